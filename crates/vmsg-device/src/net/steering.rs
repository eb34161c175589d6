// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which queue pair a frame for the guest goes to (VIRTIO 1.3, 5.1.6.5.5 to 5.1.6.5.7).

use super::flow::Flow;
use super::hash::Hash;

/// How pairs are chosen.
#[derive(Debug)]
pub(super) enum Steering {
    /// A flow comes back on the pair on which it was last sent.
    Automatic(FlowTable),
    /// The driver's table says which hash goes where.
    Rss(Indirection),
}

impl Default for Steering {
    fn default() -> Self {
        Self::Automatic(FlowTable::default())
    }
}

/// The table of `struct virtio_net_rss_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Indirection {
    /// A power of two of pairs.
    pub(super) table: Box<[u16]>,
    /// Where packets without a hash go.
    pub(super) unclassified: u16,
}

impl Indirection {
    /// Entries a table may have.
    pub(super) const LONGEST: u16 = 128;

    pub(super) fn choose(&self, hash: Option<Hash>) -> u16 {
        match hash {
            Some(hash) => self.table[hash.value as usize & (self.table.len() - 1)],
            None => self.unclassified,
        }
    }

    /// The highest pair that frames can go to.
    pub(super) fn highest(&self) -> u16 {
        let highest = self.table.iter().copied().max().unwrap_or(0);
        highest.max(self.unclassified)
    }
}

/// On which pair flows were last sent. Of two flows with the same place the
/// later one has it; the other is steered like one that is not known.
#[derive(Debug, Default)]
pub(super) struct FlowTable {
    /// Empty until the first flow is noted.
    places: Box<[Place]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// The part of the flow's hash that does not choose the place; 0: free.
    tag: u32,
    pair: u16,
}

impl FlowTable {
    /// A power of two.
    const PLACES: usize = 4096;

    /// The driver has sent a frame of `flow` on `pair`.
    pub(super) fn note(&mut self, flow: &Flow, pair: u16) {
        if self.places.is_empty() {
            self.places = vec![Place::default(); Self::PLACES].into();
        }
        let (at, tag) = place_of(flow.symmetric_hash());
        self.places[at] = Place { tag, pair };
    }

    /// One of `pairs` pairs for a frame of `flow`.
    pub(super) fn choose(&self, flow: Option<&Flow>, pairs: u16) -> u16 {
        let Some(flow) = flow else {
            return 0;
        };
        let hash = flow.symmetric_hash();
        let (at, tag) = place_of(hash);
        match self.places.get(at) {
            Some(place) if place.tag == tag && place.pair < pairs => place.pair,
            _ => u16::try_from(hash % u64::from(pairs.max(1))).expect("less than a u16"),
        }
    }
}

fn place_of(hash: u64) -> (usize, u32) {
    let at = usize::try_from(hash & (FlowTable::PLACES as u64 - 1)).expect("twelve bits");
    let tag = u32::try_from(hash >> 32).expect("32 bits") | 1;
    (at, tag)
}

#[cfg(test)]
#[path = "steering_test.rs"]
mod tests;
