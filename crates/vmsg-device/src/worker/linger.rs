// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues that have just become empty are looked at for a while before their drivers are asked for kicks: a kick costs the driver a
//! system call and this side a wake-up, each of them longer than most drivers take for their next request.

use std::time::Instant;

use super::command::Slot;
use super::core::{Core, queue_error};

/// Queues that are looked at at a time at most: looking must stay cheap.
const MOST: usize = 16;

/// The queues that are looked at.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// Whether queues that become empty are.
    on: bool,
    queues: Vec<(Slot, usize)>,
}

impl Linger {
    /// True if a queue that has become empty is looked at from now on; otherwise its driver is to be asked for kicks.
    pub(super) fn take(&mut self, slot: Slot, queue: usize) -> bool {
        if !self.on {
            return false;
        }
        let there = self.queues.contains(&(slot, queue));
        if !there && self.queues.len() < MOST {
            self.queues.push((slot, queue));
            return true;
        }
        there
    }

    /// Forgets the queues of a device.
    pub(super) fn remove(&mut self, slot: Slot) {
        self.queues.retain(|(other, _)| *other != slot);
    }
}

impl Core {
    /// Whether queues that become empty are looked at. If so, [`look`](Self::look) is to be called again and again until
    /// [`settle`](Self::settle): without either the drivers' requests wait for good.
    pub fn set_linger(&mut self, on: bool) {
        self.linger.on = on;
    }

    /// Whether there are queues to look at.
    pub fn lingers(&self) -> bool {
        !self.linger.queues.is_empty()
    }

    /// Looks at them; true if one has work now, which [`step`](Self::step) does.
    pub fn look(&mut self) -> bool {
        let mut found = false;
        let mut index = 0;
        while let Some(&(slot, queue)) = self.linger.queues.get(index) {
            if self.is_empty(slot, queue) {
                index += 1;
            } else {
                self.linger.queues.swap_remove(index);
                self.kick(slot, queue);
                found = true;
            }
        }
        found
    }

    /// Looks at them no more: their drivers are asked for kicks.
    pub fn settle(&mut self, now: Instant) {
        while let Some((slot, queue)) = self.linger.queues.pop() {
            self.with_device(slot, now, |_, io| {
                let Some(Some(active)) = io.queues.get_mut(queue) else {
                    return Ok(None);
                };
                let more = active
                    .ring()
                    .enable_notifications(io.space)
                    .map_err(|source| queue_error(queue, source))?;
                Ok(more.then_some(queue))
            });
        }
    }

    /// False also for a queue that is not there or at fault: whoever processes it finds out.
    fn is_empty(&mut self, slot: Slot, queue: usize) -> bool {
        let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
            return false;
        };
        let memory = entry.memory.lock();
        let Some(Some(active)) = entry.active.get_mut(queue) else {
            return false;
        };
        matches!(active.ring().available(memory.table.space()), Ok(0))
    }
}

#[cfg(test)]
#[path = "linger_test.rs"]
mod tests;
