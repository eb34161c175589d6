// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A link and what is on the other side of its bus: device hosts that flood, slam the door, or say nothing.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;

use common::{Host, MAX};
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use virtio_msg::{
    Channel, ChannelError, ConfigEvent, DevNum, DeviceState, DeviceStatus, Frame, Generation,
    Message, QueueIndex, Token,
};
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_bus::{Capabilities, DriverBus, loopback};
use vmsg_mem::{Doorbell, Mapping};
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Op, Options, Outcome, Session, Target};

/// Nothing takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Answers as it should and says `events` all the time.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    fn start(mut host: Host, events: Vec<Vec<u8>>) -> (Flood, DriverBus) {
        let options = loopback::Options {
            capabilities: Capabilities::all(MAX),
            ..loopback::Options::default()
        };
        let (driver, mut bus) = loopback::pair(&options).unwrap();
        let (stop, sent) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let thread = std::thread::spawn({
            let (stop, sent) = (stop.clone(), sent.clone());
            move || {
                let mut buf = vec![0; 512];
                let mut fds = Vec::new();
                let mut answers = std::collections::VecDeque::new();
                while !stop.load(Ordering::Relaxed) {
                    while let Ok(Some(len)) = bus.try_recv_with_fds(&mut buf, &mut fds) {
                        answers.extend(host.handle(&buf[..len], std::mem::take(&mut fds)));
                    }
                    while let Some(answer) = answers.front()
                        && bus.try_send(answer).is_ok()
                    {
                        answers.pop_front();
                    }
                    // As many as go, so that there is always more to take.
                    for event in events.iter().cycle().take(1000) {
                        match bus.try_send(event) {
                            Ok(()) => sent.fetch_add(1, Ordering::Relaxed),
                            Err(ChannelError::Full) => break,
                            Err(_) => return,
                        };
                    }
                    let _ = bus.flush();
                }
            }
        });
        let flood = Flood {
            stop,
            sent,
            thread: Some(thread),
        };
        (flood, driver)
    }

    /// Until so many more were sent: the other side is in the middle of it.
    fn wait(&self, more: u32) {
        let begin = self.sent.load(Ordering::Relaxed);
        while self.sent.load(Ordering::Relaxed).wrapping_sub(begin) < more {
            std::thread::yield_now();
        }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn encode(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    let len = frame.encode(&mut bytes).unwrap();
    bytes.truncate(len);
    bytes
}

fn events_of(host: &Host) -> Vec<Vec<u8>> {
    let config = |data: &'static [u8]| {
        let event = ConfigEvent {
            status: DeviceStatus::RESET,
            generation: Generation(2),
            offset: 0,
            len: data.len() as u32,
            data,
        };
        encode(&Frame::new(
            host.number,
            Token(0),
            Message::EventConfig(event),
        ))
    };
    let used = Message::EventUsed {
        queue: QueueIndex(0),
    };
    let ready = Message::EventDevice {
        device: host.number,
        state: DeviceState::Ready,
    };
    vec![
        config(&[1]),
        config(&[]),
        encode(&Frame::new(host.number, Token(0), used)),
        encode(&Frame::bus(Token(0), ready)),
        vec![0xff; 20],
    ]
}

/// Does it on another thread: it may have no end.
#[track_caller]
fn within<T: Send + 'static>(
    time: Duration,
    what: &str,
    act: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = mpsc::channel();
    std::thread::spawn(move || done.send(act()));
    result
        .recv_timeout(time)
        .unwrap_or_else(|_| panic!("{what} takes too long"))
}

fn options(dir: &tempfile::TempDir) -> VhostUserOptions {
    let mut options = VhostUserOptions::new(dir.path().join("vu.sock"));
    options.config = Some(true);
    options
}

/// A socket as the device host's, bound by hand.
fn listen(path: &Path) -> OwnedFd {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let address = rustix::net::SocketAddrUnix::new(path).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    rustix::net::listen(&socket, 8).unwrap();
    socket
}

