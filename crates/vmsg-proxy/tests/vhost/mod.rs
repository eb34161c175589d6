// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM with a vhost-user front end, and the driver of its guest.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "each test program uses another part"
)]

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmsg_mem::{BusAddr, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures, Token};

pub const GUEST: u64 = 0x8000_0000;
/// Where the front end pretends to have mapped it.
pub const USER: u64 = 0x5555_0000_0000;
pub const RAM: u64 = 4 << 20;
pub const SIZE: u16 = 64;
/// Rings of one queue after those of another.
pub const RINGS: usize = 0x4000;
const BUFFERS: usize = 0x10_0000;
/// A half to be read, a half to be written.
const BUFFER: usize = 0x4000;
const SLOTS: usize = (RAM as usize - BUFFERS) / BUFFER;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VERSION_1, EVENT_IDX, INDIRECT_DESC.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28;
/// Nothing takes so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The memory of a guest. Leaked: a few MiB, and everything may still look at it.
#[derive(Clone, Copy)]
pub struct Ram {
    pub mapping: &'static Mapping,
    pub file: &'static OwnedFd,
}

impl Ram {
    pub fn new() -> Ram {
        let (mapping, file) = Mapping::memfd("guest", RAM, false).unwrap();
        Ram {
            mapping: Box::leak(Box::new(mapping)),
            file: Box::leak(Box::new(file)),
        }
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(self.mapping.ram().read(at, &mut bytes), len);
        bytes
    }
}

pub struct Queue {
    pub driver: DriverQueue<'static, Vec<DriverSlot>>,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    /// Where the bytes of a request are, and how many there were to be read.
    asked: HashMap<Token, (usize, usize)>,
}

impl Queue {
    fn new(ram: Ram, index: usize) -> Queue {
        let layout = Layout::new(SIZE, 4).unwrap();
        let at = RINGS * index;
        let part = ram.mapping.ram().get(at, layout.total_len()).unwrap();
        let features = QueueFeatures::from_bits(FEATURES);
        let slots = vec![DriverSlot::default(); SIZE.into()];
        let base = BusAddr(GUEST + at as u64);
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Queue {
            driver: DriverQueue::new(layout, features, part, base, slots).unwrap(),
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            asked: HashMap::new(),
        }
    }
}

pub struct Guest {
    pub front: Frontend,
    pub socket: UnixStream,
    pub ram: Ram,
    pub queues: Vec<Queue>,
    features: u64,
    /// What stands in buffers that the device is to fill.
    pub stale: Vec<u8>,
    next: usize,
}

impl Guest {
    /// Connects, and comes to where QEMU waits for the guest's driver.
    pub fn connect(socket: &Path, ram: Ram) -> Guest {
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::yield_now();
        };
        let mut front = Frontend::from_stream(stream.try_clone().unwrap(), 64);
        // VIRTIO_NET_F_MQ, from who has it.
        let features = front.get_features().unwrap() & (FEATURES | 1 << 22) | PROTOCOL_FEATURES;
        let offered = front.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert!(offered.contains(wanted));
        front.set_protocol_features(wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_owner().unwrap();
        Guest {
            front,
            socket: stream,
            ram,
            queues: Vec::new(),
            features,
            stale: vec![0],
            next: 0,
        }
    }

