// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A console device in a worker, its driver, and a client, all in one thread.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use tempfile::TempDir;
use virtio_msg::FeatureSet;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

use crate::console::{Console, Handle, Hub, HubConfig, Settings};
use crate::device::{Device, Monitor};
use crate::worker::{Command, Core, Fds, Notice, QueueStart, Reply, Resume, Slot};

const BASE: u64 = 0x4000_0000;
/// Bytes of each queue's part of the memory: its rings, then its buffers.
const PART: usize = 1 << 19;
const BUFFERS: usize = 1 << 13;
const SIZE: u16 = 64;
const SLOT: Slot = Slot(0);

/// Nobody watches descriptors: kicks come as commands.
struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

/// A queue as its driver has it.
struct Queue {
    ring: DriverQueue<'static, Vec<DriverSlot>>,
    /// Next place for a buffer, in bytes from the beginning of the buffers.
    next: usize,
    /// Where the writable buffer with a token's index is, and its length.
    places: BTreeMap<usize, (usize, usize)>,
}

pub(super) struct Bench {
    core: Core,
    mapping: &'static Mapping,
    table: Arc<WindowTable>,
    queues: BTreeMap<usize, Queue>,
    monitor: Arc<dyn Monitor>,
    pub(super) offered: FeatureSet,
    pub(super) sizes: Vec<u16>,
    features: FeatureSet,
    tickets: u64,
    pub(super) notices: Vec<Notice>,
    pub(super) handles: Vec<Handle>,
    folder: TempDir,
}

/// A device with these ports after its console, its hubs in `folder`.
pub(super) fn device(folder: &TempDir, settings: &Settings) -> Console {
    let hubs = (0..=settings.ports.len())
        .map(|port| {
            let config = HubConfig {
                name: format!("con:{port}"),
                socket: Some(folder.path().join(format!("{port}"))),
                ..HubConfig::default()
            };
            Hub::open(&config).expect("a hub")
        })
        .collect();
    Console::new(settings, hubs).expect("a device")
}

impl Bench {
    pub(super) fn new(ports: &[&str]) -> Self {
        Self::with(&Settings {
            ports: ports.iter().map(|name| (*name).to_owned()).collect(),
            ..Settings::default()
        })
    }

    pub(super) fn with(settings: &Settings) -> Self {
        let folder = TempDir::new().expect("a folder");
        let device = device(&folder, settings);
        let sizes = device.queue_sizes();
        let bytes = (PART * sizes.len()) as u64;
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
        let handles = device.handles();
        let offered = device.features();
        let mut core = Core::new();
        core.command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
        let mut bench = Self {
            core,
            mapping,
            table: Arc::clone(&table),
            queues: BTreeMap::new(),
            monitor,
            offered,
            sizes,
            features: FeatureSet::EMPTY,
            tickets: 0,
            notices: Vec::new(),
            handles,
            folder,
        };
        bench.tell(Command::SetMemory(table)).expect("memory");
        bench
    }

    /// The driver negotiates `features`, sets up `queues` and says DRIVER_OK.
    pub(super) fn bring_up(&mut self, features: &[u32], queues: &[usize]) {
        self.features = FeatureSet::from_bits(features);
        assert!(self.features.is_subset(&self.offered));
        self.tell(Command::CheckFeatures(self.features))
            .expect("features");
        for queue in queues {
            self.set_up(*queue);
        }
        self.tell(Command::DriverOk(self.features))
            .expect("running");
        self.run();
    }

    fn set_up(&mut self, index: usize) {
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
        self.tell(Command::StartQueue(QueueStart {
            queue: index,
            config,
            features: FeatureSet::EMPTY,
            resume: None,
            record: None,
        }))
        .expect("a queue");
    }

