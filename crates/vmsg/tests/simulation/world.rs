// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest, session, bus, host and worker in one thread, with a seeded
//! scheduler and a virtual clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use virtio_msg::{Instant, QueueIndex};
use vmsg_bus::StaticRam;
use vmsg_device::device::Device;
use vmsg_device::host::Peer;
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_proxy::session::{Event, Op, OpError, OpId, Options, ResetReason, Session, Target};

#[path = "iommu.rs"]
mod iommu;

use iommu::Change;

use crate::disk::{Disk, Platter};
use crate::echo::{Echo, QUEUES};
use crate::guest::{BASE, Guest, Habits, Memory, Scattered};
use crate::line::{Bus, Line};
use crate::process::{HostProcess, SLOT, number};
use crate::random::Random;
use crate::setting::{Faults, Kind, Outcome, Setting};
use crate::wire::{Traffic, Wire};

/// Bytes of the longest message.
pub(crate) const MESSAGE: usize = 320;

fn session(bus: Bus, target: &Target) -> Session {
    let mut session = Session::new(target.clone(), Options::default());
    if bus == Bus::Common {
        session.set_places(Arc::new(Scattered));
    }
    session
}

pub(crate) struct World<'m> {
    random: Random,
    faults: Faults,
    setting: Setting,
    memory: &'m Memory,
    platter: Platter,
    wire: Traffic,
    target: Target,
    now: Instant,
    clock: std::time::Instant,
    session: Session,
    guest: Guest<'m>,
    pub(crate) process: Option<HostProcess>,
    pub(crate) linked: bool,
    pub(crate) line: Line,
    waiting_for: Option<OpId>,
    /// Windows on their way.
    changes: BTreeMap<OpId, Change>,
    /// What is waited for is the end of the last driver, no step of the set-up.
    releasing: bool,
    /// Nothing new is asked for.
    pub(crate) resting: bool,
    epoch: u64,
    outcome: Outcome,
    /// Why something was refused.
    pub(crate) reasons: Vec<String>,
    /// Turns in which the guest has worked with its device.
    pub(crate) traffic: usize,
    /// Messages delivered to the host, and to the driver.
    pub(crate) delivered: [usize; 2],
    /// Something has happened.
    pub(crate) moved: bool,
}

impl<'m> World<'m> {
    pub(crate) fn new(seed: u64, faults: Faults, setting: Setting, memory: &'m Memory) -> Self {
        let mut random = Random::new(seed);
        let numbered = setting.bus == Bus::BareR1 || (random.chance(1, 2) && !faults.unplugs);
        let target = if numbered {
            Target::Number(number(setting.bus))
        } else {
            Target::Name("device".to_owned())
        };
        let habits = Habits {
            eventfds: setting.eventfds,
            keeps_inflight: setting.keeps_inflight,
            in_order: setting.kind != Kind::Disk,
            frames: setting.kind == Kind::Net,
            iommu: setting.iommu,
        };
        Self {
            random,
            faults,
            setting,
            memory,
            platter: Platter::default(),
            wire: Traffic::default(),
            now: Instant(0),
            clock: std::time::Instant::now(),
            session: session(setting.bus, &target),
            target,
            guest: Guest::new(memory, habits),
            process: None,
            linked: false,
            line: Line::new(setting.bus),
            waiting_for: None,
            changes: BTreeMap::new(),
            releasing: false,
            resting: false,
            epoch: 0,
            outcome: Outcome::default(),
            reasons: Vec::new(),
            traffic: 0,
            delivered: [0; 2],
            moved: false,
        }
    }

    /// Lets chance decide for `steps` steps, then lets everything come to rest
    /// and checks that the guest got all it asked for.
    pub(crate) fn run(mut self, steps: usize) -> Outcome {
        for _ in 0..steps {
            self.step();
        }
        self.faults = Faults::default();
        self.resting = true;
        // Far more than any recovery takes: whoever needs more hangs.
        for _ in 0..200_000 {
            if self.is_at_rest() {
                self.guest.check_all_hidden();
                self.outcome.completed = self.guest.completed;
                self.outcome.replays = self.session.counters().replays;
                return self.outcome;
            }
            self.step();
        }
        panic!("no rest: {}", self.story());
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        !self.releasing
            && self.session.is_ready()
            && self.guest.is_set_up()
            && self.guest.outstanding() == 0
            && self.changes.is_empty()
            && self.guest.back.is_empty()
    }

