// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM at a vhost-user front that says anything, with any descriptors, and leaves at any time.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtio_msg::{Channel, FeatureSet};
use vmsg_bus::{Capabilities, DeviceBus, loopback};
use vmsg_mem::Mapping;
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Options, Session, Target};

use crate::common::{Host, MAX};

const RAM: u64 = 0x4_0000;
const USER: u64 = 0x7f00_0000_0000;
const GUEST: u64 = 0x4000_0000;
/// How long the front may need for the next VMM.
const PATIENCE: Duration = Duration::from_secs(60);
const STEPS: usize = 48;
/// Offered by disks: SEG_MAX, BLK_SIZE, FLUSH, CONFIG_WCE, MQ; and VERSION_1 and the protocol's.
const DISK: u64 = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 32;
const PROTOCOL: u64 = 1 << 30;

/// A front, and the device host behind it.
struct Place {
    socket: PathBuf,
    host: Arc<Mutex<Host>>,
    /// One story at a time.
    turn: Mutex<()>,
    _front: VhostUserFront,
    _link: Link,
    _dir: tempfile::TempDir,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn serve(host: &Mutex<Host>, mut bus: DeviceBus) {
    let mut bytes = vec![0; 512];
    let mut fds = Vec::new();
    loop {
        match bus.try_recv_with_fds(&mut bytes, &mut fds) {
            Ok(Some(len)) => {
                let answer = lock(host).handle(&bytes[..len], std::mem::take(&mut fds));
                if let Some(answer) = answer {
                    bus.try_send(&answer).expect("there is room");
                }
            }
            Ok(None) => {
                bus.flush().expect("the link is there");
                let waited = bus.wait(Some(Duration::from_secs(1)));
                waited.expect("the link is there");
            }
            Err(_) => return,
        }
    }
}

impl Place {
    fn new(mut host: Host, isolate: bool) -> Self {
        host.offered = FeatureSet::from_u64(DISK | 1 << 28 | 1 << 29);
        let number = host.number;
        let host = Arc::new(Mutex::new(host));
        let options = loopback::Options {
            capabilities: Capabilities::all(MAX),
            ..loopback::Options::default()
        };
        let (driver, device) = loopback::pair(&options).expect("a bus");
        let behind = Arc::clone(&host);
        std::thread::spawn(move || serve(&behind, device));
        let session = Session::new(Target::Number(number), Options::default());
        let source = Source::GivenWith(Box::new(driver), Vec::new());
        let link = Link::start("story", session, source).expect("a link");
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("front");
        let mut options = VhostUserOptions::new(&socket);
        options.isolate = isolate;
        options.stop_patience = Duration::from_millis(200);
        let front = VhostUserFront::start("story", link.handle(), options).expect("it listens");
        Self {
            socket,
            host,
            turn: Mutex::default(),
            _front: front,
            _link: link,
            _dir: dir,
        }
    }
}

/// A disk, a disk with copies, a file system.
fn places() -> &'static [Place; 3] {
    static PLACES: OnceLock<[Place; 3]> = OnceLock::new();
    PLACES.get_or_init(|| {
        [
            Place::new(Host::new(2, "disk", 2, 2, &[7; 60]), false),
            Place::new(Host::new(2, "disk", 2, 2, &[7; 60]), true),
            Place::new(Host::new(5, "share", 26, 3, &[0x61; 40]), false),
        ]
    })
}

struct Story<'a> {
    bytes: &'a [u8],
    socket: UnixStream,
    memory: (Mapping, OwnedFd),
    inflight: (Mapping, OwnedFd),
    others: Vec<OwnedFd>,
    /// It was closed, or does not read any more.
    over: bool,
}

fn long(payload: &mut Vec<u8>, numbers: &[u64]) {
    for number in numbers {
        payload.extend(number.to_ne_bytes());
    }
}

fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

