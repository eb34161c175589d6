// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue: what the driver wants of it, and what the daemon has of it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use vmsg_mem::{AddressSpace, Doorbell};
use vmsg_queue::{DeviceQueue, QueueFeatures};

use super::Resume;
use super::calls::{Calls, Place};
use super::link::duplicate;
use super::vain::Ends;
use crate::worker::{QueueStart, Resume as From};

/// Where a queue begins when the daemon gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// At this index.
    At(u16),
    /// Where the used ring stands then: it was in use before.
    InRing,
}

/// What the driver has set up.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) start: QueueStart,
    pub(super) base: Base,
    /// What is in flight stands in the record.
    pub(super) recorded: bool,
}

/// One queue.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) wanted: Option<Wanted>,
    /// What the driver rings and waits for.
    pub(super) kick: Option<Doorbell>,
    pub(super) call: Option<Doorbell>,
    /// In their place, where the driver has no eventfds.
    pub(super) own_kick: Option<Doorbell>,
    pub(super) own_call: Option<Doorbell>,
    /// The daemon works on it, as far as it is asked to.
    pub(super) live: bool,
    /// The eventfd for interrupts of a live ring, and that for kicks, is another one than the daemon's.
    pub(super) recall: bool,
    pub(super) rekick: bool,
    /// When the daemon has it, it is to be looked whether it must be kicked; it must; and the driver is to be interrupted, too.
    pub(super) kick_due: bool,
    pub(super) must_kick: bool,
    pub(super) call_due: bool,
    /// Where the daemon has stopped.
    pub(super) stopped_at: Option<u16>,
    /// The daemon is to stop for a while, and then to go on.
    pub(super) pausing: bool,
    /// The daemon that is there had it, and is to have it again.
    pub(super) parked: bool,
    /// Its memory is not there.
    pub(super) away: bool,
    /// Since when it is kicked without its memory being there.
    pub(super) kicked: Option<Instant>,
    /// The daemon has it, and has not said that it has stopped.
    pub(super) held: bool,
    /// What the daemon has rung by `own_call`.
    pub(super) calls: Calls,
    /// How its daemons have ended.
    pub(super) ends: Ends,
}

/// Whether both are copies of one eventfd, as far as the kernel tells (`eventfd-id`, since Linux 5.2).
pub(super) fn is_same(one: Option<&Doorbell>, other: Option<&Doorbell>) -> bool {
    let (Some(one), Some(other)) = (one, other) else {
        return one.is_none() && other.is_none();
    };
    let id = |bell: &Doorbell| {
        let fd = bell.eventfd()?.as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
        let mut lines = text.lines();
        let id = lines.find_map(|line| line.strip_prefix("eventfd-id:"))?;
        id.trim().parse::<u64>().ok()
    };
    id(one).is_some_and(|one| id(other) == Some(one))
}

impl Ring {
    /// Takes what the driver wants.
    ///
    /// # Errors
    /// Why the queue cannot go on where it is to.
    pub(super) fn start(
        &mut self,
        start: &QueueStart,
        policy: Resume,
        records: bool,
        space: AddressSpace<'_>,
    ) -> Result<(), String> {
        let queue = start.queue;
        let failed = |error: vmsg_queue::QueueError| format!("queue {queue}: {error}");
        let features = QueueFeatures::from_bits(start.features.low_u64());
        let used = DeviceQueue::read_used_index(start.config, space).map_err(failed)?;
        let base = match start.resume {
            None => Base::At(0),
            Some(From::At { avail, used }) if avail == used => Base::At(avail),
            // A queue that is found at its beginning is a new one.
            Some(From::AsFound) if used == 0 => Base::At(0),
            Some(_) => Base::InRing,
        };
        // Whether it lies in the driver's memory.
        let begin = if base == Base::At(0) { 0 } else { used };
        let mut ring =
            DeviceQueue::resume(start.config, features, space, begin, begin).map_err(failed)?;
        let mut recorded = false;
        if policy == Resume::Record
            && let Some(record) = start.record.as_ref().filter(|_| records)
        {
            let size = start.config.size;
            let memory = record.memory.ram();
            let begun = vmsg_queue::Inflight::is_new(memory, size).map_err(failed)?;
            if !record.resume {
                vmsg_queue::Inflight::begin(memory, size).map_err(failed)?;
            } else if begun {
                vmsg_queue::Inflight::resume(memory, size, used).map_err(failed)?;
            }
            recorded = record.resume && !begun;
        }
        if base != Base::At(0) {
            match policy {
                Resume::Never => {
                    return Err(format!(
                        "queue {queue} was in use before, and what its daemon knew is lost"
                    ));
                }
                Resume::Record if !recorded && ring.available(space).map_err(failed)? > 0 => {
                    return Err(
                        "requests may be in flight, and there is no record of them".to_owned()
                    );
                }
                Resume::Record | Resume::InOrder => {}
            }
        }
        self.wanted = Some(Wanted {
            start: start.clone(),
            base,
            recorded,
        });
        Ok(())
    }