    /// Another device takes the place of this one, whose driver notices nothing.
    pub(super) fn killed_and_resumed(&mut self, settings: &Settings) {
        let features = self.features;
        let indices: Vec<usize> = self.queues.keys().copied().collect();
        self.tell(Command::Remove).expect("removed");
        let device = device(&self.folder, settings);
        self.handles = device.handles();
        self.monitor = device.monitor().expect("counters");
        self.core
            .command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
        let table = Arc::clone(&self.table);
        self.tell(Command::SetMemory(table)).expect("memory");
        for index in indices {
            let config = self.queues[&index].ring.config();
            self.tell(Command::StartQueue(QueueStart {
                queue: index,
                config,
                features: FeatureSet::EMPTY,
                resume: Some(Resume::FromUsedRing),
                record: None,
            }))
            .expect("a queue");
        }
        self.tell(Command::DriverOk(features)).expect("running");
        self.run();
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

    pub(super) fn kick(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        self.run();
    }

    /// Has the device look after its clients.
    pub(super) fn poll(&mut self) {
        self.core.poll_device(SLOT, Instant::now());
        self.run();
    }

    fn run(&mut self) {
        // A device that never ends is as bad as one that does nothing.
        for _ in 0..100_000 {
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

    /// Adds a chain of one buffer to read, or to write.
    pub(super) fn add(&mut self, queue: usize, readable: &[u8], writable: usize) {
        let part = queue * PART + BUFFERS;
        let entry = self.queues.get_mut(&queue).expect("set up");
        let len = readable.len() + writable;
        if entry.next + len > PART - BUFFERS {
            entry.next = 0;
        }
        let at = part + entry.next;
        entry.next += len.next_multiple_of(8);
        self.mapping.ram().write(at, readable);
        let addr = BusAddr(BASE + at as u64);
        let length = |len: usize| u32::try_from(len).expect("small");
        let read = [(addr, length(readable.len()))];
        let write = [(addr, length(writable))];
        let token = entry
            .ring
            .add(
                if readable.is_empty() { &[] } else { &read },
                if writable == 0 { &[] } else { &write },
            )
            .expect("room");
        entry.places.insert(token.index(), (at, writable));
        entry.ring.publish().expect("published");
    }

    pub(super) fn give(&mut self, queue: usize, count: usize, len: usize) {
        for _ in 0..count {
            self.add(queue, &[], len);
        }
        self.kick(queue);
    }

    /// Chains of one buffer that can still be added.
    pub(super) fn room(&self, queue: usize) -> usize {
        usize::from(SIZE - self.queues[&queue].ring.outstanding())
    }

    /// What was written to the next used chain.
    pub(super) fn pop(&mut self, queue: usize) -> Option<Vec<u8>> {
        let entry = self.queues.get_mut(&queue).expect("set up");
        let used = entry.ring.pop_used().expect("sound")?;
        let (at, len) = entry.places[&used.token.index()];
        let written = usize::try_from(used.written).expect("small");
        assert!(written <= len, "{written} bytes in {len}");
        let mut bytes = vec![0; written];
        self.mapping.ram().read(at, &mut bytes);
        Some(bytes)
    }

    pub(super) fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.add(queue, bytes, 0);
        self.kick(queue);
        assert_eq!(self.pop(queue), Some(Vec::new()), "output is taken at once");
    }

    /// All that has come in a receive queue.
    pub(super) fn received(&mut self, queue: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(more) = self.pop(queue) {
            bytes.extend(more);
        }
        bytes
    }

    /// A control message of the driver.
    pub(super) fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.send(3, &message);
    }

    /// What the device has told: port, event, value, and what follows.
    pub(super) fn told(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let mut told = Vec::new();
        while let Some(message) = self.pop(2) {
            self.add(2, &[], 128);
            let (id, rest) = message.split_first_chunk().expect("a number");
            let (event, rest) = rest.split_first_chunk().expect("an event");
            let (value, rest) = rest.split_first_chunk().expect("a value");
            told.push((
                u32::from_le_bytes(*id),
                u16::from_le_bytes(*event),
                u16::from_le_bytes(*value),
                rest.to_vec(),
            ));
        }
        told
    }

    /// A client of the port.
    pub(super) fn client(&mut self, port: usize) -> UnixStream {
        let path = self.folder.path().join(port.to_string());
        let client = UnixStream::connect(path).expect("connected");
        client.set_nonblocking(true).expect("a socket");
        self.poll();
        client
    }

    pub(super) fn type_on(&mut self, client: &mut UnixStream, text: &[u8]) {
        client.write_all(text).expect("room");
        self.poll();
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let counters = self.monitor.snapshot().counters;
        let counter = counters.iter().find(|(other, _)| *other == name);
        counter.expect("a counter of that name").1
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

    pub(super) fn is_broken(&self) -> bool {
        let mut notices = self.notices.iter();
        notices.any(|notice| matches!(notice, Notice::Broken { .. }))
    }
}

/// What the client sees now.
pub(super) fn seen(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match client.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}
