// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which places of a worker are taken.

use crate::worker::Slot;

/// The places of one worker. Those of devices that are gone are given out again, so that epoll's data and the worker's table stay small
/// however often devices come and go.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// The first that nobody has had.
    next: u32,
    free: Vec<Slot>,
}

impl Slots {
    /// The place that [`take`](Self::take) would give.
    pub(super) fn peek(&self) -> Slot {
        self.free.last().copied().unwrap_or(Slot(self.next))
    }

    /// Gives out a place.
    pub(super) fn take(&mut self) -> Slot {
        self.free.pop().unwrap_or_else(|| {
            let slot = Slot(self.next);
            self.next += 1;
            slot
        })
    }

    /// The worker has let go of the device that was there.
    pub(super) fn give_back(&mut self, slot: Slot) {
        self.free.push(slot);
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        self.next as usize - self.free.len()
    }
}
