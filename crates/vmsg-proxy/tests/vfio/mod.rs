// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM with a guest whose driver finds its device on the PCI bus and works it through its registers.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "each test program uses another part"
)]

pub mod client;
pub mod place;
pub mod region;

use client::{Client, Memory, PATIENCE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;
use vmsg_mem::{BusAddr, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures, Token};

/// Where the guest's memory is, and how much.
pub const RAM_AT: u64 = 0x4000_0000;
pub const RAM: u64 = 0x40_0000;
/// Memory does not begin at the beginning of its file.
pub const OFFSET: u64 = 0x3000;
/// Where rings are, one queue after another.
const RINGS: usize = 0x1_0000;
const RING: usize = 0x4000;
/// Where buffers are.
pub const BUFFERS: usize = 0x10_0000;
const SIZE: u16 = 64;

pub const CONFIG: u32 = 7;
pub const INTX: u32 = 0;
pub const MSIX: u32 = 2;

// Status (virtio 1.3 §2.1).
pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

/// VERSION_1, ACCESS_PLATFORM, RING_EVENT_IDX.
const ACCEPTED: u64 = 1 << 32 | 1 << 33 | 1 << 29;

/// What a VMM does, whoever speaks the protocol.
pub trait Vmm {
    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]);
    fn write(&mut self, region: u32, offset: u64, data: &[u8]);
    /// A write nobody waits for.
    fn post(&mut self, region: u32, offset: u64, data: &[u8]);
    fn lend(&mut self, address: u64, size: u64, offset: u64, fd: Option<BorrowedFd<'_>>);
    fn eventfds(&mut self, index: u32, start: u32, fds: &[BorrowedFd<'_>]);
    fn unmask_intx(&mut self);
}

impl Vmm for Client {
    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        self.read_region(region, offset, into);
    }
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.write_region(region, offset, data);
    }
    fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        Client::post(self, region, offset, data);
    }
    fn lend(&mut self, address: u64, size: u64, offset: u64, fd: Option<BorrowedFd<'_>>) {
        self.map(address, size, offset, fd).unwrap();
    }
    fn eventfds(&mut self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) {
        self.set_eventfds(index, start, fds);
    }
    fn unmask_intx(&mut self) {
        self.unmask(INTX);
    }
}

/// What other people have written.
impl Vmm for vfio_user::Client {
    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        self.region_read(region, offset, into).unwrap();
    }
    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.region_write(region, offset, data).unwrap();
    }
    fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.region_write(region, offset, data).unwrap();
    }
    fn lend(&mut self, address: u64, size: u64, offset: u64, fd: Option<BorrowedFd<'_>>) {
        use std::os::fd::AsRawFd;
        let fd = fd.expect("it knows no memory without files").as_raw_fd();
        self.dma_map(offset, address, size, fd).unwrap();
    }
    fn eventfds(&mut self, index: u32, start: u32, fds: &[BorrowedFd<'_>]) {
        use std::os::fd::AsRawFd;
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        self.set_irqs(index, 4 | 32, start, fds.len() as u32, &fds)
            .unwrap();
    }
    fn unmask_intx(&mut self) {
        self.set_irqs(INTX, 1 | 16, 0, 1, &[]).unwrap();
    }
}

/// A structure of virtio: BAR and offset.
type At = (u32, u64);

/// What the capabilities in configuration space say.
#[derive(Debug)]
pub struct Layout4 {
    pub common: At,
    pub notify: At,
    pub multiplier: u64,
    pub isr: At,
    pub device: At,
    /// Offset of the MSI-X capability.
    pub msix: u64,
    pub device_id: u16,
}

/// A guest's memory, and how the device gets at it.
pub struct Ram {
    pub mapping: &'static Mapping,
    pub file: OwnedFd,
    /// Where it begins in its file.
    pub offset: u64,
    /// The memory as messages reach it, if the file is not passed on.
    pub messages: Option<Arc<Memory>>,
}

