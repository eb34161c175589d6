// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user daemon that answers anything, and a driver that does not wait for it.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use virtio_msg::FeatureSet;
use vmsg_device::bridge::{Bridge, Resume, Settings};
use vmsg_device::worker::{Command, Core, Fds, Notice, QueueStart, Record, Reply, Slot};
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::{Inflight, QueueConfig};

const BASE: u64 = 0x10_0000;
const PART: usize = 1 << 13;
const QUEUES: usize = 2;
const SIZE: u16 = 16;
const AVAIL: usize = 0x400;
const USED: usize = 0x600;
const SLOT: Slot = Slot(0);
const STEPS: usize = 64;
/// As long as a daemon may think, in the time of the story; at its beginning in everybody's.
const PATIENCE: Duration = Duration::from_secs(5);
/// Nobody waits, and a connection that is closed ends no process.
const QUIET: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);
/// Of a request's header, and of an answer's.
const HEADER: usize = 12;

/// What the device wants to be polled for.
#[derive(Default)]
struct Watched(Option<OwnedFd>);

impl Fds for Watched {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}

    fn add_device(&mut self, _slot: Slot, fd: BorrowedFd<'_>) {
        self.0 = Some(fd.try_clone_to_owned().expect("a descriptor"));
    }

    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

/// The daemon's end of a connection.
struct Daemon {
    socket: UnixStream,
    have: Vec<u8>,
    /// Where it asks by itself.
    channel: Option<OwnedFd>,
}

/// What is done with the next answer; 0: it is a good one.
fn answer(request: &[u8], wrong: u8, any: u64) -> Vec<u8> {
    let (id, flags) = (word(request, 0), word(request, 4));
    let mut body = match id {
        1 => (1u64 << 32 | 1 << 30 | 0x6a66 | 3 << 28)
            .to_ne_bytes()
            .to_vec(),
        // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS, STATUS.
        15 => (1u64 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15 | 1 << 16)
            .to_ne_bytes()
            .to_vec(),
        17 => 2u64.to_ne_bytes().to_vec(),
        36 => 8u64.to_ne_bytes().to_vec(),
        11 | 24 => request[HEADER..].to_vec(),
        31 => {
            let mut body = 4096u64.to_ne_bytes().to_vec();
            body.extend([0; 12]);
            body
        }
        _ if flags & 8 != 0 => vec![0; 8],
        _ => return Vec::new(),
    };
    let mut id = id;
    let mut flags = 1 | 4u32;
    let mut len = None;
    let bytes = any.to_ne_bytes();
    let (any, few) = (word(&bytes, 0), usize::from(bytes[0]));
    match wrong {
        1 | 13 => return Vec::new(),
        2 => body.truncate(few % 24),
        3 => body.resize(few * 5 % 1200, 0xff),
        4 => len = Some(any),
        5 => id = any % 64,
        6 => flags = any,
        7 => body.fill(0xff),
        8 | 9 => {
            // Some number of it is any number.
            let at = few >> 3 & 7;
            if let Some(place) = body.get_mut(at..).filter(|place| !place.is_empty()) {
                let count = place.len().min(7);
                place[..count].copy_from_slice(&bytes[1..=count]);
            }
        }
        _ => {}
    }
    let said = len.unwrap_or_else(|| u32::try_from(body.len()).expect("short"));
    let mut bytes = [id, flags, said].map(u32::to_ne_bytes).concat();
    bytes.extend(body);
    bytes
}

