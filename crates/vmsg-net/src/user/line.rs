// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who is next to send to the guest: deficit round robin with a lane for newcomers, as in
//! RFC 8290.
//!
//! A flow that has rested gets a short turn before those that have been sending all along, so
//! that a small flow beside many large ones waits for one turn and not for a round of them. So
//! that nobody makes a habit of it, a flow that was through with its short turn keeps a place
//! among the others and is a newcomer again only after a round.

use std::collections::VecDeque;

use super::net::Source;

/// What a newcomer may send, in bytes: a few segments, or one large one.
const SHORT: usize = 4096;

/// Where a flow is. Part of the flow, and changed by nobody but [`Line`] and
/// [`Line::turn`]'s callers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Place {
    /// Not in line.
    #[default]
    Out,
    /// In line, with something to send.
    Waiting,
    /// In line with nothing to send, after a turn as a newcomer.
    Resting,
}

/// A turn that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) source: Source,
    newcomer: bool,
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

    pub(super) fn len(&self) -> usize {
        self.newcomers.len() + self.others.len()
    }

    /// `source` has something to send.
    pub(super) fn join(&mut self, source: Source, place: &mut Place) {
        if *place == Place::Out {
            self.newcomers.push_back(source);
        }
        *place = Place::Waiting;
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

    /// Puts `slot` behind all others: it has more to send, or rests.
    pub(super) fn again(&mut self, slot: Slot) {
        self.others.push_back(slot.source);
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

impl Slot {
    /// What may be sent in this turn, in bytes, by a flow that has a debt of `debt`; `None`: the
    /// turn goes to paying it. `full` is what others than newcomers get.
    pub(super) fn budget(self, full: usize, debt: &mut usize) -> Option<usize> {
        let full = full.max(1);
        let share = if self.newcomer { full.min(SHORT) } else { full };
        if *debt >= share {
            *debt -= share;
            return None;
        }
        let budget = share - *debt;
        *debt = 0;
        Some(budget)
    }

    /// The place of a flow after a turn in which it sent all that it had. True: it is to be put
    /// back in line, with [`Line::again`].
    pub(super) fn done(self, line: &Line, place: &mut Place) -> bool {
        let rests = self.newcomer && !line.is_empty();
        *place = if rests { Place::Resting } else { Place::Out };
        rests
    }
}

#[cfg(test)]
#[path = "line_test.rs"]
mod tests;
