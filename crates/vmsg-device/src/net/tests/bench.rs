// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network device in a worker, its driver, and its back end, all in one thread.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

use crate::device::{Device, Monitor, Operation};
use crate::net::{Mac, Net, Settings};
use crate::worker::{Command, Core, Fds, Notice, QueueStart, Reply, Resume, Slot};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const BASE: u64 = 0x4000_0000;
/// Bytes of each queue's part of the memory: its rings, then its buffers.
const PART: usize = 1 << 18;
const BUFFERS: usize = 1 << 14;
const SIZE: u16 = 64;
const SLOT: Slot = Slot(0);

/// Nobody watches descriptors: kicks come as commands.
struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

/// A frame on its way to the guest.
#[derive(Clone, Debug)]
pub(super) struct Incoming {
    /// The pair that the back end has chosen, if it does.
    pub(super) pair: Option<u16>,
    pub(super) header: VnetHeader,
    pub(super) bytes: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self {
            pair: None,
            header: VnetHeader::default(),
            bytes: bytes.to_vec(),
        }
    }

    pub(super) fn on(pair: u16, bytes: &[u8]) -> Self {
        Self {
            pair: Some(pair),
            ..Self::new(bytes)
        }
    }
}

/// What the back end holds.
pub(super) struct State {
    pub(super) incoming: VecDeque<Incoming>,
    /// Pair, header and bytes of what the guest has sent.
    pub(super) sent: Vec<(u16, VnetHeader, Vec<u8>)>,
    /// Frames that are still taken from the guest.
    pub(super) patience: usize,
    pub(super) guest: Guest,
    pub(super) link: bool,
    pub(super) pairs: u16,
    pub(super) offloads: Offloads,
}

#[derive(Clone)]
pub(super) struct Wire(Arc<Mutex<State>>);

impl Wire {
    pub(super) fn new(pairs: u16) -> Self {
        Self(Arc::new(Mutex::new(State {
            incoming: VecDeque::new(),
            sent: Vec::new(),
            patience: usize::MAX,
            guest: Guest::NONE,
            link: true,
            pairs,
            offloads: Offloads::ALL,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics here")
    }

    pub(super) fn push(&self, frame: Incoming) {
        self.state().incoming.push_back(frame);
    }
}

impl Backend for Wire {
    fn queue_pairs(&self) -> u16 {
        self.state().pairs
    }
    fn offloads(&self) -> Offloads {
        self.state().offloads
    }
    fn set_guest(&mut self, guest: &Guest) {
        self.state().guest = *guest;
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn link_is_up(&self) -> bool {
        self.state().link
    }
    fn transmit(&mut self, _: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut state = self.state();
        let taken = frames.len().min(state.patience);
        state.patience -= taken;
        for frame in &frames[..taken] {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            state.sent.push((pair, frame.header, bytes));
        }
        taken
    }
    /// Goes past frames for which there is no room.
    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut state = self.state();
        let mut kept = VecDeque::new();
        let mut count = 0;
        while let Some(frame) = state.incoming.pop_front() {
            let target = match frame.pair {
                Some(pair) => Target::Pair(pair),
                None => Target::Head(&frame.bytes[..frame.bytes.len().min(Target::HEAD)]),
            };
            match sink.offer(target, frame.bytes.len()) {
                Some(room) => {
                    room.write(&frame.bytes);
                    sink.commit(&frame.header, frame.bytes.len());
                    count += 1;
                }
                None => kept.push_back(frame),
            }
        }
        state.incoming = kept;
        count
    }
    fn has_frames(&self) -> bool {
        !self.state().incoming.is_empty()
    }
    fn shutdown(&mut self) {}
}

/// A queue as its driver has it.
struct Queue<'m> {
    ring: DriverQueue<'m, Vec<DriverSlot>>,
    /// Next place for a buffer, in bytes from the beginning of the buffers.
    next: usize,
    /// Where the buffer with a token's index is, and its length.
    places: BTreeMap<usize, (usize, usize)>,
}

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) header: Vec<u8>,
    pub(super) bytes: Vec<u8>,
    /// Buffers it was spread over.
    pub(super) buffers: usize,
}

pub(super) struct Bench {
    core: Core,
    mapping: &'static Mapping,
    queues: BTreeMap<usize, Queue<'static>>,
    pub(super) wire: Wire,
    pub(super) monitor: Arc<dyn Monitor>,
    pub(super) offered: FeatureSet,
    features: FeatureSet,
    pub(super) header: usize,
    tickets: u64,
    pub(super) notices: Vec<Notice>,
}

impl Bench {
    /// A device with all that it can do, and memory that its driver has lent.
    pub(super) fn new(pairs: u16) -> Self {
        Self::with(&Settings {
            queue_pairs: pairs,
            ..Settings::new(Mac(MAC))
        })
    }

