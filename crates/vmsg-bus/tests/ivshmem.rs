// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem` over a server and over a plain file: who comes, goes and comes again.
#![cfg(feature = "ivshmem")]

#[allow(dead_code, unused_macros)]
mod suite;

use ivshmem::server::{Options, Port, Server, Source};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use suite::{accept, driver_recv, message, number, recv};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::ivshmem::{MemoryMode, QueueLayout, Ram};
use vmsg_bus::{
    BusSpec, ConnectError, Connecting, Connector, DeviceBus, DriverBus, IvshmemSpec, Listener,
};
use vmsg_mem::Doorbell;

/// A server in a thread.
struct Running {
    stop: Doorbell,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(path: &Path) -> Self {
        Self::with(Options::new(vec![Port::new(path, 3)], 1 << 20))
    }

    fn with(options: Options) -> Self {
        let mut server = Server::bind(options).unwrap();
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

struct Site {
    server: Option<Running>,
    dir: tempfile::TempDir,
    layout: QueueLayout,
}

impl Site {
    fn new(layout: QueueLayout) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = Some(Running::start(&dir.path().join("s")));
        Self {
            server,
            dir,
            layout,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn spec(&self) -> IvshmemSpec {
        IvshmemSpec {
            layout: self.layout,
            ..IvshmemSpec::socket(self.path())
        }
    }

    fn listener(&self) -> Listener {
        BusSpec::Ivshmem(Box::new(self.spec()))
            .listen("host")
            .unwrap()
    }

    fn connector(&self, name: &str) -> Connector {
        let bus = BusSpec::Ivshmem(Box::new(self.spec()));
        bus.connector(name).timeout(suite::LONG)
    }

    fn join(&self, listener: &mut Listener) -> (DriverBus, DeviceBus) {
        let connector = self.connector("driver");
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(listener);
        (driver.join().unwrap(), device)
    }
}

fn talk(driver: &mut DriverBus, device: &mut DeviceBus) {
    let mut buf = [0; 64];
    for n in 0..100 {
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

const LAYOUTS: [QueueLayout; 2] = [QueueLayout::Amp, QueueLayout::Spsc];

#[test]
fn one_driver_after_another_finds_the_same_host() {
    for layout in LAYOUTS {
        let site = Site::new(layout);
        let mut listener = site.listener();
        let mut epochs = Vec::new();
        for _ in 0..3 {
            let (mut driver, mut device) = site.join(&mut listener);
            talk(&mut driver, &mut device);
            epochs.push(driver.epoch());
            assert_eq!((driver.peer_name(), device.peer_name()), ("host", "driver"));
            drop(driver);
            assert_eq!(recv(&mut device, &mut [0; 64]), Err(ChannelError::Closed));
        }
        assert!(epochs.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn a_driver_that_comes_first_is_found_by_every_new_host() {
    for layout in LAYOUTS {
        let site = Site::new(layout);
        let connector = site.connector("driver");
        let mut epochs = Vec::new();
        for _ in 0..3 {
            let first = connector.clone();
            let driver = std::thread::spawn(move || first.connect().unwrap());
            let mut listener = site.listener();
            let mut device = accept(&mut listener);
            let mut driver = driver.join().unwrap();
            talk(&mut driver, &mut device);
            epochs.push(driver.epoch());
            drop((device, listener));
            assert_eq!(
                driver_recv(&mut driver, &mut [0; 64]),
                Err(ChannelError::Closed)
            );
        }
        epochs.dedup();
        assert_eq!(epochs.len(), 3, "each start of a host is another");
    }
}

#[test]
fn a_second_driver_is_refused_with_the_name_of_the_first() {
    let site = Site::new(QueueLayout::Amp);
    let mut listener = site.listener();
    let (mut driver, mut device) = site.join(&mut listener);
    // The first one shows that it lives as long as somebody uses it.
    let second = site.connector("second");
    let refused = std::thread::spawn(move || second.connect());
    let until = Instant::now() + suite::LONG;
    while !refused.is_finished() && Instant::now() < until {
        let _ = driver.wait(Some(Duration::from_millis(50)));
        let _ = device.wait(Some(Duration::from_millis(50)));
    }
    match refused.join().unwrap() {
        Err(ConnectError::Held { holder, .. }) => assert!(holder.contains("driver"), "{holder}"),
        other => panic!("{other:?}"),
    }
    talk(&mut driver, &mut device);
}

#[test]
fn a_second_host_is_refused() {
    let site = Site::new(QueueLayout::Spsc);
    let mut listener = site.listener();
    let spec = BusSpec::Ivshmem(Box::new(site.spec()));
    let second = std::thread::spawn(move || spec.listen("second").map(drop));
    let until = Instant::now() + suite::LONG;
    while !second.is_finished() && Instant::now() < until {
        assert!(listener.accept(Instant::now()).unwrap().is_none());
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&tenth)).unwrap();
    }
    let error = second.join().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("`host`") && error.contains("offset="),
        "{error}"
    );
}

#[test]
fn without_the_server_everything_goes_on() {
    for layout in LAYOUTS {
        let mut site = Site::new(layout);
        let mut listener = site.listener();
        let connector = site.connector("driver");
        let first = connector.clone();
        let driver = std::thread::spawn(move || first.connect().unwrap());
        let mut device = accept(&mut listener);
        let mut driver = driver.join().unwrap();
        site.server = None;
        talk(&mut driver, &mut device);
        // Even another connection, in the same memory.
        drop((driver, device));
        let again = std::thread::spawn(move || connector.connect().unwrap());
        let mut device = accept(&mut listener);
        talk(&mut again.join().unwrap(), &mut device);
    }
}

#[test]
fn two_ends_of_ours_have_vectors_and_common_memory() {
    let site = Site::new(QueueLayout::Amp);
    let mode = |mode| IvshmemSpec {
        memory: Some(mode),
        ram: Some(Ram::Bar),
        ram_offset: Some(64 << 10),
        ..site.spec()
    };
    let host = BusSpec::Ivshmem(Box::new(mode(MemoryMode::Bounce)));
    let mut listener = host.listen("host").unwrap();
    let connector = BusSpec::Ivshmem(Box::new(mode(MemoryMode::Bounce))).connector("driver");
    let driver = std::thread::spawn(move || connector.connect().unwrap());
    let device = accept(&mut listener);
    let driver = driver.join().unwrap();
    assert!(driver.capabilities().has_common_views() && device.capabilities().has_common_views());
    let (ours, theirs) = (driver.common().unwrap(), device.common().unwrap());
    assert_eq!((ours.len, theirs.len), ((1 << 20) - (64 << 10), ours.len));
    ours.mapping.as_ref().unwrap().ram().write(5, b"shared");
    let mut bytes = [0; 6];
    theirs.mapping.as_ref().unwrap().ram().read(5, &mut bytes);
    assert_eq!(&bytes, b"shared");
    let (ours, theirs) = (driver.vectors().unwrap(), device.vectors().unwrap());
    assert_eq!(ours.own().collect::<Vec<_>>(), [1, 2]);
    ours.bell(2).unwrap().ring().unwrap();
    assert_eq!(suite::value(theirs.own_fd(2).unwrap()), 1);
}

#[test]
fn several_buses_lie_in_one_memory() {
    let site = Site::new(QueueLayout::Amp);
    let at = |offset| {
        BusSpec::Ivshmem(Box::new(IvshmemSpec {
            offset: Some(offset),
            ..site.spec()
        }))
    };
    let mut pairs = Vec::new();
    for offset in [4096, 16384] {
        let mut listener = at(offset).listen("host").unwrap();
        let connector = at(offset).connector("driver");
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        pairs.push((driver.join().unwrap(), device, listener));
    }
    for (driver, device, _) in &mut pairs {
        talk(driver, device);
    }
}

#[test]
fn an_end_with_doorbells_hears_one_that_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, memory) = (dir.path().join("s"), dir.path().join("memory"));
    let mut options = Options::new(vec![Port::new(&socket, 1)], 1 << 20);
    options.source = Source::File(memory.clone());
    let _server = Running::with(options);
    let bus = |spec| BusSpec::Ivshmem(Box::new(spec));
    let mut listener = bus(IvshmemSpec::file(&memory)).listen("host").unwrap();
    let connector = bus(IvshmemSpec::socket(&socket)).connector("driver");
    let driver = std::thread::spawn(move || connector.connect().unwrap());
    let mut device = accept(&mut listener);
    let mut driver = driver.join().unwrap();
    let echo = std::thread::spawn(move || {
        let mut buf = [0; 64];
        for _ in 0..50 {
            recv(&mut device, &mut buf).unwrap();
            device.try_send(&message(number(&buf), 48)).unwrap();
            device.flush().unwrap();
        }
        device
    });
    let begin = Instant::now();
    for n in 0..50 {
        driver.try_send(&message(n, 48)).unwrap();
        driver.flush().unwrap();
        let mut buf = [0; 64];
        driver_recv(&mut driver, &mut buf).unwrap();
        assert_eq!(number(&buf), n);
    }
    // Were it woken by heartbeats alone, it would take 25 s.
    assert!(begin.elapsed() < Duration::from_secs(20));
    drop(echo.join().unwrap());
}

#[test]
fn a_host_follows_to_the_memory_of_a_new_server() {
    let mut site = Site::new(QueueLayout::Amp);
    let spec = IvshmemSpec {
        memory: Some(MemoryMode::Bounce),
        ram: Some(Ram::Bar),
        ram_offset: Some(64 << 10),
        ..site.spec()
    };
    let bus = BusSpec::Ivshmem(Box::new(spec));
    let mut listener = bus.listen("host").unwrap();
    let mut files = Vec::new();
    for words in [b"before", b"behind"] {
        // One that knows nothing of the memory that was before.
        let connector = bus.connector("driver");
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let device = accept(&mut listener);
        let driver = driver.join().unwrap();
        let (ours, theirs) = (driver.common().unwrap(), device.common().unwrap());
        ours.mapping.as_ref().unwrap().ram().write(5, words);
        let mut bytes = [0; 6];
        theirs.mapping.as_ref().unwrap().ram().read(5, &mut bytes);
        assert_eq!(&bytes, words);
        files.push(ours.file.expect("it is known which it is"));
        assert_eq!(theirs.file, ours.file);
        drop((driver, device));
        site.server = None;
        site.server = Some(Running::start(&site.path()));
    }
    assert_ne!(files[0], files[1]);
}

#[test]
fn a_driver_that_waits_follows_to_a_new_server() {
    let mut site = Site::new(QueueLayout::Amp);
    let mut connecting = site.connector("driver").start().unwrap();
    let wait = |connecting: &Connecting| {
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        poll(&mut [PollFd::new(connecting, PollFlags::IN)], Some(&tenth)).unwrap();
    };
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        assert!(connecting.advance().unwrap().is_none());
        wait(&connecting);
    }
    site.server = None;
    site.server = Some(Running::start(&site.path()));
    // It can only be found there.
    let mut listener = site.listener();
    let until = Instant::now() + suite::LONG;
    let mut device = None;
    let mut driver = loop {
        assert!(Instant::now() < until, "they do not meet");
        device = device.or(listener.accept(Instant::now()).unwrap());
        match connecting.advance().unwrap() {
            Some(driver) => break driver,
            None => wait(&connecting),
        }
    };
    let mut device = device.unwrap_or_else(|| accept(&mut listener));
    talk(&mut driver, &mut device);
}

#[test]
fn a_driver_with_impossible_indices_keeps_no_other_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let memory = File::create_new(&path).unwrap();
    memory.set_len(64 << 10).unwrap();
    let spec = IvshmemSpec {
        layout: QueueLayout::Spsc,
        ..IvshmemSpec::file(&path)
    };
    let mut listener = BusSpec::Ivshmem(Box::new(spec)).listen("host").unwrap();
    let word = |offset, value: u32| memory.write_all_at(&value.to_le_bytes(), offset).unwrap();
    // What it has read of the device's page, which has 62 slots; and a message.
    word(4096 + 0x40, 1000);
    memory.write_all_at(&message(7, 48), 128).unwrap();
    word(0, 1);
    let until = Instant::now() + suite::LONG;
    while listener
        .accept(Instant::now())
        .is_ok_and(|bus| bus.is_none())
    {
        assert!(Instant::now() < until, "indices were not looked at");
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&tenth)).unwrap();
    }
    word(4096 + 0x40, 0);
    let mut device = accept(&mut listener);
    let mut buf = [0; 64];
    recv(&mut device, &mut buf).unwrap();
    assert_eq!(number(&buf), 7);
}

#[test]
fn ends_that_poll_and_never_sleep_stay_together_and_see_the_end() {
    for layout in LAYOUTS {
        let site = Site::new(layout);
        let mut listener = site.listener();
        let (mut driver, mut device) = site.join(&mut listener);
        let mut buf = [0; 64];
        // Longer than an end may show no sign of life.
        let until = Instant::now() + Duration::from_millis(3600);
        while Instant::now() < until {
            driver.try_send(&message(1, 48)).unwrap();
            driver.flush().unwrap();
            while device.try_recv(&mut buf).unwrap().is_none() {}
            assert_eq!(driver.try_recv(&mut buf), Ok(None));
        }
        // Who goes to sleep looks at once.
        assert!(device.arm() && driver.arm());
        drop(device);
        let until = Instant::now() + suite::LONG;
        while driver.try_recv(&mut buf) == Ok(None) {
            assert!(Instant::now() < until, "never told");
        }
        assert_eq!(driver.try_recv(&mut buf), Err(ChannelError::Closed));
    }
}
