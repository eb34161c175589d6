// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of the daemon, and when.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use virtio_msg::{DeviceStatus, FeatureSet};
use vmsg_mem::{AddressSpace, WindowTable};
use vmsg_vhost_user::{
    Answer, Done, F_PROTOCOL_FEATURES, Fault, Offer, Protocol, Region, Request, RingAddresses,
};

use super::link::{Link, duplicate};
use super::ring::Base;
use super::{Bridge, CALLS, Counters, FIRST_PAUSE, Resume, State, memory, record};
use crate::device::Io;

impl Bridge {
    /// What of the driver's features the daemon is told.
    pub(super) fn forwarded_features(&self, features: &FeatureSet) -> u64 {
        self.kind.offered(features.low_u64()) & !self.settings.features
    }

    pub(super) fn has(&self, feature: Protocol) -> bool {
        self.offer.protocol.contains(feature)
    }

    pub(super) fn ask(&mut self, request: Request) {
        if let State::Up(link) = &mut self.state {
            link.ask(request);
        }
    }

    /// Goes on with whatever can go on now.
    pub(super) fn turn(&mut self, now: Instant, space: AddressSpace<'_>) {
        loop {
            match self.exchange(now) {
                Ok(()) => {}
                Err(fault) => {
                    self.lost(now, &fault, space);
                    return;
                }
            }
            let idle = matches!(&self.state, State::Up(link) if link.is_idle());
            if !idle || !self.advance(now, space) {
                return;
            }
        }
    }

    /// Sends, receives, and takes what was answered.
    fn exchange(&mut self, now: Instant) -> Result<(), Fault> {
        loop {
            let done = match &mut self.state {
                State::Down(_) => return Ok(()),
                State::Greeting(both) => {
                    let (link, greeting) = &mut **both;
                    link.transmit(now)?;
                    let Some(done) = link.receive()? else {
                        return Ok(());
                    };
                    if let Some(offer) = greeting.handle(done, link.front())? {
                        self.accept(now, offer)?;
                    }
                    continue;
                }
                State::Up(link) => {
                    link.transmit(now)?;
                    link.receive()?
                }
            };
            match done {
                Some(done) => self.answered(done)?,
                None => return Ok(()),
            }
        }
    }

    /// A daemon has come again.
    fn accept(&mut self, now: Instant, offer: Offer) -> Result<(), Fault> {
        let unfit = |why| Fault::Nonsense {
            request: "the first questions",
            why,
        };
        let has = offer.queues.filter(|_| !self.kind.queues_fixed);
        if has.is_some_and(|has| has < self.forwarded as u64) {
            return Err(unfit("it has fewer queues than before"));
        }
        if let (Some(config), None) = (&offer.config, &self.settings.config)
            && config.len() != self.config.len()
        {
            return Err(unfit("its configuration is not as long as before"));
        }
        let State::Greeting(both) = std::mem::replace(&mut self.state, State::Down(now)) else {
            return Ok(());
        };
        self.state = State::Up(Box::new(both.0));
        if let (Some(config), None) = (&offer.config, &self.settings.config) {
            self.take_config(config.clone());
        }
        self.offer = offer;
        self.arrived(now);
        if let Some(features) = self.running {
            let lacking = self.forwarded_features(&features) & !self.offer.features;
            if lacking != 0 {
                self.fail(format!(
                    "the daemon has come back without the features {lacking:#x}, which are in use"
                ));
            }
        }
        Ok(())
    }

    /// The configuration as the daemon has it now.
    fn take_config(&mut self, config: Vec<u8>) {
        let before = std::mem::replace(&mut self.config, config);
        self.fit_config();
        if before != self.config {
            Counters::count(&self.counters.config_changes);
            self.config_changed = true;
            self.wake();
        }
    }