    /// The index at which the daemon is to begin.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn begin_at(
        &self,
        policy: Resume,
        has_record: bool,
        space: AddressSpace<'_>,
    ) -> Result<u16, String> {
        let Some(wanted) = &self.wanted else {
            return Ok(0);
        };
        let config = wanted.start.config;
        let failed = |error| format!("queue {}: {error}", wanted.start.queue);
        match wanted.base {
            Base::At(index) => Ok(index),
            Base::InRing => {
                let used = DeviceQueue::read_used_index(config, space).map_err(failed)?;
                let features = QueueFeatures::from_bits(wanted.start.features.low_u64());
                let mut ring =
                    DeviceQueue::resume(config, features, space, used, used).map_err(failed)?;
                if policy != Resume::InOrder
                    && !has_record
                    && ring.available(space).map_err(failed)? > 0
                {
                    return Err(
                        "requests may be in flight, and there is no record of them".to_owned()
                    );
                }
                Ok(used)
            }
        }
    }

    /// Where the queue stands if all that the driver has made available is used.
    pub(super) fn idle_at(&self, space: AddressSpace<'_>) -> Option<u16> {
        let used = self.used_at(space)?;
        (self.available_from(used, used, space)? == 0).then_some(used)
    }

    /// The used index that the driver sees.
    pub(super) fn used_at(&self, space: AddressSpace<'_>) -> Option<u16> {
        let start = &self.wanted.as_ref()?.start;
        DeviceQueue::read_used_index(start.config, space).ok()
    }

    /// How much is available from `avail` on, where the used index is `used`; `None` where that cannot be.
    fn available_from(&self, avail: u16, used: u16, space: AddressSpace<'_>) -> Option<u16> {
        let start = &self.wanted.as_ref()?.start;
        let features = QueueFeatures::from_bits(start.features.low_u64());
        let ring = DeviceQueue::resume(start.config, features, space, avail, used);
        ring.ok()?.available(space).ok()
    }

    /// Where it stands, if it is there and can stand so.
    pub(super) fn place(&self, space: AddressSpace<'_>) -> Option<Place> {
        let size = self.wanted.as_ref()?.start.config.size;
        let used = self.used_at(space)?;
        let avail = used.wrapping_add(self.available_from(used, used, space)?);
        Some(Place { size, used, avail })
    }

    /// Whether somebody who has taken all before `base` and used all before `used` can have worked on it.
    pub(super) fn can_stand_at(&self, base: u16, used: u16, space: AddressSpace<'_>) -> bool {
        self.available_from(base, used, space).is_some()
    }

    /// Whether the driver has made something available that is not used.
    pub(super) fn has_more(&self, space: AddressSpace<'_>) -> bool {
        self.used_at(space)
            .and_then(|used| self.available_from(used, used, space))
            .is_some_and(|available| available > 0)
    }

    /// Whether what the daemon took before it stopped is not all used.
    pub(super) fn is_draining(&self, space: AddressSpace<'_>) -> bool {
        let (Some(base), Some(wanted)) = (self.stopped_at, &self.wanted) else {
            return false;
        };
        DeviceQueue::read_used_index(wanted.start.config, space).is_ok_and(|used| used != base)
    }

    /// The eventfd that the driver kicks by, or one in its place.
    pub(super) fn kick_file(&mut self) -> std::io::Result<Arc<OwnedFd>> {
        if let Some(fd) = self.kick.as_ref().and_then(Doorbell::eventfd) {
            return Ok(Arc::new(duplicate(fd)?));
        }
        let own = match &mut self.own_kick {
            Some(own) => own,
            none => none.insert(Doorbell::new()?),
        };
        Ok(Arc::new(duplicate(own.as_fd())?))
    }

    /// The eventfd that the driver waits for; `None`: it has none.
    pub(super) fn call_file(&self) -> Option<std::io::Result<Arc<OwnedFd>>> {
        let fd = self.call.as_ref().and_then(Doorbell::eventfd)?;
        Some(duplicate(fd).map(Arc::new).map_err(Into::into))
    }

    /// Kicks the daemon, which has the ring now, if it cannot have been kicked for all that is there: of a queue that was in use before it may
    /// have been the last daemon, and some take kicks out of the eventfd before the ring is enabled. A queue that was never used and is
    /// empty is left alone, and with `quiet` one that its driver has not kicked by a message.
    pub(super) fn kick_at_start(&mut self, quiet: bool, space: AddressSpace<'_>) {
        let must = std::mem::take(&mut self.must_kick);
        if must || (!quiet && self.has_more(space)) {
            self.ring_kick();
        }
    }

    /// Kicks the daemon.
    pub(super) fn ring_kick(&self) {
        let kick = match &self.kick {
            Some(kick) if kick.eventfd().is_some() => Some(kick),
            _ => self.own_kick.as_ref(),
        };
        if let Some(kick) = kick {
            // Full: then the daemon has not looked yet. Stuck: somebody has made it so, whose loss it is.
            let _ = kick.ring();
        }
    }
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod tests;
