// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device's memory, as its worker and control see it.
//!
//! A worker that has to be woken for each change of the windows costs four context switches where a vIOMMU changes them for each request. So
//! control puts a new table in place itself while the device sleeps and no command is on its way to it, and only otherwise sends it as a
//! command. Whoever works on the device's queues holds the lock meanwhile: a table that was replaced is in nobody's hands.
//!
//! Requests that go on when their device sleeps are an exception. What they touch must not go before the device says so, and only its worker
//! may ask it ([`Device::prepare`](crate::device::Device::prepare)). So with each turn of the device its worker notes in the seat, before it
//! lets go of the lock, whether there are such requests, and whether commands wait for them. Then control leaves it to the worker, unless
//! all that was there is there in the new table too. A device that never has requests under way is never looked at twice.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vmsg_mem::WindowTable;

use super::command::Slot;

/// The memory of one device, and who may change it.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) table: Arc<WindowTable>,
    /// Requests are under way that may touch it, though the device sleeps.
    pub(crate) touched: bool,
    /// The device hears of each change, or commands for it wait: only its worker may change it.
    pub(crate) by_command: bool,
}

impl Memory {
    /// Whether `table` can come without a word to the device.
    fn admits(&self, table: &WindowTable) -> bool {
        !self.by_command && (!self.touched || table.has_all_of(&self.table))
    }
}

/// Where the memory of one device is.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    memory: Mutex<Memory>,
    /// Commands for the device that are on their way or being carried out.
    commands: AtomicUsize,
}

impl Seat {
    /// The table, for as long as it is looked through.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Memory> {
        // A device that panics is caught before it gets here, and a table is never half done.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `table` in place of the one that is there, which is let go.
    pub(crate) fn set(&self, table: Arc<WindowTable>) {
        let old = std::mem::replace(&mut self.lock().table, table);
        // With the lock held, a worker would wait for `munmap`.
        drop(old);
    }

    /// As [`Self::set`], unless a worker holds the table, has commands to carry out first, or has to ask the device: then the
    /// table comes back.
    pub(crate) fn try_set(&self, table: Arc<WindowTable>) -> Result<(), Arc<WindowTable>> {
        // Only control adds commands, and it is the one that asks.
        if self.commands.load(Ordering::Acquire) != 0 {
            return Err(table);
        }
        let mut place = match self.memory.try_lock() {
            Ok(place) => place,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(table),
        };
        if !place.admits(&table) {
            return Err(table);
        }
        let old = std::mem::replace(&mut place.table, table);
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
