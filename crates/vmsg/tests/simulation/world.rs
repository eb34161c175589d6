// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest, session, bus, host and worker in one thread, with a seeded
//! scheduler and a virtual clock.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use virtio_msg::{DevNum, Instant, QueueIndex};
use vmsg_bus::Capabilities;
use vmsg_device::host::{ConnId, Core as Host, Peer};
use vmsg_device::worker::{Core as Worker, Fds, Reply, Slot};
use vmsg_proxy::session::{Event, Op, OpId, Options, Session, Target};

use crate::echo::{Echo, QUEUES};
use crate::guest::{Guest, Memory};
use crate::random::Random;

const MESSAGE: usize = 320;
const SLOT: Slot = Slot(0);

/// What may go wrong in a case.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Messages get lost.
    pub(crate) drops: bool,
    /// Messages come twice.
    pub(crate) duplicates: bool,
    /// The device host is killed and comes back.
    pub(crate) kills: bool,
    /// The guest is reset and starts over.
    pub(crate) reboots: bool,
    /// Kicks and interrupts through eventfds instead of messages.
    pub(crate) eventfds: bool,
}

/// What a case came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) completed: u64,
    pub(crate) kills: u64,
    pub(crate) replays: u64,
    pub(crate) dropped: u64,
    pub(crate) reboots: u64,
}

/// Which queue belongs to which kick descriptor.
#[derive(Debug, Default)]
struct Watched(Vec<(RawFd, usize)>);

impl Fds for Watched {
    fn add_kick(&mut self, _slot: Slot, queue: usize, fd: BorrowedFd<'_>) {
        self.0.push((fd.as_raw_fd(), queue));
    }
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, fd: BorrowedFd<'_>) {
        self.0.retain(|(watched, _)| *watched != fd.as_raw_fd());
    }
}

/// A device host's process.
struct HostProcess {
    host: Host,
    worker: Worker,
    watched: Watched,
    replies: VecDeque<Reply>,
    conn: Option<ConnId>,
}

impl HostProcess {
    fn start() -> Self {
        let mut host = Host::new(MESSAGE, 0);
        let echo = Box::new(Echo {
            config: *b"vmsg-sim",
        });
        host.add_device("echo", Some(3), 0, SLOT, echo)
            .expect("an empty bus");
        Self {
            host,
            worker: Worker::new(),
            watched: Watched::default(),
            replies: VecDeque::new(),
            conn: None,
        }
    }
}

type Message = (Vec<u8>, Vec<OwnedFd>);

pub(crate) struct World<'m> {
    random: Random,
    faults: Faults,
    now: Instant,
    clock: std::time::Instant,
    session: Session,
    guest: Guest<'m>,
    process: Option<HostProcess>,
    linked: bool,
    to_host: VecDeque<Message>,
    to_driver: VecDeque<Vec<u8>>,
    waiting_for: Option<OpId>,
    /// What is waited for is the end of the last driver, no step of the set-up.
    releasing: bool,
    /// Nothing new is asked for.
    resting: bool,
    epoch: u64,
    outcome: Outcome,
}

impl<'m> World<'m> {
    pub(crate) fn new(seed: u64, faults: Faults, memory: &'m Memory) -> Self {
        let mut random = Random::new(seed);
        let target = if random.chance(1, 2) {
            Target::Number(DevNum(3))
        } else {
            Target::Name("echo".to_owned())
        };
        Self {
            random,
            faults,
            now: Instant(0),
            clock: std::time::Instant::now(),
            session: Session::new(target, Options::default()),
            guest: Guest::new(memory, faults.eventfds),
            process: None,
            linked: false,
            to_host: VecDeque::new(),
            to_driver: VecDeque::new(),
            waiting_for: None,
            releasing: false,
            resting: false,
            epoch: 0,
            outcome: Outcome::default(),
        }
    }

    /// Lets chance decide for `steps` steps, then lets everything come to rest
    /// and checks that the guest got all it asked for.
    pub(crate) fn run(mut self, steps: usize) -> Outcome {
        for _ in 0..steps {
            self.step();
        }
        self.faults = Faults {
            eventfds: self.faults.eventfds,
            ..Faults::default()
        };
        self.resting = true;
        // Far more than any recovery takes: whoever needs more hangs.
        for _ in 0..200_000 {
            if self.is_at_rest() {
                self.outcome.completed = self.guest.completed;
                self.outcome.replays = self.session.counters().replays;
                return self.outcome;
            }
            self.step();
        }
        panic!(
            "no rest: ready {}, {} steps left, {} requests outstanding, status {}, counters {:?}",
            self.session.is_ready(),
            self.guest.steps.len(),
            self.guest.outstanding(),
            self.session.status(),
            self.session.counters(),
        );
    }

