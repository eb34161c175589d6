// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands that a device is not ready for.
//!
//! A reset, the end of a device or of a queue, and memory that goes, wait until the device says that nothing stands in their way any more
//! ([`Device::prepare`](crate::device::Device::prepare)). The commands behind one that waits wait too, so that they are carried out and
//! answered in their order; the worker's other devices go on. Meanwhile the device is polled, which is how it learns what has ended, and is
//! asked again after each time; its queues are not looked at. When the last command is carried out all of them are.
//!
//! How many can wait is for control to limit, which has one request of a driver at a time for each device, and a bounded number of others.

use std::collections::VecDeque;
use std::time::Instant;

use super::command::{Command, Slot};
use super::core::{Core, Fds};
use crate::device::Upcoming;

/// The commands for one device that wait, in their order, with their tickets. The device is not ready for the first.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    commands: VecDeque<(u64, Command)>,
    /// The device was out of order, and has panicked when it was polled: it will not say any more when it is ready.
    hopeless: bool,
    /// When it was polled last.
    polled: Option<Instant>,
}

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    pub(super) fn tickets(&self) -> impl Iterator<Item = u64> {
        self.commands.iter().map(|(ticket, _)| *ticket)
    }
}

impl Core {
    /// True while commands for the device at `slot` wait.
    pub(super) fn waits(&self, slot: Slot) -> bool {
        matches!(self.entries.get(slot.0 as usize), Some(Some(entry)) if entry.waits())
    }

    /// Carries out a command, or has it wait.
    pub(super) fn take(&mut self, slot: Slot, ticket: u64, command: Command, fds: &mut dyn Fds) {
        if !self.waits(slot) && self.is_ready(slot, &command) {
            return self.carry_out(slot, ticket, command, fds);
        }
        let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
            return;
        };
        entry.waiting.commands.push_back((ticket, command));
        if entry.waiting.commands.len() == 1 {
            entry.note_in_seat();
            // One that is out of order is polled again from now on.
            self.rewatch.push(slot);
            self.set_timer(slot);
        }
    }

    /// Carries out what has waited for devices that have been polled since and are ready now. To be called when devices were polled.
    pub fn carry_on(&mut self, fds: &mut dyn Fds) {
        while let Some(slot) = self.polled.pop() {
            self.carry_on_with(slot, fds);
        }
    }

    fn carry_on_with(&mut self, slot: Slot, fds: &mut dyn Fds) {
        loop {
            let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
                return;
            };
            let Some((ticket, command)) = entry.waiting.commands.pop_front() else {
                break;
            };
            if !self.is_ready(slot, &command) {
                if let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) {
                    entry.waiting.commands.push_front((ticket, command));
                }
                // Being asked, it seemed not to be waited for.
                self.set_timer(slot);
                return;
            }
            self.carry_out(slot, ticket, command, fds);
        }
        let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
            return;
        };
        entry.waiting.hopeless = false;
        entry.waiting.polled = None;
        entry.note_in_seat();
        let queues = entry.slots.len();
        for queue in 0..queues {
            self.kick(slot, queue);
        }
        self.rewatch.push(slot);
        self.set_timer(slot);
    }

    /// Polls a device for which commands wait, even if it is out of order.
    pub(super) fn poll_while_waiting(&mut self, slot: Slot, now: Instant) {
        let Some(Some(entry)) = self.entries.get(slot.0 as usize) else {
            return;
        };
        let broken = entry.broken;
        let mut panicked = true;
        self.call(slot, now, |device, io| {
            let result = device.poll(io);
            panicked = false;
            result.map(|()| None)
        });
        if let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) {
            entry.waiting.hopeless |= broken && panicked;
            entry.waiting.polled = Some(now);
        }
        if !self.polled.contains(&slot) {
            self.polled.push(slot);
        }
    }

    /// Asks a device whether `command` may be carried out now.
    fn is_ready(&mut self, slot: Slot, command: &Command) -> bool {
        let Some(Some(entry)) = self.entries.get(slot.0 as usize) else {
            return true;
        };
        let upcoming = match command {
            Command::Reset | Command::Remove => Upcoming::Reset,
            Command::ResetQueue(queue) if *queue < entry.slots.len() => {
                Upcoming::QueueReset(*queue)
            }
            Command::SetMemory(table) => {
                if !entry.passthrough && table.has_all_of(&entry.memory.lock().table) {
                    return true;
                }
                Upcoming::Memory(table)
            }
            _ => return true,
        };
        if entry.waiting.hopeless {
            return true;
        }
        // Who runs the worker may have a clock of its own, which is ahead.
        let now = entry.waiting.polled.unwrap_or_else(Instant::now);
        // What it leaves behind if it panics: it is not asked again.
        let mut ready = true;
        self.call(slot, now, |device, io| {
            ready = device.prepare(upcoming, io);
            Ok(None)
        });
        ready
    }
}

#[cfg(test)]
#[path = "waiting_test.rs"]
mod tests;
