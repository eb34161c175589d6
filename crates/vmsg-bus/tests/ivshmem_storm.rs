// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem` while somebody rewrites all of its memory and rings at full speed: nothing panics, nobody waits for ever, and
//! when the storm is over the two come together.
#![cfg(feature = "ivshmem")]

#[allow(dead_code, unused_macros)]
mod suite;

use ivshmem::server::{Options, Port, Server};
use ivshmem::{Client, PeerId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use suite::{driver_recv, message, number, recv};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::ivshmem::QueueLayout;
use vmsg_bus::{BusSpec, Connecting, Connector, DeviceBus, DriverBus, IvshmemSpec, Listener};
use vmsg_mem::{Access, Doorbell, Mapping};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn word(&mut self) -> u32 {
        match self.below(6) {
            0 => 0,
            1 => u32::from_le_bytes(*b"VMiv"),
            2 => u32::try_from(self.below(64)).unwrap(),
            3 => 0x514f | u32::try_from(self.below(6)).unwrap() << 16,
            4 => u32::try_from(self.below(64) << 16 | self.below(64)).unwrap(),
            _ => u32::try_from(self.next() >> 32).unwrap(),
        }
    }
}

/// Where words are that mean something.
fn places(layout: QueueLayout) -> Vec<usize> {
    let words = |begin: usize, len: usize| (begin..begin + len).step_by(4);
    match layout {
        QueueLayout::Amp => words(4096 - 128, 128 + 64 + 128 + 256).collect(),
        _ => words(0, 192).chain(words(4096, 192)).collect(),
    }
}

struct Storm {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Storm {
    /// As a client of the server: all of the memory, and everybody's doorbells.
    fn begin(path: PathBuf, layout: QueueLayout, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&stop);
        let client = Client::connect(path, suite::LONG).unwrap();
        let thread = std::thread::spawn(move || storm(client, layout, seed, &ends));
        let thread = Some(thread);
        Self { stop, thread }
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn storm(mut client: Client, layout: QueueLayout, seed: u64, stop: &AtomicBool) {
    let memory = Mapping::of_fd(client.memory_fd(), 0, 1 << 20, Access::ReadWrite).unwrap();
    let words = memory.device_region();
    let places = places(layout);
    let mut random = Random(seed);
    while !stop.load(Ordering::Acquire) {
        match random.below(32) {
            0 => {
                // Something from elsewhere: the other epoch, an index.
                let from = places[random.below(places.len())];
                let to = places[random.below(places.len())];
                assert!(words.write_u32(to, words.read_u32(from).unwrap()));
            }
            1 => {
                client.poll();
                let peers: Vec<(PeerId, u16)> = client.peers().collect();
                for (peer, vectors) in peers {
                    let _ = client.ring(peer, u16::try_from(random.below(4)).unwrap() % vectors);
                }
            }
            // A moment in which something can come about.
            2 if random.below(8) == 0 => std::thread::sleep(Duration::from_millis(2)),
            _ => {
                let to = places[random.below(places.len())];
                assert!(words.write_u32(to, random.word()));
            }
        }
    }
    // It leaves nothing that stands still half done.
    for place in places {
        assert!(words.write_u32(place, 0));
    }
}

fn server(path: &Path) -> (Doorbell, std::thread::JoinHandle<()>) {
    let mut server = Server::bind(Options::new(vec![Port::new(path, 3)], 1 << 20)).unwrap();
    let stop = Doorbell::new().unwrap();
    let stopped = stop.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        server.run(stopped.eventfd().unwrap()).unwrap();
    });
    (stop, thread)
}

