// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What moves a device: its state machine's answers and actions, until it waits for somebody else.

use std::sync::Arc;

use virtio_msg::Instant;
use vmsg_mem::WindowTable;

use super::connection::ConnId;
use super::core::{BUFFER, Core};
use super::entry::{Entry, Handled, Holder};
use crate::worker::Command;

impl Core {
    /// Accounts for what became of a message.
    pub(super) fn settle(&mut self, num: u16, conn: ConnId, handled: Handled, claimed: bool) {
        if claimed {
            self.claim(num, conn);
        }
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        match handled {
            Handled::Taken => {}
            Handled::Deferred => connection.deferred += 1,
            Handled::Refused(bytes) => {
                self.counters.refused += 1;
                connection.send(bytes);
            }
            Handled::Dropped => self.counters.unexpected += 1,
        }
    }

    /// Moves everything that a device's machine has to say and wants done.
    pub(super) fn pump(&mut self, now: Instant, num: u16) {
        let mut buffer = [0; BUFFER];
        loop {
            let Some(entry) = self.entries.get_mut(&num) else {
                return;
            };
            let mut idle = !entry.leave_if_idle(now);
            while let Some(action) = self.entries.get_mut(&num).and_then(Entry::poll_action) {
                idle = false;
                self.act(num, action);
            }
            idle &= !self.transmit(num, &mut buffer);
            idle &= !self.finish_leaving(num);
            idle &= !self.resume_waiting(now, num);
            if idle {
                return;
            }
        }
    }

    /// Sends what a device's machine has to say; true if that was anything.
    /// Events stay with the machine, which merges them, if the driver does not
    /// take its messages.
    fn transmit(&mut self, num: u16, buffer: &mut [u8]) -> bool {
        let mut any = false;
        loop {
            let Some(entry) = self.entries.get_mut(&num) else {
                return any;
            };
            let holder = match entry.holder {
                Holder::Driver(conn) => self.connections.get_mut(&conn),
                Holder::Nobody | Holder::Leaving => None,
            };
            let room = holder.is_none_or(|holder| {
                if !holder.has_room() {
                    holder.keep_back();
                }
                holder.has_room()
            });
            let Some((to, len)) = entry.poll_transmit(buffer, room) else {
                return any;
            };
            any = true;
            if let Some(connection) = to.and_then(|conn| self.connections.get_mut(&conn)) {
                connection.send(buffer[..len].to_vec());
            }
        }
    }

    /// Frees a device whose last driver's reset is over; true if it did.
    fn finish_leaving(&mut self, num: u16) -> bool {
        let Some(entry) = self.entries.get_mut(&num) else {
            return false;
        };
        if !entry.has_left() {
            return false;
        }
        if let Some(operator) = entry.removal {
            self.finish_removal(num, operator);
            return true;
        }
        entry.holder = Holder::Nobody;
        entry.memory_of = None;
        if entry.log.admit(self.now) {
            tracing::info!(device = %entry.name, "released");
        }
        let claims = std::mem::take(&mut entry.claims);
        if let Some((conn, token)) = entry.release.take() {
            self.released(num, conn, token);
        }
        self.order(num, 0, Command::SetMemory(Arc::new(WindowTable::empty())));
        for (conn, token) in claims {
            self.handle_claim(num, conn, token);
        }
        true
    }

    /// Hands over messages that waited; true if there were any.
    fn resume_waiting(&mut self, now: Instant, num: u16) -> bool {
        let Some(entry) = self.entries.get_mut(&num) else {
            return false;
        };
        let mut events = Vec::new();
        entry.resume(now, usize::from(u16::MAX), |_, conn, handled, claimed| {
            events.push((conn, handled, claimed));
        });
        let any = !events.is_empty();
        for (conn, handled, claimed) in events {
            if let Some(connection) = self.connections.get_mut(&conn) {
                connection.deferred = connection.deferred.saturating_sub(1);
            }
            self.settle(num, conn, handled, claimed);
        }
        any
    }
}