impl Ram {
    fn new(messages: bool) -> Ram {
        let (whole, file) = Mapping::memfd("guest", OFFSET + RAM, false).unwrap();
        drop(whole);
        let mut ram = Ram::of(file, OFFSET);
        let memory = || {
            Arc::new(Memory {
                base: RAM_AT,
                ram: ram.mapping,
                transfers: AtomicU64::new(0),
                silent: AtomicBool::new(false),
            })
        };
        ram.messages = messages.then(memory);
        ram
    }

    fn of(file: OwnedFd, offset: u64) -> Ram {
        let mapping =
            Mapping::of_fd(file.as_fd(), offset, RAM, vmsg_mem::Access::ReadWrite).unwrap();
        Ram {
            // Leaked: a few MiB for each guest, and the queues need somebody to own it.
            mapping: Box::leak(Box::new(mapping)),
            file,
            offset,
            messages: None,
        }
    }

    /// A file that others know by its path, from its beginning on.
    pub fn in_file(path: &Path) -> Ram {
        let mut options = std::fs::File::options();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(path).unwrap();
        file.set_len(RAM).unwrap();
        Ram::of(file.into(), 0)
    }

    pub fn shared() -> Ram {
        Ram::new(false)
    }

    pub fn by_messages() -> Ram {
        Ram::new(true)
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert_eq!(self.mapping.ram().write(at, bytes), bytes.len());
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(self.mapping.ram().read(at, &mut bytes), len);
        bytes
    }
}

pub fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Waits until `fd` was rung, and takes that away. False: it was not.
pub fn rung_within(fd: &OwnedFd, time: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::try_from(time).unwrap())).unwrap();
    let mut bytes = [0; 8];
    !fds[0].revents().is_empty() && rustix::io::read(fd, &mut bytes).is_ok()
}

/// A queue of the guest's driver.
pub struct Queue {
    pub queue: DriverQueue<'static, Vec<DriverSlot>>,
    pub call: OwnedFd,
    /// Where the answers to the requests under way go, and how long they may be.
    asked: HashMap<Token, (usize, usize)>,
    next: usize,
}

/// A guest with a driver.
pub struct Guest<V> {
    pub vmm: V,
    pub ram: Ram,
    pub layout: Layout4,
    pub queues: Vec<Queue>,
    /// The interrupt line, if it is used.
    pub intx: Option<OwnedFd>,
    /// Tells of changes of the configuration.
    pub config_call: OwnedFd,
    /// What buffers for the device to fill hold before; zeroes otherwise.
    pub stale: Vec<u8>,
}

impl Guest<Client> {
    /// Connects, gives the memory, and finds the device.
    pub fn new(socket: &Path, ram: Ram) -> Guest<Client> {
        let mut client = Client::new(socket, ram.messages.clone());
        let fd = ram.messages.is_none().then(|| ram.file.as_fd());
        client.lend(RAM_AT, RAM, ram.offset, fd);
        Guest::over(client, ram)
    }
}

impl<V: Vmm> Guest<V> {
    pub fn over(mut vmm: V, ram: Ram) -> Guest<V> {
        let layout = find(&mut vmm);
        Guest {
            vmm,
            ram,
            layout,
            queues: Vec::new(),
            intx: None,
            config_call: new_eventfd(),
            stale: Vec::new(),
        }
    }

