// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes that the server has answered and may still lose.
//!
//! Until a flush is answered, what a server has taken may be in its memory alone. If the connection is lost then, the server may
//! have been killed, and a later flush on another connection would say that all is on the medium although it is not. So copies
//! are kept until a flush covers them; on the next connection they are written again before anything else goes out. To keep
//! them few, a flush of our own is sent when there are many.

use std::collections::VecDeque;

use vmsg_mem::Held;

/// Bytes kept, from which on a flush of our own is sent.
pub(super) const MANY: usize = 32 << 20;
/// Bytes kept, from which on writes wait for that flush.
pub(super) const TOO_MANY: usize = 64 << 20;
/// What an entry costs beside its data, in bytes.
const ENTRY: usize = 256;

/// What was written.
#[derive(Clone, Debug)]
pub(super) enum Written {
    Data(Held),
    Zeroes { hole: bool },
}

/// One write.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) what: Written,
}

impl Entry {
    fn cost(&self) -> usize {
        match &self.what {
            Written::Data(data) => data.len() + ENTRY,
            Written::Zeroes { .. } => ENTRY,
        }
    }

    pub(super) fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.offset < offset.saturating_add(len) && offset < self.offset.saturating_add(self.len)
    }
}

/// The writes, in the order in which they were answered.
#[derive(Debug, Default)]
pub(super) struct Unflushed {
    entries: VecDeque<Entry>,
    /// Number of the first entry.
    first: u64,
    /// What the entries cost, in bytes.
    cost: usize,
}

impl Unflushed {
    pub(super) fn push(&mut self, entry: Entry) {
        self.cost += entry.cost();
        self.entries.push_back(entry);
    }

    /// Number of the entry that will be pushed next: what a flush that is sent now covers ends before it.
    pub(super) fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// A flush that was sent when [`end`](Self::end) was `end` is answered.
    pub(super) fn flushed(&mut self, end: u64) {
        while self.first < end {
            let Some(entry) = self.entries.pop_front() else {
                break;
            };
            self.cost -= entry.cost();
            self.first += 1;
        }
    }

    /// The entry with this number, and its successors.
    pub(super) fn from(&self, number: u64) -> impl Iterator<Item = &Entry> {
        let skip = usize::try_from(number.saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.entries.iter().skip(skip)
    }

    /// Number of the first entry.
    pub(super) fn begin(&self) -> u64 {
        self.first
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    pub(super) fn clear(&mut self) {
        self.flushed(self.end());
    }
}