impl Daemon {
    /// Reads what has come; the next request, if all of it is there.
    fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(request) = self.take() {
            return Some(request);
        }
        let mut room = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut room)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        if let Ok(received) = recvmsg(&self.socket, &mut into, &mut control, flags) {
            self.have.extend(&room[..received.bytes]);
            if received.bytes == 0 {
                // It was cut off, and lets go.
                let _ = self.socket.shutdown(std::net::Shutdown::Both);
            }
        }
        let mut files = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => files.collect(),
            _ => Vec::new(),
        });
        // SET_BACKEND_REQ_FD.
        if word(&self.have, 0) == 21 {
            self.channel = files.next();
        }
        drop(files);
        self.take()
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        if self.have.len() < HEADER {
            return None;
        }
        let len = HEADER + word(&self.have, 8) as usize;
        if self.have.len() < len {
            return None;
        }
        let rest = self.have.split_off(len);
        Some(std::mem::replace(&mut self.have, rest))
    }

    /// Sends `bytes` with so many descriptors of all kinds.
    fn send(&self, bytes: &[u8], files: usize) {
        if bytes.is_empty() {
            return;
        }
        if files == 0 {
            let _ = (&self.socket).write(bytes);
            return;
        }
        let memory = rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = memory.expect("memory");
        let all: Vec<BorrowedFd<'_>> = (0..files)
            .map(|file| match file % 3 {
                0 => memory.as_fd(),
                _ => self.socket.as_fd(),
            })
            .collect();
        let mut room = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        control.push(SendAncillaryMessage::ScmRights(&all));
        let rest = [std::io::IoSlice::new(bytes)];
        let _ = sendmsg(&self.socket, &rest, &mut control, QUIET);
    }
}

struct Story<'a> {
    bytes: &'a [u8],
    core: Core,
    watched: Watched,
    listener: UnixListener,
    daemons: Vec<Daemon>,
    memory: Arc<Mapping>,
    records: Vec<Arc<Mapping>>,
    tickets: u64,
    open: Vec<u64>,
    now: Instant,
    started: [bool; QUEUES],
}

fn memory(name: &str, len: usize) -> Arc<Mapping> {
    let (mapping, fd) = Mapping::memfd(name, len as u64, true).expect("memfd");
    Arc::new(mapping.with_file(Arc::new(fd), 0))
}

