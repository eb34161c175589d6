// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function taken by VFIO: container, group and device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::EventfdFlags;
use rustix::io::Errno;
use vmsg_mem::DeviceMapping;

use super::function::{BUS_MASTER, COMMAND, MEMORY};
use super::ioctl::{self, Iommu, Region};
use super::registers::{self, Registers};
use super::{Error, Function, bind};
use crate::memory::Memory;

/// A function that nobody else can take until this is dropped.
#[derive(Debug)]
pub(crate) struct Opened {
    function: Function,
    /// Dropped first: the group can only be left when its devices are closed.
    device: OwnedFd,
    _group: File,
    _container: File,
}

impl Opened {
    /// Takes a function, and has its memory answer.
    pub(super) fn new(function: &Function) -> Result<Self, Error> {
        if function.driver() != Some("vfio-pci") {
            return Err(Error::NotBound {
                address: function.address(),
                driver: function.driver().map(Into::into),
            });
        }
        let number = function.group().ok_or(Error::NoGroup(function.address()))?;
        let dir = function.tree().dev.join("vfio");
        let container = open_container(&dir.join("vfio"))?;
        let (group, no_iommu) = open_group(&dir, number)?;
        let viable = ioctl::is_viable(&group).map_err(|error| Error::io("ask VFIO", error))?;
        if !viable {
            let others = bind::others(function).join(", ");
            let group = number;
            return Err(Error::NotViable { group, others });
        }
        ioctl::set_container(&group, &container)
            .map_err(|error| Error::io("put a group into a container of VFIO", error))?;
        let iommu = if no_iommu {
            Iommu::Unprotected
        } else if ioctl::knows(&container, Iommu::Type1v2) {
            Iommu::Type1v2
        } else if ioctl::knows(&container, Iommu::Type1) {
            Iommu::Type1
        } else {
            return Err(Error::NoModule("vfio_iommu_type1"));
        };
        ioctl::set_iommu(&container, iommu).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Error::Unsafe(number),
            _ => Error::io("choose VFIO's IOMMU", error),
        })?;
        let device = ioctl::device(&group, &function.address().to_string())
            .map_err(|error| Error::io(format!("open {} by VFIO", function.address()), error))?;
        let opened = Self {
            function: function.clone(),
            device,
            _group: group,
            _container: container,
        };
        opened.enable()?;
        Ok(opened)
    }

    /// Has the memory answer and the interrupts come.
    fn enable(&self) -> Result<(), Error> {
        let config = self.region(ioctl::CONFIG)?;
        let at = config.offset + COMMAND;
        let failed = |error: Errno| Error::io("configuration space by VFIO", error);
        let mut command = [0; 2];
        let read = rustix::io::pread(&self.device, &mut command, at).map_err(failed)?;
        let wanted = u16::from_le_bytes(command) | MEMORY | BUS_MASTER;
        let written =
            rustix::io::pwrite(&self.device, &wanted.to_le_bytes(), at).map_err(failed)?;
        if (read, written) != (2, 2) {
            return Err(failed(Errno::IO));
        }
        Ok(())
    }

    pub(super) fn device(&self) -> &OwnedFd {
        &self.device
    }

    pub(super) fn region(&self, index: u32) -> Result<Region, Error> {
        let region = ioctl::region(&self.device, index)
            .map_err(|error| Error::io(format!("region {index} by VFIO"), error))?;
        // An offset so near the end that an access to a register would wrap.
        if region.offset.checked_add(region.size).is_none() {
            return Err(Error::Unknown("regions beyond the end of files"));
        }
        Ok(region)
    }

    fn file(&self) -> Result<OwnedFd, Error> {
        let file = self.device.try_clone();
        file.map_err(|error| Error::io("one more descriptor", error))
    }

    /// The registers: mapped, unless the BAR shares its page with another one.
    pub(super) fn registers(&self) -> Result<Registers, Error> {
        let region = self.region(ioctl::BAR0)?;
        if region.size < registers::SIZE {
            return Err(Error::Odd {
                address: self.function.address(),
                what: "no registers in BAR0",
            });
        }
        if region.can_map() {
            let mapped = DeviceMapping::of_fd(self.device.as_fd(), region.offset, registers::SIZE);
            match mapped {
                Ok(bar) => return Ok(Registers::mapped(self.file()?, Arc::new(bar))),
                Err(error) => tracing::debug!(%error, "BAR0 cannot be mapped"),
            }
        }
        Ok(Registers::in_file(self.file()?, region.offset))
    }

    /// The memory, mapped by VFIO: on arm64 as that of a device.
    pub(super) fn map_memory(self: &Arc<Self>, function: &Function) -> Result<Memory, Error> {
        let region = self.region(ioctl::BAR2)?;
        let (file, keep) = (self.device.as_fd(), Some(self.clone()));
        Memory::of_pci(file, region.offset, region.size, false, keep)
            .map_err(|source| Error::map(function, "BAR2 by VFIO", source))
    }

    /// An eventfd for each vector.
    pub(super) fn interrupts(&self) -> Result<Vec<OwnedFd>, Error> {
        let failed = |error: io::Error| Error::io("interrupts by VFIO", error);
        let count = ioctl::interrupts(&self.device, ioctl::MSI_X).map_err(failed)?;
        let mut eventfds = (0..count)
            .map(|_| rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| failed(error.into()))?;
        // A machine that has fewer to spare says how many.
        while !eventfds.is_empty() {
            let Some(fewer) = ioctl::set_eventfds(&self.device, &eventfds).map_err(failed)? else {
                break;
            };
            let fewer = usize::try_from(fewer).unwrap_or(usize::MAX);
            eventfds.truncate(fewer.min(eventfds.len() - 1));
        }
        Ok(eventfds)
    }
}

fn open_container(path: &Path) -> Result<File, Error> {
    open(path)
        .map_err(|error| match error.kind() {
            // ENODEV: the module of the file is not there.
            io::ErrorKind::NotFound => Error::NoModule("vfio"),
            _ if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {
                Error::NoModule("vfio")
            }
            _ => Error::file(path.into(), error),
        })
        .and_then(|container| match ioctl::api_version(&container) {
            Ok(ioctl::API_VERSION) => Ok(container),
            Ok(_) => Err(Error::Unknown("a version that is not known here")),
            Err(error) => Err(Error::io("ask VFIO for its version", error)),
        })
}

/// The group, and whether it is one without an IOMMU.
fn open_group(dir: &Path, number: u32) -> Result<(File, bool), Error> {
    for (name, no_iommu) in [
        (number.to_string(), false),
        (format!("noiommu-{number}"), true),
    ] {
        let path: PathBuf = dir.join(name);
        match open(&path) {
            Ok(group) => return Ok((group, no_iommu)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                return Err(Error::Busy(number));
            }
            Err(error) => return Err(Error::file(path, error)),
        }
    }
    Err(Error::NoModule("vfio-pci"))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}
