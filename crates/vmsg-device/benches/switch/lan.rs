// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network devices on a switch, with their drivers.

use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_device::net::{Mac, Net, Settings, bits};
use vmsg_device::worker::{Command, Core, Fds, Outbox, QueueStart, Reply, Slot, thread::Worker};
use vmsg_mem::{Access, BusAddr, Doorbell, Mapping, RamSlice, TableEntry, WindowTable};
use vmsg_net::switch::{PortConfig, Rule, Switch, SwitchConfig};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

use crate::frames::{HEADER, QUEUE, Shape, mac};

const BASE: u64 = 0x4000_0000;
/// Bytes for the rings of a queue.
const RINGS: usize = 1 << 14;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT_IDX: u32 = 29;
/// What drivers and devices agree on: what Linux would, as far as it matters here.
const FEATURES: [u32; 5] = [
    bits::MRG_RXBUF,
    bits::CSUM,
    bits::HOST_TSO4,
    bits::GUEST_CSUM,
    bits::GUEST_TSO4,
];

/// Nobody watches descriptors: kicks are calls.
struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _: Slot, _: usize, _: std::os::fd::BorrowedFd<'_>) {}
    fn add_device(&mut self, _: Slot, _: std::os::fd::BorrowedFd<'_>) {}
    fn remove(&mut self, _: std::os::fd::BorrowedFd<'_>) {}
}

/// Who serves the devices.
pub(crate) enum Server {
    /// This thread, when it is told to.
    Here(Box<Core>),
    /// A worker with a thread of its own.
    Thread {
        worker: Worker,
        replies: Arc<Outbox>,
        bell: Arc<Doorbell>,
    },
}

impl Server {
    pub(crate) fn here() -> Self {
        Self::Here(Box::new(Core::new()))
    }

    /// A worker that runs where this thread may run now.
    pub(crate) fn thread() -> Self {
        let replies = Arc::new(Outbox::default());
        let bell = Arc::new(Doorbell::new().expect("an eventfd"));
        let worker = Worker::start("worker", 0, Arc::clone(&replies), Arc::clone(&bell));
        Self::Thread {
            worker: worker.expect("a thread"),
            replies,
            bell,
        }
    }

    fn tell(&mut self, slot: Slot, ticket: u64, command: Command) {
        match self {
            Self::Here(core) => {
                core.command(slot, ticket, command, &mut NoFds);
                core.take_replies().for_each(check);
            }
            Self::Thread {
                worker,
                replies,
                bell,
            } => {
                let answered = !matches!(command, Command::Add(_));
                if worker.send(slot, ticket, command) || !answered {
                    return;
                }
                let mut heard = Vec::new();
                loop {
                    replies.take(&mut heard);
                    let done = heard.iter().any(
                        |(_, reply)| matches!(reply, Reply::Done { ticket: other, .. } if *other == ticket),
                    );
                    heard.drain(..).for_each(|(_, reply)| check(reply));
                    if done {
                        return;
                    }
                    let mut fds = [rustix::event::PollFd::new(
                        &**bell,
                        rustix::event::PollFlags::IN,
                    )];
                    rustix::event::poll(&mut fds, None).expect("poll");
                    let _ = bell.drain();
                }
            }
        }
    }
}

fn check(reply: Reply) {
    if let Reply::Done { result, .. } = reply {
        result.expect("a command that can be carried out");
    }
}

type Queue = DriverQueue<'static, Vec<DriverSlot>>;

/// A device's driver.
pub(crate) struct Station {
    ram: RamSlice<'static>,
    receive: Queue,
    transmit: Queue,
    kicks: [Option<Doorbell>; 2],
    /// Rung by the device when frames have come.
    pub(crate) call: Option<Doorbell>,
    /// Frames that were put into the queue, and those that came back.
    sent: usize,
    reaped: usize,
    /// Receive buffers that were added, and those that came back.
    added: usize,
    taken: usize,
    shape: Shape,
}

impl Station {
    fn outgoing(&self, number: usize) -> usize {
        2 * RINGS + number % self.shape.outgoing * self.shape.stride
    }

    fn incoming(&self, number: usize) -> usize {
        2 * RINGS + self.shape.outgoing * self.shape.stride + number % QUEUE * self.shape.buffer
    }

    /// Writes `frame`, with its header, into all buffers that are sent from.
    pub(crate) fn prepare(&self, frame: &[u8]) {
        for number in 0..self.shape.outgoing {
            self.ram.write(self.outgoing(number), frame);
        }
    }

    /// The memory of the frame that is sent next, with its header.
    pub(crate) fn next(&self) -> RamSlice<'static> {
        self.ram
            .get(self.outgoing(self.sent), HEADER + self.shape.len)
            .expect("inside")
    }

    /// Puts one frame into the queue; false if it is full.
    pub(crate) fn send(&mut self) -> bool {
        if self.in_flight() >= QUEUE.min(self.shape.outgoing) {
            return false;
        }
        let at = BusAddr(BASE + self.outgoing(self.sent) as u64);
        let len = u32::try_from(HEADER + self.shape.len).expect("short");
        self.transmit.add_direct(&[(at, len)], &[]).expect("room");
        self.sent += 1;
        true
    }

    /// Takes back frames that were sent; how many.
    pub(crate) fn reap(&mut self) -> usize {
        let mut count = 0;
        while self.transmit.pop_used().expect("sound").is_some() {
            count += 1;
        }
        self.reaped += count;
        count
    }

    /// Frames that were put into the queue and have not come back.
    pub(crate) fn in_flight(&self) -> usize {
        self.sent - self.reaped
    }

    fn refill(&mut self) {
        let len = u32::try_from(self.shape.buffer).expect("short");
        while self.added < self.taken + QUEUE {
            let at = BusAddr(BASE + self.incoming(self.added) as u64);
            self.receive.add_direct(&[], &[(at, len)]).expect("room");
            self.added += 1;
        }
    }

    /// Takes up to `most` frames that have come and gives their buffers back; calls `each` with the pieces of each.
    pub(crate) fn take(&mut self, most: usize, mut each: impl FnMut(RamSlice<'static>)) -> usize {
        let mut count = 0;
        while count < most {
            let Some(used) = self.receive.pop_used().expect("sound") else {
                break;
            };
            let at = self.incoming(self.taken);
            let buffers = self.ram.atomic_u16(at + 10).expect("aligned");
            let buffers = buffers.load(std::sync::atomic::Ordering::Relaxed);
            each(self.piece(at, used.written));
            self.taken += 1;
            for _ in 1..u16::from_le(buffers) {
                let used = self.receive.pop_used().expect("sound");
                let written = used.expect("all buffers of a frame at once").written;
                each(self.piece(self.incoming(self.taken), written));
                self.taken += 1;
            }
            count += 1;
        }
        self.refill();
        count
    }

    fn piece(&self, at: usize, len: u32) -> RamSlice<'static> {
        let len = usize::try_from(len).expect("short");
        self.ram.get(at, len).expect("inside")
    }

    /// Shows the device what was added to its receive queue; true if it wants a kick.
    pub(crate) fn publish_receive(&mut self) -> bool {
        let kick = self.receive.publish().expect("sound");
        self.kick(RECEIVE, kick)
    }

    /// Shows the device what was sent; true if it wants a kick.
    pub(crate) fn publish_transmit(&mut self) -> bool {
        let kick = self.transmit.publish().expect("sound");
        self.kick(TRANSMIT, kick)
    }

    /// Rings if there is a bell; true if the kick is still to be made.
    fn kick(&self, queue: usize, wanted: bool) -> bool {
        match &self.kicks[queue] {
            Some(bell) if wanted => {
                bell.ring().expect("rung");
                false
            }
            _ => wanted,
        }
    }

    /// Wants to be called for the next frame that comes; true if one is there.
    pub(crate) fn listen(&mut self) -> bool {
        self.receive.enable_notifications().expect("sound")
    }
}

