// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses that lend no memory by message and do not say where queues go on: the driver's memory is in a file that
//! is known from the start, and queues go on where their rings say.

use std::sync::Arc;

use vmsg_bus::StaticRam;

use super::connection::ConnId;
use super::core::Core;
use super::entry::Holder;
use crate::worker::{Command, Resume};

impl Core {
    /// Says that the bus of `conn` lends no memory by message; `ram` is where the driver's memory is. Without,
    /// devices can be looked at, but their queues cannot be set up.
    pub fn set_bare(&mut self, conn: ConnId, ram: Option<StaticRam>) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.bare = true;
            connection.ram = ram;
        }
    }

    /// The connection that holds device `num`, if its bus is such a one.
    fn bare_holder(&self, num: u16) -> Option<ConnId> {
        let Holder::Driver(conn) = self.entries.get(&num)?.holder else {
            return None;
        };
        let connection = self.connections.get(&conn)?;
        connection.bare.then_some(conn)
    }

    /// Whether device `num` is held over such a bus.
    pub(super) fn is_bare(&self, num: u16) -> bool {
        self.bare_holder(num).is_some()
    }

    /// Where a queue of device `num` begins of which the driver has not said it.
    pub(super) fn resume_unasked(&self, num: u16) -> Option<Resume> {
        self.bare_holder(num).map(|_| Resume::AsFound)
    }

    /// Opens the file with the driver's memory, as it is now, and shows it to device `num`.
    pub(super) fn find_memory(&mut self, num: u16, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let found = match &connection.ram {
            None => {
                Err("it is not known where the driver's memory is; name its file with ram=".into())
            }
            Some(ram) => ram
                .windows()
                .map_err(|error| error.to_string())
                .and_then(|windows| {
                    let keep = self.passthroughs > 0;
                    let mapped = connection.windows.set_static(&windows, keep);
                    mapped.map_err(|error| format!("{}: {error}", ram.path().display()))
                }),
        };
        if let Err(error) = found {
            if let Some(entry) = self.entries.get_mut(&num)
                && entry.log.admit(self.now)
            {
                tracing::warn!(device = %entry.name, %error, "no queue can be set up");
            }
            return;
        }
        let table = Arc::clone(connection.windows.table());
        self.order(num, 0, Command::SetMemory(table));
    }

    /// A driver sets device `num` up: on a bus where memory is not lent, that may be another guest than the last one, and its VMM has
    /// made the file anew.
    pub(super) fn find_memory_again(&mut self, num: u16) {
        if let Some(conn) = self.bare_holder(num) {
            self.find_memory(num, conn);
        }
    }

    /// Whether device `num` has its driver's memory; on a bus where that is not lent, looks for it once more.
    pub(super) fn has_memory(&mut self, num: u16) -> bool {
        let Some(conn) = self.bare_holder(num) else {
            return true;
        };
        let lacks = |core: &Self| {
            let connection = core.connections.get(&conn);
            connection.is_none_or(|connection| connection.windows.count() == 0)
        };
        if lacks(self) {
            self.find_memory(num, conn);
        }
        !lacks(self)
    }
}

#[cfg(test)]
#[path = "bare_test.rs"]
mod tests;
