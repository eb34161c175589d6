// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tests have in common: drivers' memory and queues, and workers without threads.

mod driver;
mod worker;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueConfig, QueueFeatures};

use crate::worker::{Fds, QueueStart, Slot};

pub(crate) use self::driver::{BUFFERS, Driver};
pub(crate) use self::worker::{Stand, counter};

/// `is_also!(Bench, stand: Stand)`: what a test's own stand is made of does for it what it can do.
macro_rules! is_also {
    ($outer:ty, $field:tt: $inner:ty) => {
        impl std::ops::Deref for $outer {
            type Target = $inner;

            fn deref(&self) -> &$inner {
                &self.$field
            }
        }

        impl std::ops::DerefMut for $outer {
            fn deref_mut(&mut self) -> &mut $inner {
                &mut self.$field
            }
        }
    };
}
pub(crate) use is_also;

/// Where the memory of drivers begins on the bus.
pub(crate) const BASE: u64 = 0x4000_0000;

/// Nobody watches descriptors: kicks come as commands.
pub(crate) struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

/// The first `len` bytes of `memory`, at `base` on the bus.
pub(crate) fn window(memory: &Arc<Mapping>, base: u64, len: usize, access: Access) -> TableEntry {
    TableEntry {
        base: BusAddr(base),
        mapping: Arc::clone(memory),
        offset: 0,
        len,
        access,
    }
}

/// All of `memory` at [`BASE`].
pub(crate) fn table(memory: &Arc<Mapping>) -> Arc<WindowTable> {
    let entry = window(memory, BASE, memory.len(), Access::ReadWrite);
    Arc::new(WindowTable::new(vec![entry]).expect("one window"))
}

/// A driver's side of a queue.
pub(crate) type Ring<'m> = DriverQueue<'m, Vec<DriverSlot>>;

/// An empty queue at `offset` in memory that begins at [`BASE`].
pub(crate) fn ring(memory: &Mapping, offset: usize, size: u16) -> Ring<'_> {
    let layout = Layout::new(size, 0).expect("a size");
    let ram = memory.ram().get(offset, layout.total_len());
    let base = BusAddr(BASE + offset as u64);
    let slots = vec![DriverSlot::default(); size.into()];
    let features = QueueFeatures::default();
    DriverQueue::new(layout, features, ram.expect("inside"), base, slots).expect("a queue")
}

/// A queue to begin at its beginning, without a record.
pub(crate) fn start(queue: usize, config: QueueConfig) -> QueueStart {
    QueueStart {
        queue,
        config,
        features: FeatureSet::EMPTY,
        resume: None,
        record: None,
    }
}