    fn step(&mut self) {
        match self.random.below(1000) {
            0..2 if self.faults.kills => self.kill(),
            2..5 if self.faults.reboots && self.guest.is_set_up() => self.reboot(),
            5..9 if self.faults.unplugs => self.unplug(),
            9..13 if self.faults.cuts => self.unlink(),
            0..100 => self.front(),
            100..250 if !self.resting => self.request(),
            250..450 => self.deliver_to_host(),
            450..650 => self.deliver_to_driver(),
            650..800 => self.work(),
            800..950 => self.reply(),
            _ => self.pass_time(),
        }
        self.gather();
    }

    pub(crate) fn kill(&mut self) {
        if self.process.take().is_some() {
            self.outcome.kills += 1;
            self.unlink();
            self.session.handle_host_ended(self.now);
        }
    }

    /// The operator removes the device.
    fn unplug(&mut self) {
        let now = self.now;
        if let Some(HostProcess {
            host, unplugged, ..
        }) = &mut self.process
            && host.remove_device(now, "device").is_some()
        {
            *unplugged = true;
            self.outcome.unplugs += 1;
        }
    }

    /// And adds another one, when the place of the last is free.
    fn plug(&mut self) {
        let Some(process) = self.process.as_mut().filter(|process| process.unplugged) else {
            return;
        };
        if let Some((worker, slot)) = process.host.poll_freed() {
            assert_eq!((worker, slot), (0, SLOT), "there is but one");
            process.unplugged = false;
            let device = self.device();
            let process = self.process.as_mut().expect("it is there");
            let added = process.host.add_device("device", None, 0, SLOT, device);
            added.expect("there are numbers, and the name is free");
        }
    }

    fn unlink(&mut self) {
        if std::mem::take(&mut self.linked) {
            self.session.handle_link_down(self.now);
        }
        self.line.clear();
        let now = self.now;
        if let Some(HostProcess { host, conn, .. }) = &mut self.process
            && let Some(conn) = conn.take()
        {
            host.disconnect(now, conn);
        }
    }

    fn reboot(&mut self) {
        self.outcome.reboots += 1;
        self.start_over();
    }

    /// The guest lets go of the device; when that is done, it begins anew.
    pub(crate) fn start_over(&mut self) {
        self.releasing = true;
        self.guest.check_all_hidden();
        self.waiting_for = Some(self.session.submit(self.now, Op::Release));
    }

    /// The next step of the device's set-up, when the one before is done.
    pub(crate) fn front(&mut self) {
        if self.waiting_for.is_none()
            && let Some(mut op) = self.guest.steps.last().cloned()
        {
            if matches!(op, Op::SetFeatures(_)) {
                self.guest.device_is_reset();
            }
            // Not every bus offers all that the device does.
            if let (Op::SetFeatures(features), Some(facts)) = (&mut op, self.session.device()) {
                *features = features.intersection(&facts.offered);
            }
            // The device of a front end before may have moved until its reset.
            if let Op::SetQueue(queue, setup) = &mut op {
                setup.resume = self.guest.resume(queue.to_usize());
            }
            self.waiting_for = Some(self.session.submit(self.now, op));
        }
    }

    fn request(&mut self) {
        let queue = self.random.below(QUEUES);
        self.ask(queue);
    }

    pub(crate) fn is_set_up(&self) -> bool {
        !self.releasing && self.guest.is_set_up()
    }

    pub(crate) fn completed(&self) -> u64 {
        self.guest.completed
    }

    /// The guest asks for something, if it can and there is room.
    pub(crate) fn ask(&mut self, queue: usize) {
        if !self.is_set_up() {
            return;
        }
        if self.setting.iommu {
            if let Some(slot) = self.guest.take_room(queue) {
                self.show(queue, slot);
            }
        } else if self.guest.submit(queue) {
            self.kick(queue);
        }
    }

    fn kick(&mut self, queue: usize) {
        match &self.guest.eventfds {
            Some(_) => {
                if let Some(HostProcess {
                    worker, watched, ..
                }) = &mut self.process
                    && watched.0.iter().any(|(_, index)| *index == queue)
                {
                    worker.kick(SLOT, queue);
                }
            }
            None => self
                .session
                .kick(QueueIndex(u32::try_from(queue).expect("few queues"))),
        }
    }

