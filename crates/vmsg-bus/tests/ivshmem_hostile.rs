// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem` against who has all of its memory, its server or its doorbells, and means no good.
#![cfg(feature = "ivshmem")]

#[allow(dead_code, unused_macros)]
mod suite;

use ivshmem::Client;
use ivshmem::server::{Options, Port, Server};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use suite::{accept, driver_recv, message, number, recv};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::ivshmem::{MemoryMode, QueueLayout, Ram};
use vmsg_bus::{BusSpec, Connector, DeviceBus, DriverBus, IvshmemSpec, Listener};
use vmsg_mem::{Access, Doorbell, Mapping};

const LAYOUTS: [QueueLayout; 2] = [QueueLayout::Amp, QueueLayout::Spsc];
const SIZE: u64 = 64 << 10;

/// A file that both ends have, and somebody else.
struct Memory {
    dir: tempfile::TempDir,
    layout: QueueLayout,
    mapping: Mapping,
}

impl Memory {
    fn new(layout: QueueLayout) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create_new(dir.path().join("m")).unwrap();
        file.set_len(SIZE).unwrap();
        drop(file);
        let mapping = map(&dir.path().join("m"));
        Self {
            dir,
            layout,
            mapping,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    fn spec(&self) -> BusSpec {
        BusSpec::Ivshmem(Box::new(IvshmemSpec {
            layout: self.layout,
            ..IvshmemSpec::file(self.path())
        }))
    }

    fn listener(&self) -> Listener {
        self.spec().listen("host").unwrap()
    }

    fn put(&self, offset: usize, word: u32) {
        assert!(self.mapping.device_region().write_u32(offset, word));
    }

    fn get(&self, offset: usize) -> u32 {
        self.mapping.device_region().read_u32(offset).unwrap()
    }

    /// Where the device's block is.
    fn device_block(&self) -> usize {
        match self.layout {
            QueueLayout::Amp => 4096 - 128,
            _ => 4096 + 8,
        }
    }
}

fn map(path: &Path) -> Mapping {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let len = file.metadata().unwrap().len();
    Mapping::of_fd(file.as_fd(), 0, len, Access::ReadWrite).unwrap()
}

/// Connects a driver while the listener is looked after, whatever it says meanwhile.
fn join(listener: &mut Listener, connector: Connector) -> (DriverBus, DeviceBus) {
    let done = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&done);
    let driver = std::thread::spawn(move || {
        let bus = connector.timeout(suite::LONG).connect();
        told.store(true, Ordering::Release);
        bus
    });
    let mut device: Option<DeviceBus> = None;
    let until = Instant::now() + suite::LONG;
    while device.is_none() || !done.load(Ordering::Acquire) {
        assert!(Instant::now() < until, "the two never came together");
        // It may have been for somebody who is not there any more.
        if device
            .as_mut()
            .is_some_and(|bus| bus.try_recv(&mut [0; 64]).is_err())
        {
            device = None;
        }
        if let Ok(Some(bus)) = listener.accept(Instant::now()) {
            device = Some(bus);
        }
        match &mut device {
            Some(bus) => drop(bus.wait(Some(Duration::from_millis(10)))),
            None => pause(listener.as_fd()),
        }
    }
    let driver = driver.join().unwrap().expect("the driver is connected");
    (driver, device.unwrap())
}

/// Until something is readable, or it is time to look anyway.
fn pause(fd: BorrowedFd<'_>) {
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&moment),
    )
    .unwrap();
}

/// Looks after a listener without a driver.
fn serve(listener: &mut Listener, time: Duration) -> (Vec<DeviceBus>, usize) {
    let until = Instant::now() + time;
    let (mut buses, mut errors) = (Vec::new(), 0);
    while Instant::now() < until {
        match listener.accept(Instant::now()) {
            Ok(Some(bus)) => buses.push(bus),
            Ok(None) => {}
            Err(_) => errors += 1,
        }
        pause(listener.as_fd());
    }
    (buses, errors)
}

