// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's memory, and its driver of one queue. It is the same behind every front.

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};
use vmsg_mem::{Access, BusAddr, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

/// Where its memory begins for the device, and how long it is.
pub(crate) const BASE: u64 = 0x1_0000_0000;
pub(crate) const LEN: u64 = 64 << 20;
pub(crate) const SIZE: u16 = 256;
/// Where in its memory the buffers are, and how far from each other.
pub(crate) const BUFFERS: u64 = 1 << 20;
const STRIDE: u64 = 0x2_0000;

/// Memory and a queue in it.
pub(crate) struct Ram {
    pub(crate) mapping: &'static Mapping,
    pub(crate) file: OwnedFd,
}

impl Ram {
    pub(crate) fn new() -> Ram {
        let (mapping, file) = Mapping::memfd("guest", LEN, true).expect("memory");
        // Kept until the end: drivers refer to it.
        let mapping: &'static Mapping = Box::leak(Box::new(mapping));
        mapping.ram().fill(1);
        Ram { mapping, file }
    }

    #[allow(dead_code, reason = "for who has such a file")]
    /// In a file that others know.
    pub(crate) fn in_file(file: impl Into<OwnedFd>) -> Ram {
        let file = file.into();
        let mapping = Mapping::of_fd(file.as_fd(), 0, LEN, Access::ReadWrite).expect("mapped");
        let mapping: &'static Mapping = Box::leak(Box::new(mapping));
        mapping.ram().fill(1);
        Ram { mapping, file }
    }

    /// A queue at the beginning of its memory.
    pub(crate) fn queue(&self) -> DriverQueue<'static, Vec<DriverSlot>> {
        self.queue_at(0)
    }

    /// A queue so many bytes behind that.
    pub(crate) fn queue_at(&self, offset: u64) -> DriverQueue<'static, Vec<DriverSlot>> {
        let layout = Layout::new(SIZE, 0).expect("a power of two");
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let at = usize::try_from(offset).expect("64 bits");
        let ram = self.mapping.ram().get(at, layout.total_len());
        let ram = ram.expect("room for a queue");
        DriverQueue::new(layout, features, ram, BusAddr(BASE + offset), slots)
            .expect("room for a queue")
    }
}

/// An eventfd.
pub(crate) fn bell() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// Adds to an eventfd.
pub(crate) fn ring(bell: impl AsFd) {
    rustix::io::write(bell, &1u64.to_ne_bytes()).expect("an eventfd");
}

/// What requests are like.
#[derive(Clone, Copy)]
pub(crate) struct Load {
    /// Bytes that the device reads and writes.
    pub(crate) readable: u32,
    pub(crate) writable: u32,
    /// How many are on their way at a time.
    pub(crate) depth: u16,
}

/// A driver of one queue.
pub(crate) struct Driver<'k> {
    pub(crate) queue: DriverQueue<'static, Vec<DriverSlot>>,
    /// Tells the device that there are buffers.
    pub(crate) kick: Box<dyn FnMut() + 'k>,
    /// Rung when some come back.
    pub(crate) call: OwnedFd,
    /// Where the buffers are for the device.
    pub(crate) buffers: u64,
}

impl Driver<'_> {
    /// Does so many requests.
    pub(crate) fn stream(&mut self, count: u32, load: Load) {
        let (mut asked, mut answered) = (0, 0);
        while answered < count {
            while asked < count && asked - answered < u32::from(load.depth) {
                let at = self.buffers + u64::from(asked % u32::from(load.depth)) * STRIDE;
                let readable = [(BusAddr(at), load.readable)];
                let writable = [(BusAddr(at + STRIDE / 2), load.writable)];
                let readable = &readable[..usize::from(load.readable > 0)];
                let writable = &writable[..usize::from(load.writable > 0)];
                self.queue
                    .add(readable, writable)
                    .expect("room in the queue");
                asked += 1;
            }
            if self.queue.publish().expect("a sound queue") {
                (self.kick)();
            }
            let mut some = false;
            while let Some(used) = self.queue.pop_used().expect("a sound queue") {
                assert_eq!(used.written, load.writable, "all bytes");
                answered += 1;
                some = true;
            }
            if !some && !self.queue.enable_notifications().expect("a sound queue") {
                self.wait();
            }
        }
    }

    /// Sleeps until the device has rung.
    fn wait(&self) {
        poll(&mut [PollFd::new(&self.call, PollFlags::IN)], None).expect("poll");
        rustix::io::read(&self.call, &mut [0; 8]).expect("rung");
    }
}