/// Stations on a switch.
pub(crate) struct Lan {
    pub(crate) server: Server,
    pub(crate) stations: Vec<Station>,
    pub(crate) switch: Switch,
}

impl Lan {
    /// `ports` stations that all reach each other, and whose addresses the switch knows.
    pub(crate) fn new(server: Server, ports: usize, shape: &Shape) -> Self {
        Self::with(server, &vec![*shape; ports])
    }

    /// The same with a station for each shape.
    pub(crate) fn with(mut server: Server, shapes: &[Shape]) -> Self {
        let mut config = SwitchConfig::new("s0");
        config.rules = vec![Rule::allow_all()];
        let switch = Switch::new(config).expect("a switch");
        let stations = shapes
            .iter()
            .enumerate()
            .map(|(port, shape)| station(&mut server, &switch, port, shape))
            .collect();
        let mut lan = Self {
            server,
            stations,
            switch,
        };
        lan.introduce();
        lan
    }

    /// Each sends one to the one before it, for the switch to learn where everybody is.
    fn introduce(&mut self) {
        let ports = self.stations.len();
        for from in (0..ports).chain(0..1) {
            let station = &mut self.stations[from];
            let frame = station.shape.bytes(from, (from + ports - 1) % ports);
            station.prepare(&frame);
            assert!(station.send(), "room");
            self.flush(from);
            while self.stations[from].reap() == 0 {
                self.serve();
            }
            for port in 0..ports {
                // A flooded frame stands in all receive queues before it is taken back.
                self.stations[port].take(QUEUE, |_| {});
                self.flush(port);
            }
        }
    }