fn talk(driver: &mut DriverBus, device: &mut DeviceBus) {
    let mut buf = [0; 64];
    for n in 1..100 {
        driver.try_send(&message(n, 48)).unwrap();
        driver.flush().unwrap();
        recv(device, &mut buf).unwrap();
        assert_eq!(number(&buf), n);
        device.try_send(&message(!n, 48)).unwrap();
        device.flush().unwrap();
        driver_recv(driver, &mut buf).unwrap();
        assert_eq!(number(&buf), !n);
    }
}

#[test]
fn indices_that_cannot_be_do_not_end_the_host_for_good() {
    let memory = Memory::new(QueueLayout::Spsc);
    let mut listener = memory.listener();
    let (buses, _) = serve(&mut listener, Duration::from_millis(100));
    assert!(buses.is_empty());
    // What a foreign driver stores: its tail in the device's page, then its head.
    memory.put(4096 + 0x40, u32::MAX);
    memory.put(0, 1);
    let (buses, errors) = serve(&mut listener, Duration::from_millis(600));
    assert!(buses.is_empty());
    assert!(errors <= 4, "{errors} errors: each may be logged");
    memory.put(4096 + 0x40, 0);
    memory.put(0, 0);
    let (mut driver, mut device) = join(&mut listener, memory.spec().connector("driver"));
    talk(&mut driver, &mut device);
}

#[test]
fn a_host_whose_block_was_written_over_takes_its_place_again() {
    for layout in LAYOUTS {
        let memory = Memory::new(layout);
        let mut listener = memory.listener();
        serve(&mut listener, Duration::from_millis(100));
        for offset in 0..12 {
            memory.put(memory.device_block() + 4 * offset, 0);
        }
        let (buses, errors) = serve(&mut listener, Duration::from_millis(100));
        assert!(buses.is_empty() && errors <= 1);
        let (mut driver, mut device) = join(&mut listener, memory.spec().connector("driver"));
        talk(&mut driver, &mut device);
        // Once more, while it is connected.
        memory.put(memory.device_block(), 0xdead_beef);
        let mut buf = [0; 64];
        assert_eq!(recv(&mut device, &mut buf), Err(ChannelError::Closed));
        assert_eq!(
            driver_recv(&mut driver, &mut buf),
            Err(ChannelError::Closed)
        );
        drop((driver, device));
        let (mut driver, mut device) = join(&mut listener, memory.spec().connector("driver"));
        talk(&mut driver, &mut device);
    }
}

#[test]
fn a_host_whose_place_another_one_has_waits_for_its_end() {
    let memory = Memory::new(QueueLayout::Amp);
    let mut listener = memory.listener();
    serve(&mut listener, Duration::from_millis(100));
    let block = memory.device_block();
    let (epoch, beat) = (memory.get(block + 8), memory.get(block + 0x18));
    // Somebody else who lives, for some time.
    memory.put(block + 8, epoch ^ 1);
    let until = Instant::now() + Duration::from_secs(3);
    let mut errors = 0;
    for beats in 1.. {
        if Instant::now() > until {
            break;
        }
        memory.put(block + 0x18, beat.wrapping_sub(beats));
        let (buses, more) = serve(&mut listener, Duration::from_millis(200));
        assert!(buses.is_empty());
        errors += more;
        assert_eq!(memory.get(block + 8), epoch ^ 1, "it is another's place");
    }
    assert_eq!(errors, 1, "told once");
    let (mut driver, mut device) = join(&mut listener, memory.spec().connector("driver"));
    talk(&mut driver, &mut device);
}

