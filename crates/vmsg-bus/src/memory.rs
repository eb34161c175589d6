// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory a message queue of ours lies in, owned together with whoever else uses it.

#[cfg(feature = "loopback")]
use std::sync::{Arc, atomic::AtomicU64};
use vmsg_mem::QueueMemory;
#[cfg(feature = "loopback")]
use vmsg_mem::RamSlice;

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
    /// Of memory that may not be ordinary.
    #[cfg(feature = "ivshmem")]
    Device(vmsg_mem::DeviceSlice),
}

/// Does the same with whatever memory it is.
macro_rules! with {
    ($part:expr, $memory:ident => $do:expr) => {
        match $part {
            #[cfg(feature = "loopback")]
            Part::Heap { words, offset, len } => {
                let $memory = RamSlice::from_atomics(words)
                    .get(*offset, *len)
                    .unwrap_or(RamSlice::EMPTY);
                $do
            }
            #[cfg(feature = "unix")]
            Part::Mapped(slice) => {
                let $memory = slice.ram();
                $do
            }
            #[cfg(feature = "ivshmem")]
            Part::Device(slice) => {
                let $memory = slice.region();
                $do
            }
        }
    };
}

impl QueueMemory for Part {
    #[inline]
    fn len(&self) -> usize {
        with!(self, memory => memory.len())
    }

    fn is_aligned(&self) -> bool {
        with!(self, memory => memory.is_aligned())
    }

    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        with!(self, memory => memory.load_relaxed(offset))
    }

    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        with!(self, memory => memory.load_acquire(offset))
    }

    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        with!(self, memory => memory.store_relaxed(offset, value));
    }

    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        with!(self, memory => memory.store_release(offset, value));
    }

    #[inline]
    fn take(&self, offset: usize) -> bool {
        with!(self, memory => memory.take(offset))
    }

    #[inline]
    fn fence(&self) {
        with!(self, memory => memory.fence());
    }

    #[inline]
    fn prefetch(&self, offset: usize) {
        with!(self, memory => memory.prefetch(offset));
    }

    #[inline]
    fn demote(&self, offset: usize) {
        with!(self, memory => memory.demote(offset));
    }

    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        with!(self, memory => QueueMemory::read(&memory, offset, into));
    }

    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        with!(self, memory => QueueMemory::write(&memory, offset, from));
    }
}
