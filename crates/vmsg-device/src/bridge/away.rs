// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Queues whose memory is not there.
//!
//! Virtual machine monitors take memory away for a moment and give it back (for the shadow of a ROM, as QEMU does it behind vfio-user), also
//! with a queue in it. Nothing is lost by that as long as nobody works on the queue, so it is taken from the daemon and given back to it
//! when its memory is there again. Only a driver that kicks such a queue waits for something: it hears of it if the memory stays away.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use vmsg_mem::{AddressSpace, Doorbell, WindowTable};

use super::ring::{Base, Ring};
use super::{Bridge, Resume, memory};

/// Kicks that are looked at in one turn.
const EVENTS: usize = 16;

/// The kicks of queues that are away: nobody else looks at them then.
#[derive(Debug)]
pub(super) struct Kicks(OwnedFd);

impl Kicks {
    pub(super) fn new() -> Result<Self, Errno> {
        epoll::create(epoll::CreateFlags::CLOEXEC).map(Self)
    }

    /// Looks at `kick` from now on; whether it was rung before is not told. Nothing is taken out of it: it is the driver's, and reading
    /// could block.
    fn add(&self, queue: usize, kick: &Doorbell, mut kicked: impl FnMut(usize)) {
        let Some(fd) = kick.eventfd() else {
            return;
        };
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        // Without it the driver hears nothing of a queue whose memory stays away.
        let _ = epoll::add(&self.0, fd, epoll::EventData::new_u64(queue as u64), flags);
        self.each(|other| {
            if other != queue {
                kicked(other);
            }
        });
    }

    fn remove(&self, kick: &Doorbell) {
        if let Some(fd) = kick.eventfd() {
            // It may not have been there.
            let _ = epoll::delete(&self.0, fd);
        }
    }

    /// Calls `kicked` for each queue that was kicked since the last time.
    fn each(&self, mut kicked: impl FnMut(usize)) {
        let mut room = [MaybeUninit::uninit(); EVENTS];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let events = epoll::wait(&self.0, &mut room, Some(&at_once));
        for event in events.map_or(&[][..], |(events, _)| &*events) {
            kicked(usize::try_from(event.data.u64()).unwrap_or(usize::MAX));
        }
    }
}

impl AsFd for Kicks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Bridge {
    /// Whether queues that go on elsewhere do so with a daemon that is called anew. libvhost-user keeps the addresses of queues that it
    /// has stopped, and gives up when more memory comes and they are not in what it has; and nothing is lost where requests are all that
    /// there is.
    pub(super) fn calls_anew(&self) -> bool {
        self.resume == Resume::Record && self.kind.reconnects
    }

    /// The memory is about to be `table`; `space` is what it was. All that had to stop for that has stopped.
    pub(super) fn settle(&mut self, now: Instant, table: &WindowTable, space: AddressSpace<'_>) {
        let mut trouble = None;
        for ring in &mut self.rings {
            if std::mem::take(&mut ring.pausing) {
                ring.parked = true;
                if let Err(why) = ring.pause(self.resume, space) {
                    trouble = Some(why);
                }
            }
        }
        if let Some(why) = trouble {
            self.fail(why);
        }
        if std::mem::take(&mut self.leaving) {
            self.hang_up();
        }
        let regions = self.regions(table).unwrap_or_default();
        for queue in 0..self.rings.len() {
            let Some(wanted) = &self.rings[queue].wanted else {
                continue;
            };
            if self.rings[queue].live || memory::hold(&regions, &wanted.start) {
                self.is_back(queue);
                continue;
            }
            self.rings[queue].away = true;
            self.watch_kick(queue, now);
            let ring = &mut self.rings[queue];
            if self.resume == Resume::Record && ring.has_more(space) {
                ring.kicked.get_or_insert(now);
            }
        }
    }

    /// A queue's memory is there, or the queue is not wanted any more.
    pub(super) fn is_back(&mut self, queue: usize) {
        let ring = &mut self.rings[queue];
        if std::mem::take(&mut ring.away) {
            ring.kicked = None;
            if let Some(kick) = &ring.kick {
                self.kicks.remove(kick);
            }
        }
    }

    /// Hears of kicks of a queue that is away.
    pub(super) fn watch_kick(&mut self, queue: usize, now: Instant) {
        let mut others = Vec::new();
        if let Some(kick) = &self.rings[queue].kick {
            self.kicks.add(queue, kick, |other| others.push(other));
        }
        for other in others {
            self.is_kicked_away(other, now);
        }
    }

    /// Looks at the kicks of queues that are away.
    pub(super) fn hear_kicks(&mut self, now: Instant) {
        let mut queues = Vec::new();
        self.kicks.each(|queue| queues.push(queue));
        for queue in queues {
            self.is_kicked_away(queue, now);
        }
    }

    /// A queue that is away was kicked.
    pub(super) fn is_kicked_away(&mut self, queue: usize, now: Instant) {
        let Some(ring) = self.rings.get_mut(queue).filter(|ring| ring.away) else {
            return;
        };
        ring.kicked.get_or_insert(now);
        // Once is enough.
        if let Some(kick) = &ring.kick {
            self.kicks.remove(kick);
        }
    }

    /// When [`check_away`](Self::check_away) has something to say.
    pub(super) fn away_until(&self) -> Option<Instant> {
        let kicked = self.rings.iter().filter_map(|ring| ring.kicked);
        let first = kicked
            .min()
            .filter(|_| !self.halted && self.running.is_some());
        first.map(|kicked| kicked + self.settings.away)
    }

    /// Looks for queues that were kicked and whose memory does not come back.
    pub(super) fn check_away(&mut self, now: Instant) {
        if self.away_until().is_none_or(|until| until > now) {
            return;
        }
        let away = self.settings.away;
        let over = |ring: &Ring| ring.kicked.is_some_and(|kicked| kicked + away <= now);
        if let Some(queue) = self.rings.iter().position(over) {
            self.unmapped = true;
            self.fail(format!(
                "queue {queue} was kicked and is not in the driver's memory any more"
            ));
        }
    }
}

impl Ring {
    /// The daemon has stopped working on it, and is to go on some time.
    ///
    /// # Errors
    /// Why it cannot.
    fn pause(&mut self, policy: Resume, space: AddressSpace<'_>) -> Result<(), String> {
        let stopped = self.stopped_at.take();
        let Some(wanted) = &self.wanted else {
            return Ok(());
        };
        let used = self.used_at(space);
        let base = match (policy, stopped, used) {
            // What it has taken it will not finish, and nobody has a note of it: that is done again.
            (Resume::InOrder, _, Some(used)) => Some(used),
            // All that it has taken is used: that was waited for.
            (Resume::Record, Some(base), Some(used)) if base == used => Some(base),
            // It knows what it has taken.
            (Resume::Never, Some(base), Some(used)) => {
                if !self.can_stand_at(base, used, space) {
                    return Err(format!(
                        "the daemon says that it has stopped at {base} in queue {}, where it cannot have been",
                        wanted.start.queue
                    ));
                }
                Some(base)
            }
            _ => None,
        };
        if let (Some(base), Some(wanted)) = (base, &mut self.wanted) {
            wanted.base = Base::At(base);
            wanted.recorded = false;
        }
        Ok(())
    }
}
