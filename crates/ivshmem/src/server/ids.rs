// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which ids are free.

use std::collections::{BTreeSet, HashMap};

use crate::PeerId;

/// How many ids there are: the doorbell register has 16 bits for them.
const IDS: u32 = 65_536;

/// Gives ids to clients, counted up. After the last one those of clients that have left are given again, but only if no
/// client is there that was told so: QEMU's device uses memory that it has freed when an id that left joins again.
#[derive(Debug)]
pub(super) struct Ids {
    /// All from here on were never given.
    next: u32,
    /// Below this, clients of a server before this one may have them.
    elders: u32,
    /// Never given.
    reserved: BTreeSet<PeerId>,
    /// Given and in use.
    taken: BTreeSet<PeerId>,
    /// When an id was given back.
    left: HashMap<PeerId, u64>,
    /// Where the search for one to be given again goes on.
    cursor: u32,
    /// The search was in vain while the oldest client was this one, and is as long as it stays: what is given back later was seen by
    /// it. Whoever comes again and again then costs no search.
    vain: Option<u64>,
}

impl Ids {
    /// `next` is the first one that was never given; below it, `elders` may still be there.
    pub(super) fn new(next: u32, elders: bool, reserved: impl IntoIterator<Item = PeerId>) -> Self {
        Self {
            next: next.min(IDS),
            elders: if elders { next.min(IDS) } else { 0 },
            reserved: reserved.into_iter().collect(),
            taken: BTreeSet::new(),
            left: HashMap::new(),
            cursor: 0,
            vain: None,
        }
    }

    /// The first id that was never given; 65536 if there is none.
    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// An id that is free, where `oldest` is when the oldest client that is there has come.
    pub(super) fn take(&mut self, oldest: Option<u64>) -> Option<PeerId> {
        while self.next < IDS {
            let id = peer(self.next);
            self.next += 1;
            if !self.reserved.contains(&id) {
                self.taken.insert(id);
                return Some(id);
            }
        }
        if oldest.is_some() && oldest == self.vain {
            return None;
        }
        for step in 0..IDS {
            let number = (self.cursor + step) % IDS;
            let id = peer(number);
            let is_free = number >= self.elders
                && !self.reserved.contains(&id)
                && !self.taken.contains(&id)
                && match (self.left.get(&id), oldest) {
                    (Some(left), Some(oldest)) => *left < oldest,
                    _ => true,
                };
            if is_free {
                self.cursor = (number + 1) % IDS;
                self.left.remove(&id);
                self.taken.insert(id);
                return Some(id);
            }
        }
        self.vain = oldest;
        None
    }

    /// Takes an id back at the time `now`.
    pub(super) fn give_back(&mut self, id: PeerId, now: u64) {
        if self.taken.remove(&id) {
            self.left.insert(id, now);
        }
    }
}

fn peer(number: u32) -> PeerId {
    PeerId(u16::try_from(number).expect("below 65536"))
}

#[cfg(test)]
#[path = "ids_test.rs"]
mod tests;
