// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The whole stack in one process: a device host with its control thread and a worker, a bus over
//! a Unix socket, and drivers on the other side of it.
//!
//! Prints Markdown tables. Only ratios within one run mean anything: each repetition measures
//! floor, subject, floor, and counts only if the floor, and the time that a cache line takes
//! between the two CPUs, moved by less than 30 %. The median of at least 15 counts.
//!
//! `cargo bench -p vmsg --bench stack`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

mod driver;
#[path = "../../vmsg-net/benches/guest_tcp/mod.rs"]
mod guest_tcp;
#[path = "../../vmsg-device/benches/two_sides/mod.rs"]
mod two_sides;

use std::cell::RefCell;
use std::hint::spin_loop;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use driver::Driver;
use guest_tcp::{Amount, BATCH, Guest, SEGMENT};
use rustix::thread::{sched_getaffinity, sched_setaffinity};
use two_sides::{
    FAR_NS, Places, beside, eventfd_round_trip, line_round_trip, median, moved, run_on, time,
};
use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings, bits};
use vmsg_device::rng::Rng;
use vmsg_driver::net::NetDriver;
use vmsg_driver::rng::RngDriver;
use vmsg_driver::{BusClient, Client, DmaPool, QueueOptions, Sleep, Spin, Wait};
use vmsg_mem::spsc::{Consumer, Layout, Producer, SLOT_SIZE};
use vmsg_mem::{BusAddr, Mapping, RamSlice};
use vmsg_net::user::{User, UserConfig};

const RNG: DevNum = DevNum(0);
const NET: DevNum = DevNum(1);
/// Bytes that the entropy device is asked for.
const ENTROPY: usize = 16;
const PATIENCE: Duration = Duration::from_secs(20);
/// How long one row may take on a restless machine.
const ROW: Duration = Duration::from_secs(40);

/// How much is measured.
struct Plan {
    /// Round trips in one measurement: of things that sleep, and of things that spin.
    slow: u32,
    fast: u32,
    /// Repetitions that must count.
    enough: usize,
    copy: Amount,
}

/// A 64-byte message there and back over two bare queues, both sides polling.
fn queue_round_trip(places: &Places, rounds: u32) -> f64 {
    fn send(producer: &mut Producer<RamSlice<'_>>, message: &[u8]) {
        while producer.try_push(message).is_err() {
            spin_loop();
        }
        let _ = producer.publish();
    }
    fn receive(consumer: &mut Consumer<RamSlice<'_>>, message: &mut [u8; SLOT_SIZE]) {
        while !consumer.try_pop(message).expect("a sound queue") {
            spin_loop();
        }
        let _ = consumer.release();
    }
    let memory = || Mapping::memfd("queue", 1 << 16, true).expect("memory").0;
    let (there, back) = (memory(), memory());
    let producer = |memory| Producer::new(memory, Layout::PLAIN).expect("a sound layout");
    let consumer = |memory| Consumer::new(memory, Layout::PLAIN).expect("a sound layout");
    let (mut ask, mut asked) = (producer(there.ram()), consumer(there.ram()));
    let (mut answer, mut answered) = (producer(back.ram()), consumer(back.ram()));
    let other = move || {
        let mut message = [0; SLOT_SIZE];
        for _ in 0..rounds {
            receive(&mut asked, &mut message);
            send(&mut answer, &message);
        }
    };
    let mut message = [0; SLOT_SIZE];
    beside(places, other, || {
        time(rounds, |round| {
            let [number, ..] = round.to_le_bytes();
            send(&mut ask, &[number; SLOT_SIZE]);
            receive(&mut answered, &mut message);
        })
    })
}

/// A running device host; ends when dropped.
struct Running {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Running {
    /// A host with one worker, an entropy device and a network device with the user-mode stack.
    /// Its threads run where this one may run now.
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("bus.sock");
        let listener = Listener::bind(&path, ListenerOptions::default()).expect("a socket");
        let mut host = Host::new(1).expect("a host");
        let bus = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
            .expect("a bus");
        let settings = Settings::new(Mac(guest_tcp::MAC));
        let user = User::new(UserConfig::default()).expect("a stack");
        let net = Net::new(&settings, Box::new(user));
        host.add_device(bus, "rng0", Some(RNG.0), None, Box::new(Rng::new()))
            .expect("a device");
        host.add_device(bus, "net0", Some(NET.0), None, Box::new(net))
            .expect("a device");
        let stop = host.stop_handle();
        let thread = thread::spawn(move || host.run().expect("served"));
        Self {
            stop,
            thread: Some(thread),
            path,
            _dir: dir,
        }
    }

    fn connect(&self) -> DriverBus {
        Connector::new(&self.path, "benchmark")
            .connect()
            .expect("connected")
    }

    /// A client that waits as `wait` does.
    fn client<W: Wait<DriverBus>>(&self, wait: W) -> Client<DriverBus, W, Vec<u8>> {
        let bus = self.connect();
        let room = 2 * bus.capabilities().max_message_size;
        let mut client = Client::new(bus, wait, vec![0; room]).expect("room");
        client.set_timeout(PATIENCE);
        client
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the host panicked");
        }
    }
}

