// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which queues have work, found without looking at those that have none.

use std::collections::VecDeque;

/// The queues that wait for their turn, each at most once, in the order in
/// which they became ready: nobody is overtaken.
#[derive(Debug, Default)]
pub(super) struct Ready {
    turn: VecDeque<(u32, u16)>,
    waiting: Vec<Vec<bool>>,
}

impl Ready {
    /// Makes room for a device with `queues` queues at `slot`, none of them ready.
    pub(super) fn add(&mut self, slot: u32, queues: usize) {
        let slot = slot as usize;
        if self.waiting.len() <= slot {
            self.waiting.resize_with(slot + 1, Vec::new);
        }
        self.waiting[slot] = vec![false; queues];
    }

    /// Forgets the queues of the device at `slot`.
    pub(super) fn remove(&mut self, slot: u32) {
        self.turn.retain(|(other, _)| *other != slot);
        if let Some(waiting) = self.waiting.get_mut(slot as usize) {
            waiting.clear();
        }
    }

    /// Puts a queue at the end of the line, unless it stands there already.
    pub(super) fn push(&mut self, slot: u32, queue: u16) {
        let waiting = self
            .waiting
            .get_mut(slot as usize)
            .and_then(|q| q.get_mut(queue as usize));
        if let Some(waiting @ false) = waiting {
            *waiting = true;
            self.turn.push_back((slot, queue));
        }
    }

    /// The queue whose turn it is.
    pub(super) fn pop(&mut self) -> Option<(u32, u16)> {
        let (slot, queue) = self.turn.pop_front()?;
        self.waiting[slot as usize][queue as usize] = false;
        Some((slot, queue))
    }

    /// True if no queue waits.
    pub(super) fn is_empty(&self) -> bool {
        self.turn.is_empty()
    }

    /// How many queues wait.
    pub(super) fn len(&self) -> usize {
        self.turn.len()
    }
}
