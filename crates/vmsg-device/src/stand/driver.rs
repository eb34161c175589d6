// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver with its memory, of which each queue has a part.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmsg_mem::{BusAddr, Mapping, WindowTable};
use vmsg_queue::QueueConfig;

use super::{BASE, Ring};

/// Bytes of each queue's part of the memory: its rings, then its buffers.
const PART: usize = 1 << 19;
/// Where in that part the buffers begin.
pub(crate) const BUFFERS: usize = 1 << 14;

/// A queue as its driver has it.
struct Queue {
    ring: Ring<'static>,
    /// Next place for a buffer, in bytes from the beginning of the buffers.
    next: usize,
    /// Where the writable buffer with a token's index is, and its length.
    places: BTreeMap<usize, (usize, usize)>,
}

/// A driver's memory, and the queues in it.
pub(crate) struct Driver {
    pub(crate) mapping: &'static Mapping,
    pub(crate) file: OwnedFd,
    pub(crate) table: Arc<WindowTable>,
    /// Descriptors of each queue.
    size: u16,
    queues: BTreeMap<usize, Queue>,
}

impl Driver {
    /// Memory for so many queues of `size` descriptors; a file that is not sealed can shrink.
    pub(crate) fn new(queues: usize, size: u16, sealed: bool) -> Self {
        let bytes = (PART * queues) as u64;
        let (mapping, file) = Mapping::memfd("test", bytes, sealed).expect("memfd");
        // Rings borrow the memory; a test's process is short.
        let mapping: &'static Arc<Mapping> = Box::leak(Box::new(Arc::new(mapping)));
        Self {
            mapping,
            file,
            table: super::table(mapping),
            size,
            queues: BTreeMap::new(),
        }
    }

    /// Makes an empty queue, in the place of the one that was there.
    pub(crate) fn set_up(&mut self, index: usize) -> QueueConfig {
        let ring = super::ring(self.mapping, index * PART, self.size);
        let config = ring.config();
        let queue = Queue {
            ring,
            next: 0,
            places: BTreeMap::new(),
        };
        self.queues.insert(index, queue);
        config
    }

    /// The queues that there are.
    pub(crate) fn configs(&self) -> Vec<(usize, QueueConfig)> {
        let queues = self.queues.iter();
        queues
            .map(|(index, queue)| (*index, queue.ring.config()))
            .collect()
    }

    /// Adds a chain of a buffer with bytes to read, or of one of so many to write, or of both. Does not kick.
    pub(crate) fn add(&mut self, queue: usize, readable: &[u8], writable: usize) {
        let part = queue * PART + BUFFERS;
        let entry = self.queues.get_mut(&queue).expect("set up");
        let len = readable.len() + writable;
        if entry.next + len > PART - BUFFERS {
            entry.next = 0;
        }
        let at = part + entry.next;
        entry.next += len.next_multiple_of(8);
        self.mapping.ram().write(at, readable);
        let addr = |at: usize| BusAddr(BASE + at as u64);
        let length = |len: usize| u32::try_from(len).expect("small");
        let behind = at + readable.len();
        let read = [(addr(at), length(readable.len()))];
        let write = [(addr(behind), length(writable))];
        let token = entry
            .ring
            .add(
                if readable.is_empty() { &[] } else { &read },
                if writable == 0 { &[] } else { &write },
            )
            .expect("room");
        entry.places.insert(token.index(), (behind, writable));
        entry.ring.publish().expect("published");
    }

    /// What was written to the next used chain.
    pub(crate) fn pop(&mut self, queue: usize) -> Option<Vec<u8>> {
        let entry = self.queues.get_mut(&queue).expect("set up");
        let used = entry.ring.pop_used().expect("sound")?;
        let (at, len) = entry.places[&used.token.index()];
        let written = usize::try_from(used.written).expect("small");
        assert!(written <= len, "{written} bytes in {len}");
        let mut bytes = vec![0; written];
        self.mapping.ram().read(at, &mut bytes);
        Some(bytes)
    }

    /// Chains that the device has not used yet.
    pub(crate) fn outstanding(&self, queue: usize) -> u16 {
        self.queues[&queue].ring.outstanding()
    }
}
