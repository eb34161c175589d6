// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A block device in a worker, its driver, and its disk, all in one thread.

use std::sync::Arc;

use vmsg_block::Facts;
use vmsg_mem::{Access, BusAddr, Mapping, RamSlice, WindowTable};
use vmsg_queue::{Inflight, Token};

use super::disk::{Scripted, facts};
use crate::blk::{Blk, Settings, bits};
use crate::stand::{Ring, Stand, is_also, ring, start, window};
use crate::worker::{Command, Notice, QueueStart, Record, Resume};

pub(super) use crate::stand::BASE;

/// Bytes of each of two windows that follow each other in the addresses and not in memory, the first at [`BASE`].
pub(super) const HALF: usize = 1 << 20;
/// Where there is one that can only be read.
pub(super) const READ_ONLY: u64 = 0x8000_0000;
/// Bytes for the rings of each queue.
const RINGS: usize = 1 << 14;
/// Where the buffers are, for the driver.
pub(super) const BUFFERS: u64 = BASE + 0x8_0000;
pub(super) const SIZE: u16 = 64;

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

/// The driver's memory, its rings, and the records that it lends: what outlives a device host.
pub(super) struct Guest {
    low: Arc<Mapping>,
    high: Arc<Mapping>,
    pub(super) table: Arc<WindowTable>,
    pub(super) rings: Vec<Ring<'static>>,
    records: Vec<Arc<Mapping>>,
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
            window(&low, BASE, HALF, Access::ReadWrite),
            window(&high, BASE + HALF as u64, HALF, Access::ReadWrite),
            window(&high, READ_ONLY, HALF, Access::Read),
        ];
        let table = Arc::new(WindowTable::new(entries).expect("windows"));
        let rings = (0..queues).map(|queue| ring(leaked, queue * RINGS, SIZE));
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
        let entries = vec![window(&self.low, BASE, HALF, Access::ReadWrite)];
        Arc::new(WindowTable::new(entries).expect("a window"))
    }

    fn each(&self, addr: u64, len: usize, mut work: impl FnMut(RamSlice<'_>, usize)) {
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
    stand: Stand,
    pub(super) guest: Guest,
    pub(super) disk: Scripted,
}

is_also!(Bench, stand: Stand);

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
        let mut bench = Self {
            stand: Stand::new(Box::new(device)),
            guest,
            disk,
        };
        let table = Arc::clone(&bench.guest.table);
        bench.tell(Command::SetMemory(table)).expect("memory");
        for queue in 0..bench.guest.rings.len() {
            bench.start(queue, resume);
        }
        bench.negotiate(features).expect("fine");
        bench.driver_ok();
        bench
    }

    pub(super) fn start(&mut self, queue: usize, resume: bool) {
        let start = QueueStart {
            resume: resume.then_some(Resume::FromUsedRing),
            record: Some(Record {
                memory: Arc::clone(&self.guest.records[queue]),
                resume,
            }),
            ..start(queue, self.guest.rings[queue].config())
        };
        self.tell(Command::StartQueue(start)).expect("a queue");
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
}
