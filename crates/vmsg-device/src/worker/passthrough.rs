// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues that another process works on: what the worker tells such a device in place of working on them itself.

use vmsg_mem::Doorbell;

use super::command::{Notice, QueueStart, Resume};
use super::entry::{Entry, Found};

impl Entry {
    /// True if the driver has set `queue` up, is ready, and somebody else works on the queue.
    pub(super) fn is_passed_on(&self, queue: usize) -> bool {
        let slot = self.slots.get(queue);
        self.running && slot.is_some_and(|slot| slot.passed_on)
    }

    /// The driver has kicked `queue` by a message, be it before the queue is at work.
    pub(super) fn note_kick(&mut self, queue: usize) {
        if let Some(slot) = self.slots.get_mut(queue).filter(|_| self.passthrough) {
            slot.kicked = true;
        }
    }

    /// Whether the device is to be told of a kick, once.
    pub(super) fn take_kick(&mut self, queue: usize) -> bool {
        let slot = self.slots.get_mut(queue);
        slot.is_some_and(|slot| std::mem::take(&mut slot.kicked))
    }

    /// Tells the device of a queue, which is looked at first as any other: its rings are in the driver's memory, and where it goes on is
    /// known.
    pub(super) fn pass_on(&mut self, start: &QueueStart) -> Result<(), String> {
        let slot = self.slots.get_mut(start.queue).ok_or("no such queue")?;
        let mut start = start.clone();
        let in_order = self.device.in_order(start.queue);
        start.record = start.record.filter(|_| !in_order);
        let recorded = start.record.as_ref().is_some_and(|record| record.resume);
        if start.record.is_some() {
            // The record has what was taken before the used index, and is for whoever works on the queue.
            start.resume = recorded.then_some(Resume::FromUsedRing);
        }
        let memory = self.memory.lock();
        let found = Found::look(&start, in_order || recorded, memory.table.space())?;
        drop(memory);
        start.resume = found.resumed.then_some(Resume::At {
            avail: found.avail,
            used: found.used,
        });
        let passthrough = self.device.passthrough().ok_or("the queue has nobody")?;
        passthrough.start_queue(&start)?;
        slot.passed_on = true;
        slot.resumed = found.resumed;
        Ok(())
    }

    /// Tells the device what a queue is kicked by and its driver interrupted with. Both are kept open here.
    pub(super) fn pass_on_notify(
        &mut self,
        queue: usize,
        kick: Option<Doorbell>,
        call: Option<Doorbell>,
    ) -> Result<(), String> {
        let slot = self.slots.get_mut(queue).ok_or("no such queue")?;
        slot.kick = kick;
        slot.call = call;
        if let Some(passthrough) = self.device.passthrough() {
            passthrough.set_notify(queue, slot.kick.as_ref(), slot.call.as_ref());
        }
        Ok(())
    }

    /// Interrupts the driver for each queue that was in use before: whoever worked on it may have ended between using a chain and saying so.
    pub(super) fn interrupt_resumed(&mut self, notices: &mut Vec<Notice>) {
        for (queue, slot) in self.slots.iter_mut().enumerate() {
            if !slot.passed_on || !std::mem::take(&mut slot.resumed) {
                continue;
            }
            match slot.call.as_ref().map(Doorbell::ring) {
                None => notices.push(Notice::Used { queue }),
                Some(Ok(())) => {}
                Some(Err(error)) => notices.push(Notice::CallStuck {
                    queue,
                    error: error.to_string(),
                }),
            }
        }
    }
}

#[cfg(test)]
#[path = "passthrough_test.rs"]
mod tests;
