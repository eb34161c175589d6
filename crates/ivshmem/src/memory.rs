// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vmsg_mem::{Access, DeviceMapping, DeviceRegion, DeviceSlice, Mapping};

use crate::pci::Opened;

/// The same mapping, with its file for others that are to map it; without, if there is no descriptor left.
fn keep(mapping: Mapping, file: BorrowedFd<'_>, offset: u64) -> Mapping {
    match file.try_clone_to_owned().map(Arc::<OwnedFd>::new) {
        Ok(file) => mapping.with_file(file, offset),
        Err(_) => mapping,
    }
}

/// The memory that peers share, mapped until this is dropped.
///
/// Whatever it is to the processor, [`Self::region`] and [`Self::slice`] touch it by aligned accesses of
/// natural size alone, which any memory bears.
pub struct Memory {
    kind: Kind,
}

enum Kind {
    Ram(Arc<Mapping>),
    Device(Arc<DeviceMapping>),
}

impl Memory {
    /// Maps `len` bytes of a file on the host, from its beginning.
    ///
    /// # Errors
    ///
    /// Those of [`Mapping::of_fd`].
    pub fn of_file(file: BorrowedFd<'_>, len: u64) -> Result<Self, vmsg_mem::Error> {
        let mapping = Mapping::of_fd(file, 0, len, Access::ReadWrite)?;
        let kind = Kind::Ram(Arc::new(keep(mapping, file, 0)));
        Ok(Self { kind })
    }

    /// Maps `len` bytes of a file from `offset` on, which is PCI memory: ordinary memory to the processor if
    /// `ordinary`, or on x86, where all of it is. It does not answer any more once VFIO has closed its function.
    pub(crate) fn of_pci(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        ordinary: bool,
        function: Option<Arc<Opened>>,
    ) -> Result<Self, vmsg_mem::Error> {
        let kind = if ordinary || cfg!(any(target_arch = "x86_64", target_arch = "x86")) {
            let mut mapping = Mapping::of_fd(file, offset, len, Access::ReadWrite)?;
            if let Some(function) = function {
                mapping = mapping.keeping(function);
            } else {
                mapping = keep(mapping, file, offset);
            }
            Kind::Ram(Arc::new(mapping))
        } else {
            let mut mapping = DeviceMapping::of_fd(file, offset, len)?;
            if let Some(function) = function {
                mapping = mapping.keeping(function);
            }
            Kind::Device(Arc::new(mapping))
        };
        Ok(Self { kind })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        match &self.kind {
            Kind::Ram(mapping) => mapping.len(),
            Kind::Device(mapping) => mapping.len(),
        }
    }

    /// True for no bytes, which never is mapped.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory, by aligned accesses of natural size.
    pub fn region(&self) -> DeviceRegion<'_> {
        match &self.kind {
            Kind::Ram(mapping) => mapping.device_region(),
            Kind::Device(mapping) => mapping.region(),
        }
    }

    /// The memory, where it is ordinary memory to the processor: a file of the host, `resource2_wc` of sysfs (on
    /// arm64 Normal non-cacheable), anything on x86. `None` for Device memory on arm64.
    pub fn ram(&self) -> Option<Arc<Mapping>> {
        match &self.kind {
            Kind::Ram(mapping) => Some(mapping.clone()),
            Kind::Device(_) => None,
        }
    }

    /// `len` bytes from `offset`, as memory for a message queue; `None` if they are not all inside. They stay
    /// mapped as long as the slice lives, and so does a function that VFIO has opened.
    pub fn slice(self: &Arc<Self>, offset: usize, len: usize) -> Option<DeviceSlice> {
        match &self.kind {
            Kind::Ram(mapping) => DeviceSlice::of_ram(mapping.clone(), offset, len),
            Kind::Device(mapping) => DeviceSlice::new(mapping.clone(), offset, len),
        }
    }

    /// True once some of the memory was found to be gone: the file was truncated, or the function taken away. What
    /// is written there nobody sees.
    pub fn is_lost(&self) -> bool {
        match &self.kind {
            Kind::Ram(mapping) => mapping.is_lost(),
            Kind::Device(mapping) => mapping.is_lost(),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Ram(_) => "ordinary",
            Kind::Device(_) => "device",
        };
        write!(f, "Memory({} bytes, {kind})", self.len())
    }
}