fn pause(fds: &[BorrowedFd<'_>], millis: i64) {
    let moment = Timespec {
        tv_sec: 0,
        tv_nsec: millis * 1_000_000,
    };
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    poll(&mut fds, Some(&moment)).unwrap();
}

/// Both ends in one thread, as reactors have them.
struct Ends {
    listener: Listener,
    connector: Connector,
    connecting: Option<Connecting>,
    driver: Option<DriverBus>,
    device: Option<DeviceBus>,
    connected: (usize, usize),
    slowest: Duration,
}

impl Ends {
    fn new(spec: &BusSpec) -> Self {
        Self {
            listener: spec.listen("host").unwrap(),
            connector: spec.connector("driver"),
            connecting: None,
            driver: None,
            device: None,
            connected: (0, 0),
            slowest: Duration::ZERO,
        }
    }

    fn turn(&mut self, with_driver: bool) {
        let begin = Instant::now();
        let mut buf = vec![0; 1 << 16];
        if let Ok(Some(bus)) = self.listener.accept(Instant::now()) {
            self.device = Some(bus);
            self.connected.0 += 1;
        }
        if with_driver && self.driver.is_none() {
            let connecting = match self.connecting.take() {
                Some(connecting) => Ok(connecting),
                None => self.connector.start(),
            };
            if let Ok(mut connecting) = connecting {
                match connecting.advance() {
                    Ok(None) => self.connecting = Some(connecting),
                    Ok(Some(bus)) => {
                        self.driver = Some(bus);
                        self.connected.1 += 1;
                    }
                    Err(_) => {}
                }
            }
        }
        if let Some(bus) = &mut self.driver
            && use_it(bus, &mut buf).is_err()
        {
            self.driver = None;
        }
        if let Some(bus) = &mut self.device
            && use_it(bus, &mut buf).is_err()
        {
            self.device = None;
        }
        self.slowest = self.slowest.max(begin.elapsed());
    }

    fn are_together(&mut self) -> bool {
        let (Some(driver), Some(device)) = (&mut self.driver, &mut self.device) else {
            return false;
        };
        let mut talk = || -> Result<bool, ChannelError> {
            let mut buf = [0; 64];
            driver.try_send(&message(4711, 48))?;
            driver.flush()?;
            // What was said before comes first.
            for _ in 0..100 {
                if device.try_recv(&mut buf)?.is_some() && number(&buf) == 4711 {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        talk() == Ok(true)
    }
}

/// Sends and receives for a turn.
fn use_it<B: Channel + Bus>(bus: &mut B, buf: &mut [u8]) -> Result<(), ChannelError> {
    for _ in 0..16 {
        match bus.try_recv(buf)? {
            Some(_) => {}
            None if bus.sleeps() => break,
            None => {}
        }
    }
    match bus.try_send(&message(1, 48)) {
        Ok(()) | Err(ChannelError::Full | ChannelError::TooLong) => {}
        Err(error) => return Err(error),
    }
    bus.flush()
}

trait Bus {
    fn sleeps(&mut self) -> bool;
}

impl Bus for DriverBus {
    fn sleeps(&mut self) -> bool {
        self.arm()
    }
}

impl Bus for DeviceBus {
    fn sleeps(&mut self) -> bool {
        self.arm()
    }
}

fn weather(layout: QueueLayout, with_driver: bool, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (stop, thread) = server(&path);
    let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec {
        layout,
        ..IvshmemSpec::socket(&path)
    }));
    let mut ends = Ends::new(&spec);
    let storm = Storm::begin(path, layout, seed);
    let until = Instant::now() + Duration::from_millis(1500);
    while Instant::now() < until {
        ends.turn(with_driver);
        pause(&[ends.listener.as_fd()], 1);
    }
    drop(storm);
    assert!(
        ends.slowest < Duration::from_secs(5),
        "held up for {:?}",
        ends.slowest
    );
    // Calm.
    let until = Instant::now() + suite::LONG;
    while !ends.are_together() {
        assert!(
            Instant::now() < until,
            "never together after {:?}",
            ends.connected
        );
        ends.turn(true);
        pause(&[ends.listener.as_fd()], 5);
    }
    drop(ends);
    stop.ring().unwrap();
    thread.join().unwrap();
}

#[test]
fn amp_between_two_of_ours() {
    for seed in 0..3 {
        weather(QueueLayout::Amp, true, seed);
    }
}

#[test]
fn pages_between_two_of_ours() {
    for seed in 0..3 {
        weather(QueueLayout::Spsc, true, seed);
    }
}

#[test]
fn amp_with_somebody_foreign() {
    for seed in 10..13 {
        weather(QueueLayout::Amp, false, seed);
    }
}

#[test]
fn pages_with_somebody_foreign() {
    for seed in 10..13 {
        weather(QueueLayout::Spsc, false, seed);
    }
}

#[test]
fn doorbells_that_were_rung_and_filled_do_not_keep_anybody_awake() {
    for layout in [QueueLayout::Amp, QueueLayout::Spsc] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (stop, thread) = server(&path);
        let spec = BusSpec::Ivshmem(Box::new(IvshmemSpec {
            layout,
            ..IvshmemSpec::socket(&path)
        }));
        let mut listener = spec.listen("host").unwrap();
        // Nobody is there, but rings.
        let client = Client::connect(&path, suite::LONG).unwrap();
        let host = client.peers().next().unwrap().0;
        let fill = |vector| {
            let bell = client.bell(host, vector).unwrap();
            let fd = bell.eventfd().unwrap();
            let flags = rustix::fs::fcntl_getfl(fd).unwrap();
            rustix::fs::fcntl_setfl(fd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
            // Never blocks: nobody else has rung so often.
            let mut count = [0; 8];
            let _ = bell.ring();
            rustix::io::read(fd, &mut count).unwrap();
            rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        };
        fill(0);
        let until = Instant::now() + Duration::from_secs(1);
        let mut turns = 0;
        while Instant::now() < until {
            assert!(listener.accept(Instant::now()).unwrap().is_none());
            pause(&[listener.as_fd()], 200);
            turns += 1;
        }
        assert!(turns < 50, "{turns} turns in a second");
        // And with a connection.
        let connector = spec.connector("driver");
        let driver = std::thread::spawn(move || connector.connect().unwrap());
        let mut device = suite::accept(&mut listener);
        let mut driver = driver.join().unwrap();
        for vector in 0..3 {
            fill(vector);
        }
        let mut turns = 0;
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            device.clear_poll_fd().unwrap();
            while !device.arm() {
                assert_eq!(device.try_recv(&mut [0; 64]), Ok(None));
            }
            let fd = device.poll_fd().unwrap();
            pause(&[fd], 200);
            turns += 1;
        }
        assert!(turns < 50, "{turns} turns in a second");
        // The driver's own rings only find it full: messages go all the same.
        let mut buf = [0; 64];
        driver.try_send(&message(5, 48)).unwrap();
        let _ = driver.flush();
        recv(&mut device, &mut buf).unwrap();
        device.try_send(&message(6, 48)).unwrap();
        device.flush().unwrap();
        driver_recv(&mut driver, &mut buf).unwrap();
        assert_eq!(number(&buf), 6);
        drop((driver, device, listener));
        stop.ring().unwrap();
        thread.join().unwrap();
    }
}