    pub(super) fn with(settings: &Settings) -> Self {
        let wire = Wire::new(u16::MAX);
        let device = Net::new(settings, Box::new(wire.clone()));
        let bytes = (PART * device.queue_sizes().len()) as u64;
        let (mapping, _fd) = Mapping::memfd("test", bytes, true).expect("memfd");
        // Rings borrow the memory; a test's process is short.
        let mapping: &'static Arc<Mapping> = Box::leak(Box::new(Arc::new(mapping)));
        let entry = TableEntry {
            base: BusAddr(BASE),
            mapping: Arc::clone(mapping),
            offset: 0,
            len: usize::try_from(bytes).expect("small"),
            access: Access::ReadWrite,
        };
        let table = Arc::new(WindowTable::new(vec![entry]).expect("one window"));
        let monitor = device.monitor().expect("counters");
        let offered = device.features();
        let mut core = Core::new();
        core.command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
        let mut bench = Self {
            core,
            mapping,
            queues: BTreeMap::new(),
            wire,
            monitor,
            offered,
            features: FeatureSet::EMPTY,
            header: 12,
            tickets: 0,
            notices: Vec::new(),
        };
        bench.tell(Command::SetMemory(table)).expect("memory");
        bench
    }

    /// A device that has been brought up with `features` and `queues`.
    pub(super) fn running(pairs: u16, features: &[u32], queues: &[usize]) -> Self {
        let mut bench = Self::new(pairs);
        bench.bring_up(features, queues);
        bench
    }

    pub(super) fn bring_up(&mut self, features: &[u32], queues: &[usize]) {
        self.negotiate(features).expect("features that go together");
        for queue in queues {
            self.set_up(*queue, None).expect("a queue");
        }
        self.driver_ok();
    }

    pub(super) fn negotiate(&mut self, features: &[u32]) -> Result<(), String> {
        self.features = FeatureSet::from_bits(features);
        assert!(
            self.features.is_subset(&self.offered),
            "offered: {}",
            self.offered
        );
        self.header = if self.features.contains(crate::net::bits::HASH_REPORT) {
            20
        } else {
            12
        };
        self.tell(Command::CheckFeatures(self.features))
    }

    pub(super) fn driver_ok(&mut self) {
        self.tell(Command::DriverOk(self.features))
            .expect("running");
        self.run();
    }

    pub(super) fn set_up(&mut self, index: usize, resume: Option<Resume>) -> Result<(), String> {
        let layout = Layout::new(SIZE, 0).expect("a size");
        let ram = self.mapping.ram();
        let rings = ram.get(index * PART, layout.total_len()).expect("inside");
        let base = BusAddr(BASE + (index * PART) as u64);
        let slots = vec![DriverSlot::default(); usize::from(SIZE)];
        let ring = DriverQueue::new(layout, QueueFeatures::default(), rings, base, slots);
        let ring = ring.expect("a queue");
        let config = ring.config();
        let queue = Queue {
            ring,
            next: 0,
            places: BTreeMap::new(),
        };
        self.queues.insert(index, queue);
        let start = QueueStart {
            queue: index,
            config,
            features: FeatureSet::EMPTY,
            resume,
            record: None,
        };
        self.tell(Command::StartQueue(start))
    }

