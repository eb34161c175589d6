// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is counted at a port.

use std::sync::atomic::{AtomicU64, Ordering};

use super::report::{Count, Drops, Reason, Traffic};

/// What kind of destination a frame has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cast {
    Unicast,
    Multicast,
    Broadcast,
}

const CASTS: usize = 3;

/// A number that one thread changes and others may look at.
#[derive(Debug, Default)]
pub(super) struct Cell(AtomicU64);

impl Cell {
    /// Without a locked operation, as there is only one writer.
    #[inline]
    pub(super) fn add(&self, more: u64) {
        if more > 0 {
            let sum = self.0.load(Ordering::Relaxed).wrapping_add(more);
            self.0.store(sum, Ordering::Relaxed);
        }
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames and bytes by their destinations, before they are counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    frames: [u64; CASTS],
    bytes: [u64; CASTS],
}

impl Tally {
    #[inline]
    pub(super) fn note(&mut self, cast: Cast, len: usize) {
        self.frames[cast as usize] += 1;
        self.bytes[cast as usize] += len as u64;
    }
}

/// What passed in one direction.
#[derive(Debug, Default)]
pub(super) struct Flow {
    frames: [Cell; CASTS],
    bytes: [Cell; CASTS],
}

impl Flow {
    #[inline]
    pub(super) fn add(&self, tally: &Tally) {
        for (cell, more) in self.frames.iter().zip(tally.frames) {
            cell.add(more);
        }
        for (cell, more) in self.bytes.iter().zip(tally.bytes) {
            cell.add(more);
        }
    }

    fn traffic(&self) -> Traffic {
        let count = |cast: Cast| Count {
            frames: self.frames[cast as usize].get(),
            bytes: self.bytes[cast as usize].get(),
        };
        Traffic {
            unicast: count(Cast::Unicast),
            multicast: count(Cast::Multicast),
            broadcast: count(Cast::Broadcast),
        }
    }
}

/// Frames that were dropped, by the reason.
#[derive(Debug, Default)]
pub(super) struct Dropped([Cell; Reason::COUNT]);

impl Dropped {
    #[inline]
    pub(super) fn add(&self, reason: Reason, frames: u64) {
        self.0[reason as usize].add(frames);
    }

    pub(super) fn drops(&self) -> Drops {
        let mut drops = Drops::default();
        for (to, cell) in drops.0.iter_mut().zip(&self.0) {
            *to = cell.get();
        }
        drops
    }
}

/// All that is counted at a port. The worker writes, whoever wants to know reads.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Counters {
    pub(super) output: Flow,
    pub(super) input: Flow,
    pub(super) copies: Cell,
    pub(super) dropped_in: Dropped,
    pub(super) dropped_out: Dropped,
    pub(super) segmented: Cell,
    pub(super) segments: Cell,
    pub(super) segments_lost: Cell,
    pub(super) moves: Cell,
    pub(super) not_learned: Cell,
    pub(super) waits: Cell,
    /// How many addresses there are at present.
    pub(super) macs: Cell,
}

impl Counters {
    pub(super) fn input(&self) -> Traffic {
        self.input.traffic()
    }

    pub(super) fn output(&self) -> Traffic {
        self.output.traffic()
    }
}