impl Story<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        *first
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        bytes.fill_with(|| self.byte());
        u64::from_le_bytes(bytes)
    }

    /// Sends a message with descriptors; what has been answered is read, so that the front never waits for that.
    fn send(&mut self, id: u32, flags: u32, payload: &[u8], fds: &[u8]) {
        let len = u32::try_from(payload.len()).expect("short");
        let mut bytes = words(&[id, flags, len]);
        bytes.extend(payload);
        self.send_bytes(&bytes, fds);
    }

    fn send_bytes(&mut self, bytes: &[u8], fds: &[u8]) {
        let files: Vec<BorrowedFd<'_>> = fds
            .iter()
            .map(|fd| match fd % 16 {
                0 => self.memory.1.as_fd(),
                1 => self.inflight.1.as_fd(),
                other => self.others[usize::from(other) % self.others.len()].as_fd(),
            })
            .collect();
        let mut room = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&files));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags);
        self.over |= sent.is_err();
        let _ = self.socket.read(&mut [0; 4096]);
    }

    /// Waits until all that was sent is done, or the front has had enough.
    fn settle(&mut self) {
        self.socket.set_nonblocking(false).expect("a socket");
        self.send(1, 1, &[], &[]);
        let mut room = [0; 4096];
        let mut have = Vec::new();
        // The answer to GET_FEATURES is the last thing that comes; others are as long, so all that comes is looked through.
        while !self.over {
            match self.socket.read(&mut room) {
                Ok(0) => self.over = true,
                // It was taken for the rest of what came before, or takes its time.
                Err(_) => break,
                Ok(count) => {
                    have.extend(&room[..count]);
                    let id = have.len().checked_sub(20).map(|at| have[at]);
                    if id == Some(1) {
                        break;
                    }
                }
            }
        }
        self.socket.set_nonblocking(true).expect("a socket");
    }

    fn region(&mut self, how: u8) -> Vec<u8> {
        let mut all = [GUEST, RAM, USER, 0];
        if how & 3 == 3 {
            let number = self.number();
            all[usize::from(how >> 2) & 3] = number;
        }
        let mut payload = Vec::new();
        long(&mut payload, &all);
        payload
    }

    fn ring(&mut self, index: u32, how: u8) {
        let size = if how & 1 == 0 { 64 } else { 1 << (how & 15) };
        self.send(8, 9, &words(&[index, size]), &[]);
        self.send(10, 9, &words(&[index, u32::from(how >> 6)]), &[]);
        let at = USER + u64::from(index % 4) * 0x1_0000;
        let mut payload = words(&[index, 0]);
        let wild = if how & 6 == 6 { self.number() } else { 0 };
        long(
            &mut payload,
            &[at, at + 0x2000, (at + 0x1000).wrapping_add(wild), 0],
        );
        self.send(9, 9, &payload, &[]);
        for id in [13, 14, 12] {
            let mut payload = Vec::new();
            long(&mut payload, &[u64::from(index)]);
            self.send(id, 9, &payload, &[2]);
        }
        self.send(18, 9, &words(&[index, 1]), &[]);
    }

    /// As QEMU begins.
    fn begin(&mut self, how: u8) {
        self.send(15, 1, &[], &[]);
        let mut payload = Vec::new();
        long(
            &mut payload,
            &[1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 15],
        );
        self.send(16, 1, &payload, &[]);
        self.send(3, 9, &[], &[]);
        self.send(21, 9, &[], &[5]);
        let mut payload = Vec::new();
        let features = if how & 1 == 0 {
            DISK | PROTOCOL
        } else {
            1 << 32 | PROTOCOL
        };
        long(&mut payload, &[features]);
        self.send(2, 9, &payload, &[]);
        if how & 2 == 0 {
            let mut payload = Vec::new();
            long(&mut payload, &[64 << 10, 0]);
            payload.extend([2, 0, 64, 0, 0, 0, 0, 0]);
            self.send(32, 9, &payload, &[1]);
        }
        let mut payload = words(&[1, 0]);
        payload.extend(self.region(0));
        self.send(5, 9, &payload, &[0]);
    }

    /// One byte, or any number.
    fn field(&mut self) -> u64 {
        match self.byte() {
            0xff => self.number(),
            0xfe => u64::MAX,
            0xfd => 1 << (self.byte() & 63),
            0xfc => USER + u64::from(self.byte()) * 0x800,
            0xfb => GUEST + u64::from(self.byte()) * 0x800,
            byte => u64::from(byte),
        }
    }

    fn step(&mut self) {
        let kind = self.byte();
        match kind % 16 {
            0 => {
                let how = self.byte();
                self.begin(how);
                self.ring(0, how & 0xf0);
                self.ring(1, 0);
            }
            1 => {
                let (index, how) = (u32::from(self.byte() & 3), self.byte());
                self.ring(index, how);
            }
            2 => {
                // Stop, disable, reset.
                let index = u32::from(kind >> 6);
                self.send(18, 9, &words(&[index, 0]), &[]);
                self.send(11, 1, &words(&[index, 0]), &[]);
            }
            3 => self.send(34, 9, &[], &[]),
            4 => {
                // Regions come and go.
                let how = self.byte();
                let mut payload = vec![0; 8];
                payload.extend(self.region(how));
                let id = if how & 16 == 0 { 37 } else { 38 };
                let fds: &[u8] = if id == 37 { &[how >> 5] } else { &[] };
                self.send(id, 9, &payload, fds);
            }
            5 | 6 => {
                // The configuration.
                let (offset, len) = (self.field(), self.byte());
                let word = |number: u64| u32::try_from(number & 0xffff_ffff).unwrap_or(0);
                let mut payload = words(&[word(offset), len.into(), u32::from(kind >> 6)]);
                let fill = self.byte();
                payload.extend(std::iter::repeat_n(fill, len.into()));
                let id = if kind % 16 == 5 { 25 } else { 24 };
                self.send(id, 9, &payload, &[]);
            }
            7 => {
                // Memory for what is in flight.
                let mut payload = Vec::new();
                let all = [self.field(), self.field()];
                long(&mut payload, &all);
                let (queues, entries) = (self.byte(), self.byte());
                payload.extend([queues, 0, entries, kind >> 4, 0, 0, 0, 0]);
                let id = 31 + u32::from(kind >> 7);
                let fds: &[u8] = if id == 32 { &[1] } else { &[] };
                self.send(id, 9, &payload, fds);
            }
            8 => {
                // Whatever the guest has in its memory.
                let at = usize::from(self.byte()) * 0x400 + usize::from(kind >> 4);
                let bytes = self.number().to_le_bytes();
                self.memory.0.ram().write(at, &bytes);
                self.inflight.0.ram().write(at & 0xffff, &bytes);
            }
            9 => self.settle(),
            10 => {
                // Files become shorter and longer.
                let file = if kind & 16 == 0 {
                    &self.memory.1
                } else {
                    &self.inflight.1
                };
                let _ = rustix::fs::ftruncate(file, u64::from(kind >> 5) * 0x3000);
                let _ = rustix::fs::ftruncate(file, RAM);
            }
            11 => {
                let count = usize::from(self.byte());
                let bytes: Vec<u8> = (0..count).map(|_| self.byte()).collect();
                if !bytes.is_empty() {
                    self.send_bytes(&bytes, &[]);
                }
            }
            _ => {
                // Any message.
                let id = u32::from(self.byte()) % 44;
                let flags = match self.byte() {
                    flags @ 0xf0.. => u32::from(flags),
                    flags => 1 | u32::from(flags & 1) << 3,
                };
                let shape = self.byte();
                let mut payload = Vec::new();
                for _ in 0..shape & 7 {
                    let field = self.field();
                    long(&mut payload, &[field]);
                }
                if shape & 8 != 0 {
                    payload.truncate(payload.len().saturating_sub(4));
                }
                let fds: Vec<u8> = (0..shape >> 6).map(|_| self.byte()).collect();
                self.send(id, flags, &payload, &fds);
            }
        }
    }
}

