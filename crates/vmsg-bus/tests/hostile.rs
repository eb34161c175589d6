// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The worst that the other side of a unix bus can do. The frames here are
//! written by hand, after docs/bus-unix.md.
#![cfg(feature = "unix")]

mod raw;

use raw::{connect, frame, hello, recv, send, seqpacket, u32_at, u64_at};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::SocketAddrUnix;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::unix::{ConnectError, Connector, Listener, ListenerOptions, RefuseReason};
use vmsg_bus::{Capabilities, DeviceBus, DriverBus};

const MARKER: [u8; 8] = [0x02, 0xc0, 0, 0, 0, 0, 8, 0];
const SLOTS: u32 = 8;
const SLOT: usize = 64;

fn host(dir: &Path) -> Listener {
    let options = ListenerOptions {
        capabilities: Capabilities::all(SLOT),
        slots: SLOTS,
        max_connections: 3,
        ..ListenerOptions::default()
    };
    Listener::bind(dir.join("b.sock"), options).unwrap()
}

/// Drives `listener` over everything that has happened so far.
fn accept(listener: &mut Listener) -> Option<DeviceBus> {
    listener.accept(Instant::now()).unwrap()
}

/// A driver that keeps to the rules as far as it likes.
struct Evil {
    socket: OwnedFd,
    memory: OwnedFd,
    /// Rung by us.
    device_bell: OwnedFd,
    /// Rung by the host.
    driver_bell: OwnedFd,
    to_device: u64,
    to_driver: u64,
}

impl Evil {
    fn connect(listener: &mut Listener) -> (Self, DeviceBus) {
        let socket = connect(listener.path());
        send(&socket, &hello((1, 1), 0), &[]);
        let device = accept(listener).unwrap();
        let (welcome, fds) = recv(&socket);
        assert_eq!(
            (
                u32_at(&welcome, 12),
                u32_at(&welcome, 16),
                u32_at(&welcome, 20)
            ),
            (64, 64, SLOTS)
        );
        let [memory, device_bell, driver_bell] = <[OwnedFd; 3]>::try_from(fds).unwrap();
        let (to_device, to_driver) = (u64_at(&welcome, 48), u64_at(&welcome, 56));
        (
            Self {
                socket,
                memory,
                device_bell,
                driver_bell,
                to_device,
                to_driver,
            },
            device,
        )
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(
            rustix::io::pwrite(&self.memory, bytes, at).unwrap(),
            bytes.len()
        );
    }

    /// Puts a message into slot `index` of the queue to the device and publishes it.
    fn push(&self, index: u32, message: &[u8]) {
        self.poke(
            self.to_device + 128 + u64::from(index) * SLOT as u64,
            message,
        );
        self.poke(self.to_device, &(index + 1).to_le_bytes());
    }
}

/// A message of 12 bytes.
fn message() -> Vec<u8> {
    vec![0, 2, 0, 0, 0, 0, 12, 0, 1, 2, 3, 4]
}

/// Shows that a connection works.
fn works(driver: &mut DriverBus, device: &mut DeviceBus) {
    let mut buf = [0; SLOT];
    driver.try_send(&message()).unwrap();
    driver.flush().unwrap();
    assert_eq!(device.try_recv(&mut buf), Ok(Some(12)));
    device.try_send(&message()).unwrap();
    device.flush().unwrap();
    assert_eq!(driver.try_recv(&mut buf), Ok(Some(12)));
}

/// A driver that behaves, connected while others do not.
fn good(listener: &mut Listener) -> (DriverBus, DeviceBus) {
    let mut connecting = Connector::new(listener.path(), "good").start().unwrap();
    let device = loop {
        if let Some(device) = accept(listener) {
            break device;
        }
    };
    (connecting.advance().unwrap().unwrap(), device)
}

