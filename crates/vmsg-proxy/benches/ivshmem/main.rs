// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem` between two processes of one machine: doorbells, messages, what it costs when nothing happens.
//!
//! Prints Markdown tables; only ratios within one run mean anything.
//!
//! `cargo bench -p vmsg-proxy --bench ivshmem`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

mod idle;
#[path = "../vfio_user/measure.rs"]
#[allow(dead_code, reason = "shared with others, who use the rest")]
mod measure;
mod other;
mod rate;
mod trips;

use ivshmem::server::{Options, Port, Server};
use measure::{Places, Plan, head};
use rustix::thread::{CpuSet, sched_getaffinity};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmsg_bus::{BusSpec, ConnectError, DriverBus};
use vmsg_mem::Doorbell;

/// Doorbell vectors of each peer.
const VECTORS: u16 = 1;
const PATIENCE: Duration = Duration::from_secs(20);

/// Where all that two processes share is, and a server for ivshmem.
struct Site {
    dir: tempfile::TempDir,
    stop: Doorbell,
    thread: Option<JoinHandle<()>>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a folder");
        let port = Port::new(dir.path().join("server"), VECTORS);
        let mut server = Server::bind(Options::new(vec![port], 1 << 20)).expect("a server");
        let stop = Doorbell::new().expect("an eventfd");
        let stopped = stop.try_clone().expect("an eventfd");
        let thread = std::thread::spawn(move || {
            let stopped = stopped.eventfd().expect("an eventfd");
            server.run(stopped).expect("served");
        });
        Self {
            dir,
            stop,
            thread: Some(thread),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("server")
    }

    fn unix(&self, name: &str) -> String {
        format!("unix,path={}", self.path(name).display())
    }

    /// A bus in the server's memory.
    fn ivshmem(&self, layout: &str, offset: u32) -> String {
        let socket = self.socket();
        format!(
            "ivshmem,socket={},layout={layout},offset={offset}",
            socket.display()
        )
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.ring().expect("an eventfd");
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the server panicked"
            );
        }
    }
}

/// Asleep until there is something to read, or it is time to look.
fn wait_for(fd: BorrowedFd<'_>) {
    other::readable(fd, Duration::from_millis(100));
}

/// The driver's end, once the other process is there.
fn connect(bus: &BusSpec) -> DriverBus {
    let connector = bus.connector("benchmark");
    let until = Instant::now() + PATIENCE;
    loop {
        match connector.connect() {
            Ok(bus) => return bus,
            Err(ConnectError::NotThere { .. } | ConnectError::NotYet { .. })
                if Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// The same from its text.
fn connect_to(bus: &str) -> DriverBus {
    connect(&bus.parse().expect("a bus"))
}

fn file(path: &Path, len: u64) {
    let file = std::fs::File::create(path).expect("a file");
    file.set_len(len).expect("room");
}

fn main() {
    other::be_if_told();
    let test = std::env::args().any(|arg| arg == "--test");
    let plan = if test {
        Plan {
            round_trips: 10,
            requests: 1000,
            enough: 1,
        }
    } else {
        Plan {
            round_trips: 500,
            requests: 50_000,
            enough: 15,
        }
    };
    let cpus: CpuSet = sched_getaffinity(None).expect("CPUs");
    let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu));
    let first = usable.next().expect("this thread runs somewhere");
    let one = Places::new("one CPU", first, first);
    let two = usable.next();
    let two = two.map(|second| Places::new("two CPUs", first, second));
    let site = Site::new();
    head("there and back between two processes, both asleep");
    for places in two.iter().chain([&one]) {
        trips::asleep(plan, places, &site);
    }
    println!();
    if let Some(two) = &two {
        head("there and back between two processes, both polling");
        trips::polling(plan, two, &site);
        println!();
        head("64 bytes one way between two threads, no system calls");
        rate::queues(plan, two);
        println!();
        head("messages of 16 bytes one way between two processes, receiver polling");
        rate::buses(plan, two, &site);
        println!();
    }
    measure::run_on(&cpus);
    idle::table(&site, &cpus, if test { 1 } else { 10 });
}
