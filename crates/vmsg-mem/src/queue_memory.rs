// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a message queue needs of the memory it lies in.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use crate::RamSlice;

/// Memory that holds a message queue: words of 32 bits for indices and flags,
/// bytes for messages.
///
/// Words are little-endian in memory and native in the arguments. Offsets are
/// in bytes from the beginning; those of words are multiples of 4. The queue
/// keeps to `len`; an implementation that is given an offset outside reads 0
/// and writes nothing.
///
/// The orderings are those of `core::sync::atomic`.
pub trait QueueMemory {
    /// Size in bytes.
    fn len(&self) -> usize;

    /// True if there is no memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if words can be accessed as such: the memory begins at a multiple of 4 bytes.
    fn is_aligned(&self) -> bool;

    /// Loads a word; relaxed.
    fn load_relaxed(&self, offset: usize) -> u32;

    /// Loads a word; acquire.
    fn load_acquire(&self, offset: usize) -> u32;

    /// Stores a word; relaxed.
    fn store_relaxed(&self, offset: usize, value: u32);

    /// Stores a word; release.
    fn store_release(&self, offset: usize, value: u32);

    /// Zeroes a word, unless it is zero; true if it was not. Relaxed. Never
    /// writes over a word that is zero. Memory that has no atomic exchange may
    /// load and store: two takers of a flag then may both see it set, but none
    /// is lost.
    fn take(&self, offset: usize) -> bool;

    /// A sequentially consistent fence.
    fn fence(&self);

    /// Says that the bytes at `offset` will soon be read.
    #[inline]
    fn prefetch(&self, offset: usize) {
        let _ = offset;
    }

    /// Says that the bytes at `offset`, just written, will next be read by another CPU.
    #[inline]
    fn demote(&self, offset: usize) {
        let _ = offset;
    }

    /// Copies bytes out. They may change while this happens.
    fn read(&self, offset: usize, into: &mut [u8]);

    /// Copies bytes in.
    fn write(&self, offset: usize, from: &[u8]);
}

impl QueueMemory for RamSlice<'_> {
    #[inline]
    fn len(&self) -> usize {
        RamSlice::len(self)
    }

    fn is_aligned(&self) -> bool {
        self.as_ptr().cast::<AtomicU32>().is_aligned()
    }

    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.atomic_u32(offset)
            .map_or(0, |word| u32::from_le(word.load(Ordering::Relaxed)))
    }

    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        self.atomic_u32(offset)
            .map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        if let Some(word) = self.atomic_u32(offset) {
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        if let Some(word) = self.atomic_u32(offset) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    #[inline]
    fn take(&self, offset: usize) -> bool {
        self.atomic_u32(offset).is_some_and(|word| {
            let value = word.load(Ordering::Relaxed);
            value != 0
                && word
                    .compare_exchange(value, 0, Ordering::Relaxed, Ordering::Relaxed)
                    .is_ok()
        })
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn prefetch(&self, offset: usize) {
        #[cfg(all(target_arch = "x86_64", target_feature = "sse"))]
        if offset < RamSlice::len(self) {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: inside the slice; and a prefetch never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.as_ptr().add(offset).cast()) };
        }
        #[cfg(not(all(target_arch = "x86_64", target_feature = "sse")))]
        let _ = offset;
    }

    #[inline]
    fn demote(&self, offset: usize) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if offset < RamSlice::len(self) {
            // SAFETY: CLDEMOTE only moves a cache line that the slice has a byte of, never faults,
            // and does nothing where the CPU does not know it (Intel SDM, volume 2).
            unsafe {
                core::arch::asm!(
                    "cldemote [{}]",
                    in(reg) self.as_ptr().add(offset),
                    options(nostack, preserves_flags),
                );
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = offset;
    }

    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        // A copy of known size is a few vector moves; one of any size is a call.
        if let Some(slot) = into.first_chunk_mut::<64>() {
            RamSlice::read(self, offset, slot);
            if into.len() == 64 {
                return;
            }
        }
        RamSlice::read(self, offset, into);
    }

    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        if let Some(slot) = from.first_chunk::<64>() {
            RamSlice::write(self, offset, slot);
            if from.len() == 64 {
                return;
            }
        }
        RamSlice::write(self, offset, from);
    }
}