fn others() -> Vec<OwnedFd> {
    let pair = || UnixStream::pair().expect("sockets");
    let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let (one, other) = pair();
    let (read, write) = std::io::pipe().expect("a pipe");
    let null = std::fs::File::open("/dev/null").expect("there");
    let dir = std::fs::File::open("/").expect("there");
    let memory = rustix::fs::memfd_create("empty", rustix::fs::MemfdFlags::CLOEXEC);
    vec![
        eventfd,
        one.into(),
        other.into(),
        read.into(),
        write.into(),
        null.into(),
        dir.into(),
        memory.expect("memory"),
    ]
}

fn connect(place: &Place) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(&place.socket) {
            Ok(socket) => return socket,
            // Nobody is let in for a while after some mistakes.
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::yield_now();
    }
}

/// One story; panics if the front does what it must not.
pub(crate) fn one(bytes: &[u8]) {
    let flags = bytes.first().copied().unwrap_or(0);
    let place = &places()[usize::from(flags) % 3];
    let _turn = lock(&place.turn);
    {
        let mut host = lock(&place.host);
        host.log.clear();
        host.kicks.clear();
    }
    let memory = |name| Mapping::memfd(name, RAM, false).expect("memory");
    let socket = connect(place);
    socket.set_nonblocking(true).expect("a socket");
    let moment = Some(Duration::from_millis(10));
    socket.set_read_timeout(moment).expect("a socket");
    let mut story = Story {
        bytes: bytes.get(1..).unwrap_or(&[]),
        socket,
        memory: memory("guest"),
        inflight: memory("inflight"),
        others: others(),
        over: false,
    };
    for _ in 0..STEPS {
        if story.bytes.is_empty() || story.over {
            break;
        }
        story.step();
    }
    if flags & 0x80 == 0 {
        story.settle();
    }
    drop(story);
    // Whoever comes next is served, and the device is let go.
    let begun = Instant::now();
    loop {
        let mut next = connect(place);
        next.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let asked = next.write_all(&words(&[1, 1, 0]));
        match asked.and_then(|()| next.read_exact(&mut [0; 20])) {
            Ok(()) => break,
            // The door may have been shut for a while when it stood there already.
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
    }
    let host = lock(&place.host);
    assert!(host.windows.is_empty(), "{:?}", host.windows);
    assert!(host.queues.is_empty(), "{:?}", host.queues);
    drop(host);
}
