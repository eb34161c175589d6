// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts that pass through here, where the driver has no eventfd of its own: which of them are passed on at once.
//!
//! A ring behind which there is something newly used is passed on at once, as many of them as the driver has made requests. All others have
//! told the driver nothing that it was not told before; they are passed on, too, but only so many in a second. So a daemon that rings
//! without end costs a bounded number of messages, and no interrupt is lost: the last ring is always followed by one.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::epoll;

use super::{Bridge, CALLS, Counters};
use crate::device::Io;

/// Between two rings behind which there is nothing new.
const PAUSE: Duration = Duration::from_millis(10);
/// So many of them are heard in a pause; then the daemon is not listened to until it is over.
const HEARD: u32 = 64;

/// The rings of one queue.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// The driver was told last, and what the used index was then.
    told: Option<(Instant, Option<u16>)>,
    /// The available index when it was looked at last.
    avail: u16,
    /// So many may be passed on at once.
    credit: u16,
    /// The driver is to be told then.
    due: Option<Instant>,
    /// Rings since it was told.
    heard: u32,
    /// The daemon is not listened to until then.
    deaf: bool,
}

/// What is to be done about a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ruling {
    /// The driver is told now.
    Now,
    /// It is told when that is due.
    Later,
    /// The same, and until then the daemon is not listened to.
    Deaf,
}

/// Where a queue stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) size: u16,
    pub(super) used: u16,
    pub(super) avail: u16,
}

impl Calls {
    /// The daemon has rung; `place` if it is known.
    pub(super) fn rung(&mut self, now: Instant, place: Option<Place>) -> Ruling {
        if self.deaf {
            return Ruling::Later;
        }
        let used = place.map(|place| place.used);
        if let Some(Place { size, avail, .. }) = place {
            // Each is for a request at least, and no more than the queue has entries are under way.
            let made = avail.wrapping_sub(self.avail);
            let before = if self.told.is_some() {
                self.credit
            } else {
                size
            };
            self.credit = before.saturating_add(made).min(size);
            self.avail = avail;
        }
        let Some((at, told)) = self.told else {
            self.credit = self.credit.saturating_sub(1);
            self.tell(now, used);
            return Ruling::Now;
        };
        if used.is_some() && used != told && self.credit > 0 {
            self.credit -= 1;
            self.tell(now, used);
            return Ruling::Now;
        }
        let due = at + PAUSE;
        if due <= now {
            self.tell(now, used);
            return Ruling::Now;
        }
        self.due = Some(due);
        self.heard += 1;
        self.deaf = self.heard >= HEARD;
        if self.deaf {
            Ruling::Deaf
        } else {
            Ruling::Later
        }
    }

    fn tell(&mut self, now: Instant, used: Option<u16>) {
        self.told = Some((now, used));
        self.due = None;
        self.heard = 0;
    }

    /// When the driver is to be told.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the driver is to be told now; then also whether the daemon is to be listened to again.
    fn is_due(&mut self, now: Instant, used: Option<u16>) -> Option<bool> {
        self.due.filter(|due| *due <= now)?;
        self.tell(now, used);
        Some(std::mem::take(&mut self.deaf))
    }
}

impl Bridge {
    /// The daemon has rung for `queue`.
    pub(super) fn is_called(&mut self, queue: usize, io: &mut Io<'_>) {
        let Some(ring) = self.rings.get_mut(queue) else {
            return;
        };
        let place = ring.place(io.space);
        match ring.calls.rung(io.now, place) {
            Ruling::Now => self.tell_driver(queue, io),
            Ruling::Later => {}
            // If it cannot be, it is heard in between.
            Ruling::Deaf => self.listen(queue, epoll::EventFlags::empty()),
        }
    }

    /// Tells the driver what is due.
    pub(super) fn call_late(&mut self, io: &mut Io<'_>) {
        for queue in 0..self.rings.len() {
            let ring = &mut self.rings[queue];
            if ring.calls.due.is_none_or(|due| due > io.now) {
                continue;
            }
            let used = ring.used_at(io.space);
            if ring.calls.is_due(io.now, used) == Some(true) {
                // First, so that what is rung from now on is heard. What was rung before is heard once more.
                self.listen(queue, epoll::EventFlags::IN);
            }
            self.tell_driver(queue, io);
        }
    }

    /// When [`call_late`](Self::call_late) has something to do.
    pub(super) fn call_due(&self) -> Option<Instant> {
        self.rings.iter().filter_map(|ring| ring.calls.due()).min()
    }

    fn listen(&self, queue: usize, flags: epoll::EventFlags) {
        if let Some(own) = &self.rings[queue].own_call {
            let data = epoll::EventData::new_u64(CALLS + queue as u64);
            let flags = flags | epoll::EventFlags::ET;
            let _ = epoll::modify(&self.epoll, own.as_fd(), data, flags);
        }
    }

    /// Interrupts the driver of `queue`.
    fn tell_driver(&self, queue: usize, io: &mut Io<'_>) {
        Counters::count(&self.counters.calls);
        match &self.rings[queue].call {
            // A register, which the daemon cannot ring itself.
            Some(call) => {
                let _ = call.ring();
            }
            None => io.used(queue),
        }
    }
}

#[cfg(test)]
#[path = "calls_test.rs"]
mod tests;