    pub(super) fn tell(&mut self, command: Command) -> Result<(), String> {
        self.tickets += 1;
        let ticket = self.tickets;
        self.core.command(SLOT, ticket, command, &mut NoFds);
        let mut answer = None;
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done {
                    ticket: other,
                    result,
                } if other == ticket => answer = Some(result),
                Reply::Notice(_, notice) => self.notices.push(notice),
                other => panic!("{other:?}"),
            }
        }
        answer.expect("every command is answered")
    }

    pub(super) fn operate(&mut self, operation: Operation) -> Result<(), String> {
        let result = self.tell(Command::Operate(operation));
        self.run();
        result
    }

    pub(super) fn kick(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        self.run();
    }

    /// Has the device look after its back end.
    pub(super) fn poll(&mut self) {
        self.core.poll_device(SLOT, Instant::now());
        self.run();
    }

    fn run(&mut self) {
        // A device that never ends is as bad as one that does nothing.
        for _ in 0..10_000 {
            if !self.core.step(Instant::now()) {
                break;
            }
        }
        assert!(!self.core.has_work(), "the device is busy for ever");
        self.notices
            .extend(self.core.take_replies().map(|reply| match reply {
                Reply::Notice(_, notice) => notice,
                other => panic!("{other:?}"),
            }));
    }

    /// Adds a chain of one buffer; `bytes` are written to it if it is for the device to read.
    fn add(&mut self, queue: usize, readable: &[u8], writable: usize) -> usize {
        let part = queue * PART + BUFFERS;
        let entry = self.queues.get_mut(&queue).expect("set up");
        let len = readable.len() + writable;
        if entry.next + len > PART - BUFFERS {
            entry.next = 0;
        }
        let at = part + entry.next;
        entry.next += len.next_multiple_of(8);
        self.mapping.ram().write(at, readable);
        let addr = |at: usize| BusAddr(BASE + at as u64);
        let length = |len: usize| u32::try_from(len).expect("small");
        let read = [(addr(at), length(readable.len()))];
        let write = [(addr(at + readable.len()), length(writable))];
        let token = entry
            .ring
            .add(
                if readable.is_empty() { &[] } else { &read },
                if writable == 0 { &[] } else { &write },
            )
            .expect("room");
        entry
            .places
            .insert(token.index(), (at + readable.len(), writable));
        entry.ring.publish().expect("published");
        at + readable.len()
    }

    /// Gives the device `count` receive buffers of `len` bytes.
    pub(super) fn give(&mut self, queue: usize, count: usize, len: usize) {
        for _ in 0..count {
            self.add(queue, &[], len);
        }
        self.kick(queue);
    }

    /// What has come in a receive queue.
    pub(super) fn received(&mut self, queue: usize) -> Vec<Received> {
        let mut frames = Vec::new();
        while let Some(first) = self.pop(queue) {
            let header = first[..self.header].to_vec();
            let mut bytes = first[self.header..].to_vec();
            let buffers = usize::from(u16::from_le_bytes([header[10], header[11]]));
            for _ in 1..buffers {
                bytes.extend(self.pop(queue).expect("all buffers of a frame at once"));
            }
            frames.push(Received {
                header,
                bytes,
                buffers,
            });
        }
        frames
    }

    /// The frames alone.
    pub(super) fn frames(&mut self, queue: usize) -> Vec<Vec<u8>> {
        self.received(queue)
            .into_iter()
            .map(|frame| frame.bytes)
            .collect()
    }

    /// What was written to the next used chain.
    fn pop(&mut self, queue: usize) -> Option<Vec<u8>> {
        let entry = self.queues.get_mut(&queue).expect("set up");
        let used = entry.ring.pop_used().expect("sound")?;
        let (at, len) = entry.places[&used.token.index()];
        let written = usize::try_from(used.written).expect("small");
        assert!(written <= len, "{written} bytes in {len}");
        let mut bytes = vec![0; written];
        self.mapping.ram().read(at, &mut bytes);
        Some(bytes)
    }

    /// Chains that the device has not used yet.
    pub(super) fn outstanding(&self, queue: usize) -> u16 {
        self.queues[&queue].ring.outstanding()
    }

    /// Sends a frame without offloads.
    pub(super) fn send(&mut self, queue: usize, frame: &[u8]) {
        let mut bytes = vec![0; self.header];
        bytes.extend(frame);
        self.send_raw(queue, &bytes);
    }

    pub(super) fn send_raw(&mut self, queue: usize, bytes: &[u8]) {
        self.add(queue, bytes, 0);
        self.kick(queue);
    }

    /// Frames of which the device has said that it took them.
    pub(super) fn reclaim(&mut self, queue: usize) -> usize {
        let mut count = 0;
        while self.pop(queue).is_some() {
            count += 1;
        }
        count
    }

    /// A command on the control queue; what the device acknowledges.
    pub(super) fn control(&mut self, queue: usize, class: u8, code: u8, data: &[u8]) -> u8 {
        let mut bytes = vec![class, code];
        bytes.extend(data);
        self.control_raw(queue, &bytes)
    }

    pub(super) fn control_raw(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        self.add(queue, bytes, 1);
        self.kick(queue);
        let ack = self.pop(queue).expect("every command is used");
        assert_eq!(ack.len(), 1);
        ack[0]
    }

    /// A counter of the device.
    pub(super) fn counter(&self, name: &str) -> u64 {
        find(&self.monitor.snapshot().counters, name)
    }

    /// A counter of a pair.
    pub(super) fn pair_counter(&self, pair: usize, name: &str) -> u64 {
        find(&self.monitor.snapshot().pairs[pair], name)
    }

    /// The last configuration bytes at `offset` that the driver was told of.
    pub(super) fn config_notice(&mut self, offset: usize) -> Option<Vec<u8>> {
        let mut last = None;
        for notice in self.notices.drain(..) {
            if let Notice::Config { offset: at, data } = notice
                && at == offset
            {
                last = Some(data);
            }
        }
        last
    }

    /// True if the device has asked for a reset since the last look at notices.
    pub(super) fn is_broken(&self) -> bool {
        let mut notices = self.notices.iter();
        notices.any(|notice| matches!(notice, Notice::Broken { .. }))
    }
}

fn find(counters: &[(&str, u64)], name: &str) -> u64 {
    let counter = counters.iter().find(|(other, _)| *other == name);
    counter.expect("a counter of that name").1
}