/// A host that costs itself nothing: it says once what it has to say, and then only that all of it is new again.
#[test]
fn a_queue_that_is_always_full_cannot_keep_a_link_from_ending() {
    // So long that it is not drained while the host's thread is not scheduled.
    const SLOTS: u32 = 65536;
    const TO_DRIVER: u64 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus.sock");
    let socket = listen(&path);
    let long = Duration::from_secs(600);
    let options = Options {
        request_timeout: long,
        operation_timeout: long,
        ..Options::default()
    };
    let session = Session::new(Target::Number(DevNum(3)), options);
    let link = Link::start(
        "test",
        session,
        Source::Bus(Connector::new(&path, "test").into()),
    )
    .unwrap();
    let peer = rustix::net::accept(&socket).unwrap();

    // docs/bus-unix.md §2: WELCOME with two queues of 64-byte slots.
    let (memory, file) = Mapping::memfd("queues", 2 * TO_DRIVER, true).unwrap();
    let mut welcome = b"VMSG".to_vec();
    welcome.extend([2, 0, 76, 0, 1, 0, 0, 0]);
    for word in [64, 64, SLOTS, 0x1f, 4] {
        welcome.extend(word.to_le_bytes());
    }
    for word in [7, 0, 0, TO_DRIVER, 2 * TO_DRIVER] {
        welcome.extend(word.to_le_bytes());
    }
    welcome.extend([0; 4]);
    let bells = [(); 2].map(|()| Doorbell::new().unwrap());
    let fds = [file.as_fd(), bells[0].as_fd(), bells[1].as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(&peer, &[IoSlice::new(&welcome)], &mut control, flags).unwrap();

    let queue = memory
        .ram()
        .get(TO_DRIVER as usize, TO_DRIVER as usize)
        .unwrap();
    let message = &events_of(&Host::net())[2];
    for slot in 0..SLOTS as usize {
        queue.write(0x80 + 64 * slot, message);
    }
    // §3: the head right behind the tail is a full queue.
    let (head, tail) = (
        queue.atomic_u32(0).unwrap(),
        queue.atomic_u32(0x40).unwrap(),
    );
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let full = (tail.load(Ordering::Relaxed) + SLOTS - 1) % SLOTS;
                head.store(full, Ordering::Release);
            }
        });
        let _ = bells[1].ring();
        let handle = link.handle();
        let end = Instant::now() + PATIENCE;
        while handle.stats().unwrap().received < 100_000 {
            assert!(Instant::now() < end, "{:?}", handle.stats());
        }
        assert_eq!(handle.stats().unwrap().connections, 1);
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            drop(link);
            let _ = done.send(());
        });
        let ended = ended.recv_timeout(PATIENCE);
        stop.store(true, Ordering::Relaxed);
        assert!(ended.is_ok(), "the link does not end");
    });
}

#[test]
fn operations_come_through_a_flood() {
    let host = Host::net();
    let session = Session::new(Target::Number(host.number), Options::default());
    let events = events_of(&host);
    let (flood, bus) = Flood::start(host, events);
    let link = Link::start("test", session, Source::Given(Box::new(bus))).unwrap();
    let handle = link.handle();
    flood.wait(1000);
    let described = within(PATIENCE, "an operation", move || handle.call(Op::Describe));
    assert!(matches!(described, Ok(Outcome::Device(_))), "{described:?}");
    flood.wait(1000);
    within(PATIENCE, "the end", move || drop(link));
}

#[test]
fn a_flooding_host_cannot_keep_a_front_from_its_front_end() {
    use vhost::VhostBackend;
    let host = Host::new(2, "disk", 2, 1, &[1, 2, 3, 4]);
    let session = Session::new(Target::Number(host.number), Options::default());
    let events = events_of(&host);
    let (flood, bus) = Flood::start(host, events);
    let link = Link::start("test", session, Source::Given(Box::new(bus))).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let front = VhostUserFront::start("test", link.handle(), options(&dir)).unwrap();
    let socket = dir.path().join("vu.sock");
    for _ in 0..4 {
        flood.wait(1000);
        let socket = socket.clone();
        within(PATIENCE, "a request", move || {
            let front_end = vhost::vhost_user::Frontend::connect(socket, 1).unwrap();
            for _ in 0..20 {
                front_end.get_features().unwrap();
            }
        });
    }
    within(PATIENCE, "the end of the front", move || drop(front));
    within(PATIENCE, "the end of the link", move || drop(link));
}

#[test]
fn a_host_that_slams_the_door_does_not_keep_the_link_busy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus.sock");
    let mut listener = Listener::bind(&path, ListenerOptions::default()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let host = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut accepted = 0;
            while !stop.load(Ordering::Relaxed) {
                if let Ok(Some(bus)) = listener.accept(Instant::now()) {
                    accepted += 1;
                    drop(bus);
                } else {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            accepted
        }
    });
    let session = Session::new(Target::Name("x".into()), Options::default());
    let link = Link::start(
        "test",
        session,
        Source::Bus(Connector::new(&path, "test").into()),
    )
    .unwrap();
    let begin = Instant::now();
    std::thread::sleep(Duration::from_millis(1500));
    within(PATIENCE, "the end", move || drop(link));
    let took = begin.elapsed();
    stop.store(true, Ordering::Relaxed);
    let accepted = host.join().unwrap();
    assert!(accepted >= 2, "it is tried again");
    assert!(
        u64::from(accepted as u32) <= 12 + took.as_secs(),
        "{accepted} connections in {took:?}"
    );
}

#[test]
fn a_host_that_accepts_and_says_nothing_holds_nobody_up_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus.sock");
    let _socket = listen(&path);
    let session = Session::new(
        Target::Name("x".into()),
        Options {
            first_contact_timeout: Duration::from_millis(500),
            request_timeout: 10 * PATIENCE,
            operation_timeout: 10 * PATIENCE,
            ..Options::default()
        },
    );
    let link = Link::start(
        "test",
        session,
        Source::Bus(Connector::new(&path, "test").into()),
    )
    .unwrap();
    let handle = link.handle();
    let begin = Instant::now();
    assert!(handle.call(Op::Describe).is_err());
    assert!(handle.call(Op::Describe).is_err());
    assert!(begin.elapsed() < PATIENCE);
    within(PATIENCE, "the end", move || drop(link));
}