#[test]
fn memory_that_was_truncated_is_looked_for_again() {
    for layout in LAYOUTS {
        let memory = Memory::new(layout);
        let mut listener = memory.listener();
        let connector = memory.spec().connector("driver");
        let (mut driver, mut device) = join(&mut listener, connector.clone());
        talk(&mut driver, &mut device);
        let file = std::fs::OpenOptions::new().write(true).open(memory.path());
        let file = file.unwrap();
        file.set_len(0).unwrap();
        let mut buf = [0; 64];
        // Zeros may come first, which are no messages.
        while let Ok(len) = recv(&mut device, &mut buf) {
            assert!(buf[..len].iter().all(|byte| *byte == 0));
        }
        while let Ok(len) = driver_recv(&mut driver, &mut buf) {
            assert!(buf[..len].iter().all(|byte| *byte == 0));
        }
        drop((driver, device));
        serve(&mut listener, Duration::from_millis(100));
        assert!(connector.clone().timeout(Duration::ZERO).connect().is_err());
        file.set_len(SIZE).unwrap();
        let (mut driver, mut device) = join(&mut listener, connector);
        talk(&mut driver, &mut device);
    }
}

/// A server in a thread.
struct Running {
    stop: Doorbell,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(path: &Path) -> Self {
        let mut server = Server::bind(Options::new(vec![Port::new(path, 3)], 1 << 20)).unwrap();
        let stop = Doorbell::new().unwrap();
        let stopped = stop.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            server.run(stopped.eventfd().unwrap()).unwrap();
        });
        let thread = Some(thread);
        Self { stop, thread }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.ring().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_new_server_brings_other_common_memory_for_both() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = Running::start(&path);
    let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec {
        memory: Some(MemoryMode::Bounce),
        ram: Some(Ram::Bar),
        ram_offset: Some(64 << 10),
        ..IvshmemSpec::socket(&path)
    }));
    let mut listener = spec.listen("host").unwrap();
    let connector = spec.connector("driver");
    let both_have_the_same = |driver: &DriverBus, device: &DeviceBus| {
        let (ours, theirs) = (driver.common().unwrap(), device.common().unwrap());
        ours.mapping.as_ref().unwrap().ram().write(5, b"shared");
        let mut bytes = [0; 6];
        theirs.mapping.as_ref().unwrap().ram().read(5, &mut bytes);
        assert_eq!(&bytes, b"shared");
    };
    let (driver, device) = join(&mut listener, connector.clone());
    both_have_the_same(&driver, &device);
    drop((driver, device));
    drop(server);
    serve(&mut listener, Duration::from_millis(200));
    let _server = Running::start(&path);
    // Whoever is quicker finds the other in the new memory only.
    let until = Instant::now() + suite::LONG;
    while Instant::now() < until {
        let (buses, _) = serve(&mut listener, Duration::from_millis(100));
        assert!(buses.is_empty());
        if Client::connect(&path, suite::LONG).is_ok_and(|c| c.peers().count() > 0) {
            break;
        }
    }
    let (driver, device) = join(&mut listener, connector);
    both_have_the_same(&driver, &device);
}

