// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a Debian machine gives: packages for the system, and a private apt for packages of any architecture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::sources::Sources;

/// Which packages a private apt sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Release {
    /// Those of the release that this machine has.
    Own,
    /// Those of Debian 13 with its backports preferred, from the same archive.
    TrixieBackports,
}

impl Release {
    /// The name in the cache.
    pub(crate) fn name(self, debian: &Debian) -> &str {
        match self {
            Self::Own => &debian.codename,
            Self::TrixieBackports => "trixie-backports",
        }
    }
}

/// A Debian machine.
#[derive(Debug, Clone)]
pub(crate) struct Debian {
    /// The release's name, as `bookworm`.
    pub(crate) codename: String,
}

impl Debian {
    /// The Debian machine we are on, if it is one. Derived distributions have other archives and do not count.
    pub(crate) fn here() -> Option<Self> {
        Self::from_os_release(&fs::read_to_string("/etc/os-release").ok()?)
    }

    fn from_os_release(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
                .map(|v| v.trim_matches(['"', '\'']).to_owned())
        };
        (field("ID")? == "debian").then_some(())?;
        Some(Self {
            codename: field("VERSION_CODENAME").unwrap_or_else(|| "sid".to_owned()),
        })
    }
}

/// Installs packages on this machine with `apt-get`, through `sudo` if we are not root.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let apt = |arguments: &[&str]| -> Result<()> {
        let mut command = if root {
            Command::new("apt-get")
        } else {
            Command::new("sudo")
        };
        if !root {
            command.args(["--", "apt-get"]);
        }
        command.args(["-q", "-y"]).args(arguments);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null());
        let by_hand = format!("apt-get install {}", packages.join(" "));
        let status = command.status().with_context(|| {
            format!(
                "cannot run {:?}; install by hand, as root: {by_hand}",
                command.get_program()
            )
        })?;
        if !status.success() {
            bail!(
                "`apt-get {}` failed ({status}); install by hand, as root: {by_hand}",
                arguments.join(" ")
            );
        }
        Ok(())
    };
    apt(&["update"])?;
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend(packages);
    apt(&arguments)
}

