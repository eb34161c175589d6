// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of devices, mapped into this process.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

use crate::{Access, DeviceRegion, Error, Mapping, QueueMemory};

/// Memory of a device, mapped until this is dropped: registers, or PCI memory.
///
/// On arm64 such memory faults at accesses that are not aligned, and a virtual machine monitor
/// may have to emulate each one. So all that comes out of it is a [`DeviceRegion`].
///
/// A device that is taken away leaves zeroes behind ([`fault`](crate::fault)), see
/// [`Self::is_lost`].
#[derive(Debug)]
pub struct DeviceMapping(Mapping);

impl DeviceMapping {
    /// Maps `len` bytes of a device's file from `offset` on. Neither needs to be a multiple of the
    /// page size: a BAR smaller than a page lies somewhere in one. The file is not asked for its
    /// length, which device files do not tell.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] if `len` is zero or the file cannot be mapped.
    pub fn of_fd(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, Error> {
        Mapping::of_device(fd, offset, len, Access::ReadWrite).map(Self)
    }

    /// As [`Mapping::keeping`].
    #[must_use]
    pub fn keeping<T>(self, keeper: Arc<T>) -> Self
    where
        T: Send + Sync + UnwindSafe + RefUnwindSafe + 'static,
    {
        Self(self.0.keeping(keeper))
    }

    /// The memory.
    #[inline]
    pub fn region(&self) -> DeviceRegion<'_> {
        self.0.device_region()
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// True for no bytes, which never is mapped.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True once some of the memory was found to be gone and was replaced by private zeroes.
    pub fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}

/// What a [`DeviceSlice`] is a part of.
#[derive(Clone)]
enum Whole {
    Device(Arc<DeviceMapping>),
    Ram(Arc<Mapping>),
}

/// A part of a [`DeviceMapping`], or of a [`Mapping`] that is to be treated like one, that keeps it
/// mapped.
#[derive(Clone)]
pub struct DeviceSlice {
    whole: Whole,
    offset: usize,
    len: usize,
}

impl DeviceSlice {
    /// `len` bytes of `mapping` from `offset`; `None` if they are not all inside.
    pub fn new(mapping: Arc<DeviceMapping>, offset: usize, len: usize) -> Option<Self> {
        mapping.region().get(offset, len)?;
        let whole = Whole::Device(mapping);
        Some(Self { whole, offset, len })
    }

    /// `len` bytes of ordinary memory from `offset`, which is not read-only; `None` otherwise.
    pub fn of_ram(mapping: Arc<Mapping>, offset: usize, len: usize) -> Option<Self> {
        if mapping.access() != Access::ReadWrite {
            return None;
        }
        mapping.device_region().get(offset, len)?;
        let whole = Whole::Ram(mapping);
        Some(Self { whole, offset, len })
    }

    /// The memory.
    #[inline]
    pub fn region(&self) -> DeviceRegion<'_> {
        let whole = match &self.whole {
            Whole::Device(mapping) => mapping.region(),
            Whole::Ram(mapping) => mapping.device_region(),
        };
        whole
            .get(self.offset, self.len)
            .expect("checked when the slice was made")
    }

    /// `len` bytes of this part from `offset`; `None` if they are not all inside.
    pub fn get(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        Some(Self {
            whole: self.whole.clone(),
            offset: self.offset + offset,
            len,
        })
    }

    /// True once some of the memory that this is a part of was found to be gone.
    pub fn is_lost(&self) -> bool {
        match &self.whole {
            Whole::Device(mapping) => mapping.is_lost(),
            Whole::Ram(mapping) => mapping.is_lost(),
        }
    }
}

impl fmt::Debug for DeviceSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceSlice").field(&self.region()).finish()
    }
}

/// As for [`DeviceRegion`].
impl QueueMemory for DeviceSlice {
    #[inline]
    fn len(&self) -> usize {
        self.len
    }
    fn is_aligned(&self) -> bool {
        self.region().is_aligned()
    }
    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.region().load_relaxed(offset)
    }
    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        self.region().load_acquire(offset)
    }
    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        self.region().store_relaxed(offset, value);
    }
    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        self.region().store_release(offset, value);
    }
    #[inline]
    fn take(&self, offset: usize) -> bool {
        self.region().take(offset)
    }
    #[inline]
    fn fence(&self) {
        self.region().fence();
    }
    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.region().read(offset, into);
    }
    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        self.region().write(offset, from);
    }
}

#[cfg(test)]
#[path = "device_mapping_test.rs"]
mod tests;
