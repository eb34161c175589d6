// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest is made of — QEMU, a stock kernel with its modules, a static busybox — and where it comes from.
//!
//! On Debian, QEMU is installed as a package; kernel and busybox are fetched from the Debian archive by a private apt
//! into the cache folder, for any architecture, without touching the system. Elsewhere they are named by the user.

mod fetch;
mod missing;

use std::env;
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use fetch::{Fetch, Part, fetch_all};
use missing::{Missing, refuse_elsewhere};

use crate::cross;
use crate::debian::{self, Debian, Release};
use crate::dirs;
use crate::machine::Machine;
use crate::tree::{self, Spec, Tree};

/// The QEMU of guests over vfio-user.
pub(crate) const NEW_QEMU: (u32, u32) = (11, 1);

/// Where parts of a guest come from when not from Debian; options shared by all commands that boot guests.
#[derive(clap::Args, Debug, Clone, Default)]
#[group(id = "kit")]
pub(crate) struct Options {
    /// Go ahead with installing and fetching without asking
    #[arg(long)]
    pub(crate) yes: bool,
    /// Boot this kernel image instead of Debian's
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Modules that go with --kernel: a folder as /lib/modules/VERSION [default: beside the kernel, if it is there]
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// Put this statically linked busybox into the guest instead of Debian's
    #[arg(long, value_name = "FILE")]
    pub(crate) busybox: Option<PathBuf>,
    /// Run this QEMU instead of the one in PATH
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu: Option<PathBuf>,
    /// Run QEMU 11.1 or later, from Debian 13's backports, not installed but unpacked in the cache
    #[arg(long, conflicts_with = "qemu")]
    pub(crate) new_qemu: bool,
    /// Take the newest kernel there is for Debian 13, unless one is named
    #[arg(skip)]
    pub(crate) new_kernel: bool,
    /// What else will be wanted: it is asked for and fetched with the rest
    #[arg(skip)]
    pub(crate) more: More,
}

/// What only some guests are made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct More {
    /// Programs that are unpacked, by the machine they are for.
    pub(crate) trees: Vec<fn(Machine) -> Spec>,
    /// Programs of this machine, each with the package it is of.
    pub(crate) tools: Vec<(&'static str, &'static str)>,
    /// Programs are built for the machines.
    pub(crate) cross: bool,
    /// QEMU 11.1 or later beside the one that is there.
    pub(crate) new_qemu: bool,
    /// The newest kernel for Debian 13, beside the usual one.
    pub(crate) new_kernel: bool,
}

/// Everything a guest of one machine type is made of.
#[derive(Debug, Clone)]
pub(crate) struct Kit {
    /// The machine type.
    pub(crate) machine: Machine,
    /// The QEMU program.
    pub(crate) qemu: Qemu,
    /// The kernel image.
    pub(crate) kernel: PathBuf,
    /// The kernel's modules, a folder as `/lib/modules/VERSION`; none if all that is needed is built in.
    pub(crate) modules: Option<PathBuf>,
    /// A static busybox for the guest's architecture.
    pub(crate) busybox: PathBuf,
    /// Programs for the guest beside busybox, by the tree they come from.
    pub(crate) programs: Vec<(Tree, &'static [&'static str])>,
    /// Modules for the guest beside the usual ones; they are inserted before those.
    pub(crate) more_modules: Vec<&'static str>,
}

impl Kit {
    /// The same with the tools of network tests in the guest.
    pub(crate) fn with_tools(&self) -> Result<Self> {
        let mut kit = self.with_modules(&["8021q"]);
        let tree = tree::net_tools(self.machine).fetch()?;
        kit.programs.push((tree, &["ethtool", "iperf3", "ip"]));
        Ok(kit)
    }

    /// The same with `lspci` in the guest.
    pub(crate) fn with_lspci(&self) -> Result<Self> {
        let mut kit = self.clone();
        let tree = tree::pci_tools(self.machine).fetch()?;
        kit.programs.push((tree, &["lspci"]));
        Ok(kit)
    }

