// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who is next to send to the guest: deficit round robin with a lane for newcomers, after
//! RFC 8290.
//!
//! A flow that has rested gets short turns before those that have been sending all along, so that
//! a small flow beside many large ones waits for the turn that is under way and not for a round of
//! all of them. So that nobody makes a habit of it, the first short turn leaves a mark behind
//! those that wait, and until the mark comes up, all short turns together are no more than one.

use std::collections::VecDeque;

use super::Turn;
use super::net::Source;

/// What a newcomer may send in a round, in bytes: a few segments, or one large one.
const SHORT: usize = 4096;
/// The least that counts as a turn: so that a debt, which is less than two packets, is paid soon.
const LEAST: usize = 2048;

/// Where a flow is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Not in line.
    #[default]
    Out,
    /// Among the newcomers.
    New,
    /// Among the newcomers once more, and its mark among the others.
    Renewed,
    /// Among the others.
    Waiting,
    /// With nothing to send; its mark is among the others.
    Resting,
}

/// What a flow has to do with the line.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    place: Place,
    /// Bytes sent beyond the share of the turns so far.
    debt: usize,
    /// Bytes that it may send as a newcomer before its mark comes up.
    short: usize,
}

impl Share {
    /// True if it is in line, be it with nothing to send.
    pub(super) fn is_in_line(&self) -> bool {
        self.place != Place::Out
    }

    /// True if it is in line with something to send.
    pub(super) fn waits(&self) -> bool {
        !matches!(self.place, Place::Out | Place::Resting)
    }
}

/// A turn that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) source: Source,
    newcomer: bool,
}

/// What may be sent in a turn, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    all: usize,
    left: usize,
    /// Sent beyond what was left.
    over: usize,
}

impl Budget {
    /// All is sent that may be; the last frame may have been more than was left.
    pub(super) const fn is_spent(&self) -> bool {
        self.left == 0
    }

    pub(super) const fn spend(&mut self, bytes: usize) {
        self.over += bytes.saturating_sub(self.left);
        self.left = self.left.saturating_sub(bytes);
    }
}

/// The line.
#[derive(Debug, Default)]
pub(super) struct Line {
    newcomers: VecDeque<Source>,
    others: VecDeque<Source>,
}

impl Line {
    pub(super) fn is_empty(&self) -> bool {
        self.newcomers.is_empty() && self.others.is_empty()
    }

    /// Places in it; nobody has more than two.
    pub(super) fn len(&self) -> usize {
        self.newcomers.len() + self.others.len()
    }

    /// `source` has something to send.
    pub(super) fn join(&mut self, source: Source, share: &mut Share) {
        match share.place {
            Place::Out => {
                share.short = SHORT;
                share.place = Place::New;
                self.newcomers.push_back(source);
            }
            Place::Resting if share.short > 0 => {
                share.place = Place::Renewed;
                self.newcomers.push_back(source);
            }
            Place::Resting => share.place = Place::Waiting,
            Place::New | Place::Renewed | Place::Waiting => {}
        }
    }

    /// Takes out who is next.
    pub(super) fn next(&mut self) -> Option<Slot> {
        let newcomer = self.newcomers.pop_front();
        let source = newcomer.or_else(|| self.others.pop_front())?;
        Some(Slot {
            source,
            newcomer: newcomer.is_some(),
        })
    }

    /// Begins the turn that `slot` is; `full` is what others than newcomers get. `None`: it has
    /// none, and what there is to be done about its place is done.
    pub(super) fn begin(&mut self, slot: Slot, share: &mut Share, full: usize) -> Option<Budget> {
        // Who is alone need not let anybody else pass.
        let alone = self.is_empty();
        let all = match (slot.newcomer, share.place) {
            (true, Place::New) if alone => full.max(LEAST),
            (true, Place::New | Place::Renewed) => share.short,
            (false, Place::Waiting) => full.max(LEAST),
            (false, Place::Resting) => {
                share.place = Place::Out;
                return None;
            }
            (false, Place::Renewed) => {
                share.place = Place::New;
                share.short = SHORT;
                return None;
            }
            // Nobody it was before.
            _ => return None,
        };
        if alone {
            share.debt = 0;
        }
        if share.debt >= all {
            share.debt -= all;
            if slot.newcomer {
                share.short = 0;
            }
            self.wait(slot, share);
            return None;
        }
        let all = all - share.debt;
        share.debt = 0;
        Some(Budget {
            all,
            left: all,
            over: 0,
        })
    }

    /// Ends the turn that `slot` was.
    pub(super) fn end(&mut self, slot: Slot, share: &mut Share, turn: Turn, budget: Budget) {
        if slot.newcomer {
            share.short = share.short.saturating_sub(budget.all - budget.left);
        }
        share.debt += budget.over;
        match turn {
            // Whoever asked puts it back.
            Turn::NoRoom => {}
            Turn::Again => self.wait(slot, share),
            Turn::Done => match (slot.newcomer, share.place) {
                (true, Place::Renewed) => share.place = Place::Resting,
                (true, Place::New) if !self.is_empty() => {
                    share.place = Place::Resting;
                    self.others.push_back(slot.source);
                }
                _ => share.place = Place::Out,
            },
        }
    }

    /// Puts it among the others, unless its mark is there.
    fn wait(&mut self, slot: Slot, share: &mut Share) {
        if share.place != Place::Renewed {
            self.others.push_back(slot.source);
        }
        share.place = Place::Waiting;
    }

    /// Puts back at the front who found no room.
    pub(super) fn back(&mut self, slot: Slot) {
        if slot.newcomer {
            self.newcomers.push_front(slot.source);
        } else {
            self.others.push_front(slot.source);
        }
    }

    /// Keeps only those that `waits` knows.
    pub(super) fn retain(&mut self, mut waits: impl FnMut(Source) -> bool) {
        self.newcomers.retain(|source| waits(*source));
        self.others.retain(|source| waits(*source));
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = &Source> {
        self.newcomers.iter().chain(&self.others)
    }
}

#[cfg(test)]
#[path = "line_test.rs"]
mod tests;