impl Story<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        *first
    }

    fn long(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes.fill_with(|| self.byte());
        u64::from_le_bytes(bytes)
    }

    fn begin(&mut self, command: Command) {
        self.tickets += 1;
        self.open.push(self.tickets);
        self.core
            .command(SLOT, self.tickets, command, &mut self.watched);
        self.take_replies();
    }

    fn take_replies(&mut self) {
        for reply in self.core.take_replies() {
            match reply {
                Reply::Done { ticket, .. } => {
                    let at = self.open.iter().position(|open| *open == ticket);
                    self.open.remove(at.expect("each is answered once"));
                }
                Reply::Notice(_, Notice::Broken { why, .. }) => {
                    assert!(!why.contains("panicked"), "{why}");
                }
                Reply::Notice(..) => {}
            }
        }
    }

    fn poll(&mut self) {
        self.core.handle_timeouts(self.now);
        self.core.poll_device(SLOT, self.now);
        self.core.carry_on(&mut self.watched);
        self.take_replies();
    }

    /// Has the daemon answer what there is, until nothing more comes of it.
    fn exchange(&mut self, spoil: bool) {
        for _ in 0..40 {
            while let Ok((socket, _)) = self.listener.accept() {
                socket.set_nonblocking(true).expect("a socket");
                self.daemons.push(Daemon {
                    socket,
                    have: Vec::new(),
                    channel: None,
                });
            }
            let Some(request) = self.daemons.last_mut().and_then(Daemon::next) else {
                self.poll();
                if self
                    .daemons
                    .last_mut()
                    .is_none_or(|last| last.have.is_empty())
                {
                    return;
                }
                continue;
            };
            let wrong = if spoil { self.byte() & 0x7f } else { 0 };
            let any = if (2..=9).contains(&wrong) {
                self.long()
            } else {
                0
            };
            let bytes = answer(&request, wrong, any);
            let files = match (word(&request, 0), wrong) {
                (_, 10) => usize::from(self.byte()) % 64,
                (31, _) => 1,
                _ => 0,
            };
            let daemon = self.daemons.last().expect("looked at before");
            daemon.send(&bytes, files);
            match wrong {
                11 => daemon.send(&bytes, 0),
                13 => {
                    // It asks instead.
                    let call = [2u32, 1, 0].map(u32::to_ne_bytes).concat();
                    if let Some(channel) = &daemon.channel {
                        let _ = send(channel, &call, QUIET);
                    }
                    self.poll();
                    self.comes_to_rest();
                    return;
                }
                12 => {
                    let _ = daemon.socket.shutdown(std::net::Shutdown::Both);
                }
                _ => {}
            }
            self.poll();
        }
    }

    /// As long as nobody does anything the device has nothing to do.
    fn comes_to_rest(&mut self) {
        for _ in 0..40 {
            let Some(fd) = &self.watched.0 else { return };
            let at_once = Timespec::default();
            let ready = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&at_once));
            if ready == Ok(0) {
                return;
            }
            self.poll();
        }
        panic!("the device is polled for ever");
    }

    /// Whatever the daemon does, the device has done what it was told when its patience is at an end.
    fn settle(&mut self) {
        for _ in 0..200 {
            if self.open.is_empty() {
                return;
            }
            self.exchange(false);
            self.now += PATIENCE / 2;
            self.poll();
        }
        panic!("the device is never ready");
    }

    fn table(&mut self) -> Arc<WindowTable> {
        let which = self.byte();
        let entry = |base: u64, offset: usize, access| TableEntry {
            base: BusAddr(base),
            mapping: Arc::clone(&self.memory),
            offset,
            len: PART,
            access,
        };
        let mut all = Vec::new();
        for queue in 0..QUEUES {
            if which & 1 << queue == 0 {
                let base = BASE + (queue * PART) as u64;
                all.push(entry(base, queue * PART, Access::ReadWrite));
            }
        }
        for more in 0..usize::from(which >> 4) {
            let base = BASE + (2 + more) as u64 * PART as u64;
            all.push(entry(base, 0, Access::ReadWrite));
        }
        Arc::new(WindowTable::new(all).expect("windows"))
    }

    fn start(&mut self, queue: usize) {
        if std::mem::replace(&mut self.started[queue], true) {
            return;
        }
        let how = self.byte();
        let at = |offset: usize| BusAddr(BASE + (queue * PART + offset) as u64);
        let resume = (how & 1 != 0).then_some(vmsg_device::worker::Resume::FromUsedRing);
        let record = (how & 2 != 0).then(|| Record {
            memory: Arc::clone(&self.records[queue]),
            resume: how & 4 != 0,
        });
        self.begin(Command::StartQueue(QueueStart {
            queue,
            config: QueueConfig {
                size: SIZE,
                desc: at(0),
                driver: at(AVAIL),
                device: at(USED),
            },
            features: FeatureSet::EMPTY,
            resume,
            record,
        }));
    }

    fn step(&mut self) {
        let queue = usize::from(self.byte()) % QUEUES;
        match self.byte() % 16 {
            0..=3 => self.exchange(true),
            4 => self.exchange(false),
            5 => {
                let time = u64::from(self.byte()) * 100;
                self.now += Duration::from_millis(time);
                self.poll();
                self.comes_to_rest();
            }
            6 => {
                let table = self.table();
                self.begin(Command::SetMemory(table));
            }
            7 | 8 => self.start(queue),
            9 => {
                let features = self.long() & 0x1_3000_6a66 | 1 << 32;
                self.begin(Command::DriverOk(FeatureSet::from_u64(features)));
            }
            10 => {
                self.begin(Command::Reset);
                self.started = [false; QUEUES];
            }
            11 => {
                self.begin(Command::ResetQueue(queue));
                self.started[queue] = false;
            }
            12 => {
                // Both ends of the ring, and the record.
                let at = queue * PART + AVAIL + 2 + 0x200 * usize::from(self.byte() & 1);
                let index = u16::from(self.byte());
                self.memory.ram().write(at, &index.to_le_bytes());
                let record = Arc::clone(&self.records[queue]);
                let at = usize::from(self.byte()) % (record.ram().len() - 8);
                let bytes = self.long().to_le_bytes();
                record.ram().write(at, &bytes);
            }
            13 => {
                let offset = usize::from(self.byte()) % 70;
                let data = self.long().to_le_bytes()[..offset % 9].to_vec();
                self.begin(Command::WriteConfig { offset, data });
            }
            14 => {
                // What nobody has asked for.
                let (how, bytes) = (self.byte(), self.long().to_le_bytes());
                let Some(daemon) = self.daemons.last() else {
                    return;
                };
                let flags = 1 | u32::from(how & 0x38);
                let call = [2 + u32::from(how >> 6), flags, u32::from(how & 2) * 4];
                let call = call.map(u32::to_ne_bytes).concat();
                match &daemon.channel {
                    Some(channel) if how & 1 == 0 => {
                        for _ in 0..=how >> 2 & 1 {
                            let _ = send(channel, &call, QUIET);
                        }
                    }
                    Some(channel) if how & 5 == 5 => {
                        let _ = send(channel, &bytes, QUIET);
                    }
                    _ => daemon.send(&bytes, 0),
                }
                self.poll();
                self.comes_to_rest();
            }
            _ => {
                let table = {
                    self.begin(Command::Reset);
                    self.started = [false; QUEUES];
                    self.table()
                };
                self.begin(Command::SetMemory(table));
                self.start(0);
                self.start(1);
                let features = FeatureSet::from_u64(1 << 32 | 0x6a66);
                self.begin(Command::DriverOk(features));
                self.exchange(false);
            }
        }
    }
}

