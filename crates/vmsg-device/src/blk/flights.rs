// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests that are under way.

use vmsg_mem::BusAddr;
use vmsg_queue::ChainHead;

use super::places::{self, Places};
use super::request::Range;

/// What kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        }
    }
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) queue: usize,
    pub(super) head: ChainHead,
    /// Where the byte of the status is.
    pub(super) status: BusAddr,
    /// The used length.
    pub(super) written: u32,
}

/// A request that the disk has.
#[derive(Debug)]
pub(super) struct Flight {
    /// `None`: nobody waits for it any more.
    pub(super) answer: Option<Answer>,
    pub(super) kind: Kind,
    /// Bytes read or written.
    pub(super) bytes: u64,
    /// What is to be done when this is done, the last one first.
    pub(super) then: Vec<Range>,
    /// The memory of its chain.
    pub(super) places: Places,
}

/// All of them, by tag. A tag is used again when the disk has told the request as completed, whatever has become of the queue
/// meanwhile: so no answer goes to the wrong request.
#[derive(Debug, Default)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
    /// Room for the places of more.
    spare: Vec<Places>,
    /// Requests of each queue that have an answer to come.
    of_queue: Vec<usize>,
}

impl Flights {
    /// None, for a device with so many queues.
    pub(super) fn new(queues: usize) -> Self {
        Self {
            of_queue: vec![0; queues],
            ..Self::default()
        }
    }

    /// The tag that [`insert`](Self::insert) will give.
    pub(super) fn next_tag(&self) -> u32 {
        match self.free.last() {
            Some(tag) => *tag,
            // A request for each descriptor of each queue at most, and those that were abandoned.
            None => u32::try_from(self.slots.len()).expect("fewer requests"),
        }
    }

    pub(super) fn insert(&mut self, flight: Flight) {
        if let Some(answer) = &flight.answer {
            self.of_queue[answer.queue] += 1;
        }
        match self.free.pop() {
            Some(tag) => self.slots[tag as usize] = Some(flight),
            None => self.slots.push(Some(flight)),
        }
    }

    pub(super) fn get_mut(&mut self, tag: u32) -> Option<&mut Flight> {
        self.slots.get_mut(tag as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, tag: u32) -> Option<Flight> {
        let mut flight = self.slots.get_mut(tag as usize)?.take()?;
        self.free.push(tag);
        self.give_back(std::mem::take(&mut flight.places));
        if let Some(answer) = &flight.answer {
            self.of_queue[answer.queue] -= 1;
        }
        Some(flight)
    }

    /// Room for the places of a request.
    pub(super) fn room(&mut self) -> Places {
        self.spare.pop().unwrap_or_default()
    }

    /// Room that is not needed any more.
    pub(super) fn give_back(&mut self, mut room: Places) {
        const FEW: usize = 32;
        const MOST: usize = 256;
        if room.capacity() <= FEW && self.spare.len() < MOST {
            room.clear();
            self.spare.push(room);
        }
    }

    /// Whether the disk has a request with memory in `gone`, whoever waits for it.
    pub(super) fn has_memory_in(&self, gone: &Places) -> bool {
        let flights = self.slots.iter().flatten();
        let mut all = flights.map(|flight| &flight.places);
        all.any(|places| places::meet(places, gone))
    }

    /// Requests that somebody waits for.
    pub(super) fn waiting(&self) -> usize {
        self.of_queue.iter().sum()
    }

    /// Of those, the ones of `queue`.
    pub(super) fn of_queue(&self, queue: usize) -> usize {
        self.of_queue.get(queue).copied().unwrap_or(0)
    }

    /// Nobody waits for the requests of `queue` any more.
    pub(super) fn abandon(&mut self, queue: usize) {
        if self.of_queue(queue) == 0 {
            return;
        }
        for flight in self.slots.iter_mut().flatten() {
            if flight.answer.is_some_and(|answer| answer.queue == queue) {
                flight.answer = None;
                flight.then.clear();
            }
        }
        self.of_queue[queue] = 0;
    }

    /// Forgets requests that the disk does not have, and that nobody waits for.
    pub(super) fn forget(&mut self, tags: &mut Vec<u32>) {
        for tag in tags.drain(..) {
            self.remove(tag);
        }
    }

    /// Nobody waits for anything any more.
    pub(super) fn abandon_all(&mut self) {
        for queue in 0..self.of_queue.len() {
            self.abandon(queue);
        }
    }
}