    pub fn common<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let (bar, at) = self.layout.common;
        let mut bytes = [0; N];
        self.vmm.read(bar, at + offset, &mut bytes);
        bytes
    }

    pub fn set_common(&mut self, offset: u64, bytes: &[u8]) {
        let (bar, at) = self.layout.common;
        self.vmm.write(bar, at + offset, bytes);
    }

    pub fn status(&mut self) -> u8 {
        self.common::<1>(0x14)[0]
    }

    pub fn set_status(&mut self, status: u8) {
        self.set_common(0x14, &[status]);
    }

    /// Status 0, and until it reads so.
    pub fn reset(&mut self) {
        self.set_status(0);
        let end = std::time::Instant::now() + PATIENCE;
        while self.status() != 0 {
            assert!(std::time::Instant::now() < end, "no reset");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.queues.clear();
    }

    pub fn offered(&mut self) -> u64 {
        let mut offered = 0;
        for block in 0..2u32 {
            self.set_common(0, &block.to_le_bytes());
            offered |= u64::from(u32::from_le_bytes(self.common(4))) << (32 * block);
        }
        offered
    }

    /// Interrupts as MSI-X: the configuration has vector 0, queue `n` vector `n` + 1.
    pub fn use_msix(&mut self, queues: usize) {
        let calls: Vec<OwnedFd> = (0..queues).map(|_| new_eventfd()).collect();
        let mut fds = vec![self.config_call.as_fd()];
        fds.extend(calls.iter().map(AsFd::as_fd));
        self.vmm.eventfds(MSIX, 0, &fds);
        let control = self.layout.msix + 2;
        self.vmm.write(CONFIG, control, &0x8000u16.to_le_bytes());
        self.set_common(0x10, &0u16.to_le_bytes());
        for (queue, call) in self.queues.iter_mut().zip(calls) {
            queue.call = call;
        }
        for index in 0..queues {
            self.set_common(0x16, &(index as u16).to_le_bytes());
            self.set_common(0x1a, &(index as u16 + 1).to_le_bytes());
        }
    }

    /// Interrupts as a line.
    pub fn use_intx(&mut self) {
        let line = new_eventfd();
        self.vmm.eventfds(INTX, 0, &[line.as_fd()]);
        self.intx = Some(line);
    }

    /// From reset to FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let features = self.offered() & (ACCEPTED | features);
        for block in 0..2u32 {
            self.set_common(8, &block.to_le_bytes());
            let part = (features >> (32 * block)) as u32;
            self.set_common(0xc, &part.to_le_bytes());
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status() & FEATURES_OK, FEATURES_OK);
    }

    /// Makes the rings of the next queue and says where they are.
    pub fn lay_out_queue(&mut self) {
        let index = self.queues.len();
        let at = RINGS + RING * index;
        let ram = self.ram.mapping.ram();
        let part = ram.get(at, RING).unwrap();
        part.fill(0);
        let base = BusAddr(RAM_AT + at as u64);
        let features = QueueFeatures {
            event_idx: true,
            indirect: false,
        };
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let layout = Layout::new(SIZE, 0).unwrap();
        let queue = DriverQueue::new(layout, features, part, base, slots).unwrap();
        let config = queue.config();
        self.queues.push(Queue {
            queue,
            call: new_eventfd(),
            asked: HashMap::new(),
            next: 0,
        });
        self.set_common(0x16, &(index as u16).to_le_bytes());
        self.set_common(0x18, &SIZE.to_le_bytes());
        for (offset, area) in [
            (0x20, config.desc),
            (0x28, config.driver),
            (0x30, config.device),
        ] {
            self.set_common(offset, &(area.0 as u32).to_le_bytes());
            self.set_common(offset + 4, &((area.0 >> 32) as u32).to_le_bytes());
        }
    }

    pub fn enable_queues(&mut self) {
        for index in 0..self.queues.len() {
            self.set_common(0x16, &(index as u16).to_le_bytes());
            self.set_common(0x1c, &1u16.to_le_bytes());
        }
    }

    /// All of it, with `queues` queues and MSI-X, unless [`Self::use_intx`] was said before.
    pub fn start(&mut self, queues: usize) {
        self.negotiate(0);
        for _ in 0..queues {
            self.lay_out_queue();
        }
        if self.intx.is_none() {
            self.use_msix(queues);
        }
        self.enable_queues();
        let live = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        self.set_status(live);
    }

    pub fn kick(&mut self, queue: usize) {
        let (bar, at) = self.layout.notify;
        let at = at + self.layout.multiplier * queue as u64;
        self.vmm.post(bar, at, &(queue as u16).to_le_bytes());
    }

    /// Gives the device `len` bytes to fill.
    pub fn ask(&mut self, queue: usize, len: usize) {
        let ram = self.ram.mapping.ram();
        let q = &mut self.queues[queue];
        let at = BUFFERS + queue * 0x10_0000 + (q.next % 64) * 0x1000;
        q.next += 1;
        let buffer = ram.get(at, len).unwrap();
        buffer.fill(0);
        if !self.stale.is_empty() {
            for at in (0..len).step_by(self.stale.len()) {
                buffer.write(at, &self.stale);
            }
        }
        let address = BusAddr(RAM_AT + at as u64);
        let token = q.queue.add(&[], &[(address, len as u32)]).unwrap();
        q.asked.insert(token, (at, len));
        if q.queue.publish().unwrap() {
            self.kick(queue);
        }
    }

    /// Gives the device bytes to read.
    pub fn tell(&mut self, queue: usize, bytes: &[u8]) {
        let q = &mut self.queues[queue];
        let at = BUFFERS + queue * 0x10_0000 + (q.next % 64) * 0x1000;
        q.next += 1;
        self.ram.write(at, bytes);
        let q = &mut self.queues[queue];
        let address = BusAddr(RAM_AT + at as u64);
        let token = q.queue.add(&[(address, bytes.len() as u32)], &[]).unwrap();
        q.asked.insert(token, (at, 0));
        if q.queue.publish().unwrap() {
            self.kick(queue);
        }
    }

    /// The next answer, awaited by interrupt alone: what the device has written.
    pub fn answer(&mut self, queue: usize) -> Vec<u8> {
        self.answer_within(queue, PATIENCE)
            .expect("an answer and an interrupt")
    }

    pub fn answer_within(&mut self, queue: usize, time: Duration) -> Option<Vec<u8>> {
        let end = std::time::Instant::now() + time;
        loop {
            let q = &mut self.queues[queue];
            if let Some(used) = q.queue.pop_used().unwrap() {
                let (at, len) = q.asked.remove(&used.token).expect("asked for");
                let written = used.written as usize;
                assert!(written <= len);
                return Some(self.ram.read(at, written));
            }
            if q.queue.enable_notifications().unwrap() {
                continue;
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            let line = self.intx.as_ref();
            if !rung_within(line.unwrap_or(&self.queues[queue].call), left) {
                return None;
            }
            if self.intx.is_some() {
                // Reading it takes the interrupt back.
                let (bar, at) = self.layout.isr;
                let mut isr = [0];
                self.vmm.read(bar, at, &mut isr);
                assert_ne!(isr[0], 0, "somebody else's interrupt");
                self.vmm.unmask_intx();
            }
        }
    }

    pub fn read_config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let (bar, at) = self.layout.device;
        let mut bytes = [0; N];
        self.vmm.read(bar, at + offset, &mut bytes);
        bytes
    }

    /// The chains that were not given back are.
    pub fn forget(&mut self) {
        for queue in &mut self.queues {
            queue.asked.clear();
        }
    }
}

