// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver of a disk that writes anything into its rings, buffers and records, and takes memory and queues away at any time.

mod disk;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_msg::FeatureSet;
use vmsg_device::blk::{Blk, Settings};
use vmsg_device::device::Operation;
use vmsg_device::worker::{Command, Core, Fds, Notice, QueueStart, Record, Reply, Resume, Slot};
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{Inflight, QueueConfig};

use disk::Made;

const BASE: u64 = 0x10_0000;
const QUEUES: usize = 2;
/// Bytes of each queue's part of the memory.
const PART: usize = 1 << 14;
const SIZE: u16 = 16;
/// Where rings and buffers are in a part.
const AVAIL: usize = 0x400;
const USED: usize = 0x600;
const BUFFERS: usize = 0x800;
/// Bytes of the file that no window has; and of the window that can only be read.
const OUTSIDE: usize = 1 << 13;
const SLOT: Slot = Slot(0);
/// Steps of a story.
const STEPS: usize = 96;
/// Turns of queues after a kick: whoever is busy for longer is so for ever.
const TURNS: usize = 20_000;
/// What stands where the device must not write.
const CANARY: u8 = 0xa5;

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

struct Story<'a> {
    bytes: &'a [u8],
    core: Core,
    disk: Made,
    memory: Arc<Mapping>,
    records: Vec<Arc<Mapping>>,
    available: [u16; QUEUES],
    tickets: u64,
    /// Commands that are not answered yet.
    open: Vec<u64>,
    /// The answers to the others.
    refused: Vec<u64>,
    now: Instant,
}

fn memory(name: &str, len: usize) -> Arc<Mapping> {
    let (mapping, _fd) = Mapping::memfd(name, len as u64, true).expect("memfd");
    Arc::new(mapping)
}

/// All windows: each queue's part, and behind them one that can only be read.
fn windows(memory: &Arc<Mapping>, which: u8) -> Arc<WindowTable> {
    let entry = |base: u64, offset: usize, len: usize, access| TableEntry {
        base: BusAddr(base),
        mapping: Arc::clone(memory),
        offset,
        len,
        access,
    };
    let mut all = Vec::new();
    for queue in 0..QUEUES {
        if which & 1 << queue == 0 {
            let base = BASE + (queue * PART) as u64;
            all.push(entry(base, queue * PART, PART, Access::ReadWrite));
        }
    }
    if which & 4 == 0 {
        let behind = QUEUES * PART;
        all.push(entry(BASE + behind as u64, behind, OUTSIDE, Access::Read));
    }
    if which & 8 != 0 {
        // The first part once more, where its end is the end of all addresses.
        let base = u64::MAX - (PART as u64 - 1);
        all.push(entry(base, 0, PART, Access::ReadWrite));
    }
    Arc::new(WindowTable::new(all).expect("windows"))
}