    /// Whether the device host has something to do.
    pub(crate) fn works(&self) -> bool {
        self.process
            .as_ref()
            .is_some_and(|HostProcess { worker, .. }| {
                let due = worker.next_timeout();
                worker.has_work() || due.is_some_and(|due| due <= self.clock)
            })
    }

    /// Lets time pass to where something is due.
    pub(crate) fn wait(&mut self) {
        let due = self.session.poll_timeout();
        self.now = due.map_or(self.now, |due| due.max(self.now));
        self.session.handle_timeout(self.now);
    }

    /// The process with the session ends; the front end sets the next one up.
    pub(crate) fn kill_proxy(&mut self) {
        self.unlink();
        // Nobody has answered: a buffer that was to be shown is not, one that was to be hidden is seen.
        for (
            _,
            Change {
                queue, slot, show, ..
            },
        ) in std::mem::take(&mut self.changes)
        {
            if show {
                self.guest.give_back(queue, slot);
            } else {
                self.guest.back.push((queue, slot));
            }
        }
        self.session = session(self.setting.bus, &self.target);
        self.waiting_for = None;
        if std::mem::take(&mut self.releasing) {
            // What it had lent is known to be free when the device is claimed again, and no sooner.
            self.guest.boot_later();
        } else {
            self.guest.set_up_again();
        }
    }

    /// Where everybody stands.
    pub(crate) fn story(&self) -> String {
        format!(
            "ready {}, {} steps left, {} requests outstanding, status {}, {:?}, counters {:?}",
            self.session.is_ready(),
            self.guest.steps.len(),
            self.guest.outstanding(),
            self.session.status(),
            self.reasons,
            self.session.counters(),
        )
    }

    pub(crate) fn deliver_to_host(&mut self) {
        let Some((bytes, fds)) = self.line.for_host() else {
            return;
        };
        self.moved = true;
        self.delivered[0] += 1;
        if self.faults.drops && self.random.chance(1, 60) {
            self.outcome.dropped += 1;
            return;
        }
        let twice = self.faults.duplicates && fds.is_empty() && self.random.chance(1, 40);
        let now = self.now;
        if let Some(HostProcess {
            host,
            conn: Some(conn),
            ..
        }) = &mut self.process
        {
            if twice {
                host.handle_message(now, *conn, &bytes, Vec::new());
            }
            host.handle_message(now, *conn, &bytes, fds);
        }
    }

    pub(crate) fn deliver_to_driver(&mut self) {
        let Some(bytes) = self.line.for_driver() else {
            return;
        };
        self.moved = true;
        self.delivered[1] += 1;
        if self.faults.drops && self.random.chance(1, 60) {
            self.outcome.dropped += 1;
            return;
        }
        if self.faults.duplicates && self.random.chance(1, 40) {
            self.session.handle_message(self.now, &bytes);
        }
        self.session.handle_message(self.now, &bytes);
    }

    pub(crate) fn work(&mut self) {
        let Some(HostProcess {
            host,
            worker,
            watched,
            replies,
            ..
        }) = &mut self.process
        else {
            return;
        };
        match host.poll_order() {
            Some(order) => {
                self.moved = true;
                worker.command(order.slot, order.ticket, order.command, watched);
            }
            None => {
                worker.handle_timeouts(self.clock);
                worker.carry_on(watched);
                worker.step(self.clock);
            }
        }
        replies.extend(worker.take_replies());
        self.guest.check_all_hidden();
        self.platter.check();
        self.wire.check();
        self.guest.take_interrupts();
    }

    pub(crate) fn reply(&mut self) {
        let now = self.now;
        if let Some(HostProcess { host, replies, .. }) = &mut self.process
            && let Some(reply) = replies.pop_front()
        {
            self.moved = true;
            host.handle_reply(now, 0, reply);
        }
    }

