// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A block device in a worker, its driver, and its disk, all in one thread.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_block::Facts;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{DriverQueue, DriverSlot, Inflight, Layout, QueueFeatures, Token};

use super::disk::{Scripted, facts};
use crate::blk::{Blk, Settings, bits};
use crate::device::{Device, Monitor, Operation};
use crate::worker::{Command, Core, Fds, Notice, QueueStart, Record, Reply, Resume, Slot};

/// Two windows that follow each other in the addresses and not in memory, and one that can only be read.
pub(super) const BASE: u64 = 0x4000_0000;
pub(super) const HALF: usize = 1 << 20;
pub(super) const READ_ONLY: u64 = 0x8000_0000;
/// Bytes for the rings of each queue.
const RINGS: usize = 1 << 14;
/// Where the buffers are, for the driver.
pub(super) const BUFFERS: u64 = BASE + 0x8_0000;
pub(super) const SIZE: u16 = 64;
const SLOT: Slot = Slot(0);

/// All features that a device has, but those of the transport.
pub(super) const ALL: &[u32] = &[
    bits::SIZE_MAX,
    bits::SEG_MAX,
    bits::BLK_SIZE,
    bits::FLUSH,
    bits::TOPOLOGY,
    bits::CONFIG_WCE,
    bits::DISCARD,
    bits::WRITE_ZEROES,
];

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

/// The driver's memory, its rings, and the records that it lends: what outlives a device host.
pub(super) struct Guest {
    low: Arc<Mapping>,
    high: Arc<Mapping>,
    pub(super) table: Arc<WindowTable>,
    pub(super) rings: Vec<DriverQueue<'static, Vec<DriverSlot>>>,
    records: Vec<Arc<Mapping>>,
}

fn entry(base: u64, mapping: &Arc<Mapping>, access: Access) -> TableEntry {
    TableEntry {
        base: BusAddr(base),
        mapping: Arc::clone(mapping),
        offset: 0,
        len: HALF,
        access,
    }
}

impl Guest {
    pub(super) fn new(queues: usize) -> Self {
        let memory = || {
            let (mapping, _fd) = Mapping::memfd("guest", HALF as u64, true).expect("memfd");
            Arc::new(mapping)
        };
        let (low, high) = (memory(), memory());
        // Rings borrow the memory; a test's process is short.
        let leaked: &'static Mapping = Box::leak(Box::new(Arc::clone(&low)));
        let entries = vec![
            entry(BASE, &low, Access::ReadWrite),
            entry(BASE + HALF as u64, &high, Access::ReadWrite),
            entry(READ_ONLY, &high, Access::Read),
        ];
        let table = Arc::new(WindowTable::new(entries).expect("windows"));
        let layout = Layout::new(SIZE, 0).expect("a size");
        let rings = (0..queues).map(|queue| {
            let at = queue * RINGS;
            let ram = leaked.ram().get(at, layout.total_len()).expect("inside");
            let base = BusAddr(BASE + at as u64);
            let slots = vec![DriverSlot::default(); usize::from(SIZE)];
            DriverQueue::new(layout, QueueFeatures::default(), ram, base, slots).expect("a queue")
        });
        let rings = rings.collect();
        let bytes = u64::try_from(Inflight::bytes_for(SIZE)).expect("small");
        let records = (0..queues).map(|_| {
            let (record, _fd) = Mapping::memfd("record", bytes, true).expect("memfd");
            Arc::new(record)
        });
        Self {
            low,
            high,
            table,
            rings,
            records: records.collect(),
        }
    }

    /// The memory without its upper half.
    pub(super) fn lower_half(&self) -> Arc<WindowTable> {
        let entries = vec![entry(BASE, &self.low, Access::ReadWrite)];
        Arc::new(WindowTable::new(entries).expect("a window"))
    }

    fn each(&self, addr: u64, len: usize, mut work: impl FnMut(vmsg_mem::RamSlice<'_>, usize)) {
        let mut at = usize::try_from(addr - BASE).expect("small");
        let mut done = 0;
        while done < len {
            let (mapping, offset) = match at.checked_sub(HALF) {
                None => (&self.low, at),
                Some(offset) => (&self.high, offset),
            };
            let count = (len - done).min(HALF - offset);
            work(mapping.ram().get(offset, count).expect("inside"), done);
            at += count;
            done += count;
        }
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) {
        self.each(addr, bytes.len(), |ram, done| {
            ram.write(0, &bytes[done..done + ram.len()]);
        });
    }

    pub(super) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.each(addr, len, |ram, done| {
            let len = ram.len();
            ram.read(0, &mut bytes[done..done + len]);
        });
        bytes
    }

    /// Takes the next used chain of `queue`.
    pub(super) fn used(&mut self, queue: usize) -> Option<(Token, u32)> {
        let used = self.rings[queue].pop_used().expect("a sane device")?;
        Some((used.token, used.written))
    }
}

pub(super) struct Bench {
    core: Core,
    pub(super) guest: Guest,
    pub(super) disk: Scripted,
    pub(super) monitor: Arc<dyn Monitor>,
    features: FeatureSet,
    tickets: u64,
    pub(super) notices: Vec<Notice>,
    /// Tickets that were answered.
    answers: Vec<(u64, Result<(), String>)>,
}

pub(super) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub(super) const DISK: u64 = 1 << 20;

impl Bench {
    /// A device with a disk of 1 MiB that its driver has set up with all features.
    pub(super) fn new() -> Self {
        Self::with(&Settings::new("disk0"), facts(DISK), ALL)
    }

