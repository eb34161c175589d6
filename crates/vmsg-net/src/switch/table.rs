// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which address is behind which port.
//!
//! Memory is fixed. Every port has a limit of its own, and nobody's address goes to make room for another's: a flood of
//! addresses only fills what its port may have. Places are found with a secret, so that nobody can choose addresses that
//! collide.

use std::hash::{BuildHasher, RandomState};

use crate::Mac;

/// Stands for all VLANs of a trunk; not a VLAN.
pub(super) const ALL_VLANS: u16 = 4095;

/// Places that are tried for a learned address.
const PATIENCE: usize = 64;

/// A VLAN and an address; 0 is no key of anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    const NONE: Self = Self(0);

    #[inline]
    pub(super) fn new(vlan: u16, mac: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = mac;
        let [high, low] = vlan.to_be_bytes();
        Self(u64::from_be_bytes([high, low, a, b, c, d, e, f]))
    }

    pub(super) fn vlan(self) -> u16 {
        let [high, low, ..] = self.0.to_be_bytes();
        u16::from_be_bytes([high, low])
    }

    pub(super) fn mac(self) -> Mac {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        Mac([a, b, c, d, e, f])
    }
}

/// What is known of an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    /// When it was last seen, in milliseconds, wrapping.
    pub(super) seen: u32,
    pub(super) port: u16,
    /// It was set, not learned.
    pub(super) fixed: bool,
}

const EMPTY: Entry = Entry {
    key: Key::NONE,
    seen: 0,
    port: 0,
    fixed: false,
};

/// All known addresses.
pub(super) struct Table {
    /// Open addressing with linear probing, at most half full.
    places: Box<[Entry]>,
    mask: usize,
    secrets: [u64; 2],
    len: usize,
    most: usize,
    age: u32,
    /// Where the search for old entries goes on.
    cursor: usize,
}

impl Table {
    /// Room for `most` addresses, each forgotten `age` milliseconds after it was last seen.
    pub(super) fn new(most: usize, age: u32) -> Self {
        let places = (most * 2).next_power_of_two().max(16);
        let random = RandomState::new();
        Self {
            places: vec![EMPTY; places].into(),
            mask: places - 1,
            secrets: [random.hash_one(1), random.hash_one(2) | 1],
            len: 0,
            most,
            age,
            cursor: 0,
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Places to look at until [`sweep`](Self::sweep) has seen all.
    pub(super) const fn places(&self) -> usize {
        self.places.len()
    }

    #[inline]
    fn home(&self, key: Key) -> usize {
        let product = u128::from(key.0 ^ self.secrets[0]) * u128::from(self.secrets[1]);
        let bytes = product.to_le_bytes();
        let [low, high] = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        });
        // Any bits will do.
        usize::try_from((low ^ high) & 0xffff_ffff).unwrap_or(0) & self.mask
    }

    #[inline]
    const fn is_old(&self, entry: &Entry, now: u32) -> bool {
        !entry.fixed && now.wrapping_sub(entry.seen) > self.age
    }

    #[inline]
    fn place_of(&self, key: Key) -> Option<usize> {
        if key.0 << 16 == 0 {
            return None;
        }
        let mut at = self.home(key);
        loop {
            let found = self.places[at].key;
            if found == key {
                return Some(at);
            }
            if found == Key::NONE {
                return None;
            }
            at = (at + 1) & self.mask;
        }
    }

    /// What is known of `key`.
    #[inline]
    pub(super) fn find(&self, key: Key, now: u32) -> Option<&Entry> {
        self.place_of(key)
            .map(|at| &self.places[at])
            .filter(|entry| !self.is_old(entry, now))
    }

    /// As [`find`](Self::find), and notes that it was seen now if it is at `port`.
    #[inline]
    pub(super) fn see(&mut self, key: Key, port: u16, now: u32) -> Option<Entry> {
        let at = self.place_of(key)?;
        if self.is_old(&self.places[at], now) {
            return None;
        }
        let entry = &mut self.places[at];
        if entry.port == port && entry.seen != now {
            entry.seen = now;
        }
        Some(*entry)
    }

