// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Programs of Debian packages that are used without being installed: unpacked into the cache folder with all they
//! depend on, and run by the dynamic loader that came with them. So a machine with one release can run QEMU of a later
//! one, and a guest can have `ethtool` and `iperf3` beside its busybox.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use goblin::elf::Elf;

use crate::cpio::Cpio;
use crate::debian::{Debian, PrivateApt, Release};
use crate::dirs;
use crate::machine::Machine;

/// Packages to be unpacked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Name of the folder in the cache, after release and architecture.
    name: &'static str,
    release: Release,
    packages: &'static [&'static str],
    arch: &'static str,
    /// Without what the packages depend on.
    alone: bool,
    megabytes: u32,
}

/// QEMU 11.1 or later for this machine's processor: the first with a generic vhost-user device, and with vfio-user.
pub(crate) fn new_qemu() -> Spec {
    Spec {
        name: "qemu",
        release: Release::TrixieBackports,
        packages: &["qemu-system-x86", "qemu-system-arm"],
        arch: host_arch(),
        alone: false,
        megabytes: 240,
    }
}

/// What guests of `machine` have beside busybox. Also run on the host.
pub(crate) fn net_tools(machine: Machine) -> Spec {
    Spec {
        name: "net-tools",
        release: Release::Own,
        packages: &["ethtool", "iperf3", "iproute2"],
        arch: machine.debian_arch(),
        alone: false,
        megabytes: 120,
    }
}

/// What guests of `machine` look at their PCI devices with.
pub(crate) fn pci_tools(machine: Machine) -> Spec {
    Spec {
        name: "pci-tools",
        release: Release::Own,
        packages: &["pciutils"],
        arch: machine.debian_arch(),
        alone: false,
        megabytes: 30,
    }
}

/// The root file system of guests of `machine` that boot from a disk: what looks at disks and makes file systems, with
/// all that it needs.
pub(crate) fn disk_root(machine: Machine) -> Spec {
    Spec {
        name: "disk-root",
        release: Release::Own,
        packages: &["dash", "e2fsprogs", "mount", "util-linux"],
        arch: machine.debian_arch(),
        alone: false,
        megabytes: 40,
    }
}

/// The root file system of guests of `machine` that boot from a disk as people's machines do.
pub(crate) fn whole_root(machine: Machine) -> Spec {
    Spec {
        name: "whole-root",
        release: Release::Own,
        packages: &[
            "base-files",
            "base-passwd",
            "bash",
            "coreutils",
            "dbus",
            "e2fsprogs",
            "findutils",
            "gawk",
            "grep",
            "iproute2",
            "iputils-ping",
            "kmod",
            "libpam-runtime",
            "libpam-modules",
            "login",
            "mount",
            "passwd",
            "procps",
            "sed",
            "systemd-sysv",
            "udev",
            "util-linux",
            "wget",
        ],
        arch: machine.debian_arch(),
        alone: false,
        megabytes: 200,
    }
}

/// A daemon that shares folders over vhost-user: the one in Rust, for this machine.
pub(crate) fn virtiofsd() -> Spec {
    Spec {
        name: "virtiofsd",
        release: Release::TrixieBackports,
        packages: &["virtiofsd"],
        arch: host_arch(),
        alone: false,
        megabytes: 30,
    }
}

/// QEMU for guests inside of guests of `machine`.
pub(crate) fn inner_qemu(machine: Machine) -> Spec {
    Spec {
        name: "inner-qemu",
        release: Release::Own,
        packages: match machine {
            Machine::X86 => &["qemu-system-x86"],
            Machine::Arm64 => &["qemu-system-arm"],
        },
        arch: machine.debian_arch(),
        alone: false,
        megabytes: 180,
    }
}

/// The version of gcc whose run-time library [`c_library`] has.
pub(crate) const LIBGCC: &str = "14";

/// What static programs for `machine` are linked with: the C library and gcc's.
pub(crate) fn c_library(machine: Machine) -> Spec {
    Spec {
        name: "c-library",
        release: Release::TrixieBackports,
        packages: &["libc6-dev", "libgcc-14-dev"],
        arch: machine.debian_arch(),
        alone: true,
        megabytes: 30,
    }
}

/// [`net_tools`] for this machine.
pub(crate) fn host_net_tools() -> Spec {
    Spec {
        arch: host_arch(),
        ..net_tools(Machine::X86)
    }
}

/// Debian's name of the architecture this program runs on.
fn host_arch() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

