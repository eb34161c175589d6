// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory of a device: registers, and message queues in PCI memory.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::QueueMemory;

/// A piece of device memory, of known length: only ever touched by aligned
/// volatile accesses of 1, 2, 4 or 8 bytes.
///
/// A virtual machine monitor may have to emulate each access, and knows only
/// plain ones; and the widths matter to registers. Words are little-endian in
/// the region and native in the arguments.
#[derive(Clone, Copy)]
pub struct DeviceRegion<'m> {
    ptr: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m ()>,
}

// SAFETY: a bounded pointer to memory that others access anyway; every access is a single
// volatile load or store of natural size, from any thread.
unsafe impl Send for DeviceRegion<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for DeviceRegion<'_> {}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $bytes:literal) => {
        #[doc = concat!("Loads ", $bytes, " at `offset`, a multiple of that; `None` outside or misaligned.")]
        #[inline]
        pub fn $read(&self, offset: usize) -> Option<$type> {
            let word = self.word::<$type>(offset)?;
            // SAFETY: inside the region, aligned, readable by the constructor's promise.
            Some(<$type>::from_le(unsafe { word.read_volatile() }))
        }

        #[doc = concat!("Stores ", $bytes, " at `offset`, a multiple of that; false outside or misaligned.")]
        #[inline]
        #[must_use = "false means that nothing was stored"]
        pub fn $write(&self, offset: usize, value: $type) -> bool {
            let Some(word) = self.word::<$type>(offset) else {
                return false;
            };
            // SAFETY: inside the region, aligned, writable by the constructor's promise.
            unsafe { word.write_volatile(value.to_le()) };
            true
        }
    };
}

impl<'m> DeviceRegion<'m> {
    /// Wraps `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// The whole range must stay mapped, readable and writable for `'m`, any
    /// load or store in it must be harmless to the memory of this process, and
    /// no Rust reference to any of it may be alive meanwhile.
    pub const unsafe fn from_raw_parts(ptr: NonNull<u8>, len: usize) -> Self {
        Self {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// Treats `words` as device memory, for tests.
    pub fn from_atomics(words: &'m [AtomicU64]) -> Self {
        let ptr = NonNull::from(words).cast::<u8>();
        // SAFETY: borrowed for 'm, and atomics may be written through a shared borrow.
        unsafe { Self::from_raw_parts(ptr, size_of_val(words)) }
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for a region of no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes from `offset`, or `None` if they are not all inside.
    pub fn get(&self, offset: usize, len: usize) -> Option<DeviceRegion<'m>> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset + len lies inside this region.
        Some(unsafe { Self::from_raw_parts(self.ptr.add(offset), len) })
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let part = self.get(offset, size_of::<T>())?;
        let word = part.ptr.cast::<T>();
        word.is_aligned().then_some(word)
    }

    access!(read_u8, write_u8, u8, "1 byte");
    access!(read_u16, write_u16, u16, "2 bytes");
    access!(read_u32, write_u32, u32, "4 bytes");
    access!(read_u64, write_u64, u64, "8 bytes");

    /// The widest access at `offset` when `left` bytes remain to be copied.
    #[inline]
    fn width(&self, offset: usize, left: usize) -> usize {
        let address = self.ptr.as_ptr().addr() + offset;
        let widest = if cfg!(target_pointer_width = "64") {
            8
        } else {
            4
        };
        let mut width = widest;
        while width > 1 && (address % width != 0 || left < width) {
            width /= 2;
        }
        width
    }

    /// Copies bytes from `offset` into `into`, in the widest accesses that are
    /// aligned; returns how many there were.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> usize {
        let n = self.len.saturating_sub(offset).min(into.len());
        let mut done = 0;
        while done < n {
            let at = offset + done;
            let width = self.width(at, n - done);
            let to = &mut into[done..done + width];
            match width {
                8 => to.copy_from_slice(&self.read_u64(at).unwrap_or(0).to_le_bytes()),
                4 => to.copy_from_slice(&self.read_u32(at).unwrap_or(0).to_le_bytes()),
                2 => to.copy_from_slice(&self.read_u16(at).unwrap_or(0).to_le_bytes()),
                _ => to.copy_from_slice(&[self.read_u8(at).unwrap_or(0)]),
            }
            done += width;
        }
        n
    }

    /// Copies `from` to `offset`, in the widest accesses that are aligned;
    /// returns how many bytes fitted.
    pub fn write(&self, offset: usize, from: &[u8]) -> usize {
        let n = self.len.saturating_sub(offset).min(from.len());
        let mut done = 0;
        while done < n {
            let at = offset + done;
            let width = self.width(at, n - done);
            let bytes = &from[done..done + width];
            let stored = match *bytes {
                [a, b, c, d, e, f, g, h] => {
                    self.write_u64(at, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
                }
                [a, b, c, d] => self.write_u32(at, u32::from_le_bytes([a, b, c, d])),
                [a, b] => self.write_u16(at, u16::from_le_bytes([a, b])),
                _ => self.write_u8(at, bytes[0]),
            };
            debug_assert!(stored);
            done += width;
        }
        n
    }
}

/// A fence between accesses to memory of devices, and between these and accesses to ordinary memory.
#[inline]
pub(crate) fn device_fence(order: Ordering) {
    fence(order);
    // On arm64 that stops at the inner shareable domain, and devices, with whoever is behind them, are outside of it.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: barriers change nothing.
    unsafe {
        if matches!(order, Ordering::Acquire) {
            core::arch::asm!("dmb oshld", options(nostack, preserves_flags));
        } else {
            core::arch::asm!("dmb osh", options(nostack, preserves_flags));
        }
    }
}

/// Device memory has no atomic exchange: [`QueueMemory::take`] loads and stores.
impl QueueMemory for DeviceRegion<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn is_aligned(&self) -> bool {
        self.ptr.cast::<u32>().is_aligned()
    }

    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.read_u32(offset).unwrap_or(0)
    }

    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        let value = self.load_relaxed(offset);
        device_fence(Ordering::Acquire);
        value
    }

    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        // Outside, nothing is stored, as promised.
        let _ = self.write_u32(offset, value);
    }

    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        device_fence(Ordering::Release);
        self.store_relaxed(offset, value);
    }

    fn take(&self, offset: usize) -> bool {
        let set = self.load_relaxed(offset) != 0;
        if set {
            self.store_relaxed(offset, 0);
        }
        set
    }

    fn fence(&self) {
        device_fence(Ordering::SeqCst);
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        DeviceRegion::read(self, offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        DeviceRegion::write(self, offset, from);
    }
}

impl fmt::Debug for DeviceRegion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Loading from a register may have effects: show where, not what.
        write!(f, "DeviceRegion({:p}+{})", self.ptr, self.len)
    }
}

#[cfg(test)]
#[path = "device_region_test.rs"]
mod tests;