#[test]
fn what_comes_over_an_open_connection_does_not_wake_the_listener() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, _device) = Evil::connect(&mut listener);
    let is_ready = |listener: &Listener| {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() != 0
    };
    send(&evil.socket, &MARKER, &[]);
    assert!(!is_ready(&listener));
    drop(evil);
    assert!(!is_ready(&listener));
    let _next = connect(listener.path());
    assert!(is_ready(&listener), "somebody new");
}

#[test]
fn worthless_hellos_are_refused_and_the_next_driver_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let mut wrong_magic = hello((1, 1), 0);
    wrong_magic[0] = b'X';
    let mut wrong_length = hello((1, 1), 0);
    wrong_length.push(0);
    let mut long_name = hello((1, 1), 0);
    long_name[20] = 200;
    let giant = frame(1, &vec![0xaa; 50_000]);
    let worthless = [
        vec![0xff],
        wrong_magic,
        wrong_length,
        long_name,
        giant,
        frame(2, &[0; 80]),
        frame(1, &[]),
    ];
    for (i, bytes) in worthless.iter().enumerate() {
        let socket = connect(listener.path());
        send(&socket, bytes, &[]);
        assert!(accept(&mut listener).is_none());
        let (refuse, fds) = recv(&socket);
        assert_eq!(
            (&refuse[..4], refuse[4], u32_at(&refuse, 8)),
            (b"VMSG".as_slice(), 3, 3),
            "case {i}"
        );
        assert!(fds.is_empty());
        assert_eq!(recv(&socket).0, b"", "closed afterwards");
    }
    assert_eq!(listener.rejected().malformed, worthless.len() as u64);
    let (mut driver, mut device) = good(&mut listener);
    works(&mut driver, &mut device);
}

#[test]
fn a_driver_of_another_version_learns_which_one_is_spoken() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    for versions in [(2, 7), (0, 0), (3, 1)] {
        let socket = connect(listener.path());
        send(&socket, &hello(versions, 0), &[]);
        assert!(accept(&mut listener).is_none());
        let refuse = recv(&socket).0;
        assert_eq!(
            (u32_at(&refuse, 8), &refuse[12..16]),
            (1, [1, 0, 1, 0].as_slice())
        );
    }
    let socket = connect(listener.path());
    send(&socket, &hello((0, 9), 0), &[]);
    assert!(accept(&mut listener).is_some());
    assert_eq!(recv(&socket).0[8..10], [1, 0]);
}

#[test]
fn the_message_size_is_the_smaller_of_both_and_at_least_48() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    for (wanted, got) in [
        (0, Some(64)),
        (48, Some(48)),
        (1 << 31, Some(64)),
        (47, None),
    ] {
        let socket = connect(listener.path());
        send(&socket, &hello((1, 1), wanted), &[]);
        let device = accept(&mut listener);
        assert_eq!(device.map(|d| d.max_message_size()), got);
        let answer = recv(&socket).0;
        assert_eq!(
            u32_at(&answer, if got.is_some() { 12 } else { 8 }),
            got.map_or(4, |size| u32::try_from(size).unwrap())
        );
    }
}

#[test]
fn connections_beyond_the_limit_are_refused_until_one_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let mut open: Vec<_> = (0..3).map(|_| good(&mut listener)).collect();
    let mut fourth = Connector::new(listener.path(), "fourth").start().unwrap();
    assert!(accept(&mut listener).is_none());
    let error = fourth.advance().unwrap_err();
    assert!(matches!(
        error,
        ConnectError::Refused {
            reason: RefuseReason::TooMany,
            ..
        }
    ));
    assert!(error.is_transient());
    assert!(
        error
            .to_string()
            .ends_with("refused the connection: too many connections (3 are open already)")
    );
    open.pop();
    assert_eq!(listener.connections(), 2);
    let (mut driver, mut device) = good(&mut listener);
    works(&mut driver, &mut device);
}

