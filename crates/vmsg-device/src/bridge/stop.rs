// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What must end before the worker goes on: queues at work, memory in use.

use std::ops::Range;
use std::time::{Duration, Instant};

use vmsg_mem::{AddressSpace, WindowTable};
use vmsg_vhost_user::{F_PROTOCOL_FEATURES, Fault, Protocol, Request};

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
        let live = self.rings.iter().any(|ring| ring.live);
        let wanted = memory::regions(table, self.offer.regions);
        let space = table.space();
        let lost = self.rings.iter().position(|ring| {
            let Some(wanted) = ring.wanted.as_ref().filter(|_| ring.live) else {
                return false;
            };
            vmsg_queue::DeviceQueue::resume(
                wanted.start.config,
                vmsg_queue::QueueFeatures::default(),
                space,
                0,
                0,
            )
            .is_err()
        });
        let lost = lost.or_else(|| {
            let wanted = wanted.as_ref().ok()?;
            self.ring_that_moves(wanted)
        });
        let wanted = match (wanted, lost) {
            (Ok(wanted), None) => wanted,
            (Err(why), _) => {
                self.fail(why);
                self.begin_stop(0..self.rings.len());
                Vec::new()
            }
            (Ok(wanted), Some(queue)) => {
                self.fail(format!(
                    "queue {queue} is not in the driver's memory any more"
                ));
                self.begin_stop(0..self.rings.len());
                wanted
            }
        };
        if live {
            self.replace_memory(wanted);
        } else if self.has(Protocol::CONFIGURE_MEM_SLOTS) {
            // What comes is told when it is needed.
            let told = self.told.memory.iter();
            let left = told.filter(|old| wanted.contains(old)).cloned().collect();
            self.replace_memory(left);
        }
    }

    /// A queue at work that lies in a region which goes, where regions go one by one: for a moment it would be nowhere.
    fn ring_that_moves(&self, wanted: &[vmsg_vhost_user::Region]) -> Option<usize> {
        if !self.has(Protocol::CONFIGURE_MEM_SLOTS) {
            return None;
        }
        let mut gone = self.told.memory.iter();
        let gone: Vec<_> = gone.by_ref().filter(|old| !wanted.contains(old)).collect();
        let lies_there = |addr: u64| {
            let mut gone = gone.iter();
            gone.any(|region| {
                addr.checked_sub(region.guest)
                    .is_some_and(|at| at < region.len)
            })
        };
        self.rings.iter().position(|ring| {
            let wanted = ring.wanted.as_ref().filter(|_| ring.live);
            wanted.is_some_and(|wanted| {
                let config = wanted.start.config;
                [config.desc, config.driver, config.device]
                    .iter()
                    .any(|addr| lies_there(addr.0))
            })
        })
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
