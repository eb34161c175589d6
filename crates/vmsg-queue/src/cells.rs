// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs of ring words in shared memory.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use vmsg_mem::RamSlice;

/// What rings are made of.
///
/// # Safety
///
/// Implementors consist of atomics only, without padding, so that a shared
/// reference to one never claims that its contents stay the same.
pub(crate) unsafe trait Cell: Sized {}

// SAFETY: an atomic.
unsafe impl Cell for AtomicU16 {}
// SAFETY: two atomics of the same size, hence without padding.
unsafe impl Cell for [AtomicU32; 2] {}
// SAFETY: two atomics of the same size, hence without padding.
unsafe impl Cell for [AtomicU64; 2] {}

/// `count` cells from `offset` bytes into `ram` on; `None` if they are not all
/// inside or not aligned in this process.
#[inline]
pub(crate) fn cells<T: Cell>(ram: RamSlice<'_>, offset: usize, count: usize) -> Option<&[T]> {
    let part = ram.get(offset, count.checked_mul(size_of::<T>())?)?;
    let ptr = part.as_ptr().cast::<T>();
    if !ptr.is_aligned() {
        return None;
    }
    // SAFETY: `part` is a range of count * size_of::<T>() bytes that stays mapped for the lifetime
    // of the slice, aligned as just checked; any bits are a valid atomic, and atomics may change
    // and be changed behind a shared reference. Memory that is mapped read-only is only loaded.
    Some(unsafe { core::slice::from_raw_parts(ptr, count) })
}

/// Copies `N` bytes from `offset` on, each byte exactly once; `None` outside.
#[inline]
pub(crate) fn snapshot<const N: usize>(ram: RamSlice<'_>, offset: usize) -> Option<[u8; N]> {
    let part = ram.get(offset, N)?;
    // SAFETY: `part` is N mapped bytes, and an array of bytes needs no alignment. Volatile, because
    // the peer may write meanwhile and checks must see the same bytes as their users.
    Some(unsafe { part.as_ptr().cast::<[u8; N]>().read_volatile() })
}