#[test]
fn silent_connections_delay_nobody_and_are_dropped_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let silent: Vec<OwnedFd> = (0..100)
        .map(|_| {
            let socket = connect(listener.path());
            assert!(accept(&mut listener).is_none());
            socket
        })
        .collect();
    // Of too many the oldest had to go.
    assert_eq!(listener.rejected().stalled, 36);
    let (mut driver, mut device) = good(&mut listener);
    works(&mut driver, &mut device);
    let deadline = listener.next_deadline().unwrap();
    assert!(
        listener
            .accept(deadline + Duration::from_secs(2))
            .unwrap()
            .is_none()
    );
    assert_eq!(listener.rejected().stalled, 101 - 1);
    assert_eq!(listener.next_deadline(), None);
    for socket in &silent {
        assert_eq!(recv(socket).0, b"");
    }
    works(&mut driver, &mut device);
}

#[test]
fn leaving_in_mid_handshake_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    drop(connect(listener.path()));
    assert!(accept(&mut listener).is_none());
    // Says HELLO and is gone before the answer.
    let socket = connect(listener.path());
    send(&socket, &hello((1, 1), 0), &[]);
    drop(socket);
    assert!(accept(&mut listener).is_none());
    // A packet without bytes.
    let socket = connect(listener.path());
    send(&socket, &[], &[]);
    assert!(accept(&mut listener).is_none());
    assert_eq!(listener.rejected().gone, 3);
    assert_eq!(listener.connections(), 0);
    assert_eq!(listener.next_deadline(), None);
}

#[test]
fn descriptors_with_a_hello_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let socket = connect(listener.path());
    send(&socket, &hello((1, 1), 0), &[writer.as_fd(); 200]);
    drop(writer);
    assert!(accept(&mut listener).is_some());
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
}

#[test]
fn impossible_indices_close_that_connection_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (mut driver, mut neighbour) = good(&mut listener);
    let mut buf = [0; SLOT];
    for head in [SLOTS, u32::MAX, 0x8000_0000] {
        let (evil, mut device) = Evil::connect(&mut listener);
        evil.poke(evil.to_device, &head.to_le_bytes());
        assert!(matches!(
            device.try_recv(&mut buf),
            Err(ChannelError::Corrupt(_))
        ));
        assert!(matches!(
            device.try_send(&message()),
            Err(ChannelError::Corrupt(_))
        ));
        assert!(device.is_closed() && !device.arm());
        // The other side is told.
        assert_eq!(recv(&evil.socket).0, b"");
        works(&mut driver, &mut neighbour);
    }
    for tail in [SLOTS, u32::MAX, 3] {
        let (evil, mut device) = Evil::connect(&mut listener);
        // Nothing was sent, so nothing can have been taken.
        evil.poke(evil.to_driver + 0x40, &tail.to_le_bytes());
        let error = (0..3 * SLOTS).find_map(|_| match device.try_send(&message()) {
            Ok(()) => device.flush().err(),
            Err(error) => Some(error),
        });
        // 3 may be believed once three are out; the index never leads outside the queue.
        match error {
            Some(ChannelError::Corrupt(_)) => assert!(device.is_closed()),
            other => assert_eq!((tail, other), (3, Some(ChannelError::Full))),
        }
    }
    works(&mut driver, &mut neighbour);
}

#[test]
fn a_head_that_jumps_about_only_yields_rubbish_or_an_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, mut device) = Evil::connect(&mut listener);
    let mut buf = [0; SLOT];
    for step in 0..1000u32 {
        evil.poke(
            evil.to_device,
            &(step.wrapping_mul(7) % SLOTS).to_le_bytes(),
        );
        evil.poke(
            evil.to_driver + 0x40,
            &(step.wrapping_mul(5) % SLOTS).to_le_bytes(),
        );
        let _ = device.try_send(&message());
        let _ = device.flush();
        // Never more than the queue holds.
        let mut got = 0;
        while let Ok(Some(_)) = device.try_recv(&mut buf) {
            got += 1;
            assert!(got < SLOTS);
        }
    }
}

