// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bits that tell what a doorbell was rung for.

use super::{Layout, Side};
use crate::QueueMemory;

/// The notification words of both sides: of each `tx`, which it toggles to notify, `rx`, what it has seen of the other side's `tx`,
/// and perhaps a mask. A bit is pending where `rx` and the other side's `tx` differ.
#[derive(Debug)]
pub struct Notifications<M> {
    memory: M,
    own: usize,
    theirs: usize,
    words: usize,
    masked: bool,
}

impl<M: QueueMemory> Notifications<M> {
    /// Those of `layout`, if it has some; `memory` begins with the layout.
    pub fn new(memory: M, layout: &Layout, side: Side) -> Option<Self> {
        let (own, theirs) = match side {
            Side::Device => (Side::Device, Side::Driver),
            Side::Driver => (Side::Driver, Side::Device),
        };
        let notifications = Self {
            own: layout.notification_area(own)?,
            theirs: layout.notification_area(theirs)?,
            words: usize::from(layout.notifications()),
            masked: layout.is_masked(),
            memory,
        };
        (notifications.memory.len() >= layout.len()).then_some(notifications)
    }

    /// How many bits there are.
    pub const fn bits(&self) -> usize {
        self.words * 64
    }

    /// Where in a part (0 `tx`, 1 `rx`, 2 mask) the 32 bits lie that contain `bit`.
    fn place(&self, part: usize, bit: usize) -> usize {
        part * self.words * 8 + bit / 32 * 4
    }

    /// Makes `bit` pending for the other side. True if it has to be rung: the bit was not pending, and is not masked.
    pub fn raise(&mut self, bit: usize) -> bool {
        if bit >= self.bits() {
            return false;
        }
        let flag = 1 << (bit % 32);
        let sent = self.memory.load_relaxed(self.own + self.place(0, bit));
        let seen = self.memory.load_acquire(self.theirs + self.place(1, bit));
        if (sent ^ seen) & flag != 0 {
            return false;
        }
        self.memory
            .store_release(self.own + self.place(0, bit), sent ^ flag);
        let mask = match self.masked {
            true => self.memory.load_acquire(self.theirs + self.place(2, bit)),
            false => 0,
        };
        mask & flag == 0
    }

    /// Takes the pending bits of word `word` of 64.
    pub fn take(&mut self, word: usize) -> u64 {
        if word >= self.words {
            return 0;
        }
        let mut pending = 0;
        for half in [1, 0] {
            let bit = word * 64 + half * 32;
            let sent = self.memory.load_acquire(self.theirs + self.place(0, bit));
            let seen = self.memory.load_relaxed(self.own + self.place(1, bit));
            if sent != seen {
                self.memory
                    .store_release(self.own + self.place(1, bit), sent);
            }
            pending = pending << 32 | u64::from(sent ^ seen);
        }
        pending
    }

    /// Sets all words of this side to 0, for a beginning.
    pub fn clear(&mut self) {
        let parts = if self.masked { 3 } else { 2 };
        for at in (0..parts * self.words * 8).step_by(4) {
            self.memory.store_relaxed(self.own + at, 0);
        }
    }
}
