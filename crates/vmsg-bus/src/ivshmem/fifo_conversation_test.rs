// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus over an emulated AMP FIFO: a register file whose NOTIFY is counted and becomes an interrupt of the other side, and a
//! recorded conversation held over it, our end once as the device's and once as the driver's.

use super::super::doors::{Doors, FifoEnd};
use super::super::open::{Opened, arrange};
use super::super::{Connector, Listener, QueueLayout, Site};
use super::*;
use crate::{DeviceBus, DriverBus, IvshmemSpec};
use ivshmem::Memory;
use recording::Direction;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use virtio_msg::Channel;
use vmsg_mem::Mapping;

#[allow(dead_code, unreachable_pub)]
#[path = "../../../virtio-msg/tests/support/recording.rs"]
mod recording;

/// The FIFO of two that the bus is in.
const NUMBER: u16 = 1;
const BASE: usize = BYTES;
const PAGE: usize = 4096;
const SLOTS: u32 = 62;
const LONG: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// A side of the card: how often it was rung, and its interrupt.
struct Side {
    rung: AtomicUsize,
    interrupt: OwnedFd,
}

impl Side {
    fn new() -> Arc<Self> {
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Arc::new(Self {
            rung: AtomicUsize::new(0),
            interrupt: interrupt.unwrap(),
        })
    }
}

/// BAR0 as one side sees it; what it rings is the other side.
struct Bar0 {
    other: Arc<Side>,
    version: u32,
}

impl Registers for Bar0 {
    fn load(&self, offset: usize) -> Option<u32> {
        match offset {
            VERSION => Some(self.version),
            FEATURES | 0x20 | 0x24 => Some(0),
            _ => None,
        }
    }

    fn store(&self, offset: usize, value: u32) -> bool {
        if offset == NOTIFY + 4 * usize::from(NUMBER) && value != 0 {
            self.other.rung.fetch_add(1, Ordering::SeqCst);
            rustix::io::write(&self.other.interrupt, &1u64.to_ne_bytes()).unwrap();
        }
        matches!(offset, 0x20 | 0x24)
    }
}

/// Two sides and their memory.
struct Card {
    memory: Arc<Memory>,
    ours: Arc<Side>,
    theirs: Arc<Side>,
}

impl Card {
    fn new() -> Self {
        let (_, file) = Mapping::memfd("bar1", 2 * BYTES as u64, false).unwrap();
        let memory = Memory::of_file(file.as_fd(), 2 * BYTES as u64).unwrap();
        Self {
            memory: Arc::new(memory),
            ours: Side::new(),
            theirs: Side::new(),
        }
    }

    fn spec() -> IvshmemSpec {
        IvshmemSpec {
            pci: Some("0000:00:04.0".into()),
            layout: QueueLayout::AmpPci,
            offset: Some(BASE as u64),
            ..IvshmemSpec::default()
        }
    }

    /// An end of ours on one of the sides.
    fn end(&self, side: &Side, other: &Arc<Side>) -> Opened {
        let registers: Box<dyn Registers> = Box::new(Bar0 {
            other: Arc::clone(other),
            version: 1,
        });
        let fifo = Fifo::new(registers, NUMBER).unwrap();
        let interrupt = side.interrupt.try_clone().unwrap();
        let end = FifoEnd::new(Arc::clone(&self.memory), fifo, interrupt);
        arrange(&Self::spec(), Doors::Fifo(end)).unwrap()
    }

    fn listener(&self) -> Listener {
        let site = Site::new(&Self::spec(), "host");
        Listener::on(site, self.end(&self.ours, &self.theirs)).unwrap()
    }

    /// On the other side where `listener` is on ours.
    fn connector(&self, side: &Side, other: &Arc<Side>) -> Connector {
        Connector::on(&Self::spec(), "driver", self.end(side, other))
    }

    /// The other end, by hand.
    fn raw(&self, driver: bool) -> Raw<'_> {
        let page = |driver| BASE + QUEUES + if driver { 0 } else { PAGE };
        Raw {
            card: self,
            out: page(driver),
            into: page(!driver),
            sent: 0,
        }
    }
}

/// An end that is not ours: QEMU's, which rings for each message and sleeps until its interrupt.
struct Raw<'c> {
    card: &'c Card,
    out: usize,
    into: usize,
    sent: usize,
}

impl Raw<'_> {
    fn word(&self, at: usize) -> u32 {
        self.card.memory.region().read_u32(at).unwrap()
    }

    fn put(&self, at: usize, value: u32) {
        std::sync::atomic::fence(Ordering::SeqCst);
        assert!(self.card.memory.region().write_u32(at, value));
    }

    fn slot(page: usize, index: u32) -> usize {
        page + 0x80 + 64 * usize::try_from(index).unwrap()
    }

    fn send(&mut self, message: &[u8]) {
        let head = self.word(self.out);
        let region = self.card.memory.region();
        let mut slot = [0; 64];
        slot[..message.len()].copy_from_slice(message);
        assert_eq!(region.write(Self::slot(self.out, head), &slot), 64);
        self.put(self.out, (head + 1) % SLOTS);
        let registers = Bar0 {
            other: Arc::clone(&self.card.ours),
            version: 1,
        };
        assert!(registers.store(NOTIFY + 4 * usize::from(NUMBER), 1));
        self.sent += 1;
    }

    fn recv(&mut self) -> [u8; 64] {
        loop {
            let tail = self.word(self.into + 0x40);
            if tail != self.word(self.into) {
                std::sync::atomic::fence(Ordering::SeqCst);
                let mut slot = [0; 64];
                let region = self.card.memory.region();
                assert_eq!(region.read(Self::slot(self.into, tail), &mut slot), 64);
                self.put(self.into + 0x40, (tail + 1) % SLOTS);
                return slot;
            }
            sleep_on(&self.card.theirs.interrupt);
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.card.theirs.interrupt, &mut count);
        }
    }

    #[track_caller]
    fn hears(&mut self, message: &[u8]) {
        let slot = self.recv();
        assert_eq!(slot[..message.len()], *message);
        assert!(slot[message.len()..].iter().all(|byte| *byte == 0));
    }
}