    /// The same with these modules in the guest.
    pub(crate) fn with_modules(&self, names: &[&'static str]) -> Self {
        let mut kit = self.clone();
        kit.more_modules.extend(names);
        kit
    }

    /// The same with the newest kernel there is for Debian 13, unless the user has named one.
    pub(crate) fn with_new_kernel(&self) -> Result<Self> {
        let cache = dirs::cache()?;
        if !self.kernel.starts_with(&cache) {
            return Ok(self.clone());
        }
        let debian = Debian::here().context("only on Debian is a newer kernel fetched")?;
        let fetch = Fetch {
            machine: self.machine,
            part: Part::Kernel,
            release: Release::TrixieBackports,
        };
        let folder = fetch.folder(&cache, Some(&debian));
        if !folder.is_dir() {
            println!("      fetching a kernel into {}", folder.display());
            fetch_all(&[fetch], &cache, &debian)?;
        }
        Ok(Self {
            kernel: folder.join(Part::Kernel.file()),
            modules: Some(folder.join("modules")),
            ..self.clone()
        })
    }

    /// The same with QEMU 11.1 or later, unless the user has named one that is as new.
    pub(crate) fn with_new_qemu(&self) -> Result<Self> {
        if crate::qemu::version(&self.qemu)? >= NEW_QEMU {
            return Ok(self.clone());
        }
        Ok(Self {
            qemu: Qemu::new(self.machine)?,
            ..self.clone()
        })
    }
}

/// A QEMU for one machine.
#[derive(Debug, Clone)]
pub(crate) enum Qemu {
    /// A program that is installed, or that the user has named.
    Program(PathBuf),
    /// A program of packages that are only unpacked.
    Tree(Tree, &'static str),
}

impl Qemu {
    /// QEMU 11.1 or later, fetched if it is not in the cache.
    fn new(machine: Machine) -> Result<Self> {
        Ok(Self::Tree(
            tree::new_qemu().fetch()?,
            machine.qemu_program(),
        ))
    }

    /// What is here already: the one that the user has named, or one in PATH, if it is as new as wanted.
    fn here(machine: Machine, options: &Options) -> Result<Option<Self>> {
        if let Some(named) = &options.qemu {
            let path = named
                .canonicalize()
                .with_context(|| format!("no QEMU at {}", named.display()))?;
            return Ok(Some(Self::Program(path)));
        }
        let is_new = |qemu: &Self| crate::qemu::version(qemu).is_ok_and(|v| v >= NEW_QEMU);
        let installed = in_path(machine.qemu_program()).map(Self::Program);
        Ok(installed.filter(|qemu| !options.new_qemu || is_new(qemu)))
    }

    /// A command that runs it.
    pub(crate) fn command(&self) -> Result<Command> {
        match self {
            Self::Program(path) => Ok(Command::new(path)),
            Self::Tree(tree, program) => {
                let mut command = tree.command(program)?;
                command.arg("-L").arg(tree.data("share/qemu"));
                Ok(command)
            }
        }
    }
}

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(path) => path.display().fmt(f),
            Self::Tree(tree, program) => match tree.program(program) {
                Ok(path) => path.display().fmt(f),
                Err(_) => f.write_str(program),
            },
        }
    }
}

