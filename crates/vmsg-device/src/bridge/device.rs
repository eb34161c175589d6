// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bridge as its worker sees it.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{Timespec, epoll};
use virtio_msg::FeatureSet;
use vmsg_mem::{Doorbell, WindowTable};
use vmsg_vhost_user::{Protocol, Request};

use super::ring::is_same;
use super::{
    BROKEN, Bridge, CALLS, CHANNEL, Counters, HELD, KICKS, LINK, LISTENER, State, Told, WAKE,
    memory,
};
use crate::device::{
    Device, DeviceError, Identity, Io, Monitor, Passthrough, Progress, ReadOnly, Upcoming,
    VENDOR_ID,
};
use crate::worker::{Notice, QueueStart};

/// Events that are looked at in one turn.
const EVENTS: usize = 16;

/// Requests in line for a daemon, beyond which it is not told of more that the driver writes into the configuration.
const MOST_ASKED: usize = 64;

impl Device for Bridge {
    fn identity(&self) -> Identity {
        Identity {
            device_id: self.kind.id,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; self.rings.len()]
    }

    fn in_order(&self, _: usize) -> bool {
        // Then a record is lent, if there is one.
        self.resume != super::Resume::Record
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), ReadOnly> {
        let can = self.offer.protocol.contains(Protocol::CONFIG) && self.settings.config.is_none();
        let end = offset.checked_add(data.len());
        let place = end.and_then(|end| self.config.get_mut(offset..end));
        if place.as_deref() == Some(data) && !self.config_asked {
            // It is so.
            return Ok(());
        }
        let known = self.kind.writable.as_ref();
        let can = can
            && end.is_some_and(|end| {
                known.is_none_or(|known| known.contains(&offset) && end <= known.end)
            });
        let (State::Up(link), Some(place), Ok(offset)) = (
            &mut self.state,
            place.filter(|_| can),
            u32::try_from(offset),
        ) else {
            return Err(ReadOnly);
        };
        // The daemon is asked one at a time, and may be slower than the driver.
        if link.under_way() >= MOST_ASKED {
            return Err(ReadOnly);
        }
        place.copy_from_slice(data);
        // What is being read may be older than this.
        self.config_due |= self.config_asked;
        link.ask(Request::SetConfig {
            offset,
            data: data.to_vec(),
        });
        self.wake();
        Ok(())
    }

    fn check_features(&self, features: &FeatureSet) -> Result<(), String> {
        let lacking = self.forwarded_features(features) & !self.offer.features;
        if lacking != 0 {
            return Err(format!(
                "the daemon that is there now lacks the features {lacking:#x}, which it had before"
            ));
        }
        self.regions(&self.table).map(|_| ())
    }

    fn activate(&mut self, features: &FeatureSet) {
        self.running = Some(*features);
        self.wake();
    }

    fn reset(&mut self) {
        self.running = None;
        self.halted = false;
        self.trouble = None;
        self.preparing = None;
        self.leaving = false;
        self.unmapped = false;
        self.in_vain = 0;
        self.ends_in_vain = 0;
        self.record_in_vain = 0;
        self.no_record = false;
        self.told.kept = None;
        for queue in 0..self.rings.len() {
            self.is_back(queue);
        }
        for ring in &mut self.rings {
            if let Some(own) = ring.own_call.take() {
                // Daemons have it, too, so the system would go on watching it.
                let _ = epoll::delete(&self.epoll, &own);
            }
            let (live, held) = (ring.live, ring.held);
            *ring = super::Ring::default();
            // Should nobody have waited for its end.
            (ring.live, ring.held) = (live, held);
        }
        self.config_due = true;
        // Over what was there to do no daemon ends any more.
        if let State::Down(until) = &mut self.state {
            *until = (*until).min(Instant::now() + self.pause);
        }
        self.wake();
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        Some(Arc::<Counters>::clone(&self.counters))
    }

    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        // The daemon does.
        Ok(Progress::Idle)
    }

    fn prepare(&mut self, upcoming: Upcoming<'_>, io: &mut Io<'_>) -> bool {
        if self.preparing.is_none() {
            match upcoming {
                Upcoming::Reset => self.begin_reset(),
                Upcoming::QueueReset(queue) => self.begin_stop(queue..queue + 1),
                Upcoming::Memory(table) => self.begin_memory(table),
            }
            self.preparing = Some(super::Preparing {
                drained_by: io.now + super::stop::DRAIN,
                answered_by: io.now + super::stop::MOST_ANSWERS * self.settings.patience,
                for_good: matches!(upcoming, Upcoming::Reset),
            });
        }
        self.turn(io.now, io.space);
        if !self.is_prepared(io.now, io.space) || !self.lets_go(&upcoming) {
            return false;
        }
        if let Upcoming::Memory(table) = upcoming {
            self.settle(io.now, table, io.space);
        }
        self.preparing = None;
        for ring in &mut self.rings {
            ring.stopped_at = None;
        }
        self.wake();
        true
    }

    fn is_touching_memory(&self) -> bool {
        true
    }

    fn passthrough(&mut self) -> Option<&mut dyn Passthrough> {
        Some(self)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        let link = match &self.state {
            State::Down(_) if self.clinging.is_some() => None,
            State::Down(until) => Some(*until),
            State::Greeting(both) => both.0.deadline(),
            State::Up(link) => link.deadline(),
        };
        let drain = self.next_look_at_drain();
        let away = self.away_until();
        let calls = self.call_due();
        let all = link.into_iter().chain(drain).chain(away).chain(calls);
        all.min()
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut room = [MaybeUninit::uninit(); EVENTS];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let events = epoll::wait(&self.epoll, &mut room, Some(&at_once));
        let mut called = false;
        for event in events.map_or(&[][..], |(events, _)| &*events) {
            match event.data.u64() {
                WAKE => {
                    // Ours alone.
                    let _ = self.wake.drain();
                }
                LINK => {}
                HELD => self.has_let_go(io.now, io.space),
                LISTENER => self.has_connected(io.now),
                CHANNEL => called = true,
                KICKS => self.hear_kicks(io.now),
                BROKEN => {
                    if self.rings.iter().any(|ring| ring.live) {
                        self.fail("the daemon says that a queue is broken".to_owned());
                    }
                }
                queue => {
                    let queue = usize::try_from(queue - CALLS).unwrap_or(usize::MAX);
                    self.is_called(queue, io);
                }
            }
        }
        if called {
            self.hear(io.now, io.space);
        }
        self.on_time(io.now, io.space);
        self.check_away(io.now);
        self.call_late(io);
        self.turn(io.now, io.space);
        self.interrupt_after_resume(io);
        self.note_queues();
        if let Some(why) = self.trouble.take() {
            // Not as an error: the connection is still to be looked after.
            let unmapped = std::mem::take(&mut self.unmapped);
            io.notices.push(Notice::Broken { why, unmapped });
        }
        if std::mem::take(&mut self.config_changed) {
            io.config_changed(0, &self.config);
        }
        Ok(())
    }

    fn removed(&mut self) {
        self.state = State::Down(Instant::now());
        self.clinging = None;
        self.told = Told::default();
    }
}

