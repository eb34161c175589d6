// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A part of the memory, as memory of its own.

use super::super::geometry::Geometry;
use vmsg_mem::QueueMemory;

/// The part of the memory that an AMP layout is in.
#[derive(Clone, Copy)]
pub(super) struct Part<'m, M> {
    memory: &'m M,
    base: usize,
    len: usize,
}

impl<'m, M: QueueMemory> Part<'m, M> {
    pub(super) fn new(memory: &'m M, geometry: &Geometry) -> Self {
        Self {
            memory,
            base: geometry.base,
            len: geometry.end - geometry.base,
        }
    }
}

impl<M: QueueMemory> QueueMemory for Part<'_, M> {
    fn len(&self) -> usize {
        self.len
    }
    fn is_aligned(&self) -> bool {
        self.memory.is_aligned()
    }
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.memory.load_relaxed(self.base + offset)
    }
    fn load_acquire(&self, offset: usize) -> u32 {
        self.memory.load_acquire(self.base + offset)
    }
    fn store_relaxed(&self, offset: usize, value: u32) {
        self.memory.store_relaxed(self.base + offset, value);
    }
    fn store_release(&self, offset: usize, value: u32) {
        self.memory.store_release(self.base + offset, value);
    }
    fn take(&self, offset: usize) -> bool {
        self.memory.take(self.base + offset)
    }
    fn fence(&self) {
        self.memory.fence();
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory.read(self.base + offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.memory.write(self.base + offset, from);
    }
}
