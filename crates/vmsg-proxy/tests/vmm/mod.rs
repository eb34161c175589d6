// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end with its guest, whose messages are sent one by one.
#![allow(dead_code, unreachable_pub, reason = "a part of a test program")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmsg_mem::{Access, BusAddr, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures, Token};

pub const GUEST: u64 = 0x8000_0000;
const USER: u64 = 0x5555_0000_0000;
const RAM: u64 = 0x2_0000;
const BUFFERS: usize = 0x1_0000;
const SIZE: u16 = 64;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const FEATURES: u64 = 1 << 32 | 1 << 29 | PROTOCOL_FEATURES;
/// Messages of a set-up.
pub const MESSAGES: usize = 15;
/// Nothing takes so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What has become of the connection.
#[derive(Debug)]
pub enum End {
    /// The other side has closed it.
    SentAway,
    /// It is there, but the device is not any more.
    Broken(&'static str),
}

pub struct Vmm {
    socket: PathBuf,
    ram: PathBuf,
    keeps: bool,
    connection: Option<(Frontend, UnixStream)>,
    /// Messages of this connection so far.
    at: usize,
    inflight: Option<(VhostUserInflight, File)>,
    file: File,
    // Leaked: a few KiB for each guest, and nobody else is left to own it.
    memory: &'static Mapping,
    queue: DriverQueue<'static, Vec<DriverSlot>>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    asked_for: HashMap<Token, u64>,
    /// Requests so far, of all guests.
    pub asked: usize,
    /// Answers to the guest there is.
    pub answered: u64,
    /// Messages so far, of all connections.
    pub messages: usize,
    /// Chains of this guest that came back.
    used: u16,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn new_memory(path: &PathBuf) -> (File, &'static Mapping) {
    let _ = std::fs::remove_file(path);
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(path).unwrap();
    file.set_len(RAM).unwrap();
    let mapping = Mapping::of_fd(file.as_fd(), 0, RAM, Access::ReadWrite).unwrap();
    (file, Box::leak(Box::new(mapping)))
}

fn new_queue(memory: &'static Mapping) -> DriverQueue<'static, Vec<DriverSlot>> {
    let layout = Layout::new(SIZE, 0).unwrap();
    let features = QueueFeatures {
        event_idx: true,
        indirect: false,
    };
    let slots = vec![DriverSlot::default(); SIZE.into()];
    DriverQueue::new(layout, features, memory.ram(), BusAddr(GUEST), slots).unwrap()
}

impl Vmm {
    pub fn new(socket: PathBuf, ram: PathBuf, keeps: bool) -> Vmm {
        let (file, memory) = new_memory(&ram);
        Vmm {
            socket,
            ram,
            keeps,
            connection: None,
            at: 0,
            inflight: None,
            file,
            memory,
            queue: new_queue(memory),
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            asked_for: HashMap::new(),
            asked: 0,
            answered: 0,
            messages: 0,
            used: 0,
        }
    }

    /// Another guest, which knows nothing of this one.
    pub fn start_over(&mut self) {
        self.disconnect();
        self.inflight = None;
        (self.file, self.memory) = new_memory(&self.ram);
        self.queue = new_queue(self.memory);
        self.asked_for.clear();
        self.answered = 0;
        self.used = 0;
    }

    pub fn disconnect(&mut self) {
        self.connection = None;
        self.at = 0;
    }

    /// The guest's driver starts over, and the front end is told to stop and to start: the connection stays. Gives where the ring was.
    pub fn reset_driver(&mut self) -> Result<u32, End> {
        let (front, _) = self.connection.as_mut().expect("a connection");
        let base = front.get_vring_base(0).map_err(|_| End::SentAway)?;
        self.memory.ram().fill(0);
        self.queue = new_queue(self.memory);
        self.asked_for.clear();
        self.answered = 0;
        self.used = 0;
        // SET_FEATURES is the first message of a start.
        self.at = 5;
        Ok(base)
    }

    pub fn is_set_up(&self) -> bool {
        self.connection.is_some() && self.at == MESSAGES
    }

    pub fn outstanding(&self) -> usize {
        self.asked_for.len()
    }

    pub fn story(&self) -> String {
        format!(
            "message {}, {} asked, {} answered, {} outstanding",
            self.at,
            self.asked,
            self.answered,
            self.outstanding()
        )
    }

    /// Connects, or sends the next message of the set-up.
    pub fn step(&mut self) -> Result<(), End> {
        if self.connection.is_none() {
            // As a front end with `reconnect` does.
            let Ok(stream) = UnixStream::connect(&self.socket) else {
                std::thread::sleep(Duration::from_millis(1));
                return Ok(());
            };
            let front = Frontend::from_stream(stream.try_clone().unwrap(), 1);
            self.connection = Some((front, stream));
            self.at = 0;
            return Ok(());
        }
        let result = self.send();
        self.at += 1;
        self.messages += 1;
        result.map_err(|_| End::SentAway)
    }

    fn send(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        let base = self.used_index();
        let (front, _) = self.connection.as_mut().unwrap();
        match self.at {
            0 => drop(front.get_features()?),
            1 => drop(front.get_protocol_features()?),
            2 => {
                let wanted = VhostUserProtocolFeatures::REPLY_ACK
                    | VhostUserProtocolFeatures::MQ
                    | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
                front.set_protocol_features(wanted)?;
                front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            3 => front.set_owner()?,
            4 if self.keeps && self.inflight.is_none() => {
                let wanted = VhostUserInflight::new(0, 0, 1, SIZE);
                self.inflight = Some(front.get_inflight_fd(&wanted)?);
            }
            4 => {}
            5 => front.set_features(FEATURES)?,
            6 => {
                let region = VhostUserMemoryRegionInfo {
                    guest_phys_addr: GUEST,
                    memory_size: RAM,
                    userspace_addr: USER,
                    mmap_offset: 0,
                    mmap_handle: self.file.as_raw_fd(),
                };
                front.set_mem_table(&[region])?;
            }
            7 => {
                if let Some((area, file)) = &self.inflight {
                    front.set_inflight_fd(area, file.as_raw_fd())?;
                }
            }
            8 => front.set_vring_num(0, SIZE)?,
            9 => front.set_vring_base(0, base)?,
            10 => {
                let config = self.queue.config();
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
                front.set_vring_addr(0, &addresses)?;
            }
            11 => front.set_vring_err(0, &self.err)?,
            12 => front.set_vring_kick(0, &self.kick)?,
            13 => front.set_vring_call(0, &self.call)?,
            _ => front.set_vring_enable(0, true)?,
        }
        Ok(())
    }

    /// As a front end finds it that has lost its back end.
    fn used_index(&self) -> u16 {
        let at = (self.queue.config().device.0 - GUEST) as usize + 2;
        let mut bytes = [0; 2];
        self.memory.ram().read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub fn ask(&mut self) {
        self.asked += 1;
        let sequence = self.asked as u64;
        let at = BUFFERS + 64 * (self.asked % 256);
        let ram = self.memory.ram();
        ram.write(at, &sequence.to_le_bytes());
        ram.write(at + 16, &[0; 16]);
        let address = |offset: usize| BusAddr(GUEST + (at + offset) as u64);
        let chain = self.queue.add(&[(address(0), 16)], &[(address(16), 16)]);
        self.asked_for.insert(chain.unwrap(), sequence);
        if self.queue.publish().unwrap() {
            self.kick.write(1).unwrap();
        }
    }

    /// Sleeps until something comes back.
    pub fn await_answer(&mut self) -> Result<(), End> {
        let end = Instant::now() + PATIENCE;
        loop {
            let _ = self.call.read();
            let before = self.answered;
            while let Some(used) = self.queue.pop_used().unwrap() {
                let sequence = self.asked_for.remove(&used.token).expect("asked for once");
                let at = BUFFERS + 64 * (sequence as usize % 256) + 16;
                let mut bytes = [0; 8];
                self.memory.ram().read(at, &mut bytes);
                assert_eq!((used.written, bytes), (16, (!sequence).to_le_bytes()));
                self.answered += 1;
                self.used = self.used.wrapping_add(1);
            }
            if self.answered > before {
                return Ok(());
            }
            if self.queue.enable_notifications().unwrap() {
                continue;
            }
            let (_, socket) = self.connection.as_ref().unwrap();
            let epoll = Epoll::new().unwrap();
            let fds = [
                self.call.as_raw_fd(),
                self.err.as_raw_fd(),
                socket.as_raw_fd(),
            ];
            for (at, fd) in (0..).zip(fds) {
                let event = EpollEvent::new(EventSet::IN, at);
                epoll.ctl(ControlOperation::Add, fd, event).unwrap();
            }
            let left = end.saturating_duration_since(Instant::now());
            let mut events = [EpollEvent::default(); 3];
            let count = epoll.wait(left.as_millis() as i32, &mut events).unwrap();
            let is = |at: u64| events[..count].iter().any(|event| event.data() == at);
            let (called, broken, closed) = (is(0), is(1), is(2));
            if closed {
                return Err(End::SentAway);
            }
            if !called && broken {
                let _ = self.err.read();
                return Err(End::Broken("the device needs a reset"));
            }
            assert!(called, "no answer: {}", self.story());
        }
    }
}