#[test]
fn a_marker_without_its_message_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, mut device) = Evil::connect(&mut listener);
    evil.push(0, &MARKER);
    let mut buf = [0; SLOT];
    assert_eq!(
        device.try_recv(&mut buf),
        Err(ChannelError::Corrupt("a marker without its message"))
    );
}

#[test]
fn messages_over_the_socket_that_are_too_long_or_too_short_end_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    for (len, why) in [
        (65, "a message longer than agreed"),
        (7, "a message without a header"),
        (0, "a message without a header"),
    ] {
        let (evil, mut device) = Evil::connect(&mut listener);
        send(&evil.socket, &vec![0; len], &[evil.memory.as_fd()]);
        evil.push(0, &MARKER);
        let mut fds = Vec::new();
        assert_eq!(
            device.try_recv_with_fds(&mut [0; SLOT], &mut fds),
            Err(ChannelError::Corrupt(why))
        );
    }
}

#[test]
fn a_flood_of_descriptors_is_closed_and_counted_and_the_message_comes_without() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, mut device) = Evil::connect(&mut listener);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let mut buf = [0; SLOT];
    let mut fds = Vec::new();
    for (index, count) in [5, 6, 253].into_iter().enumerate() {
        send(&evil.socket, &message(), &vec![writer.as_fd(); count]);
        evil.push(u32::try_from(index).unwrap(), &MARKER);
        assert_eq!(device.try_recv_with_fds(&mut buf, &mut fds), Ok(Some(12)));
        assert!(fds.is_empty());
    }
    assert_eq!(device.counters().fds_dropped, 12);
    drop(writer);
    assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0));
    assert!(!device.is_closed());
}

#[test]
fn packets_without_a_marker_wake_nobody_and_are_never_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, mut device) = Evil::connect(&mut listener);
    for _ in 0..20 {
        send(&evil.socket, &message(), &[]);
    }
    assert_eq!(device.try_recv(&mut [0; SLOT]), Ok(None));
    // The first look at freshly watched descriptors may report them.
    let _ = device.wait(Some(Duration::from_millis(1))).unwrap();
    assert!(!device.wait(Some(Duration::from_millis(30))).unwrap());
    drop(evil);
    assert!(device.wait(Some(Duration::from_secs(60))).unwrap());
    assert!(!device.arm());
    assert_eq!(device.try_recv(&mut [0; SLOT]), Err(ChannelError::Closed));
}

