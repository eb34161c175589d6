// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device's memory, as its worker and control see it.
//!
//! A worker that has to be woken for each change of the windows costs four context switches where a vIOMMU changes them for each request. So
//! control puts a new table in place itself while the device sleeps and no command is on its way to it, and only otherwise sends it as a
//! command. Whoever works on the device's queues holds the lock meanwhile: a table that was replaced is in nobody's hands.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vmsg_mem::WindowTable;

use super::command::Slot;

/// Where the memory of one device is.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    table: Mutex<Arc<WindowTable>>,
    /// Commands for the device that are on their way or being carried out.
    commands: AtomicUsize,
}

impl Seat {
    /// The table, for as long as it is looked through.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Arc<WindowTable>> {
        // A device that panics is caught before it gets here, and a table is never half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `table` in place of the one that is there, which is let go.
    pub(crate) fn set(&self, table: Arc<WindowTable>) {
        let old = std::mem::replace(&mut *self.lock(), table);
        // With the lock held, a worker would wait for `munmap`.
        drop(old);
    }

    /// As [`Self::set`], unless a worker holds the table or has commands to carry out first: then the table comes back.
    pub(crate) fn try_set(&self, table: Arc<WindowTable>) -> Result<(), Arc<WindowTable>> {
        // Only control adds commands, and it is the one that asks.
        if self.commands.load(Ordering::Acquire) != 0 {
            return Err(table);
        }
        let mut place = match self.table.try_lock() {
            Ok(place) => place,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(table),
        };
        let old = std::mem::replace(&mut *place, table);
        drop(place);
        drop(old);
        Ok(())
    }

    /// A command is on its way.
    pub(crate) fn command_sent(&self) {
        self.commands.fetch_add(1, Ordering::AcqRel);
    }

    /// A command was carried out.
    pub(crate) fn command_done(&self) {
        self.commands.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The seats of one worker's devices, by slot.
#[derive(Debug, Default)]
pub(crate) struct Seats(Mutex<Vec<Arc<Seat>>>);

impl Seats {
    /// The seat at `slot`, which is made if it is not there.
    pub(crate) fn at(&self, slot: Slot) -> Arc<Seat> {
        let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = slot.0 as usize;
        if seats.len() <= index {
            seats.resize_with(index + 1, Arc::default);
        }
        Arc::clone(&seats[index])
    }
}

/// Mappings of a driver that are looked at after each turn of one of its queues.
const MAPPINGS: usize = 16;

/// Looks at a few mappings, `next` and others each time, for one whose file has shrunk: what a device writes there fills private memory of
/// this process.
pub(super) fn has_lost_some(table: &WindowTable, next: &mut usize) -> bool {
    let mappings = table.mappings();
    (0..mappings.len().min(MAPPINGS)).any(|_| {
        *next = (*next + 1) % mappings.len();
        mappings[*next].is_lost()
    })
}

#[cfg(test)]
#[path = "seat_test.rs"]
mod tests;