/// One story; panics if the device does what it must not.
pub(crate) fn one(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("d");
    let listener = UnixListener::bind(&path).expect("a socket");
    let flags = bytes.first().copied().unwrap_or(0);
    let mut settings = Settings::new(&path, if flags & 8 == 0 { 2 } else { 26 });
    settings.patience = PATIENCE;
    settings.reconnect = PATIENCE;
    settings.queues = Some(2);
    settings.resume = [
        None,
        Some(Resume::InOrder),
        Some(Resume::Record),
        Some(Resume::Never),
    ][usize::from(flags & 3)];
    // The first questions are answered well: without, there is no device.
    let greeter = std::thread::spawn(move || {
        let (socket, _) = listener.accept().expect("called");
        socket.set_nonblocking(false).expect("a socket");
        let limit = Some(Duration::from_millis(20));
        socket.set_read_timeout(limit).expect("a socket");
        let mut daemon = Daemon {
            socket,
            have: Vec::new(),
            channel: None,
        };
        loop {
            match daemon.next() {
                Some(request) => {
                    daemon.send(&answer(&request, 0, 0), 0);
                    // Config, the last question.
                    if word(&request, 0) == 24 {
                        return (listener, daemon);
                    }
                }
                None => std::thread::yield_now(),
            }
        }
    });
    let bridge = Bridge::connect(&settings, Duration::from_secs(60)).expect("a device");
    let (listener, daemon) = greeter.join().expect("it greets");
    listener.set_nonblocking(true).expect("a socket");
    daemon.socket.set_nonblocking(true).expect("a socket");
    let record = Inflight::bytes_for(SIZE);
    let mut story = Story {
        bytes: bytes.get(1..).unwrap_or(&[]),
        core: Core::new(),
        watched: Watched::default(),
        listener,
        daemons: vec![daemon],
        memory: memory("guest", QUEUES * PART),
        records: (0..QUEUES).map(|_| memory("record", record)).collect(),
        tickets: 0,
        open: Vec::new(),
        now: Instant::now(),
        started: [false; QUEUES],
    };
    story
        .core
        .command(SLOT, 0, Command::Add(Box::new(bridge)), &mut story.watched);
    story.take_replies();
    for _ in 0..STEPS {
        if story.bytes.is_empty() {
            break;
        }
        story.step();
    }
    story.settle();
    story.begin(Command::Reset);
    story.settle();
    story.comes_to_rest();
    story.begin(Command::Remove);
    story.settle();
}