impl Story<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn long(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes.fill_with(|| self.byte());
        u64::from_le_bytes(bytes)
    }

    fn begin(&mut self, command: Command) -> u64 {
        self.tickets += 1;
        self.open.push(self.tickets);
        self.core.command(SLOT, self.tickets, command, &mut NoFds);
        self.take_replies();
        self.tickets
    }

    fn take_replies(&mut self) {
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done { ticket, result } => {
                    let at = self.open.iter().position(|open| *open == ticket);
                    self.open.remove(at.expect("each is answered once"));
                    if result.is_err() {
                        self.refused.push(ticket);
                    }
                }
                Reply::Notice(_, Notice::Broken { why, .. }) => {
                    assert!(!why.contains("panicked"), "{why}");
                }
                Reply::Notice(..) => {}
            }
        }
    }

    fn run(&mut self) {
        self.core.carry_on(&mut NoFds);
        for _ in 0..TURNS {
            if !self.core.step(self.now) {
                break;
            }
        }
        assert!(!self.core.has_work(), "the device is busy for ever");
        self.take_replies();
    }

    fn poll(&mut self) {
        self.core.poll_device(SLOT, self.now);
        self.run();
    }

    /// Lets the disk end everything, until the device has done what it was told.
    fn settle(&mut self) {
        for _ in 0..64 {
            if self.open.is_empty() {
                return;
            }
            self.disk.finish_all();
            self.now += Duration::from_secs(1);
            self.core.handle_timeouts(self.now);
            self.poll();
        }
        panic!("the device is never ready");
    }

    /// What the driver has taken back is nobody's any more.
    fn check_let_go(&self, table: Option<&Arc<WindowTable>>) {
        self.disk.check_touches_only(table);
    }

    fn add(&mut self) {
        let flags = self.byte();
        self.disk = Made::new(flags);
        let mut settings =
            Settings::new(["disk0", "", "a serial number that is too long"][self.below(3)]);
        settings.queues = u16::try_from(QUEUES).expect("few");
        settings.write_back = flags & 1 != 0;
        settings.discard = flags & 2 == 0;
        let device = Blk::new(&settings, Box::new(self.disk.clone()));
        self.core
            .command(SLOT, 0, Command::Add(Box::new(device)), &mut NoFds);
        self.take_replies();
        let table = windows(&self.memory, 0);
        self.begin(Command::SetMemory(table));
    }

    fn config(&mut self, queue: usize) -> QueueConfig {
        let at = |offset: usize| BusAddr(BASE + (queue * PART + offset) as u64);
        let mut config = QueueConfig {
            size: SIZE,
            desc: at(0),
            driver: at(AVAIL),
            device: at(USED),
        };
        let spoil = self.byte();
        if spoil & 0xc0 == 0xc0 {
            let place = BusAddr(match spoil & 3 {
                0 => self.long(),
                _ => BASE + (self.below(64) * 1024) as u64,
            });
            match spoil >> 2 & 3 {
                0 => config.desc = place,
                1 => config.driver = place,
                2 => config.device = place,
                _ => config.size = u16::from(self.byte()) << self.below(9),
            }
        }
        config
    }

    fn start(&mut self, queue: usize) {
        let how = self.byte();
        let config = self.config(queue);
        let resume = match how & 7 {
            0 => Some(Resume::FromUsedRing),
            1 => Some(Resume::AsFound),
            2 => {
                let avail = u16::from(self.byte());
                let used = u16::from(self.byte());
                Some(Resume::At { avail, used })
            }
            _ => None,
        };
        let record = (how & 0x18 != 0).then(|| Record {
            memory: Arc::clone(&self.records[queue]),
            resume: how & 0x20 != 0,
        });
        if resume.is_none() && how & 0x40 != 0 {
            let ram = self.memory.ram();
            ram.write(queue * PART + AVAIL, &[0; 4]);
            ram.write(queue * PART + USED, &[0; 4]);
            self.available[queue] = 0;
        }
        let features = FeatureSet::from_u64(u64::from(self.byte() & 0x30) << 24);
        self.begin(Command::StartQueue(QueueStart {
            queue,
            config,
            features,
            resume,
            record,
        }));
    }

    /// A chain of sound descriptors for a sound request, with anything in them made unsound now and then.
    fn chain(&mut self, queue: usize) {
        let part = queue * PART;
        let kind = [0, 1, 4, 8, 11, 13, 0, 1, 2, u32::MAX][self.below(10)];
        let sector = match self.byte() {
            255 => self.long(),
            254 => u64::MAX / 512 - u64::from(self.byte()),
            sector => u64::from(sector & 0x3f),
        };
        let place = part + BUFFERS + 512 * self.below(16);
        let mut words = Vec::from(kind.to_le_bytes());
        words.extend([0; 4]);
        words.extend(sector.to_le_bytes());
        for _ in 0..self.below(3) {
            // Segments of discards.
            words.extend(self.below(64).to_le_bytes());
            let sectors = match self.byte() {
                255 => u32::MAX,
                254 => 1 << 22,
                few => u32::from(few & 0xf),
            };
            words.extend(sectors.to_le_bytes());
            words.extend(u32::from(self.byte() & 3).to_le_bytes());
        }
        self.memory.ram().write(place, &words);
        let count = 1 + self.below(5);
        let first = self.below(usize::from(SIZE));
        let readable = self.below(count + 1);
        for piece in 0..count {
            let index = (first + piece) % usize::from(SIZE);
            let spoil = self.byte();
            let mut len = match spoil & 0x3f {
                0 => 0,
                1 => u32::MAX,
                2 => 15,
                3 => 19,
                4 => 21,
                5 => 17,
                6 => 1,
                7 => 4096,
                _ if piece == 0 && readable > 1 => 16,
                _ if piece == 0 => u32::try_from(words.len()).expect("few"),
                _ if piece == count - 1 => 1,
                _ => 512,
            };
            if spoil & 0x3f == 8 {
                len = u32::from(self.byte()) << 8;
            }
            let addr = match spoil >> 6 {
                0 => match self.byte() {
                    0 => self.long(),
                    1 => u64::MAX - self.long() % PART as u64,
                    // Rings, what can only be read, what is in no window.
                    many => BASE + u64::from(many) * 0xc0,
                },
                _ => BASE + (place + 512 * piece) as u64,
            };
            let mut flags = u16::from(piece >= readable) << 1;
            let mut next = u16::try_from((index + 1) % usize::from(SIZE)).expect("small");
            if piece + 1 < count {
                flags |= 1;
            }
            if spoil == 0x7f {
                flags = u16::from(self.byte());
                next = u16::from(self.byte());
            }
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&addr.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&next.to_le_bytes());
            self.memory.ram().write(part + 16 * index, &descriptor);
        }
        self.offer(queue, u16::try_from(first).expect("small"));
    }

    /// Puts a head into the available ring, the same one as before if it is so said.
    fn offer(&mut self, queue: usize, head: u16) {
        let ram = self.memory.ram();
        let part = queue * PART;
        let at = usize::from(self.available[queue] % SIZE);
        ram.write(part + AVAIL + 4 + 2 * at, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        let index = self.available[queue];
        ram.write(part + AVAIL + 2, &index.to_le_bytes());
    }

    fn kick(&mut self, queue: usize) {
        self.core.kick(SLOT, queue);
        self.run();
    }

    fn step(&mut self) {
        let queue = self.below(QUEUES);
        match self.byte() % 32 {
            0..=10 => {
                self.chain(queue);
                if self.byte() & 3 != 0 {
                    self.kick(queue);
                }
            }
            11 => {
                let head = self.byte() % 18;
                self.offer(queue, u16::from(head));
                self.kick(queue);
            }
            12 => self.kick(queue),
            13 | 14 => {
                let (which, fails) = (self.below(16), self.byte() & 7 == 0);
                self.disk.finish(which, fails);
                self.poll();
            }
            15 => self.poll(),
            16 => {
                let time = u64::from(self.byte()) * 16;
                self.now += Duration::from_millis(time);
                self.core.handle_timeouts(self.now);
                self.run();
            }
            // Anything anywhere.
            17 => {
                let at = self.below(256) * 64 + self.below(64) + queue * PART;
                let count = self.below(9);
                let bytes = self.long().to_le_bytes();
                let room = (queue + 1) * PART - at.min((queue + 1) * PART);
                self.memory
                    .ram()
                    .write(at, &bytes[..count.min(8).min(room)]);
            }
            18 => {
                let record = Arc::clone(&self.records[queue]);
                let at = self.below(record.ram().len() - 8);
                let bytes = self.long().to_le_bytes();
                let count = self.below(9);
                record.ram().write(at, &bytes[..count]);
            }
            19 => {
                self.begin(Command::Reset);
                if self.byte() & 1 != 0 {
                    self.settle();
                    self.check_let_go(None);
                }
            }
            20 => {
                self.begin(Command::ResetQueue(queue));
                if self.byte() & 1 != 0 {
                    self.settle();
                }
            }
            21..=23 => self.start(queue),
            24 => {
                let features = (self.long() & 0x30ff_ffff) | u64::from(self.byte()) << 28;
                let features = FeatureSet::from_u64(features);
                self.begin(Command::DriverOk(features));
                self.run();
            }
            25 => {
                let table = windows(&self.memory, self.bytes.first().copied().unwrap_or(0) & 15);
                self.byte();
                let ticket = self.begin(Command::SetMemory(Arc::clone(&table)));
                if self.byte() & 1 != 0 {
                    self.settle();
                    if !self.refused.contains(&ticket) {
                        self.check_let_go(Some(&table));
                    }
                }
            }
            26 => {
                let offset = self.below(70);
                let count = self.below(9);
                let data = self.long().to_le_bytes()[..count].to_vec();
                self.begin(Command::WriteConfig { offset, data });
            }
            27 => {
                let sectors = u64::from(self.byte());
                self.disk.resize(sectors * 512);
                self.begin(Command::Operate(Operation::Rescan));
                self.run();
            }
            28 => {
                let room = self.below(20);
                self.disk.set_room(room);
            }
            29 => {
                let hold = self.byte() & 1 != 0;
                self.disk.set_hold(hold);
            }
            30 => {
                self.disk.set_room(usize::MAX);
                self.begin(Command::Remove);
                self.settle();
                self.add();
            }
            _ => {
                // The usual beginning, so that the rest is about something.
                self.begin(Command::Reset);
                self.settle();
                for queue in 0..QUEUES {
                    let ram = self.memory.ram();
                    ram.write(queue * PART, &[0; BUFFERS]);
                    self.available[queue] = 0;
                    let config = QueueConfig {
                        size: SIZE,
                        desc: BusAddr(BASE + (queue * PART) as u64),
                        driver: BusAddr(BASE + (queue * PART + AVAIL) as u64),
                        device: BusAddr(BASE + (queue * PART + USED) as u64),
                    };
                    self.begin(Command::SetMemory(windows(&self.memory, 0)));
                    self.begin(Command::StartQueue(QueueStart {
                        queue,
                        config,
                        features: FeatureSet::EMPTY,
                        resume: None,
                        record: Some(Record {
                            memory: Arc::clone(&self.records[queue]),
                            resume: false,
                        }),
                    }));
                }
                self.begin(Command::DriverOk(FeatureSet::from_u64(0x6a66)));
                self.run();
            }
        }
    }
}

/// One story; panics if the device does what it must not.
pub(crate) fn one(bytes: &[u8]) {
    let whole = memory("guest", QUEUES * PART + 2 * OUTSIDE);
    whole.ram().fill(CANARY);
    let record = Inflight::bytes_for(SIZE);
    let mut story = Story {
        bytes,
        core: Core::new(),
        disk: Made::new(0),
        memory: Arc::clone(&whole),
        records: (0..QUEUES).map(|_| memory("record", record)).collect(),
        available: [0; QUEUES],
        tickets: 0,
        open: Vec::new(),
        refused: Vec::new(),
        now: Instant::now(),
    };
    story.add();
    for _ in 0..STEPS {
        if story.bytes.is_empty() {
            break;
        }
        story.step();
    }
    story.disk.set_room(usize::MAX);
    story.settle();
    story.begin(Command::Reset);
    story.settle();
    story.check_let_go(None);
    // What can only be read, and what no window has.
    let mut rest = vec![0; 2 * OUTSIDE];
    whole.ram().read(QUEUES * PART, &mut rest);
    assert!(rest.iter().all(|byte| *byte == CANARY), "written outside");
    story.begin(Command::Remove);
    story.settle();
}
