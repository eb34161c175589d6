// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that keeps to the rules as far as it likes, after docs/bus-unix.md.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use virtio_msg::DevNum;
use vmsg_mem::{Access, Mapping};

use crate::host::{PATIENCE, readable};

pub(crate) const MARKER: [u8; 8] = [0x02, 0xc0, 0, 0, 0, 0, 8, 0];

/// Message ids, of requests and events about a device.
pub(crate) const GET_INFO: u8 = 0x02;
pub(crate) const GET_FEATURES: u8 = 0x03;
pub(crate) const SET_FEATURES: u8 = 0x04;
pub(crate) const SET_CONFIG: u8 = 0x06;
pub(crate) const GET_STATUS: u8 = 0x07;
pub(crate) const SET_STATUS: u8 = 0x08;
pub(crate) const SET_VQUEUE: u8 = 0x0a;
pub(crate) const RESET_VQUEUE: u8 = 0x0b;
pub(crate) const EVENT_CONFIG: u8 = 0x40;
pub(crate) const EVENT_AVAIL: u8 = 0x41;

/// Message ids about the bus.
pub(crate) const PING: u8 = 0x03;
pub(crate) const WINDOW_ADD: u8 = 0x80;
pub(crate) const WINDOW_REMOVE: u8 = 0x81;
pub(crate) const QUEUE_NOTIFY: u8 = 0x82;
pub(crate) const QUEUE_RESUME: u8 = 0x83;
pub(crate) const CLAIM: u8 = 0x84;

/// Statuses of bus requests.
pub(crate) const OK: u32 = 0;
pub(crate) const EXISTS: u32 = 3;
pub(crate) const TOO_MANY: u32 = 4;
pub(crate) const HELD: u32 = 5;
pub(crate) const BAD_FD: u32 = 6;

/// Device status bits.
pub(crate) const NEEDS_RESET: u32 = 64;

pub(crate) fn socket(path: &Path) -> OwnedFd {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket");
    let address = SocketAddrUnix::new(path).expect("a short path");
    rustix::net::connect(&socket, &address).expect("a listener");
    socket
}

pub(crate) fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
}

pub(crate) fn receive(socket: &OwnedFd) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 2048];
    let got = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    bytes.truncate(got.map_or(0, |got| got.bytes));
    (bytes, fds)
}