/// An apt whose state, lists and cache lie in a folder of our own and which believes to run on `architecture`. The
/// system's apt knows nothing of it: no foreign architecture is added, nothing is installed.
#[derive(Debug)]
pub(crate) struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    /// Sets it up in `dir` and fetches the package lists of `release`.
    pub(crate) fn new(
        dir: &Path,
        debian: &Debian,
        release: Release,
        architecture: &str,
    ) -> Result<Self> {
        let mut sources = Sources::read(Path::new("/etc/apt"), &debian.codename)?;
        if release == Release::TrixieBackports {
            sources = sources.of_trixie_with_backports();
        }
        if sources.is_empty() {
            bail!(
                "no apt source of the Debian archive for {} in /etc/apt: add one, or name a kernel with --kernel and a \
                 static busybox with --busybox",
                debian.codename
            );
        }
        let root = dir.display();
        for sub in [
            "state/lists/partial",
            "cache/archives/partial",
            "sources.d",
            "preferences.d",
        ] {
            fs::create_dir_all(dir.join(sub))
                .with_context(|| format!("cannot create {root}/{sub}"))?;
        }
        let preferred = match release {
            Release::Own => "",
            Release::TrixieBackports => "APT::Default-Release \"trixie-backports\";\n",
        };
        // The system's configuration stays in force (proxies, keys); hooks on its package cache are dropped.
        let config = format!(
            "Dir::State \"{root}/state\";\n\
             Dir::State::lists \"{root}/state/lists\";\n\
             Dir::State::status \"{root}/status\";\n\
             Dir::State::extended_states \"{root}/extended_states\";\n\
             Dir::Cache \"{root}/cache\";\n\
             Dir::Cache::archives \"{root}/cache/archives\";\n\
             Dir::Etc::sourcelist \"{root}/sources.list\";\n\
             Dir::Etc::sourceparts \"{root}/sources.d\";\n\
             Dir::Etc::preferences \"{root}/preferences\";\n\
             Dir::Etc::preferencesparts \"{root}/preferences.d\";\n\
             Dir::Log \"{root}\";\n\
             APT::Architecture \"{architecture}\";\n\
             #clear APT::Architectures;\n\
             APT::Architectures {{ \"{architecture}\"; }};\n\
             #clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear APT::NeverAutoRemove;\n\
             APT::Sandbox::User \"root\";\n\
             {preferred}\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled \"false\";\n",
        );
        for (name, text) in [
            ("apt.conf", config.as_str()),
            ("sources.list", &sources.list),
            ("sources.d/debian.sources", &sources.stanzas),
            ("status", ""),
        ] {
            fs::write(dir.join(name), text)
                .with_context(|| format!("cannot write {root}/{name}"))?;
        }
        let apt = Self {
            dir: dir.to_owned(),
        };
        apt.run("apt-get", &["update"])
            .context("cannot fetch the package lists; is this machine online?")?;
        Ok(apt)
    }

    /// Fetches `package` and the kernel packages it leads to, and unpacks them all into `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let mut names = vec![package.to_owned()];
        let mut next = 0;
        while next < names.len() {
            for name in self.kernel_dependencies(&names[next])? {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            next += 1;
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.unpack_alone(&names, into)
    }

    /// Fetches `packages` without what they depend on, and unpacks them into `into`. A name may have a version or a
    /// pattern of one behind `=`.
    pub(crate) fn unpack_alone(&self, packages: &[&str], into: &Path) -> Result<()> {
        let debs = tempfile::tempdir_in(&self.dir)?;
        let config = self.dir.join("apt.conf");
        let names = packages.join(", ");
        let mut command = Command::new("apt-get");
        command
            .arg("-c")
            .arg(&config)
            .args(["-q", "download"])
            .args(packages)
            .current_dir(debs.path());
        finish(command).with_context(|| format!("cannot fetch the Debian packages {names}"))?;
        for entry in fs::read_dir(debs.path())? {
            let mut command = Command::new("dpkg-deb");
            command.arg("-x").arg(entry?.path()).arg(into);
            finish(command).with_context(|| format!("cannot unpack {names}"))?;
        }
        Ok(())
    }

    /// Fetches `packages` with all that they depend on, down to the C library, and unpacks them into `into`.
    pub(crate) fn unpack_all(&self, packages: &[&str], into: &Path) -> Result<()> {
        let mut arguments = vec![
            "-y",
            "--no-install-recommends",
            "--download-only",
            "install",
        ];
        arguments.extend(packages);
        let names = packages.join(", ");
        self.run("apt-get", &arguments)
            .with_context(|| format!("cannot fetch the Debian packages {names}"))?;
        let debs = self.dir.join("cache/archives");
        for entry in fs::read_dir(&debs)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                let mut command = Command::new("dpkg-deb");
                command.arg("-x").arg(&path).arg(into);
                finish(command).with_context(|| format!("cannot unpack {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// The packages `package` depends on that carry a kernel: a metapackage names the concrete one, newer releases
    /// keep modules in a package of their own.
    fn kernel_dependencies(&self, package: &str) -> Result<Vec<String>> {
        let shown = self.run("apt-cache", &["show", "--no-all-versions", package])?;
        Ok(shown
            .lines()
            .filter_map(|l| l.strip_prefix("Depends:"))
            .flat_map(kernel_packages)
            .collect())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.dir.join("apt.conf"))
            .arg("-q")
            .args(arguments);
        finish(command)
    }
}

/// The names in a `Depends` field that are packages with a kernel or its modules.
fn kernel_packages(depends: &str) -> Vec<String> {
    depends
        .split([',', '|'])
        .filter_map(|d| d.split_whitespace().next())
        .filter(|d| {
            // The last one has the list of what is built in.
            [
                "linux-image-",
                "linux-modules-",
                "linux-binary-",
                "linux-base-",
            ]
            .iter()
            .any(|p| d.starts_with(p))
        })
        .map(str::to_owned)
        .collect()
}

/// Runs a command to its end and gives its output; a failure carries what it said.
fn finish(mut command: Command) -> Result<String> {
    command
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
#[path = "debian_test.rs"]
mod tests;
