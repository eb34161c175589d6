// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory a message queue of ours lies in, owned together with whoever else uses it.

#[cfg(feature = "loopback")]
use std::sync::{Arc, atomic::AtomicU64};
use vmsg_mem::{QueueMemory, RamSlice};

/// A part of shared memory that keeps the whole alive.
#[derive(Clone)]
pub(crate) enum Part {
    /// Of this process alone.
    #[cfg(feature = "loopback")]
    Heap {
        words: Arc<[AtomicU64]>,
        offset: usize,
        len: usize,
    },
    /// Of a file that another process has mapped as well.
    #[cfg(feature = "unix")]
    Mapped(vmsg_mem::MappedSlice),
}

impl Part {
    #[inline]
    fn ram(&self) -> RamSlice<'_> {
        match self {
            #[cfg(feature = "loopback")]
            Self::Heap { words, offset, len } => RamSlice::from_atomics(words)
                .get(*offset, *len)
                .unwrap_or(RamSlice::EMPTY),
            #[cfg(feature = "unix")]
            Self::Mapped(slice) => slice.ram(),
        }
    }
}

impl QueueMemory for Part {
    #[inline]
    fn len(&self) -> usize {
        self.ram().len()
    }

    fn is_aligned(&self) -> bool {
        self.ram().is_aligned()
    }

    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.ram().load_relaxed(offset)
    }

    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        self.ram().load_acquire(offset)
    }

    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        self.ram().store_relaxed(offset, value);
    }

    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        self.ram().store_release(offset, value);
    }

    #[inline]
    fn take(&self, offset: usize) -> bool {
        self.ram().take(offset)
    }

    #[inline]
    fn fence(&self) {
        self.ram().fence();
    }

    #[inline]
    fn prefetch(&self, offset: usize) {
        self.ram().prefetch(offset);
    }

    #[inline]
    fn demote(&self, offset: usize) {
        self.ram().demote(offset);
    }

    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        QueueMemory::read(&self.ram(), offset, into);
    }

    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        QueueMemory::write(&self.ram(), offset, from);
    }
}