    /// The same, and its driver starts with so many new queues.
    pub fn start(socket: &Path, ram: Ram, queues: usize) -> Guest {
        let mut guest = Guest::connect(socket, ram);
        guest.set_up(queues);
        guest
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: RAM,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.ram.file.as_raw_fd(),
        }
    }

    pub fn features_and_memory(&mut self) {
        self.front.set_features(self.features).unwrap();
        self.front.set_mem_table(&[self.region()]).unwrap();
    }

    /// A driver that starts, as far as it is let.
    pub fn front_end_starts(&mut self) -> Result<(), vhost::Error> {
        self.front.set_features(self.features)?;
        self.front.set_mem_table(&[self.region()])?;
        Ok(())
    }

    pub fn new_queues(&mut self, queues: usize) {
        self.queues = (0..queues).map(|at| Queue::new(self.ram, at)).collect();
    }

    /// A driver that starts.
    pub fn set_up(&mut self, queues: usize) {
        self.new_queues(queues);
        self.features_and_memory();
        for queue in 0..queues {
            self.set_ring(queue, 0);
            self.enable(queue);
        }
    }

    pub fn set_ring(&mut self, index: usize, base: u16) {
        let queue = &self.queues[index];
        let front = &mut self.front;
        front.set_vring_num(index, SIZE).unwrap();
        front.set_vring_base(index, base).unwrap();
        let config = queue.driver.config();
        let user = |at: BusAddr| at.0 - GUEST + USER;
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: user(config.desc),
            avail_ring_addr: user(config.driver),
            used_ring_addr: user(config.device),
            log_addr: None,
        };
        front.set_vring_addr(index, &addresses).unwrap();
        front.set_vring_err(index, &queue.err).unwrap();
        front.set_vring_kick(index, &queue.kick).unwrap();
        front.set_vring_call(index, &queue.call).unwrap();
    }

    pub fn enable(&mut self, index: usize) {
        self.front.set_vring_enable(index, true).unwrap();
    }

    /// The driver stops: all rings do.
    pub fn stop(&mut self) -> Vec<u16> {
        let stop = |index| self.front.get_vring_base(index).unwrap() as u16;
        (0..self.queues.len()).map(stop).collect()
    }

    /// Makes a request available and kicks, if that is wanted: bytes to be read, and room for so many.
    pub fn ask(&mut self, queue: usize, readable: &[u8], writable: usize) -> Token {
        let token = self.offer(queue, readable, writable);
        self.publish(queue);
        token
    }

    pub fn offer(&mut self, queue: usize, readable: &[u8], writable: usize) -> Token {
        assert!(readable.len() <= BUFFER / 2 && writable <= BUFFER / 2);
        let at = BUFFERS + BUFFER * (self.next % SLOTS);
        self.next += 1;
        let ram = self.ram.mapping.ram();
        ram.write(at, readable);
        let room: Vec<u8> = self.stale.iter().copied().cycle().take(writable).collect();
        ram.write(at + BUFFER / 2, &room);
        let buffer = |at: usize, len: usize| (BusAddr(GUEST + at as u64), len as u32);
        let list = |at, len| -> Vec<_> { (len > 0).then(|| buffer(at, len)).into_iter().collect() };
        let read = list(at, readable.len());
        let write = list(at + BUFFER / 2, writable);
        let queue = &mut self.queues[queue];
        let token = queue.driver.add(&read, &write).unwrap();
        queue.asked.insert(token, (at, readable.len()));
        token
    }

    pub fn publish(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        if queue.driver.publish().unwrap() {
            queue.kick.write(1).unwrap();
        }
    }

    /// Requests that have not come back.
    pub fn outstanding(&self, queue: usize) -> usize {
        self.queues[queue].asked.len()
    }

    /// What the device wrote for the next request that comes back; `None`: nothing came in time, or the ring's eventfd for errors was rung.
    pub fn answer_within(&mut self, queue: usize, time: Duration) -> Option<Vec<u8>> {
        self.next_within(queue, time).map(|(_, answer)| answer)
    }

    /// The same, with the request that it is the answer to.
    pub fn next_within(&mut self, queue: usize, time: Duration) -> Option<(Token, Vec<u8>)> {
        let end = Instant::now() + time;
        let queue = &mut self.queues[queue];
        loop {
            let _ = queue.call.read();
            if let Some(used) = queue.driver.pop_used().unwrap() {
                let (at, _) = queue.asked.remove(&used.token).expect("asked for once");
                let answer = self.ram.read(at + BUFFER / 2, used.written as usize);
                return Some((used.token, answer));
            }
            if queue.driver.enable_notifications().unwrap() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            if wait([&queue.call, &queue.err], left) != [true, false] {
                return None;
            }
        }
    }

    #[track_caller]
    pub fn answer(&mut self, queue: usize) -> Vec<u8> {
        let answer = self.answer_within(queue, PATIENCE);
        answer.expect("an answer in time")
    }

    /// Sleeps until a request comes back that was not made by [`Self::ask`].
    #[track_caller]
    pub fn until_used(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        while queue.driver.pop_used().unwrap().is_none() {
            let _ = queue.call.read();
            if !queue.driver.enable_notifications().unwrap() {
                assert_eq!(wait([&queue.call, &queue.err], PATIENCE), [true, false]);
            }
        }
    }

    /// The next answer of either queue, and which one it is.
    #[track_caller]
    pub fn next_of(&mut self, queues: [usize; 2]) -> (usize, Vec<u8>) {
        let end = Instant::now() + PATIENCE;
        loop {
            for queue in queues {
                if let Some(answer) = self.answer_within(queue, Duration::ZERO) {
                    return (queue, answer);
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "an answer in time");
            let [one, two] = queues.map(|queue| &self.queues[queue].call);
            wait([one, two], left);
        }
    }

    /// Whether the device has said that it needs a reset, within so long.
    pub fn is_broken_within(&self, queue: usize, time: Duration) -> bool {
        wait([&self.queues[queue].err], time) == [true]
    }
}

/// Waits until one of them was rung, or for so long; which ones were.
fn wait<const N: usize>(eventfds: [&EventFd; N], time: Duration) -> [bool; N] {
    let epoll = Epoll::new().unwrap();
    for (at, eventfd) in (0..).zip(eventfds) {
        let event = EpollEvent::new(EventSet::IN, at);
        epoll
            .ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
            .unwrap();
    }
    let mut events = [EpollEvent::default(); N];
    let found = epoll.wait(time.as_millis() as i32, &mut events).unwrap();
    std::array::from_fn(|at| {
        events[..found]
            .iter()
            .any(|event| event.data() == at as u64)
    })
}