    fn pass_time(&mut self) {
        let most = if self.faults.hangs { 500 } else { 50 };
        let millis = u64::try_from(self.random.below(most)).expect("small");
        self.now = self.now.saturating_add(Duration::from_millis(millis));
        if self
            .session
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.session.handle_timeout(self.now);
        }
        if self.process.is_none() && self.random.chance(1, 4) {
            self.start_host();
        }
        let unplugged = self.process.as_ref().is_some_and(|host| host.unplugged);
        if unplugged && self.random.chance(1, 4) {
            self.plug();
        }
        if !self.linked && self.process.is_some() && self.random.chance(1, 4) {
            self.link();
        }
    }

    pub(crate) fn start_host(&mut self) {
        let device = self.device();
        self.process = Some(HostProcess::start(self.setting.bus, device));
        self.epoch += 1;
    }

    fn device(&mut self) -> Box<dyn Device> {
        match self.setting.kind {
            Kind::Echo => Box::new(Echo {
                config: *b"vmsg-sim",
            }),
            Kind::Disk => {
                let random = Random::new(self.random.next());
                let platter = self.platter.clone();
                Box::new(Disk::new(platter, random, self.clock, self.faults.hangs))
            }
            Kind::Net => {
                let wire = Box::new(Wire::new(self.wire.clone(), self.clock));
                Box::new(Net::new(&Settings::new(Mac([2; 6])), wire))
            }
        }
    }

    pub(crate) fn link(&mut self) {
        let Some(process) = &mut self.process else {
            return;
        };
        let bus = self.setting.bus;
        let conn = process.host.connect(Peer::default(), bus.max_message());
        if bus == Bus::Common {
            let memory = Arc::clone(self.memory.mapping());
            process.host.set_common(conn, Some(memory), None);
        } else if !bus.lends() {
            let ram = StaticRam::new(self.memory.path(), BASE, 0, 0);
            process.host.set_bare(conn, Some(ram));
            self.session
                .set_common_memory(Ok(vec![self.memory.common()]));
        }
        process.conn = Some(conn);
        self.linked = true;
        self.session.set_host_seen(true);
        self.session
            .handle_link_up(self.now, bus.capabilities(), self.epoch);
    }

    /// Moves what the machines have to say to where chance will find it.
    pub(crate) fn gather(&mut self) {
        while let Some(outgoing) = self.session.poll_transmit() {
            if self.linked {
                let fds = outgoing
                    .fds
                    .iter()
                    .map(|fd| fd.try_clone().expect("dup"))
                    .collect();
                self.line.driver_sends(outgoing.bytes, fds);
            }
        }
        if let Some(HostProcess {
            host,
            conn: Some(conn),
            ..
        }) = &mut self.process
        {
            while let Some(message) = host.poll_transmit(*conn) {
                self.line.host_sends(message.to_vec());
                host.sent(*conn);
            }
        }
        while let Some(event) = self.session.poll_event() {
            self.moved = true;
            match event {
                Event::Done { id, result } if self.waiting_for == Some(id) => {
                    self.waiting_for = None;
                    if self.releasing && matches!(result, Err(OpError::Busy | OpError::StillInUse))
                    {
                        // The guest's memory is not used for anything else yet.
                        self.outcome.waits += 1;
                        self.waiting_for = Some(self.session.submit(self.now, Op::Release));
                        continue;
                    }
                    if std::mem::take(&mut self.releasing) {
                        let seen = self.session.device().is_some();
                        // A host that refuses is given up; of one that takes its time nothing may be left in the record.
                        let kept = seen && matches!(result, Err(OpError::TimedOut));
                        assert!(!kept, "not released: {result:?}");
                        self.changes.clear();
                        self.guest.boot();
                        continue;
                    }
                    match result {
                        Ok(_) => drop(self.guest.steps.pop()),
                        Err(error) => {
                            self.reasons.push(error.to_string());
                            // As a guest's driver does that is bound anew.
                            self.start_over();
                        }
                    }
                }
                Event::Done { id, result } if self.changes.contains_key(&id) => {
                    let change = self.changes.remove(&id).expect("it is there");
                    self.changed(change, &result);
                }
                Event::QueueUsed(queue) if !self.releasing => self.guest.collect(queue.to_usize()),
                Event::LinkFault(_) => self.unlink(),
                // Drivers in the field do not care, and go on with the device that comes in its place.
                Event::NeedsReset(ResetReason::Removed) if self.random.chance(1, 2) => {}
                Event::NeedsReset(reason) => {
                    self.outcome.refused += 1;
                    self.reasons.push(reason.to_string());
                    if !self.releasing {
                        self.start_over();
                    }
                }
                _ => {}
            }
        }
        if self.is_set_up() {
            for (queue, slot) in std::mem::take(&mut self.guest.back) {
                self.moved = true;
                self.hide(queue, slot);
            }
        }
    }
}