    /// Has all that `from` sends go to `to`.
    pub(crate) fn aim(&mut self, from: usize, to: usize) {
        let station = &self.stations[from];
        station.prepare(&station.shape.bytes(from, to));
    }

    /// Shows the device of `port` all that its driver has added.
    pub(crate) fn flush(&mut self, port: usize) {
        let station = &mut self.stations[port];
        let kicks = [station.publish_receive(), station.publish_transmit()];
        if let Server::Here(core) = &mut self.server {
            let slot = Slot(u32::try_from(port).expect("few"));
            for (queue, kick) in kicks.into_iter().enumerate() {
                if kick {
                    core.kick(slot, queue);
                }
            }
        }
    }

    /// Works on the queues, if that is for this thread to do.
    pub(crate) fn serve(&mut self) {
        if let Server::Here(core) = &mut self.server {
            let now = Instant::now();
            while core.step(now) {}
            drop(core.take_replies());
        }
    }

    /// So many turns of queues.
    pub(crate) fn steps(&mut self, turns: usize) {
        if let Server::Here(core) = &mut self.server {
            let now = Instant::now();
            for _ in 0..turns {
                if !core.step(now) {
                    break;
                }
            }
            drop(core.take_replies());
        }
    }

    /// Frames that were dropped anywhere.
    pub(crate) fn dropped(&self) -> u64 {
        let report = self.switch.control().report();
        let ports = report.ports.iter();
        ports
            .map(|port| port.dropped_in.total() + port.dropped_out.total())
            .sum()
    }
}

fn station(server: &mut Server, switch: &Switch, port: usize, shape: &Shape) -> Station {
    let slot = Slot(u32::try_from(port).expect("few"));
    let bytes = 2 * RINGS + shape.outgoing * shape.stride + QUEUE * shape.buffer;
    let (mapping, _fd) = Mapping::memfd("bench", bytes as u64, true).expect("memory");
    // Rings borrow the memory; the process is short.
    let mapping: &'static Arc<Mapping> = Box::leak(Box::new(Arc::new(mapping)));
    let entry = TableEntry {
        base: BusAddr(BASE),
        mapping: Arc::clone(mapping),
        offset: 0,
        len: bytes,
        access: Access::ReadWrite,
    };
    let table = Arc::new(WindowTable::new(vec![entry]).expect("a window"));
    let backend = switch
        .add_port(PortConfig::new(format!("net{port}")))
        .expect("a port");
    let net = Net::new(&Settings::new(Mac(mac(port))), Box::new(backend));
    server.tell(slot, 0, Command::Add(Box::new(net)));
    server.tell(slot, 1, Command::SetMemory(table));
    let ram = mapping.ram();
    let threaded = matches!(server, Server::Thread { .. });
    let bell = || threaded.then(|| Doorbell::new().expect("an eventfd"));
    let kicks = [bell(), bell()];
    let call = bell();
    let twin = |bell: &Option<Doorbell>| bell.as_ref().map(|bell| bell.try_clone().expect("one"));
    let mut queue = |index: usize| {
        let size = u16::try_from(QUEUE).expect("small");
        let layout = Layout::new(size, 0).expect("a size");
        let rings = ram.get(index * RINGS, layout.total_len()).expect("inside");
        let base = BusAddr(BASE + (index * RINGS) as u64);
        let slots = vec![DriverSlot::default(); QUEUE];
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let mut queue = DriverQueue::new(layout, features, rings, base, slots).expect("a queue");
        queue.disable_notifications().expect("sound");
        server.tell(
            slot,
            2,
            Command::StartQueue(QueueStart {
                queue: index,
                config: queue.config(),
                features: FeatureSet::from_bits(&[EVENT_IDX]),
                resume: None,
                record: None,
            }),
        );
        if threaded {
            let call = if index == RECEIVE { &call } else { &None };
            server.tell(
                slot,
                3,
                Command::SetNotify {
                    queue: index,
                    kick: twin(&kicks[index]),
                    call: twin(call).or_else(|| Some(Doorbell::new().expect("an eventfd"))),
                },
            );
        }
        queue
    };
    let (receive, transmit) = (queue(RECEIVE), queue(TRANSMIT));
    server.tell(slot, 4, Command::DriverOk(FeatureSet::from_bits(&FEATURES)));
    let mut station = Station {
        ram,
        receive,
        transmit,
        kicks,
        call,
        sent: 0,
        reaped: 0,
        added: 0,
        taken: 0,
        shape: *shape,
    };
    station.refill();
    station.publish_receive();
    station
}