/// An unpacked tree.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Spec {
    fn folder(&self, cache: &Path, debian: &Debian) -> PathBuf {
        let release = self.release.name(debian);
        cache.join(format!("{release}-{}-{}", self.arch, self.name))
    }

    /// Whether it is in the cache.
    pub(crate) fn is_fetched(&self, cache: &Path, debian: &Debian) -> bool {
        self.folder(cache, debian).is_dir()
    }

    /// What it is, for people.
    pub(crate) fn what(&self) -> String {
        let release = match self.release {
            Release::Own => "this Debian",
            Release::TrixieBackports => "Debian 13 and its backports",
        };
        format!("{} for {} of {release}", self.packages(), self.arch)
    }

    /// What it takes in the cache, roughly.
    pub(crate) fn megabytes(&self) -> u32 {
        self.megabytes
    }

    /// The names of the packages, for people.
    fn packages(&self) -> String {
        self.packages.join(", ")
    }

    /// The tree, fetched if it is not in the cache.
    ///
    /// # Errors
    /// Not on Debian; no package of this name; no network.
    pub(crate) fn fetch(&self) -> Result<Tree> {
        let names = self.packages();
        let debian = Debian::here().with_context(|| {
            format!("{names}: only on Debian are these fetched; this machine is something else")
        })?;
        let cache = dirs::cache()?;
        let root = self.folder(&cache, &debian);
        if !root.is_dir() {
            println!(
                "      fetching {names} ({}) into {}",
                self.arch,
                root.display()
            );
            let dir = tempfile::tempdir_in(&cache)?;
            let ready = tempfile::tempdir_in(&cache)?;
            let apt = PrivateApt::new(dir.path(), &debian, self.release, self.arch)?;
            if self.alone {
                apt.unpack_alone(self.packages, ready.path())?;
            } else {
                apt.unpack_all(self.packages, ready.path())?;
            }
            fs::set_permissions(ready.path(), fs::Permissions::from_mode(0o755))?;
            // Whole, by a rename, or not at all; another run may have been first.
            if let Err(error) = fs::rename(ready.path(), &root)
                && !root.is_dir()
            {
                return Err(error).with_context(|| format!("cannot create {}", root.display()));
            }
        }
        Ok(Tree { root })
    }
}

impl Tree {
    /// The folder that would be `/`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The path of `program` in the tree.
    pub(crate) fn program(&self, program: &str) -> Result<PathBuf> {
        ["usr/bin", "usr/sbin", "bin", "sbin", "usr/libexec"]
            .iter()
            .map(|dir| self.root.join(dir).join(program))
            .find(|path| path.is_file())
            .with_context(|| format!("no {program} in {}", self.root.display()))
    }

    /// A folder of data files, such as `share/qemu`.
    pub(crate) fn data(&self, path: &str) -> PathBuf {
        self.root.join("usr").join(path)
    }

    /// A command that runs `program` with the libraries of the tree.
    pub(crate) fn command(&self, program: &str) -> Result<Command> {
        let path = self.program(program)?;
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let elf =
            Elf::parse(&bytes).with_context(|| format!("{} is no program", path.display()))?;
        let Some(loader) = elf.interpreter else {
            return Ok(Command::new(path));
        };
        let mut command = Command::new(self.find(loader)?);
        command
            .arg("--library-path")
            .arg(
                self.library_dirs()
                    .map(|d| d.display().to_string())
                    .collect::<Vec<_>>()
                    .join(":"),
            )
            .arg(path);
        Ok(command)
    }

    /// Puts `program` and the libraries it needs into a guest's file system.
    pub(crate) fn add_to(&self, cpio: &mut Files, program: &str) -> Result<()> {
        let path = self.program(program)?;
        let mut waiting = vec![(format!("bin/{program}"), path)];
        while let Some((name, path)) = waiting.pop() {
            if !cpio.names.insert(name.clone()) {
                continue;
            }
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let elf =
                Elf::parse(&bytes).with_context(|| format!("{} is no ELF file", path.display()))?;
            if let Some(loader) = elf.interpreter {
                let loader = loader.trim_start_matches('/').to_owned();
                waiting.push((loader.clone(), self.find(&loader)?));
            }
            for library in &elf.libraries {
                waiting.push((
                    format!("lib/{library}"),
                    self.find(&format!("lib/{library}"))?,
                ));
            }
            cpio.files.push((name, bytes));
        }
        Ok(())
    }

    fn library_dirs(&self) -> impl Iterator<Item = PathBuf> + '_ {
        [
            "usr/lib/x86_64-linux-gnu",
            "usr/lib/aarch64-linux-gnu",
            "usr/lib",
            "usr/lib64",
            "lib/x86_64-linux-gnu",
            "lib/aarch64-linux-gnu",
            "lib",
            "lib64",
        ]
        .into_iter()
        .map(|dir| self.root.join(dir))
        .filter(|dir| dir.is_dir())
    }

    /// A library or loader by the last part of its path: the distribution moves `/lib` below `/usr`.
    fn find(&self, path: &str) -> Result<PathBuf> {
        let name = Path::new(path)
            .file_name()
            .with_context(|| format!("{path} names no file"))?;
        let Some(found) = self
            .library_dirs()
            .map(|d| d.join(name))
            .find(|f| f.is_file())
        else {
            bail!("no {path} in {}", self.root.display());
        };
        Ok(found)
    }
}

/// Files for a guest, each once.
#[derive(Debug, Default)]
pub(crate) struct Files {
    names: BTreeSet<String>,
    files: Vec<(String, Vec<u8>)>,
}

impl Files {
    /// Writes them and the folders they lie in, without those in `known`.
    pub(crate) fn write(&self, cpio: &mut Cpio, known: &[&str]) {
        let mut dirs: BTreeSet<&Path> = BTreeSet::new();
        for (name, _) in &self.files {
            dirs.extend(Path::new(name).ancestors().skip(1));
        }
        for dir in dirs.iter().filter_map(|d| d.to_str()) {
            if !dir.is_empty() && !known.contains(&dir) {
                cpio.directory(dir);
            }
        }
        for (name, bytes) in &self.files {
            cpio.file(name, 0o755, bytes);
        }
    }
}

#[cfg(test)]
#[path = "tree_test.rs"]
mod tests;
