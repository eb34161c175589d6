// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels and busybox, from the Debian archive into the cache.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Options, in_path, is_static};
use crate::debian::{Debian, PrivateApt, Release};
use crate::machine::Machine;

/// A part that can be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Kernel,
    Busybox,
}

impl Part {
    pub(super) const ALL: [Self; 2] = [Self::Kernel, Self::Busybox];

    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Busybox => "busybox",
        }
    }

    /// The main file's name in its cache folder.
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Kernel => "vmlinuz",
            Self::Busybox => "busybox",
        }
    }

    /// The file the user named, or one that lies ready on a machine that is not Debian.
    pub(super) fn given(
        self,
        machine: Machine,
        options: &Options,
        debian: Option<&Debian>,
    ) -> Option<PathBuf> {
        match self {
            Self::Kernel => options.kernel.clone(),
            Self::Busybox => options.busybox.clone().or_else(|| {
                let found = if debian.is_none() {
                    in_path("busybox")
                } else {
                    None
                };
                found.filter(|f| fs::read(f).is_ok_and(|elf| is_static(&elf, machine)))
            }),
        }
    }
}

/// A part to be fetched for a machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    pub(super) machine: Machine,
    pub(super) part: Part,
    pub(super) release: Release,
}

impl Fetch {
    /// From the release that this machine has, unless something newer is wanted.
    pub(super) fn wanted(machine: Machine, part: Part, options: &Options) -> Self {
        Self {
            machine,
            part,
            release: match part {
                Part::Kernel if options.new_kernel => Release::TrixieBackports,
                _ => Release::Own,
            },
        }
    }

    /// The folder in the cache. It appears whole, by a rename, or not at all.
    pub(super) fn folder(self, cache: &Path, debian: Option<&Debian>) -> PathBuf {
        let release = debian.map_or("other", |d| self.release.name(d));
        cache.join(format!(
            "{release}-{}-{}",
            self.machine.debian_arch(),
            self.part.what()
        ))
    }

    pub(super) fn unpack(self, apt: &PrivateApt, cache: &Path, debian: &Debian) -> Result<()> {
        let arch = self.machine.debian_arch();
        let raw = tempfile::tempdir_in(cache)?;
        let ready = tempfile::tempdir_in(cache)?;
        match self.part {
            Part::Kernel => {
                // The cloud flavour is a third of the size, with all of virtio; not every release has it.
                apt.unpack(&format!("linux-image-cloud-{arch}"), raw.path())
                    .or_else(|_| apt.unpack(&format!("linux-image-{arch}"), raw.path()))?;
                let modules = ["lib/modules", "usr/lib/modules"].map(|m| raw.path().join(m));
                let modules = modules
                    .iter()
                    .find_map(|m| find_one(m, "").ok())
                    .context("a kernel package without modules")?;
                let version = modules.file_name().and_then(|n| n.to_str());
                let version = version.context("a kernel package without a version")?;
                // Newer packages have the image beside the modules.
                let image = find_one(&raw.path().join("boot"), "vmlinuz-")
                    .or_else(|_| find_one(&modules, "vmlinuz"))?;
                fs::rename(&image, ready.path().join(self.part.file()))?;
                fs::write(ready.path().join("version"), version)?;
                fs::rename(&modules, ready.path().join("modules"))?;
            }
            Part::Busybox => {
                apt.unpack("busybox-static", raw.path())?;
                let places = ["bin/busybox", "usr/bin/busybox"].map(|p| raw.path().join(p));
                let busybox = places
                    .iter()
                    .find(|p| p.is_file())
                    .context("busybox-static without a busybox")?;
                fs::rename(busybox, ready.path().join(self.part.file()))?;
            }
        }
        fs::set_permissions(ready.path(), fs::Permissions::from_mode(0o755))?;
        let folder = self.folder(cache, Some(debian));
        if let Err(error) = fs::rename(ready.path(), &folder)
            && !folder.is_dir()
        {
            return Err(error).with_context(|| format!("cannot create {}", folder.display()));
        }
        Ok(())
    }
}

pub(super) fn fetch_all(fetches: &[Fetch], cache: &Path, debian: &Debian) -> Result<()> {
    for machine in Machine::ALL {
        for release in [Release::Own, Release::TrixieBackports] {
            let mine: Vec<&Fetch> = fetches
                .iter()
                .filter(|f| (f.machine, f.release) == (machine, release))
                .collect();
            if mine.is_empty() {
                continue;
            }
            let dir = tempfile::tempdir_in(cache)?;
            let arch = machine.debian_arch();
            let apt = PrivateApt::new(dir.path(), debian, release, arch)?;
            for fetch in mine {
                fetch.unpack(&apt, cache, debian)?;
            }
        }
    }
    Ok(())
}

/// The only file in `dir` whose name begins with `prefix`.
pub(super) fn find_one(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    entries
        .flatten()
        .map(|e| e.path())
        .find(|p| {
            p.file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| n.starts_with(prefix))
        })
        .with_context(|| format!("no {prefix}* in {}", dir.display()))
}