#[test]
fn a_foreign_driver_that_comes_back_under_another_id_is_rung() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _server = Running::start(&path);
    let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec {
        layout: QueueLayout::Spsc,
        ..IvshmemSpec::socket(&path)
    }));
    let mut listener = spec.listen("host").unwrap();
    serve(&mut listener, Duration::from_millis(50));
    let connect = || Client::connect(&path, suite::LONG).unwrap();
    let first = connect();
    let memory = Mapping::of_fd(first.memory_fd(), 0, 1 << 20, Access::ReadWrite).unwrap();
    let send = |client: &Client, head: usize| {
        memory.ram().write(0x80 + head * 64, &message(7, 48));
        let next = u32::try_from(head + 1).unwrap();
        assert!(memory.device_region().write_u32(0, next));
        let (host, _) = client.peers().next().unwrap();
        client.ring(host, 0).unwrap();
    };
    send(&first, 0);
    let mut device = accept(&mut listener);
    let mut buf = [0; 64];
    recv(&mut device, &mut buf).unwrap();
    drop(first);
    let second = connect();
    send(&second, 1);
    recv(&mut device, &mut buf).unwrap();
    // News of the server are looked at with the message, if they have come by then.
    let until = Instant::now() + suite::LONG;
    while !is_readable(second.vector_fd(0).unwrap()) {
        assert!(Instant::now() < until, "it is not rung");
        let _ = device.wait(Some(Duration::from_millis(1)));
        match device.try_send(&message(9, 48)) {
            Ok(()) => device.flush().unwrap(),
            Err(error) => assert_eq!(error, ChannelError::Full),
        }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// A server by hand, with more doorbells than a client takes.
fn crowd(path: &Path) -> (UnixListener, OwnedFd, Vec<OwnedFd>) {
    let listener = UnixListener::bind(path).unwrap();
    let (_, memory) = Mapping::memfd("crowd", SIZE, false).unwrap();
    let bells = (0..3).map(|_| suite::eventfd(0)).collect();
    (listener, memory, bells)
}

fn say(stream: &UnixStream, number: i64, fd: Option<BorrowedFd<'_>>) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let bytes = number.to_le_bytes();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.unwrap_or(stream.as_fd())];
    if fd.is_some() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let sent = sendmsg(
        stream,
        &[std::io::IoSlice::new(&bytes)],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(8));
}

#[test]
fn who_is_lost_in_a_crowd_is_not_taken_for_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (server, fd, bells) = crowd(&path);
    let memory = Mapping::of_fd(fd.as_fd(), 0, SIZE, Access::ReadWrite).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = server.accept().unwrap();
        say(&stream, 0, None);
        say(&stream, 1, None);
        say(&stream, -1, Some(fd.as_fd()));
        for peer in [7, 8] {
            for _ in 0..256 {
                say(&stream, peer, Some(bells[0].as_fd()));
            }
        }
        // One more than the client takes.
        say(&stream, 9, Some(bells[1].as_fd()));
        say(&stream, 1, Some(bells[2].as_fd()));
        stream
    });
    let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec::socket(&path)));
    let mut listener = spec.listen("host").unwrap();
    let _stream = thread.join().unwrap();
    serve(&mut listener, Duration::from_millis(50));
    // The driver, which is peer 9.
    let words = memory.device_region();
    let block = 4096 - 64;
    let put = |offset: usize, word: u32| assert!(words.write_u32(block + offset, word));
    put(4, 1 | 1 << 16 | 2 << 24);
    put(8, 77);
    put(0x0c, words.read_u32(4096 - 128 + 8).unwrap());
    put(0x10, 9 | 1 << 16);
    put(0, u32::from_le_bytes(*b"VMiv"));
    let until = Instant::now() + suite::LONG;
    let mut beats = 1..;
    let mut bus = loop {
        let (mut buses, _) = serve(&mut listener, Duration::from_millis(300));
        if let Some(bus) = buses.pop() {
            break bus;
        }
        assert!(Instant::now() < until, "it has not come");
        put(0x18, beats.next().unwrap());
    };
    for beat in beats.take(4) {
        put(0x18, beat);
        let _ = bus.wait(Some(Duration::from_millis(300)));
        assert_eq!(bus.try_recv(&mut [0; 64]), Ok(None), "it is still there");
    }
}

/// Counts what is logged as a warning or worse.
struct Warnings(Arc<AtomicUsize>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_layout_that_is_wrong_in_another_way_each_time_does_not_fill_the_log() {
    let memory = Memory::new(QueueLayout::Amp);
    let count = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Warnings(Arc::clone(&count)), || {
        let connector = memory.spec().connector("driver");
        let mut connecting = connector.start().unwrap();
        let until = Instant::now() + Duration::from_secs(1);
        // Magic, then a length that is never right.
        for wrong in 100u32.. {
            if Instant::now() > until {
                break;
            }
            memory.put(4096, 0x4c4f | wrong << 16);
            assert!(connecting.advance().unwrap().is_none());
        }
    });
    let lines = count.load(Ordering::Relaxed);
    assert!((1..=3).contains(&lines), "{lines} lines");
}