impl Passthrough for Bridge {
    fn set_memory(&mut self, table: &Arc<WindowTable>) {
        self.table = Arc::clone(table);
        self.wake();
    }

    fn start_queue(&mut self, start: &QueueStart) -> Result<(), String> {
        let records = self.offer.protocol.contains(Protocol::INFLIGHT_SHMFD) && !self.no_record;
        if let Ok(regions) = self.regions(&self.table)
            && !memory::hold(&regions, start)
        {
            return Err(format!(
                "queue {} does not lie in memory that a daemon could map, each part in one window",
                start.queue
            ));
        }
        let (resume, forwarded) = (self.resume, self.forwarded);
        let ring = self.rings.get_mut(start.queue).ok_or("no such queue")?;
        if start.queue >= forwarded {
            // Nothing ever happens in it.
            return Ok(());
        }
        ring.start(start, resume, records, self.table.space())?;
        self.wake();
        Ok(())
    }

    fn set_notify(&mut self, queue: usize, kick: Option<&Doorbell>, call: Option<&Doorbell>) {
        if queue >= self.rings.len() {
            return;
        }
        let away = self.rings[queue].away;
        let kicked = self.rings[queue].kicked;
        self.is_back(queue);
        let ring = &mut self.rings[queue];
        let copy = |bell: Option<&Doorbell>| bell.and_then(|bell| bell.try_clone().ok());
        let (kick, call) = (copy(kick), copy(call));
        // Some daemons (QEMU's virtiofsd) end if a running ring gets its kick once more.
        ring.rekick |= ring.live && !is_same(ring.kick.as_ref(), kick.as_ref());
        ring.recall |= ring.live && !is_same(ring.call.as_ref(), call.as_ref());
        (ring.kick, ring.call) = (kick, call);
        if away {
            (ring.away, ring.kicked) = (true, kicked);
            self.watch_kick(queue, Instant::now());
        }
        self.wake();
    }

    fn kick(&mut self, queue: usize) {
        let Some(ring) = self.rings.get_mut(queue) else {
            return;
        };
        Counters::count(&self.counters.kicks);
        if ring.away {
            ring.must_kick = true;
            self.is_kicked_away(queue, Instant::now());
        } else if ring.kick.as_ref().and_then(Doorbell::eventfd).is_some() {
            // Its driver has kicked the daemon itself if it wanted to; who speaks for a driver says it of all queues when they start.
            ring.kick_due = true;
        } else if ring.live && !ring.kick_due {
            ring.ring_kick();
            return;
        } else {
            // When the daemon has it.
            ring.must_kick |= self.kind.quiet != Some(queue);
        }
        self.wake();
    }

    fn stop_queue(&mut self, queue: usize) {
        if queue < self.rings.len() {
            self.is_back(queue);
            let ring = &mut self.rings[queue];
            ring.wanted = None;
            ring.parked = false;
        }
    }
}