    fn is_at_rest(&self) -> bool {
        !self.releasing
            && self.session.is_ready()
            && self.guest.is_set_up()
            && self.guest.outstanding() == 0
    }

    fn step(&mut self) {
        match self.random.below(1000) {
            0..2 if self.faults.kills => self.kill(),
            2..5 if self.faults.reboots && self.guest.is_set_up() => self.reboot(),
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

    fn kill(&mut self) {
        if self.process.take().is_some() {
            self.outcome.kills += 1;
            self.unlink();
        }
    }

    fn unlink(&mut self) {
        if std::mem::take(&mut self.linked) {
            self.session.handle_link_down(self.now);
        }
        self.to_host.clear();
        self.to_driver.clear();
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
    fn start_over(&mut self) {
        self.releasing = true;
        self.waiting_for = Some(self.session.submit(self.now, Op::Release));
    }

    /// The next step of the device's set-up, when the one before is done.
    fn front(&mut self) {
        if self.waiting_for.is_none()
            && let Some(op) = self.guest.steps.last().cloned()
        {
            self.waiting_for = Some(self.session.submit(self.now, op));
        }
    }

    fn request(&mut self) {
        if self.releasing || !self.guest.is_set_up() {
            return;
        }
        let queue = self.random.below(QUEUES);
        if !self.guest.submit(queue) {
            return;
        }
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

    fn deliver_to_host(&mut self) {
        let Some((bytes, fds)) = self.to_host.pop_front() else {
            return;
        };
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

    fn deliver_to_driver(&mut self) {
        let Some(bytes) = self.to_driver.pop_front() else {
            return;
        };
        if self.faults.drops && self.random.chance(1, 60) {
            self.outcome.dropped += 1;
            return;
        }
        if self.faults.duplicates && self.random.chance(1, 40) {
            self.session.handle_message(self.now, &bytes);
        }
        self.session.handle_message(self.now, &bytes);
    }

    fn work(&mut self) {
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
            Some(order) => worker.command(order.slot, order.ticket, order.command, watched),
            None => {
                worker.step(self.clock);
            }
        }
        replies.extend(worker.take_replies());
        self.guest.take_interrupts();
    }

    fn reply(&mut self) {
        let now = self.now;
        if let Some(HostProcess { host, replies, .. }) = &mut self.process
            && let Some(reply) = replies.pop_front()
        {
            host.handle_reply(now, 0, reply);
        }
    }

    fn pass_time(&mut self) {
        let millis = u64::try_from(self.random.below(50)).expect("small");
        self.now = self.now.saturating_add(Duration::from_millis(millis));
        if self
            .session
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.session.handle_timeout(self.now);
        }
        if self.process.is_none() && self.random.chance(1, 4) {
            self.process = Some(HostProcess::start());
            self.epoch += 1;
        }
        if !self.linked
            && let Some(process) = &mut self.process
            && self.random.chance(1, 4)
        {
            process.conn = Some(process.host.connect(Peer::default(), MESSAGE));
            self.linked = true;
            self.session
                .handle_link_up(self.now, Capabilities::all(MESSAGE), self.epoch);
        }
    }

    /// Moves what the machines have to say to where chance will find it.
    fn gather(&mut self) {
        while let Some(outgoing) = self.session.poll_transmit() {
            if self.linked {
                let fds = outgoing
                    .fds
                    .iter()
                    .map(|fd| fd.try_clone().expect("dup"))
                    .collect();
                self.to_host.push_back((outgoing.bytes, fds));
            }
        }
        if let Some(HostProcess {
            host,
            conn: Some(conn),
            ..
        }) = &mut self.process
        {
            while let Some(message) = host.poll_transmit(*conn) {
                self.to_driver.push_back(message.to_vec());
                host.sent(*conn);
            }
        }
        while let Some(event) = self.session.poll_event() {
            match event {
                Event::Done { id, result } if self.waiting_for == Some(id) => {
                    self.waiting_for = None;
                    if std::mem::take(&mut self.releasing) {
                        self.guest.boot();
                    } else if result.is_ok() {
                        self.guest.steps.pop();
                    } else {
                        // As a guest's driver does that is bound anew.
                        self.start_over();
                    }
                }
                Event::QueueUsed(queue) if !self.releasing => self.guest.collect(queue.to_usize()),
                Event::LinkFault(_) => self.unlink(),
                Event::NeedsReset(_) if !self.releasing => self.start_over(),
                _ => {}
            }
        }
    }
}