/// Measures and prints one row.
fn row(
    plan: &Plan,
    places: &Places,
    name: &str,
    target: &str,
    floor: impl Fn() -> f64,
    mut subject: impl FnMut() -> f64,
) {
    // On one CPU there is nothing between the two sides.
    let line = || match places.are_two() {
        true => line_round_trip(places, plan.fast),
        false => 1.0,
    };
    let mut samples = Vec::new();
    let mut tried = 0;
    let start = Instant::now();
    while samples.len() < plan.enough && start.elapsed() < ROW {
        tried += 1;
        let before = (line(), floor());
        let ours = subject();
        let after = (floor(), line());
        if plan.enough > 1 && (moved(before.0, after.1) || moved(before.1, after.0)) {
            continue;
        }
        samples.push((before.0, f64::midpoint(before.1, after.0), ours));
    }
    let name = format!("{name}, {}", places.name);
    if samples.is_empty() {
        println!("| {name} | – | {target} | – | – | 0 of {tried}: the machine is too restless |");
        return;
    }
    let pick =
        |value: &dyn Fn(&(f64, f64, f64)) -> f64| median(samples.iter().map(value).collect());
    let far = samples.iter().filter(|sample| sample.0 > FAR_NS).count();
    println!(
        "| {name} | {:.2} | {target} | {:.2} µs | {:.2} µs | {} of {tried}{} |",
        pick(&|sample| sample.2 / sample.1),
        pick(&|sample| sample.2 / 1e3),
        pick(&|sample| sample.1 / 1e3),
        samples.len(),
        if places.are_two() {
            format!(", {far} far")
        } else {
            String::new()
        },
    );
}

/// Round trips of messages and of requests, with the host there and the driver here.
fn round_trips(plan: &Plan, places: &Places) {
    run_on(places.there);
    let host = Running::start();
    run_on(places.here);
    let eventfds = || eventfd_round_trip(places, plan.slow);

    let mut asleep = host.client(Sleep::spinning(Duration::ZERO));
    let ping = || {
        time(plan.slow, |number| {
            asleep.ping(number).expect("answered");
        })
    };
    row(
        plan,
        places,
        "PING and answer, both asleep ÷ eventfd round trip",
        "≤ 1.05 (1.3)",
        eventfds,
        ping,
    );

    if places.are_two() {
        let mut default = host.client(Sleep::new());
        let ping = || {
            time(plan.slow, |number| {
                default.ping(number).expect("answered");
            })
        };
        row(
            plan,
            places,
            "PING and answer, driver spins 25 µs first ÷ eventfd round trip",
            "≤ 1.05 (1.3)",
            eventfds,
            ping,
        );
        let start = Instant::now();
        let clock = || {
            let nanos = start.elapsed().as_nanos();
            virtio_msg::Instant(u64::try_from(nanos).expect("not that long"))
        };
        let mut polling = host.client(Spin::new(clock));
        let ping = || {
            time(plan.slow, |number| {
                polling.ping(number).expect("answered");
            })
        };
        row(
            plan,
            places,
            "PING and answer, driver polls ÷ bare queue, both polling",
            "–",
            || queue_round_trip(places, plan.fast),
            ping,
        );
    }

    let pool = DmaPool::new("rng", BusAddr(0x1_0000_0000), 1 << 20).expect("memory");
    let mut client = host.client(Sleep::spinning(Duration::ZERO));
    pool.lend(&mut client, 1).expect("lent");
    let rng = RngDriver::new(client, RNG, &pool, &QueueOptions::default());
    let rng = RefCell::new(rng.expect("a device"));
    let request = || {
        time(plan.slow, |_| {
            let mut bytes = [0; ENTROPY];
            let filled = rng.borrow_mut().fill(&mut bytes, PATIENCE);
            filled.expect("filled");
        })
    };
    row(
        plan,
        places,
        "16 bytes of entropy: kick, device, call ÷ eventfd round trip",
        "≤ 1.05 (1.3)",
        eventfds,
        request,
    );
}

/// TCP between a driver and a socket of the host, through the network device and `backend=user`,
/// with all threads where this one may run now: `place`.
fn tcp(plan: &Plan, place: &str) {
    let host = Running::start();
    let mut client = BusClient::on_bus(host.connect());
    client.set_timeout(PATIENCE);
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 32 << 20).expect("memory");
    pool.lend(&mut client, 1).expect("lent");
    let net = NetDriver::new(client, NET, &pool, &driver::options()).expect("a device");
    let features = net.device().features();
    for bit in driver::LARGE.into_iter().chain([bits::MRG_RXBUF]) {
        assert!(features.contains(bit), "feature {bit} was not agreed on");
    }
    let mut guest = Guest::new(Driver {
        net,
        outgoing: vec![vec![1; 64 + SEGMENT]; BATCH],
        incoming: vec![0; 80 << 10],
    });
    guest_tcp::print_rows(&mut guest, place, plan.copy);
}

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let plan = if test {
        Plan {
            slow: 10,
            fast: 100,
            enough: 1,
            copy: Amount::TEST,
        }
    } else {
        Plan {
            slow: 500,
            fast: 5000,
            enough: 15,
            copy: Amount::FULL,
        }
    };
    let cpus = sched_getaffinity(None).expect("CPUs");
    let (two, one) = Places::find();
    println!("| round trip | ratio | target (floor to pass) | ours | floor | samples |");
    println!("|---|---|---|---|---|---|");
    if let Some(two) = two {
        round_trips(&plan, &two);
    }
    round_trips(&plan, &one);
    println!();
    guest_tcp::print_head("TCP through driver, bus, device and `user`, large segments");
    sched_setaffinity(None, &cpus).expect("as it was");
    tcp(&plan, "all CPUs");
    // How much work it is, where the scheduler has no say.
    run_on(one.here);
    tcp(&plan, "one CPU");
}