pub(crate) fn hello() -> Vec<u8> {
    let mut bytes = b"VMSG".to_vec();
    for field in [1u16, 28, 1, 1, 0, 0, 0, 0, 4, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(b"evil");
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn offset_at(bytes: &[u8], at: usize) -> usize {
    let value = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    usize::try_from(value).expect("small")
}

/// A message with a correct header.
pub(crate) fn message(kind: u8, id: u8, dev: u16, token: u16, payload: &[u8]) -> Vec<u8> {
    let size = u16::try_from(8 + payload.len()).expect("short");
    let mut bytes = vec![kind, id];
    for field in [dev, token, size] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// Integers one after another, little-endian.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) struct Peer {
    pub(crate) socket: OwnedFd,
    queues: Mapping,
    pub(crate) device_bell: OwnedFd,
    pub(crate) driver_bell: OwnedFd,
    slots: u32,
    slot: usize,
    to_device: usize,
    to_driver: usize,
    head: u32,
    tail: u32,
    token: u16,
    barrier: OwnedFd,
    /// Events that came while something else was waited for.
    pub(crate) events: VecDeque<Vec<u8>>,
}

impl Peer {
    /// Connects; `None` if it is refused.
    pub(crate) fn try_connect(path: &Path) -> Option<Self> {
        let socket = socket(path);
        send(&socket, &hello(), &[]);
        let (welcome, fds) = receive(&socket);
        let [memory, device_bell, driver_bell] = <[OwnedFd; 3]>::try_from(fds).ok()?;
        let len = offset_at(&welcome, 64) as u64;
        let queues = Mapping::of_fd(memory.as_fd(), 0, len, Access::ReadWrite).expect("queues");
        let (_, barrier) = Mapping::memfd("barrier", 4096, true).expect("memory");
        Some(Self {
            socket,
            queues,
            device_bell,
            driver_bell,
            slot: usize::try_from(u32_at(&welcome, 16)).expect("small"),
            slots: u32_at(&welcome, 20),
            to_device: offset_at(&welcome, 48),
            to_driver: offset_at(&welcome, 56),
            head: 0,
            tail: 0,
            token: 0,
            barrier,
            events: VecDeque::new(),
        })
    }

    pub(crate) fn connect(path: &Path) -> Self {
        Self::try_connect(path).expect("a place")
    }

    fn load(&self, at: usize) -> u32 {
        let word = self.queues.ram().atomic_u32(at).expect("inside");
        word.load(Ordering::Acquire)
    }

    fn store(&self, at: usize, value: u32) {
        let word = self.queues.ram().atomic_u32(at).expect("inside");
        word.store(value, Ordering::SeqCst);
    }

    fn ring(&self) {
        let _ = rustix::io::write(&self.device_bell, &1u64.to_ne_bytes());
    }

    /// Writes anything over the words of a queue.
    pub(crate) fn spoil(&self, at: usize, value: u32) {
        self.store(self.to_device + at, value);
        self.ring();
    }

    /// Puts bytes into the queue, if there is room.
    pub(crate) fn try_push(&mut self, bytes: &[u8]) -> bool {
        let next = (self.head + 1) % self.slots;
        if next == self.load(self.to_device + 0x40) {
            self.ring();
            return false;
        }
        let at = self.to_device + 128 + self.head as usize * self.slot;
        let len = bytes.len().min(self.slot);
        self.queues.ram().write(at, &bytes[..len]);
        self.head = next;
        self.store(self.to_device, next);
        self.ring();
        true
    }

    /// Puts bytes into the queue, waiting for room; false if none comes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !self.try_push(bytes) {
            // Asks for room.
            self.store(self.to_device + 0x04, 1);
            if Instant::now() > deadline || self.is_closed() {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Takes answers until the host has taken all that was sent.
    pub(crate) fn listen(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.load(self.to_device + 0x40) != self.head {
            assert!(Instant::now() < deadline, "the host does not go on");
            if self.pop().is_none() {
                std::thread::yield_now();
            }
        }
    }

    /// A message with descriptors, and its marker.
    pub(crate) fn push_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        if fds.is_empty() {
            return self.push(bytes);
        }
        let deadline = Instant::now() + PATIENCE;
        while !send(&self.socket, bytes, fds) {
            if Instant::now() > deadline || self.is_closed() {
                return false;
            }
            std::thread::yield_now();
        }
        self.push(&MARKER)
    }

    pub(crate) fn is_closed(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(
            &self.socket,
            rustix::event::PollFlags::RDHUP,
        )];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut fds, Some(&now)).expect("poll") > 0
    }

    /// Makes the host ring: asks to be woken, and for an answer.
    pub(crate) fn expect_a_ring(&mut self) {
        self.store(self.to_driver + 0x44, 1);
        self.push(&message(2, PING, 0, 1, &words(&[1])));
    }

    /// The next message, if there is one.
    pub(crate) fn pop(&mut self) -> Option<Vec<u8>> {
        if self.load(self.to_driver) == self.tail {
            return None;
        }
        let at = self.to_driver + 128 + self.tail as usize * self.slot;
        let mut bytes = vec![0; self.slot];
        self.queues.ram().read(at, &mut bytes);
        let size = u16::from_le_bytes([bytes[6], bytes[7]]);
        bytes.truncate(size.into());
        self.tail = (self.tail + 1) % self.slots;
        self.store(self.to_driver + 0x40, self.tail);
        if self.load(self.to_driver + 0x04) == 1 {
            self.store(self.to_driver + 0x04, 0);
            self.ring();
        }
        Some(bytes)
    }

    /// The next message, waiting for it.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(message) = self.pop() {
                return Some(message);
            }
            self.store(self.to_driver + 0x44, 1);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.load(self.to_driver) == self.tail
                && (left.is_zero() || self.is_closed() || !readable(&self.driver_bell, left))
            {
                return self.pop();
            }
            let _ = rustix::io::read(&self.driver_bell, &mut [0; 8]);
        }
    }

    /// Makes a request and gives the payload of the answer.
    pub(crate) fn try_ask(
        &mut self,
        (kind, id): (u8, u8),
        dev: DevNum,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Option<Vec<u8>> {
        self.token = self.token.wrapping_add(1);
        let [low, high] = self.token.to_le_bytes();
        self.push_with(&message(kind, id, dev.0, self.token, payload), fds);
        loop {
            let answer = self.next()?;
            if answer[..2] == [kind | 1, id] && answer[4..6] == [low, high] {
                return Some(answer[8..].to_vec());
            }
            if answer[1] & 0x40 != 0 {
                self.events.push_back(answer);
            }
        }
    }

    pub(crate) fn ask(&mut self, id: u8, dev: DevNum, payload: &[u8]) -> Vec<u8> {
        self.try_ask((0, id), dev, payload, &[]).expect("an answer")
    }

    /// Makes a bus request of our own and gives its status.
    pub(crate) fn bus(&mut self, id: u8, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
        let answer = self
            .try_ask((2, id), DevNum(0), payload, fds)
            .expect("an answer");
        assert_eq!(answer[..4], payload[..4]);
        u32_at(&answer, 4)
    }

    pub(crate) fn ping(&mut self) {
        self.try_ask((2, PING), DevNum(0), &words(&[7]), &[])
            .expect("an answer");
    }

    pub(crate) fn status(&mut self, dev: DevNum) -> u32 {
        u32_at(&self.ask(GET_STATUS, dev, &[]), 0)
    }

    pub(crate) fn set_status(&mut self, dev: DevNum, status: u32) -> u32 {
        u32_at(&self.ask(SET_STATUS, dev, &words(&[status])), 0)
    }

    pub(crate) fn claim(&mut self, dev: DevNum) -> u32 {
        self.bus(CLAIM, &words(&[dev.0.into()]), &[])
    }

    pub(crate) fn release(&mut self, dev: DevNum) -> u32 {
        let payload = words(&[u32::from(dev.0) | 1 << 16]);
        let answer = self
            .try_ask((2, CLAIM), DevNum(0), &payload, &[])
            .expect("an answer");
        u32_at(&answer, 4)
    }

    /// Adds a window; `flags`: 1 writable, 2 more to come.
    pub(crate) fn window(
        &mut self,
        id: u32,
        flags: u32,
        (base, len, offset): (u64, u64, u64),
        fd: BorrowedFd<'_>,
    ) -> u32 {
        let mut payload = words(&[id, flags]);
        for value in [base, len, offset] {
            payload.extend(value.to_le_bytes());
        }
        self.bus(WINDOW_ADD, &payload, &[fd])
    }

    pub(crate) fn notify(
        &mut self,
        dev: DevNum,
        queue: u32,
        flags: u16,
        fds: &[BorrowedFd<'_>],
    ) -> u32 {
        let payload = words(&[u32::from(dev.0) | u32::from(flags) << 16, queue]);
        self.bus(QUEUE_NOTIFY, &payload, fds)
    }

    /// Goes as far as FEATURES_OK, with these features and VERSION_1.
    pub(crate) fn negotiate(&mut self, dev: DevNum, features: u32) {
        assert_eq!(self.set_status(dev, 0), 0);
        assert_eq!(self.set_status(dev, 3), 3);
        self.ask(SET_FEATURES, dev, &words(&[0, 2, features, 1]));
        assert_eq!(self.set_status(dev, 11), 11);
    }

    pub(crate) fn set_queue(&mut self, dev: DevNum, queue: u32, size: u32, areas: [u64; 3]) {
        let mut payload = words(&[queue, 0, size, 0]);
        for area in areas {
            payload.extend(area.to_le_bytes());
        }
        self.ask(SET_VQUEUE, dev, &payload);
    }

    pub(crate) fn kick(&mut self, dev: DevNum, queue: u32) {
        self.push(&message(0, EVENT_AVAIL, dev.0, 0, &words(&[queue, 0])));
    }

    /// What was sent before has reached the worker of the devices that are held, which had its turn: control has answered two
    /// changes of the windows, so orders that came before are the worker's, and then every thread of the host was seen asleep.
    pub(crate) fn barrier(&mut self) {
        let bytes = self.barrier.try_clone().expect("a descriptor");
        let window = (1 << 60, 4096, 0);
        assert_eq!(self.window(u32::MAX, 0, window, bytes.as_fd()), OK);
        let payload = words(&[u32::MAX, 0]);
        assert_eq!(self.bus(WINDOW_REMOVE, &payload, &[]), OK);
        let host = socket_peercred(&self.socket)
            .expect("the host's process")
            .pid;
        let tasks = format!("/proc/{}/task", host.as_raw_pid());
        let deadline = Instant::now() + PATIENCE;
        for task in std::fs::read_dir(tasks).expect("its threads").flatten() {
            let stat = task.path().join("stat");
            // proc_pid_stat(5): the state stands behind the name, which is in brackets. A thread that waits for the kernel alone, as it
            // may for its memory, is not at rest; one that has ended is.
            let is_awake = || {
                let stat = std::fs::read_to_string(&stat).unwrap_or_default();
                stat.rsplit_once(") ")
                    .is_some_and(|(_, fields)| fields.starts_with(['R', 'D']))
            };
            while is_awake() {
                assert!(Instant::now() < deadline, "a thread never rests: {stat:?}");
                std::thread::yield_now();
            }
        }
    }

    /// Waits until the host says that the device needs a reset.
    pub(crate) fn wait_for_needs_reset(&mut self, dev: DevNum) {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .next()
                    .expect("the event that the device needs a reset"),
            };
            if event[1] == EVENT_CONFIG
                && event[2..4] == dev.0.to_le_bytes()
                && u32_at(&event, 8) & NEEDS_RESET != 0
            {
                return;
            }
        }
    }
}

/// Waits until the host has ended the connection.
pub(crate) fn ends(peer: &Peer) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        &peer.socket,
        rustix::event::PollFlags::RDHUP,
    )];
    let timeout = rustix::event::Timespec {
        tv_sec: PATIENCE.as_secs().try_into().expect("seconds"),
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&timeout)).expect("poll") > 0
}