/// Finds the structures of virtio.
fn find(vmm: &mut impl Vmm) -> Layout4 {
    let mut config = [0; 256];
    vmm.read(CONFIG, 0, &mut config);
    assert_eq!(config[..2], 0x1af4u16.to_le_bytes());
    let device_id = u16::from_le_bytes([config[2], config[3]]);
    assert_ne!(config[6] & 0x10, 0, "capabilities");
    let mut parts = HashMap::new();
    let (mut multiplier, mut msix) = (0, 0);
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        match config[at] {
            0x09 => {
                let offset = client::u32_at(&config, at + 8);
                let place = (u32::from(config[at + 4]), u64::from(offset));
                parts.entry(config[at + 3]).or_insert(place);
                if config[at + 3] == 2 {
                    multiplier = client::u32_at(&config, at + 16);
                }
            }
            0x11 => msix = at as u64,
            _ => {}
        }
        at = usize::from(config[at + 1]);
    }
    // Memory and bus master.
    vmm.write(CONFIG, 4, &6u16.to_le_bytes());
    Layout4 {
        common: parts[&1],
        notify: parts[&2],
        multiplier: multiplier.into(),
        isr: parts[&3],
        // Devices without configuration have none.
        device: parts.get(&4).copied().unwrap_or_default(),
        msix,
        device_id,
    }
}