/// Gathers a kit for each machine, asking once for all that must be installed or fetched.
pub(crate) fn gather(machines: &[Machine], options: &Options) -> Result<Vec<Kit>> {
    let debian = Debian::here();
    let cache = dirs::cache()?;
    let tools = options.more.tools.iter();
    let mut packages: Vec<&str> = tools
        .filter(|(program, _)| system_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    let mut trees = Vec::new();
    let mut fetches = Vec::new();
    for &machine in machines {
        let qemu = Qemu::here(machine, options)?;
        if qemu.is_none() && !options.new_qemu {
            packages.push(machine.qemu_package());
        }
        let is_old = |qemu: &Qemu| crate::qemu::version(qemu).is_ok_and(|v| v < NEW_QEMU);
        if qemu.is_none() && options.new_qemu
            || options.more.new_qemu && qemu.as_ref().is_none_or(is_old)
        {
            trees.push(tree::new_qemu());
        }
        trees.extend(options.more.trees.iter().map(|tree| tree(machine)));
        trees.extend(options.more.cross.then(|| tree::c_library(machine)));
        if options.more.new_kernel && options.kernel.is_none() {
            fetches.push(Fetch {
                machine,
                part: Part::Kernel,
                release: Release::TrixieBackports,
            });
        }
        fetches.extend(
            Part::ALL
                .into_iter()
                .filter(|p| p.given(machine, options, debian.as_ref()).is_none())
                .map(|part| Fetch::wanted(machine, part, options)),
        );
    }
    fetches.retain(|fetch| !fetch.folder(&cache, debian.as_ref()).is_dir());
    let Some(debian) = debian.as_ref() else {
        refuse_elsewhere(&packages, &fetches, &trees)?;
        return machines
            .iter()
            .map(|&m| kit(m, options, &cache, None))
            .collect();
    };
    let wanted = std::mem::take(&mut trees);
    for tree in wanted {
        if !trees.contains(&tree) && !tree.is_fetched(&cache, debian) {
            trees.push(tree);
        }
    }
    let libraries = match options.more.cross {
        true => cross::missing_libraries(machines)?,
        false => Vec::new(),
    };
    let missing = Missing {
        packages: &packages,
        fetches: &fetches,
        trees: &trees,
        libraries: &libraries,
    };
    missing.ask(&cache, options.yes)?;
    if !packages.is_empty() {
        debian::install(&packages)?;
    }
    fetch_all(&fetches, &cache, debian)?;
    for tree in trees {
        tree.fetch()?;
    }
    machines
        .iter()
        .map(|&m| kit(m, options, &cache, Some(debian)))
        .collect()
}

/// Asks for what is needed to build programs for `machine`, and fetches it.
pub(crate) fn gather_to_build(machine: Machine, yes: bool) -> Result<()> {
    let Some(debian) = Debian::here() else {
        // What is missing is said by who builds.
        return Ok(());
    };
    let cache = dirs::cache()?;
    let mut trees = vec![tree::c_library(machine)];
    trees.retain(|tree| !tree.is_fetched(&cache, &debian));
    let missing = Missing {
        packages: &[],
        fetches: &[],
        trees: &trees,
        libraries: &cross::missing_libraries(&[machine])?,
    };
    missing.ask(&cache, yes)
}

fn kit(machine: Machine, options: &Options, cache: &Path, debian: Option<&Debian>) -> Result<Kit> {
    let qemu = match Qemu::here(machine, options)? {
        Some(qemu) => qemu,
        None if options.new_qemu => Qemu::new(machine)?,
        None => bail!("no {} in PATH", machine.qemu_program()),
    };
    let place = |part: Part| match part.given(machine, options, debian) {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no {} at {}", part.what(), path.display())),
        None => Ok(Fetch::wanted(machine, part, options)
            .folder(cache, debian)
            .join(part.file())),
    };
    let kernel = place(Part::Kernel)?;
    let modules = match (&options.kernel, &options.modules) {
        (Some(_), Some(dir)) => Some(
            dir.canonicalize()
                .with_context(|| format!("no modules at {}", dir.display()))?,
        ),
        (Some(_), None) => modules_beside(&kernel),
        (None, _) => kernel
            .parent()
            .map(|p| p.join("modules"))
            .filter(|m| m.is_dir()),
    };
    Ok(Kit {
        machine,
        qemu,
        kernel,
        modules,
        busybox: place(Part::Busybox)?,
        programs: Vec::new(),
        more_modules: Vec::new(),
    })
}

/// Modules of a kernel that lies in a tree as the distributions lay it out: `boot/vmlinuz-V` and `lib/modules/V`.
fn modules_beside(kernel: &Path) -> Option<PathBuf> {
    let version = kernel.file_name()?.to_str()?.strip_prefix("vmlinuz-")?;
    let root = kernel.parent()?.parent()?;
    ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|m| root.join(m).join(version))
        .find(|m| m.is_dir())
}

/// The program `name` in PATH.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| {
            fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        })
}

/// The same, also where those programs are that only root has in PATH.
pub(crate) fn system_program(name: &str) -> Option<PathBuf> {
    in_path(name).or_else(|| {
        let dirs = ["/usr/sbin", "/sbin"];
        let mut files = dirs.iter().map(|dir| Path::new(dir).join(name));
        files.find(|file| file.is_file())
    })
}

/// Whether a test can use the program `name`, of the Debian package of that name.
///
/// # Errors
///
/// If it is missing and `VMSG_REQUIRE_TOOLS` is 1.
pub(crate) fn has_tool(name: &str) -> Result<bool> {
    let found = in_path(name).is_some();
    if !found && env::var_os("VMSG_REQUIRE_TOOLS").is_some_and(|value| value == "1") {
        bail!("{name} is missing: apt install {name}");
    }
    Ok(found)
}

/// Whether `elf` is a statically linked 64-bit little-endian program for `machine` (no `PT_INTERP` segment).
fn is_static(elf: &[u8], machine: Machine) -> bool {
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let segments = || {
        let header = elf.get(..6)?;
        let wanted = match machine {
            Machine::X86 => 62,
            Machine::Arm64 => 183,
        };
        if header != b"\x7fELF\x02\x01" || u16_at(18)? != wanted {
            return None;
        }
        let start = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
        let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
        (0..count)
            .map(|n| elf.get(start.checked_add(n * size)?..)?.get(..4))
            .collect::<Option<Vec<_>>>()
    };
    segments().is_some_and(|s| s.iter().all(|kind| *kind != [3, 0, 0, 0]))
}