    /// Has the configuration agree with the number of queues.
    pub(super) fn fit_config(&mut self) {
        let queues = u16::try_from(self.rings.len()).unwrap_or(u16::MAX);
        // virtio_blk_config: num_queues.
        if let (2, Some(place)) = (self.kind.id, self.config.get_mut(34..36)) {
            place.copy_from_slice(&queues.to_le_bytes());
        }
        // virtio_fs_config: num_request_queues, beside that for urgent ones.
        if let (26, Some(place)) = (self.kind.id, self.config.get_mut(36..40)) {
            place.copy_from_slice(&u32::from(queues.saturating_sub(1)).to_le_bytes());
        }
    }

    fn answered(&mut self, done: Done) -> Result<(), Fault> {
        let name = done.request.name();
        match (done.request, done.answer) {
            (Request::SetConfig { .. }, Answer::Refused(_)) => {
                // The driver reads what it is.
                self.config_due = true;
            }
            (Request::GetInflight { .. } | Request::SetInflight(_), Answer::Refused(code)) => {
                self.told.inflight_asked = false;
                self.do_without_record(&format!("the daemon refuses {name} (error {code})"));
            }
            (Request::SetInflight(_), _) => self.told.inflight_asked = false,
            (_, Answer::Refused(code)) => {
                return Err(Fault::Refused {
                    request: name,
                    code,
                });
            }
            (Request::GetRingBase { queue }, Answer::Base(base)) => {
                if let Some(ring) = self.rings.get_mut(usize::from(queue)) {
                    ring.stopped_at = Some(base);
                    ring.held = false;
                }
            }
            (Request::GetInflight { .. }, Answer::Inflight(inflight)) => {
                self.told.inflight_asked = false;
                if self.running.is_some() {
                    self.told.kept = Some(inflight);
                }
            }
            (Request::GetConfig { .. }, Answer::Config(config)) => {
                self.config_asked = false;
                if config.len() == self.config.len() {
                    self.take_config(config);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Hears what the daemon says by itself.
    pub(super) fn hear(&mut self, now: Instant, space: AddressSpace<'_>) {
        let link = match &mut self.state {
            State::Up(link) => &mut **link,
            // What is not read would have this polled again at once.
            State::Greeting(both) => &mut both.0,
            State::Down(_) => return,
        };
        let result = link.hear(now);
        let closed = link.is_channel_closed();
        if closed {
            let _ = rustix::event::epoll::delete(&self.epoll, link.channel());
        }
        match result {
            Ok(calls) => {
                self.config_due |= calls.config_changed;
                if let Some(id) = calls.refused {
                    Counters::count(&self.counters.refused_calls);
                    if self.is_logged(now) {
                        let path = self.settings.socket.display();
                        tracing::warn!(%path, id, "the daemon asks for something that is not done here");
                    }
                }
            }
            Err(fault) => self.lost(now, &fault, space),
        }
    }

    /// What has its time.
    pub(super) fn on_time(&mut self, now: Instant, space: AddressSpace<'_>) {
        let late = match &self.state {
            State::Down(_) if self.clinging.is_some() => Ok(()),
            State::Down(until) if *until <= now => {
                self.call(now, space);
                return;
            }
            State::Down(_) => Ok(()),
            _ => self.late(now),
        };
        if late.is_ok() {
            return;
        }
        // It may have been this side that was late, and the answer is there.
        self.turn(now, space);
        if let Err(fault) = self.late(now) {
            self.lost(now, &fault, space);
        }
    }

    /// Whether the daemon has taken too long for an answer.
    fn late(&self, now: Instant) -> Result<(), Fault> {
        match &self.state {
            State::Down(_) => Ok(()),
            State::Greeting(both) => both.0.check_time(now),
            State::Up(link) => link.check_time(now),
        }
    }

    /// Somebody has connected. Who was cut off is not listened to before the pause is over.
    pub(super) fn has_connected(&mut self, now: Instant) {
        if let (true, State::Down(until)) = (self.expecting, &mut self.state) {
            *until = now;
        }
    }

    /// Tries to reach the daemon.
    fn call(&mut self, now: Instant, space: AddressSpace<'_>) {
        let opened = Link::open(&self.settings, &self.kind);
        let listens = self.settings.listener.is_some();
        self.expecting = listens && matches!(opened, Err(Errno::AGAIN));
        if self.expecting {
            self.state = State::Down(now + self.settings.reconnect.max(FIRST_PAUSE));
            return;
        }
        let watched = opened.and_then(|both| self.watch_link(&both.0).map(|()| both));
        match watched {
            Ok(both) => self.state = State::Greeting(Box::new(both)),
            Err(error) => self.lost(now, &Fault::Os(error), space),
        }
    }

    /// Asks the daemon, which has nothing else to do, for what it has not done yet; true if there was something.
    fn advance(&mut self, now: Instant, space: AddressSpace<'_>) -> bool {
        if self.preparing.is_some() {
            return false;
        }
        if self.config_due && !self.config_asked {
            self.config_due = false;
            if self.has(Protocol::CONFIG) && self.settings.config.is_none() {
                self.config_asked = true;
                let len = u32::try_from(self.config.len()).unwrap_or(0);
                if len > 0 {
                    self.ask(Request::GetConfig { offset: 0, len });
                    return true;
                }
            }
        }
        let Some(features) = self.running.filter(|_| !self.halted) else {
            return false;
        };
        match self.bring_up(now, &features, space) {
            Ok(asked) => asked,
            Err(why) => {
                self.fail(why);
                false
            }
        }
    }

    fn bring_up(
        &mut self,
        now: Instant,
        features: &FeatureSet,
        space: AddressSpace<'_>,
    ) -> Result<bool, String> {
        let status = self.has(Protocol::STATUS);
        let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        if !self.told.features {
            self.told.features = true;
            let protocol = self.offer.features & F_PROTOCOL_FEATURES;
            let bits = self.forwarded_features(features) | protocol;
            if status {
                self.ask_status(begun);
            }
            self.ask(Request::SetFeatures(bits));
            if status {
                self.ask_status(begun | DeviceStatus::FEATURES_OK);
            }
            return Ok(true);
        }
        let waiting = |ring: &super::Ring| ring.wanted.is_some() && !ring.live && !ring.away;
        if self.rings.iter().any(waiting) {
            if self.give_memory()? || self.give_record() {
                return Ok(true);
            }
            for queue in 0..self.rings.len() {
                if waiting(&self.rings[queue]) {
                    self.give_ring(queue, space)?;
                }
            }
            if status && !self.told.driver_ok {
                self.told.driver_ok = true;
                let all = begun | DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK;
                self.ask_status(all);
            }
            if self.is_logged(now) {
                let path = self.settings.socket.display();
                tracing::debug!(%path, "the daemon has the queues");
            }
            return Ok(true);
        }
        let mut any = false;
        for queue in 0..self.rings.len() {
            if !self.rings[queue].live {
                continue;
            }
            if std::mem::take(&mut self.rings[queue].recall) {
                self.give_call(queue)?;
                any = true;
            }
            if std::mem::take(&mut self.rings[queue].rekick) {
                self.give_kick(queue)?;
                self.rings[queue].kick_due = true;
                any = true;
            }
        }
        if any {
            return Ok(true);
        }
        if self.rings.iter().any(|ring| ring.live) {
            // It has taken all that it was given.
            self.in_vain = 0;
        }
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            if ring.live && std::mem::take(&mut ring.kick_due) {
                ring.kick_at_start(self.kind.quiet == Some(queue), space);
            }
        }
        Ok(false)
    }

    /// Goes on without a record of what is in flight, as far as nothing is.
    pub(super) fn do_without_record(&mut self, why: &str) {
        self.no_record = true;
        self.told.inflight = false;
        self.told.kept = None;
        self.forget_records();
        for ring in &self.rings {
            let start = ring.wanted.as_ref().map(|wanted| &wanted.start);
            if let Some(start) = start
                && let Some(record) = &start.record
            {
                // Nobody keeps it from now on, and whoever goes on after us is not to believe it. It was fit to be begun.
                let _ = vmsg_queue::Inflight::forget(record.memory.ram(), start.config.size);
            }
        }
        if !std::mem::replace(&mut self.no_record_said, true) {
            let path = self.settings.socket.display();
            tracing::warn!(%path, why, "the daemon keeps no record of requests: if it ends with some under way, the driver has to start over");
        }
    }

    /// What is in the records is of no use to the daemon: nothing may be in flight, then.
    fn forget_records(&mut self) {
        let wanted = self.rings.iter_mut();
        for wanted in wanted.filter_map(|ring| ring.wanted.as_mut()) {
            if wanted.recorded && wanted.base != Base::At(0) {
                wanted.recorded = false;
                wanted.base = Base::InRing;
            }
        }
    }

    fn ask_status(&mut self, status: DeviceStatus) {
        let bits = u8::try_from(status.bits() & 0xff).unwrap_or(0);
        self.ask(Request::SetStatus(bits));
    }

    /// Gives the daemon the driver's memory; true if it has not all of it yet.
    fn give_memory(&mut self) -> Result<bool, String> {
        let wanted = self.regions(&self.table)?;
        if wanted.is_empty() {
            return Err("the driver has lent no memory that a daemon could map".to_owned());
        }
        let stays = self.rings.iter().any(|ring| ring.live || ring.parked);
        if wanted != self.told.memory && self.told.rings && !stays && self.kind.reconnects {
            // Of rings of a driver before, libvhost-user keeps the addresses, and must find them in whatever memory comes.
            self.hang_up();
            return Ok(true);
        }
        Ok(self.replace_memory(wanted))
    }

    /// The memory of `table` as this daemon can have it.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn regions(&self, table: &WindowTable) -> Result<Vec<Region>, String> {
        let whole = !self.has(Protocol::CONFIGURE_MEM_SLOTS);
        memory::regions(table, self.offer.regions, whole)
    }

    /// Has the daemon's memory be `wanted`; true if there is something to be done for it.
    pub(super) fn replace_memory(&mut self, wanted: Vec<Region>) -> bool {
        if wanted == self.told.memory {
            return false;
        }
        if self.has(Protocol::CONFIGURE_MEM_SLOTS) {
            let gone = self.told.memory.iter().filter(|old| !wanted.contains(old));
            let gone: Vec<_> = gone.cloned().collect();
            let mut new: Vec<_> = wanted
                .iter()
                .filter(|new| !self.told.memory.contains(new))
                .cloned()
                .collect();
            // With each of them libvhost-user looks for its queues: first those that have some.
            let has_queue = |region: &Region| {
                let mut wanted = self.rings.iter().filter_map(|ring| ring.wanted.as_ref());
                wanted.any(|wanted| memory::hold(std::slice::from_ref(region), &wanted.start))
            };
            new.sort_by_key(|region| !has_queue(region));
            for region in gone {
                self.ask(Request::RemoveRegion(region));
            }
            for region in new {
                self.ask(Request::AddRegion(region));
            }
        } else if !wanted.is_empty() {
            self.ask(Request::SetMemTable(wanted.clone()));
        }
        self.told.memory = wanted;
        true
    }

    /// Gives the daemon the memory where it notes what is in flight; true if something is to be done for that.
    fn give_record(&mut self) -> bool {
        if self.resume != Resume::Record
            || !self.has(Protocol::INFLIGHT_SHMFD)
            || self.told.inflight
            || self.no_record
        {
            return false;
        }
        let records: Vec<_> = self
            .rings
            .iter()
            .zip(0u16..)
            .filter_map(|(ring, index)| {
                let start = &ring.wanted.as_ref()?.start;
                Some((index, start.config.size, start.record.as_ref()?))
            })
            .collect();
        let wanted = self.rings.iter().filter(|ring| ring.wanted.is_some());
        let all = records.len() == wanted.count();
        let lent = record::region(&records).filter(|_| all);
        if lent.is_none() && self.told.kept.is_none() {
            self.forget_records();
            self.told.inflight_asked = true;
            let queues = u16::try_from(self.forwarded).unwrap_or(u16::MAX);
            self.ask(Request::GetInflight {
                queues,
                queue_size: self.queue_size,
            });
            return true;
        }
        let Some(inflight) = lent.or_else(|| self.told.kept.clone()) else {
            return true;
        };
        self.told.inflight = true;
        self.told.inflight_asked = true;
        self.ask(Request::SetInflight(inflight));
        true
    }

    /// Gives the daemon a ring.
    fn give_ring(&mut self, queue: usize, space: AddressSpace<'_>) -> Result<(), String> {
        let index = u16::try_from(queue).map_err(|_| "too many queues")?;
        let ring = &mut self.rings[queue];
        let Some(wanted) = &ring.wanted else {
            return Ok(());
        };
        let config = wanted.start.config;
        let resumed = wanted.start.resume.is_some();
        let quiet = self.kind.quiet == Some(queue);
        let recorded = wanted.recorded && self.told.inflight;
        let base = ring.begin_at(self.resume, recorded, space)?;
        if wanted.base == Base::InRing {
            Counters::count(&self.counters.queues_resumed);
        }
        self.told.rings = true;
        ring.live = true;
        ring.held = true;
        ring.ends.given(ring.used_at(space));
        // With kicks told by index, its driver may have had no reason to kick for what comes next.
        let used_before = ring.call_due || ring.parked || resumed;
        ring.must_kick |= base != 0 || (used_before && !quiet);
        ring.parked = false;
        ring.kick_due = true;
        (ring.recall, ring.rekick) = (false, false);
        self.ask(Request::SetRingSize {
            queue: index,
            size: config.size,
        });
        self.ask(Request::SetRingBase { queue: index, base });
        self.ask(Request::SetRingAddresses {
            queue: index,
            addresses: RingAddresses {
                desc: config.desc.0,
                used: config.device.0,
                avail: config.driver.0,
            },
        });
        let broken = duplicate(self.broken.as_fd()).map_err(|error| error.to_string())?;
        self.ask(Request::SetRingError {
            queue: index,
            file: Arc::new(broken),
        });
        self.give_call(queue)?;
        self.give_kick(queue)?;
        if self.offer.features & F_PROTOCOL_FEATURES != 0 {
            self.ask(Request::EnableRing {
                queue: index,
                on: true,
            });
        }
        Ok(())
    }

    /// Gives the daemon the eventfds of a ring.
    fn give_kick(&mut self, queue: usize) -> Result<(), String> {
        let words = |error: std::io::Error| format!("eventfds: {error}");
        let index = u16::try_from(queue).map_err(|_| "too many queues")?;
        let file = self.rings[queue].kick_file().map_err(words)?;
        self.ask(Request::SetRingKick { queue: index, file });
        Ok(())
    }

    fn give_call(&mut self, queue: usize) -> Result<(), String> {
        let words = |error: std::io::Error| format!("eventfds: {error}");
        let index = u16::try_from(queue).map_err(|_| "too many queues")?;
        let ring = &mut self.rings[queue];
        let call = match ring.call_file() {
            Some(call) => call.map_err(words)?,
            None => {
                if ring.own_call.is_none() {
                    let own = vmsg_mem::Doorbell::new().map_err(words)?;
                    self.watch_edges(own.as_fd(), CALLS + queue as u64)
                        .map_err(|error| words(error.into()))?;
                    self.rings[queue].own_call = Some(own);
                }
                let own = self.rings[queue].own_call.as_ref().expect("just made");
                Arc::new(duplicate(own.as_fd()).map_err(|error| words(error.into()))?)
            }
        };
        self.ask(Request::SetRingCall {
            queue: index,
            file: call,
        });
        Ok(())
    }

    /// Who worked on a queue before may have ended between using a request and saying so.
    pub(super) fn interrupt_after_resume(&mut self, io: &mut Io<'_>) {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            if ring.live && std::mem::take(&mut ring.call_due) {
                match &ring.call {
                    Some(call) => {
                        let _ = call.ring();
                    }
                    None => io.used(queue),
                }
            }
        }
    }
}