    pub(super) fn with(settings: &Settings, facts: Facts, features: &[u32]) -> Self {
        let guest = Guest::new(usize::from(settings.queues));
        Self::over(settings, Scripted::new(facts), guest, features, false)
    }

    /// A device for a driver that may have had another one before.
    pub(super) fn over(
        settings: &Settings,
        disk: Scripted,
        guest: Guest,
        features: &[u32],
        resume: bool,
    ) -> Self {
        let device = Blk::new(settings, Box::new(disk.clone()));
        let offered = device.features();
        let features = FeatureSet::from_bits(features);
        assert!(features.is_subset(&offered), "offered: {offered}");
        let monitor = device.monitor().expect("counters");
        let mut core = Core::new();
        core.command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
        let mut bench = Self {
            core,
            guest,
            disk,
            monitor,
            features,
            tickets: 0,
            notices: Vec::new(),
            answers: Vec::new(),
        };
        let table = Arc::clone(&bench.guest.table);
        bench.tell(Command::SetMemory(table)).expect("memory");
        for queue in 0..bench.guest.rings.len() {
            bench.start(queue, resume);
        }
        bench.driver_ok();
        bench
    }

    pub(super) fn start(&mut self, queue: usize, resume: bool) {
        let start = QueueStart {
            queue,
            config: self.guest.rings[queue].config(),
            features: FeatureSet::EMPTY,
            resume: resume.then_some(Resume::FromUsedRing),
            record: Some(Record {
                memory: Arc::clone(&self.guest.records[queue]),
                resume,
            }),
        };
        self.tell(Command::StartQueue(start)).expect("a queue");
    }

    pub(super) fn driver_ok(&mut self) {
        let features = self.features;
        self.tell(Command::CheckFeatures(features)).expect("fine");
        self.tell(Command::DriverOk(features)).expect("running");
        self.run();
    }

    /// Begins a command; its ticket.
    pub(super) fn begin(&mut self, command: Command) -> u64 {
        self.tickets += 1;
        self.core.command(SLOT, self.tickets, command, &mut NoFds);
        self.collect();
        self.tickets
    }

    pub(super) fn answer(&self, ticket: u64) -> Option<Result<(), String>> {
        let answer = self.answers.iter().find(|(of, _)| *of == ticket);
        answer.map(|(_, result)| result.clone())
    }

    pub(super) fn tell(&mut self, command: Command) -> Result<(), String> {
        let ticket = self.begin(command);
        self.answer(ticket).expect("every command is answered")
    }

    pub(super) fn operate(&mut self, operation: Operation) -> Result<(), String> {
        let result = self.tell(Command::Operate(operation));
        self.run();
        result
    }

    fn collect(&mut self) {
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done { ticket, result } => self.answers.push((ticket, result)),
                Reply::Notice(_, notice) => self.notices.push(notice),
            }
        }
    }

    pub(super) fn kick(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        self.run();
    }

    /// The disk's descriptor is readable.
    pub(super) fn poll(&mut self) {
        self.poll_at(Instant::now());
    }

    pub(super) fn poll_at(&mut self, now: Instant) {
        self.core.poll_device(SLOT, now);
        self.run();
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.core.next_timeout()
    }

    pub(super) fn run(&mut self) {
        self.core.carry_on(&mut NoFds);
        // A device that never ends is as bad as one that does nothing.
        for _ in 0..10_000 {
            if !self.core.step(Instant::now()) {
                break;
            }
        }
        assert!(!self.core.has_work(), "the device is busy for ever");
        self.collect();
    }

    pub(super) fn broken(&self) -> Option<&str> {
        self.notices.iter().find_map(|notice| match notice {
            Notice::Broken { why, .. } => Some(why.as_str()),
            _ => None,
        })
    }

    /// The configuration that the driver was told of last.
    pub(super) fn config_notices(&self) -> Vec<(usize, Vec<u8>)> {
        let notices = self.notices.iter().filter_map(|notice| match notice {
            Notice::Config { offset, data } => Some((*offset, data.clone())),
            _ => None,
        });
        notices.collect()
    }

    /// Adds a request of one buffer for what is read and one for what is written, at place `slot`; kicks.
    pub(super) fn add(&mut self, queue: usize, slot: u64, readable: &[u8], room: usize) -> Token {
        let at = BUFFERS + slot * 0x4000;
        self.guest.write(at, readable);
        self.guest.write(at + 0x2000, &vec![0xee; room]);
        let len = |len: usize| u32::try_from(len).expect("small");
        let readable = [(BusAddr(at), len(readable.len()))];
        let writable = [(BusAddr(at + 0x2000), len(room))];
        let ring = &mut self.guest.rings[queue];
        let token = ring.add(&readable, &writable).expect("room");
        ring.publish().expect("published");
        self.kick(queue);
        token
    }

    /// A request that is done at once: what was written for it.
    pub(super) fn ask(&mut self, readable: &[u8], room: usize) -> Vec<u8> {
        let token = self.add(0, 0, readable, room);
        let (used, written) = self.guest.used(0).expect("done");
        assert_eq!(used, token);
        assert_eq!(written as usize, room, "data and status");
        self.guest.read(BUFFERS + 0x2000, room)
    }

    pub(super) fn count(&self, name: &str) -> u64 {
        let counters = self.monitor.snapshot().counters;
        let found = counters.iter().find(|(known, _)| *known == name);
        found.expect("a counter").1
    }
}