    /// Learns that `key` is at `port`, wherever it was before. Returns what was known of it, even if that is old, or
    /// `None` inside if nothing was; `Err` if there is no room.
    pub(super) fn learn(&mut self, key: Key, port: u16, now: u32) -> Result<Option<Entry>, Full> {
        let new = Entry {
            key,
            seen: now,
            port,
            fixed: false,
        };
        if let Some(at) = self.place_of(key) {
            let old = self.places[at];
            debug_assert!(!old.fixed, "fixed addresses stay where they are");
            self.places[at] = new;
            return Ok(Some(old));
        }
        if self.len >= self.most {
            return Err(Full);
        }
        let home = self.home(key);
        for step in 0..PATIENCE.min(self.places.len()) {
            let at = (home + step) & self.mask;
            if self.places[at].key == Key::NONE {
                self.places[at] = new;
                self.len += 1;
                return Ok(None);
            }
        }
        Err(Full)
    }

    /// Fixes `key` at `port`; calls `gone` with what had to go for it.
    pub(super) fn fix(&mut self, key: Key, port: u16, mut gone: impl FnMut(&Entry)) {
        if key.vlan() == ALL_VLANS {
            let mac = key.mac();
            self.retain(|entry| entry.fixed || entry.key.mac() != mac, &mut gone);
        }
        let new = Entry {
            key,
            seen: 0,
            port,
            fixed: true,
        };
        if let Some(at) = self.place_of(key) {
            if !self.places[at].fixed {
                gone(&self.places[at]);
            }
            self.places[at] = new;
            return;
        }
        let home = self.home(key);
        if self.len >= self.most {
            let learned = (0..self.places.len())
                .map(|step| (home + step) & self.mask)
                .find(|at| self.places[*at].key != Key::NONE && !self.places[*at].fixed);
            let Some(at) = learned else {
                return;
            };
            gone(&self.places[at]);
            self.remove_at(at);
        }
        let mut at = home;
        while self.places[at].key != Key::NONE {
            at = (at + 1) & self.mask;
        }
        self.places[at] = new;
        self.len += 1;
    }

    /// Empties a place and moves up what would not be found behind it.
    fn remove_at(&mut self, mut hole: usize) {
        self.len -= 1;
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask;
            let entry = self.places[at];
            if entry.key == Key::NONE {
                break;
            }
            let from_home = at.wrapping_sub(self.home(entry.key)) & self.mask;
            let from_hole = at.wrapping_sub(hole) & self.mask;
            if from_home >= from_hole {
                self.places[hole] = entry;
                hole = at;
            }
        }
        self.places[hole] = EMPTY;
    }

    /// Forgets what `keep` is false for; calls `gone` with each.
    pub(super) fn retain(&mut self, keep: impl Fn(&Entry) -> bool, mut gone: impl FnMut(&Entry)) {
        let mut at = 0;
        while at < self.places.len() {
            let entry = self.places[at];
            if entry.key == Key::NONE || keep(&entry) {
                at += 1;
            } else {
                // Another may come to this place; those that come around the end were kept before.
                gone(&entry);
                self.remove_at(at);
            }
        }
    }

    /// Looks at the next `count` places and forgets what is old; calls `gone` with each.
    pub(super) fn sweep(&mut self, count: usize, now: u32, mut gone: impl FnMut(&Entry)) {
        for _ in 0..count {
            let entry = self.places[self.cursor];
            if entry.key != Key::NONE && self.is_old(&entry, now) {
                gone(&entry);
                self.remove_at(self.cursor);
            } else {
                self.cursor = (self.cursor + 1) & self.mask;
            }
        }
    }

    /// All that is known, with the milliseconds since it was last seen.
    pub(super) fn entries(&self, now: u32) -> impl Iterator<Item = (Entry, u32)> {
        self.places
            .iter()
            .filter(move |entry| entry.key != Key::NONE && !self.is_old(entry, now))
            .map(move |entry| {
                let age = now.wrapping_sub(entry.seen);
                (*entry, if entry.fixed { 0 } else { age })
            })
    }
}

/// There is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