#[track_caller]
fn sleep_on(fd: impl AsFd) {
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&LONG));
    assert_eq!(ready.unwrap(), 1, "never woken");
}

#[track_caller]
fn accept(listener: &mut Listener) -> DeviceBus {
    loop {
        if let Some(bus) = listener.accept(Instant::now()).unwrap() {
            return bus;
        }
        sleep_on(&*listener);
    }
}

macro_rules! hears {
    ($bus:expr, $message:expr) => {{
        let (bus, message): (_, &[u8]) = ($bus, $message);
        let mut buf = [0; 64];
        let len = loop {
            if let Some(len) = bus.try_recv(&mut buf).unwrap() {
                break len;
            }
            let long = std::time::Duration::from_secs(20);
            assert!(bus.wait(Some(long)).unwrap(), "never woken");
        };
        assert!(len >= message.len());
        assert_eq!(buf[..message.len()], *message);
    }};
}

fn conversation() -> Vec<recording::Line> {
    let recordings = recording::recordings().into_iter();
    let mut found = recordings.filter(|recording| recording.name == "qemu/v2-amp-spsc.txt");
    let lines = found.next().expect("the recording").lines;
    assert!(lines.len() > 20);
    lines
}

fn says(bus: &mut impl Channel, message: &[u8]) {
    bus.try_send(message).unwrap();
    bus.flush().unwrap();
}

#[test]
fn a_recorded_driver_is_served_through_registers() {
    let card = Card::new();
    let mut listener = card.listener();
    let mut raw = card.raw(true);
    let mut bus = None;
    let mut answers = 0;
    for line in conversation() {
        match line.direction {
            Direction::ToDevice => {
                raw.send(&line.bytes);
                let bus = bus.get_or_insert_with(|| accept(&mut listener));
                hears!(bus, &line.bytes);
            }
            Direction::FromDevice => {
                let bus: &mut DeviceBus = bus.as_mut().expect("asked before");
                let before = card.theirs.rung.load(Ordering::SeqCst);
                says(bus, &line.bytes);
                assert!(card.theirs.rung.load(Ordering::SeqCst) > before, "rung");
                raw.hears(&line.bytes);
                answers += 1;
            }
        }
    }
    assert!(answers > 10);
    assert_eq!(card.ours.rung.load(Ordering::SeqCst), raw.sent);
}

#[test]
fn a_recorded_device_is_driven_through_registers() {
    let card = Card::new();
    let mut bus: DriverBus = card.connector(&card.ours, &card.theirs).connect().unwrap();
    let mut raw = card.raw(false);
    for line in conversation() {
        match line.direction {
            Direction::ToDevice => {
                let before = card.theirs.rung.load(Ordering::SeqCst);
                says(&mut bus, &line.bytes);
                assert!(card.theirs.rung.load(Ordering::SeqCst) > before, "rung");
                raw.hears(&line.bytes);
            }
            Direction::FromDevice => {
                raw.send(&line.bytes);
                hears!(&mut bus, &line.bytes);
            }
        }
    }
    assert_eq!(card.ours.rung.load(Ordering::SeqCst), raw.sent);
}

#[test]
fn two_ends_of_ours_find_each_other_on_a_fifo() {
    let card = Card::new();
    let mut listener = card.listener();
    for round in 0..3u8 {
        let connector = card.connector(&card.theirs, &card.ours);
        let thread = std::thread::spawn(move || connector.connect().unwrap());
        let mut device = accept(&mut listener);
        let mut driver = thread.join().unwrap();
        assert_eq!(driver.peer().name, "host");
        assert_eq!(device.peer().name, "driver");
        let message = [2, 3, 0, 0, 1, 0, 12, 0, round, 2, 3, 4];
        for _ in 0..200 {
            says(&mut driver, &message);
            hears!(&mut device, &message);
            says(&mut device, &message);
            hears!(&mut driver, &message);
        }
    }
}

#[test]
fn a_card_of_another_version_or_with_fewer_fifos_is_refused() {
    let registers = |version| Bar0 {
        other: Side::new(),
        version,
    };
    let error = Fifo::new(registers(2), 0).unwrap_err();
    assert_eq!(error, FifoError::Version(2));
    let error = Fifo::new(registers(1), 2).unwrap_err();
    assert_eq!(error, FifoError::NoRegister(0x28));
}
