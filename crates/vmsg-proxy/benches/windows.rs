// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a window costs that comes and goes, as a vIOMMU makes them: from the front's call to the device host's acknowledgement, over the `unix`
//! bus, against a PING of the same host in the same run. `cargo bench -p vmsg-proxy --bench windows`

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_msg::DevNum;
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::host::Host;
use vmsg_device::rng::Rng;
use vmsg_driver::{BusClient, Client};
use vmsg_mem::Mapping;
use vmsg_proxy::link::{Link, SessionHandle, Source};
use vmsg_proxy::session::{FileId, Op, Options, Session, Target, Window};

const PAGE: u64 = 0x1000;
const RAM: u64 = 1 << 30;
/// Calls of a kind before the others have their turn, and how often.
const RUN: u32 = 500;
const TURNS: u32 = 10;

struct Ram {
    fd: Arc<OwnedFd>,
    file: FileId,
}

impl Ram {
    fn page(&self, base: u64, page: u64) -> Window {
        Window {
            base,
            len: PAGE,
            file_offset: page * PAGE % RAM,
            writable: true,
            fd: Arc::clone(&self.fd),
            file: self.file,
        }
    }
}

fn change(handle: &SessionHandle, remove: Vec<u64>, add: Vec<Window>) {
    let change = Op::ChangeWindows { remove, add };
    handle.call(change).expect("a change that can be");
}

/// Where the windows that stay are: every second page, in no order of the file, so that none are neighbours.
fn fill(handle: &SessionHandle, ram: &Ram, from: u64, to: u64) {
    let at = |i: u64| ram.page(0x10_0000_0000 + i * 2 * PAGE, i * 7919);
    change(handle, Vec::new(), (from..to).map(at).collect());
}

fn micros(time: Duration, calls: u32) -> f64 {
    time.as_secs_f64() * 1e6 / f64::from(calls)
}

fn measure(handle: &SessionHandle, client: &mut BusClient, ram: &Ram, windows: u64) {
    let (mut ping, mut pair, mut both) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let place = 0x10_0000_0000 + windows * PAGE + PAGE;
    for _ in 0..TURNS {
        let begin = Instant::now();
        for _ in 0..RUN {
            client.ping(7).expect("answered");
        }
        ping += begin.elapsed();
        let begin = Instant::now();
        for i in 0..RUN {
            change(handle, Vec::new(), vec![ram.page(place, u64::from(i))]);
            change(handle, vec![place], Vec::new());
        }
        pair += begin.elapsed();
        let begin = Instant::now();
        change(handle, Vec::new(), vec![ram.page(place, 0)]);
        for i in 0..RUN {
            change(handle, vec![place], vec![ram.page(place, u64::from(i))]);
        }
        change(handle, vec![place], Vec::new());
        both += begin.elapsed();
    }
    let ping = micros(ping, RUN * TURNS);
    let one = micros(pair, 2 * RUN * TURNS);
    let both = micros(both, RUN * TURNS);
    println!(
        "{windows:6} windows: PING {ping:.1} µs; one window more or less {one:.1} µs, {:.2} PING; one for another {both:.1} µs, {:.2} PING",
        one / ping,
        both / ping
    );
}

fn main() {
    let dir = tempfile::tempdir().expect("a folder");
    let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
    let listener = bus.listen("bench host").expect("a socket");
    let mut host = Host::new(1).expect("a host");
    let index = host
        .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
        .expect("a bus");
    host.add_device(index, "rng0", Some(1), None, Box::new(Rng::new()))
        .expect("a device");
    let stop = host.stop_handle();
    let thread = std::thread::spawn(move || host.run().expect("a running host"));
    let connector = bus.connector("bench");
    let mut client = Client::on_bus(connector.connect().expect("a connection"));
    let connector = bus.connector("bench");
    let session = Session::new(Target::Number(DevNum(1)), Options::default());
    let link = Link::start("bench", session, Source::Bus(connector)).expect("a link");
    let handle = link.handle();
    handle.call(Op::Describe).expect("the device");
    handle.call(Op::Claim).expect("nobody else has it");
    let fd = Mapping::memfd("ram", RAM, true).expect("memory").1;
    let stat = rustix::fs::fstat(&fd).expect("a file");
    let ram = Ram {
        file: FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        fd: Arc::new(fd),
    };
    let mut there = 0;
    for windows in [1, 1000, 16_000] {
        let begin = Instant::now();
        fill(&handle, &ram, there, windows);
        let time = begin.elapsed();
        let added = windows - there;
        println!(
            "{added} windows lent in one change: {:.1} ms",
            time.as_secs_f64() * 1e3
        );
        there = windows;
        measure(&handle, &mut client, &ram, windows);
    }
    drop(link);
    drop(client);
    stop.stop();
    thread.join().expect("a host that ends");
}
