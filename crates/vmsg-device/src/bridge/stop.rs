// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What must end before the worker goes on: queues at work, memory in use.

use std::ops::Range;
use std::time::{Duration, Instant};

use vmsg_mem::{AddressSpace, WindowTable};
use vmsg_vhost_user::{F_PROTOCOL_FEATURES, Fault, Protocol, Region, Request};

use super::ring::Wanted;
use super::{Bridge, Resume, State, memory};

/// How long requests are waited for that a daemon has taken before it said that it had stopped.
pub(super) const DRAIN: Duration = Duration::from_secs(2);
/// All answers that something waits for may take as long together as so many at the most.
pub(super) const MOST_ANSWERS: u32 = 4;
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(2);

impl Bridge {
    /// Has the daemon stop queues.
    pub(super) fn begin_stop(&mut self, queues: Range<usize>) {
        let proto = self.offer.features & F_PROTOCOL_FEATURES != 0;
        for queue in queues {
            let (Some(ring), Ok(index)) = (self.rings.get_mut(queue), u16::try_from(queue)) else {
                continue;
            };
            ring.kick_due = false;
            if std::mem::take(&mut ring.live) {
                if proto {
                    self.ask(Request::EnableRing {
                        queue: index,
                        on: false,
                    });
                }
                self.ask(Request::GetRingBase { queue: index });
            }
        }
    }

    /// Has it stop all of them and forget the driver.
    pub(super) fn begin_reset(&mut self) {
        self.begin_stop(0..self.rings.len());
        if !std::mem::take(&mut self.told.features) {
            return;
        }
        self.told.inflight = false;
        self.told.driver_ok = false;
        if self.has(Protocol::STATUS) {
            self.ask(Request::SetStatus(0));
        }
        if self.has(Protocol::RESET_DEVICE) {
            self.ask(Request::ResetDevice);
        }
    }

    /// Has it see other memory.
    pub(super) fn begin_memory(&mut self, table: &WindowTable) {
        if self.told.memory.is_empty() {
            return;
        }
        let wanted = match self.regions(table) {
            Ok(wanted) => {
                let moving: Vec<usize> = (0..self.rings.len())
                    .filter(|queue| self.moves(*queue, &wanted))
                    .collect();
                if !moving.is_empty() && self.calls_anew() {
                    self.pause(0..self.rings.len());
                    self.leaving = true;
                    return;
                }
                for queue in moving {
                    self.pause(queue..queue + 1);
                }
                wanted
            }
            Err(why) => {
                if self.rings.iter().any(|ring| ring.live || ring.parked) {
                    self.fail(why);
                }
                self.begin_stop(0..self.rings.len());
                Vec::new()
            }
        };
        if self.rings.iter().any(|ring| ring.live) {
            self.replace_memory(wanted);
        } else if self.has(Protocol::CONFIGURE_MEM_SLOTS) {
            // What comes is told when it is needed.
            let told = self.told.memory.iter();
            let left = told.filter(|old| wanted.contains(old)).cloned().collect();
            self.replace_memory(left);
        }
    }

    /// Has the daemon stop queues that are to go on later.
    fn pause(&mut self, queues: Range<usize>) {
        for ring in &mut self.rings[queues.clone()] {
            ring.pausing = ring.live;
        }
        self.begin_stop(queues);
    }

    /// Whether a queue that the daemon works on cannot stay where it is when it has `wanted` for its memory.
    fn moves(&self, queue: usize, wanted: &[Region]) -> bool {
        let ring = &self.rings[queue];
        let Some(Wanted { start, .. }) = ring.wanted.as_ref().filter(|_| ring.live) else {
            return false;
        };
        if !memory::hold(wanted, start) {
            return true;
        }
        // Where regions go one by one, it would be nowhere for a moment, though it is in another one then.
        let stays = |region: &&Region| wanted.contains(region);
        self.has(Protocol::CONFIGURE_MEM_SLOTS) && {
            let stay: Vec<_> = self.told.memory.iter().filter(stays).cloned().collect();
            !memory::hold(&stay, start)
        }
    }

    /// Whether all that was begun has ended.
    pub(super) fn is_prepared(&mut self, now: Instant, space: AddressSpace<'_>) -> bool {
        let State::Up(link) = &self.state else {
            return true;
        };
        if !link.is_idle() {
            let time = MOST_ANSWERS * self.settings.patience;
            let late = self
                .preparing
                .is_some_and(|preparing| preparing.answered_by <= now);
            if late {
                let request = "all that it was asked";
                self.lost(now, &Fault::Silent { request, time }, space);
            }
            return late;
        }
        if self.resume != Resume::Record || !self.rings.iter().any(|ring| ring.is_draining(space)) {
            return true;
        }
        let late = self
            .preparing
            .is_none_or(|preparing| preparing.drained_by <= now);
        if late {
            let time = DRAIN;
            let request = "the end of the requests that it has taken";
            self.lost(now, &Fault::Silent { request, time }, space);
        }
        late
    }

    /// When the rings that drain are looked at again.
    pub(super) fn next_look_at_drain(&self) -> Option<Instant> {
        let draining = self.preparing.is_some()
            && self.resume == Resume::Record
            && self.rings.iter().any(|ring| ring.stopped_at.is_some());
        draining.then(|| Instant::now() + LOOK)
    }
}
