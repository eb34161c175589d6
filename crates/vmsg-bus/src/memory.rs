// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory a message queue of ours lies in, owned together with whoever else uses it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use vmsg_mem::{QueueMemory, RamSlice};

/// Who owns the bytes.
#[derive(Clone)]
enum Owner {
    /// This process alone.
    #[cfg(feature = "loopback")]
    Heap(Arc<[AtomicU64]>),
    /// A file that another process has mapped as well.
    #[cfg(feature = "unix")]
    Mapped(Arc<vmsg_mem::Mapping>),
}

/// A part of shared memory that keeps the whole alive.
#[derive(Clone)]
pub(crate) struct Part {
    owner: Owner,
    offset: usize,
    len: usize,
}

impl Part {
    /// The `len` bytes of `words` from `offset` on; none if they are not all there.
    #[cfg(feature = "loopback")]
    pub(crate) fn of_heap(words: &Arc<[AtomicU64]>, offset: usize, len: usize) -> Self {
        Self { owner: Owner::Heap(Arc::clone(words)), offset, len }
    }

    /// The `len` bytes of `mapping` from `offset` on; none if they are not all there.
    #[cfg(feature = "unix")]
    pub(crate) fn of_mapping(mapping: &Arc<vmsg_mem::Mapping>, offset: usize, len: usize) -> Self {
        Self { owner: Owner::Mapped(Arc::clone(mapping)), offset, len }
    }

    #[inline]
    fn ram(&self) -> RamSlice<'_> {
        let whole = match &self.owner {
            #[cfg(feature = "loopback")]
            Owner::Heap(words) => RamSlice::from_atomics(words),
            #[cfg(feature = "unix")]
            Owner::Mapped(mapping) => mapping.ram(),
        };
        whole.get(self.offset, self.len).unwrap_or(RamSlice::EMPTY)
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
    fn swap(&self, offset: usize, value: u32) -> u32 {
        self.ram().swap(offset, value)
    }

    #[inline]
    fn fence(&self) {
        self.ram().fence();
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