#[test]
fn a_doorbell_that_was_filled_and_made_blocking_hangs_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let mut listener = host(dir.path());
    let (evil, mut device) = Evil::connect(&mut listener);
    // A full one is as good as a rung one.
    rustix::io::write(&evil.driver_bell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    evil.poke(evil.to_driver + 0x44, &1u32.to_le_bytes());
    device.try_send(&message()).unwrap();
    device.flush().unwrap();
    let flags = rustix::fs::fcntl_getfl(&evil.driver_bell).unwrap();
    rustix::fs::fcntl_setfl(&evil.driver_bell, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    evil.poke(evil.to_driver + 0x44, &1u32.to_le_bytes());
    let before = Instant::now();
    device.try_send(&message()).unwrap();
    assert_eq!(
        device.flush(),
        Err(ChannelError::Corrupt("the doorbell blocks"))
    );
    assert!(before.elapsed() < Duration::from_secs(60));
    drop(evil.device_bell);
}

/// Answers one driver with `answer` and `fds`, and returns what the driver made of it.
fn fake_host(answer: &[u8], fds: &[BorrowedFd<'_>]) -> ConnectError {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("fake.sock");
    let socket = seqpacket();
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 1).unwrap();
    let driver = thread::spawn(move || Connector::new(path, "driver").connect().unwrap_err());
    let peer = rustix::net::accept(&socket).unwrap();
    assert_eq!(recv(&peer).0[..8], [b'V', b'M', b'S', b'G', 1, 0, 30, 0]);
    if answer.is_empty() {
        drop(peer);
    } else {
        send(&peer, answer, fds);
    }
    driver.join().unwrap()
}

/// A WELCOME for two queues of eight 64-byte slots.
fn welcome(file_len: u64) -> Vec<u8> {
    let mut body = vec![1, 0, 0, 0];
    for word in [64u32, 64, 8, 0x1f, 4] {
        body.extend(word.to_le_bytes());
    }
    body.extend(7u64.to_le_bytes());
    body.extend([0; 8]);
    for offset in [0u64, 4096, file_len] {
        body.extend(offset.to_le_bytes());
    }
    body.extend([0; 4]);
    frame(2, &body)
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("fake", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[test]
fn a_hostile_host_gives_the_driver_a_named_error() {
    let event = || rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let (a, b) = (event(), event());
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let good = memfd(8192, sealed);
    let unsealed = memfd(8192, SealFlags::GROW);
    let short = memfd(4096, sealed);
    let plain = tempfile::tempfile().unwrap();
    plain.set_len(8192).unwrap();
    let fds = |memory| [memory, a.as_fd(), b.as_fd()];
    let cases: [(Vec<u8>, Vec<BorrowedFd<'_>>, &str); 11] = [
        (vec![], vec![], "closed the connection"),
        (vec![1, 2, 3], vec![], "shorter than its head"),
        (frame(9, &[0; 20]), vec![], "neither WELCOME nor REFUSE"),
        (frame(1, &vec![0; 3000]), vec![], "too long"),
        (welcome(8192), vec![], "without its three descriptors"),
        (
            welcome(8192),
            vec![good.as_fd(); 5],
            "more than three descriptors",
        ),
        (welcome(8192), fds(unsealed.as_fd()).to_vec(), "not sealed"),
        (welcome(8192), fds(plain.as_fd()).to_vec(), "not sealed"),
        (welcome(8192), fds(short.as_fd()).to_vec(), "another length"),
        (
            welcome(4096),
            fds(short.as_fd()).to_vec(),
            "do not lie in its file",
        ),
        (welcome(8192), vec![good.as_fd(); 3], "not an eventfd"),
    ];
    for (answer, fds, expected) in cases {
        let error = fake_host(&answer, &fds).to_string();
        assert!(error.contains(expected), "{error} instead of {expected}");
    }
}

/// A file of huge pages can be sealed like any other, but where there are none left touching it is fatal.
#[test]
fn queues_in_huge_pages_are_refused_before_they_are_touched() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(huge) = rustix::fs::memfd_create("fake", flags) else {
        // A kernel without huge pages.
        return;
    };
    let len = 32 << 20;
    rustix::fs::ftruncate(&huge, len).unwrap();
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&huge, sealed).unwrap();
    let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let fds = [huge.as_fd(), bell.as_fd(), bell.as_fd()];
    let error = fake_host(&welcome(len), &fds).to_string();
    assert!(error.contains("not ordinary memory"), "{error}");
}

#[test]
fn a_host_that_says_nothing_costs_the_driver_only_its_patience() {
    let dir = tempfile::tempdir().unwrap();
    let listener = host(dir.path());
    let connector = Connector::new(listener.path(), "driver").timeout(Duration::from_millis(30));
    assert!(matches!(
        connector.connect(),
        Err(ConnectError::TimedOut { .. })
    ));
    // Nobody accepts: at some time the backlog is full.
    let waiting: Vec<_> = std::iter::from_fn(|| connector.start().ok())
        .take(1000)
        .collect();
    assert!(waiting.len() < 1000);
    assert!(matches!(connector.start(), Err(ConnectError::Busy { .. })));
    let error = connector.connect().unwrap_err();
    assert!(error.is_transient(), "{error}");
}
