// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network device on a tap interface against plain write(2) and read(2) on one.
//!
//! Each of the two has a network namespace, an interface and a process of its own: this program
//! starts itself again with unshare(1), which needs root. Prints a Markdown table; as in the other
//! benchmarks floor, subject and floor are measured in turn, and only ratios mean anything.
//!
//! `cargo bench -p vmsg --bench tap`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

mod driver;
#[path = "../../vmsg-net/benches/guest_tcp/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the floor is another here")]
mod guest_tcp;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use driver::Driver;
use guest_tcp::{BATCH, Frame, Guest, HEADERS, SEGMENT, Wire, through_guest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use virtio_msg::DevNum;
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::host::Host;
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_driver::net::NetDriver;
use vmsg_driver::{BusClient, DmaPool};
use vmsg_mem::BusAddr;
use vmsg_net::tap::{Tap, TapConfig};
use vmsg_net::{Backend, Offloads};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const NET: DevNum = DevNum(0);
const PATIENCE: Duration = Duration::from_secs(20);
/// Which of the processes this is.
const ROLE: &str = "VMSG_BENCH_TAP";
/// How long frames are counted that the host sends.
const FLOOD: Duration = Duration::from_millis(150);

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip(8)");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// An interface like the gateway that the guest's TCP talks to.
fn gateway() {
    ip("link set lo up");
    ip("tuntap add dev t0 mode tap");
    ip("link set t0 address 52:55:0a:00:02:02");
    ip(&format!("address add {HOST}/24 dev t0"));
    ip("link set t0 up");
    let mac = guest_tcp::MAC.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!(
        "neigh add {GUEST} lladdr {mac} dev t0 nud permanent"
    ));
}

fn wait_for_carrier() {
    let start = Instant::now();
    while !ip("link show t0").contains("state UP") {
        assert!(start.elapsed() < PATIENCE, "no carrier");
    }
}

/// What is measured, on either side.
trait Side: Wire {
    /// Sends `count` frames that the host's kernel throws away, of 60 bytes.
    fn send_small(&mut self, count: usize);

    /// Takes frames that have come, without looking at them; how many there were.
    fn drain(&mut self) -> usize;
}

impl<S: Side> Side for &mut S {
    fn send_small(&mut self, count: usize) {
        (**self).send_small(count);
    }

    fn drain(&mut self) -> usize {
        (**self).drain()
    }
}

/// A frame of a protocol for experiments (IEEE 802, 88b5), which nobody takes.
fn small() -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].copy_from_slice(&[0x52, 0x55, 0x0a, 0, 2, 2]);
    frame[6..12].copy_from_slice(&guest_tcp::MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// Seconds for one thing: `up BYTES`, `down BYTES`, `send FRAMES` as they are; `take` for one frame
/// of those that the host sends as fast as it can.
fn measure(side: &mut impl Side, what: &str, amount: u64) -> f64 {
    match what {
        "up" | "down" => {
            let mut guest = Guest::new(side);
            through_guest(&mut guest, HOST, amount, what == "up")
        }
        "send" => {
            let start = Instant::now();
            side.send_small(usize::try_from(amount).expect("not so many"));
            start.elapsed().as_secs_f64()
        }
        "take" => {
            let stop = AtomicBool::new(false);
            let socket = UdpSocket::bind((HOST, 0)).expect("a socket");
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        // Full: then it is lost.
                        let _ = socket.send_to(&[0; 18], (GUEST, 9));
                    }
                });
                let start = Instant::now();
                let mut count = 0;
                while start.elapsed() < FLOOD {
                    count += side.drain();
                }
                let time = start.elapsed();
                stop.store(true, Ordering::Relaxed);
                while side.drain() > 0 {}
                time.as_secs_f64() / count.max(1) as f64
            })
        }
        other => unreachable!("{other}"),
    }
}

/// Plain system calls on the interface, one for each frame.
struct Plain {
    fd: OwnedFd,
    /// Sees to offloads and the carrier.
    _tap: Tap,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

/// Bytes of the header before each frame.
const HEADER: usize = 12;

impl Plain {
    fn new() -> Self {
        let config = TapConfig {
            ifname: "t0".to_owned(),
            ..TapConfig::default()
        };
        let fd = config.join().expect("an interface").remove(0);
        let mut tap = Tap::open(&TapConfig {
            fds: vec![fd.as_raw_fd()],
            ..TapConfig::default()
        })
        .expect("the same interface");
        tap.set_guest(&vmsg_net::Guest {
            offloads: Offloads::ALL,
            running: true,
            ..vmsg_net::Guest::NONE
        });
        wait_for_carrier();
        Self {
            fd,
            _tap: tap,
            outgoing: vec![1; HEADER + 64 + SEGMENT],
            incoming: vec![0; 80 << 10],
        }
    }

    fn write(&self, bytes: &[u8]) {
        let len = rustix::io::write(&self.fd, bytes).expect("taken");
        assert_eq!(len, bytes.len());
    }

    /// The next frame, if there is one.
    fn read(&mut self) -> Option<usize> {
        match rustix::io::read(&self.fd, self.incoming.as_mut_slice()) {
            Ok(len) => Some(len),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn wait(&self) {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll");
    }
}

impl Wire for Plain {
    fn send(&mut self, frames: &[Frame]) {
        for frame in frames {
            let head = frame.head();
            let vnet = frame.vnet.to_bytes();
            self.outgoing[..vnet.len()].copy_from_slice(&vnet);
            self.outgoing[vnet.len()..HEADER].fill(0);
            self.outgoing[HEADER..HEADER + head.len()].copy_from_slice(head);
            self.write(&self.outgoing[..HEADER + head.len() + frame.payload]);
        }
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS])) {
        let mut any = false;
        for _ in 0..64 {
            if self.read().is_none() {
                break;
            }
            any = true;
            each(self.incoming[HEADER..].first_chunk().expect("room"));
        }
        if !any {
            self.wait();
        }
    }
}

impl Side for Plain {
    fn send_small(&mut self, count: usize) {
        let mut bytes = [0; HEADER + 60];
        bytes[HEADER..].copy_from_slice(&small());
        for _ in 0..count {
            self.write(&bytes);
        }
    }

    fn drain(&mut self) -> usize {
        let mut count = 0;
        while count < 64 && self.read().is_some() {
            count += 1;
        }
        if count == 0 {
            self.wait();
        }
        count
    }
}

impl Side for Driver<'_> {
    fn send_small(&mut self, count: usize) {
        let frame = small();
        let mut sent = 0;
        while sent < count {
            let most = (count - sent).min(64);
            let frames = std::iter::repeat_n(frame.as_slice(), most);
            let taken = self.net.transmit(frames).expect("sent");
            sent += taken;
            if taken == 0 {
                self.net.wait_sent(PATIENCE).expect("a live device");
            }
        }
        while self.net.in_flight().expect("a sound queue") > 0 {
            self.net.wait_sent(PATIENCE).expect("a live device");
        }
    }

    fn drain(&mut self) -> usize {
        let incoming = &mut self.incoming;
        let count = self.net.receive(64, |frame| {
            frame.copy_to(incoming);
        });
        let count = count.expect("a sound queue");
        if count == 0 {
            let timeout = Duration::from_millis(5);
            self.net.wait(timeout).expect("a live device");
        }
        count
    }
}

/// The process of the floor: answers lines `WHAT AMOUNT` with seconds.
fn floor() {
    gateway();
    let mut plain = Plain::new();
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let (what, amount) = line.split_once(' ').expect("two words");
        println!(
            "{}",
            measure(&mut plain, what, amount.parse().expect("a number"))
        );
    }
}

/// How much is measured.
struct Plan {
    bytes: u64,
    frames: u64,
    /// Repetitions that must count, and after which a restless machine is given up.
    enough: usize,
    tries: usize,
}

fn moved(one: f64, two: f64) -> bool {
    one.max(two) > one.min(two) * 1.3
}

/// Measures and prints all rows.
fn rows(plan: &Plan, side: &mut impl Side, mut floor: impl FnMut(&str, u64) -> f64) {
    println!("| device on a tap interface | ours | plain read and write | ratio | repetitions |");
    println!("|---|---|---|---|---|");
    for (name, what, amount, unit) in [
        (
            "TCP in large segments, guest to host",
            "up",
            plan.bytes,
            "Gb/s",
        ),
        (
            "TCP in large segments, host to guest",
            "down",
            plan.bytes,
            "Gb/s",
        ),
        (
            "frames of 60 bytes, guest to host",
            "send",
            plan.frames,
            "M/s",
        ),
        (
            "frames of 60 bytes, host to guest under a flood",
            "take",
            1,
            "M/s",
        ),
    ] {
        let mut kept = Vec::new();
        let mut tried = 0;
        while kept.len() < plan.enough && tried < plan.tries {
            tried += 1;
            let before = floor(what, amount);
            let ours = measure(side, what, amount);
            let after = floor(what, amount);
            if plan.tries == 1 || !moved(before, after) {
                let floor = f64::midpoint(before, after);
                kept.push((floor / ours, ours, floor));
            }
        }
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some((ratio, ours, floor)) = kept.get(kept.len() / 2) else {
            println!("| {name} | – | – | – | 0 of {tried}: the machine is too restless |");
            continue;
        };
        let rate = |seconds: f64| match unit {
            "Gb/s" => amount as f64 * 8e-9 / seconds,
            _ => amount as f64 * 1e-6 / seconds,
        };
        println!(
            "| {name} | {:.2} {unit} | {:.2} {unit} | {ratio:.2} | {} of {tried} |",
            rate(*ours),
            rate(*floor),
            kept.len()
        );
    }
}

/// The process of the device.
fn subject(plan: &Plan) {
    let mut child = again("floor")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the floor");
    let mut ask = child.stdin.take().expect("piped");
    let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut answer = move || answers.next().expect("an answer").expect("a line");
    assert_eq!(answer(), "ready");

    gateway();
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("bus.sock");
    let listener = Listener::bind(&path, ListenerOptions::default()).expect("a socket");
    let mut host = Host::new(1).expect("a host");
    let bus = host
        .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
        .expect("a bus");
    let tap = Tap::open(&TapConfig {
        ifname: "t0".to_owned(),
        ..TapConfig::default()
    })
    .expect("an interface");
    let net = Net::new(&Settings::new(Mac(guest_tcp::MAC)), Box::new(tap));
    host.add_device(bus, "net0", Some(NET.0), None, Box::new(net))
        .expect("a device");
    let stop = host.stop_handle();
    let server = thread::spawn(move || host.run().expect("served"));

    let connected = Connector::new(&path, "benchmark").connect();
    let mut client = BusClient::on_bus(connected.expect("connected"));
    client.set_timeout(PATIENCE);
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 32 << 20).expect("memory");
    pool.lend(&mut client, 1).expect("lent");
    let net = NetDriver::new(client, NET, &pool, &driver::options()).expect("a device");
    wait_for_carrier();
    let mut driver = Driver {
        net,
        outgoing: vec![vec![1; 64 + SEGMENT]; BATCH],
        incoming: vec![0; 80 << 10],
    };
    rows(plan, &mut driver, |what, amount| {
        writeln!(ask, "{what} {amount}").expect("asked");
        answer().parse().expect("seconds")
    });
    drop(driver);
    stop.stop();
    server.join().expect("the host's thread");
    let _ = child.kill();
    let _ = child.wait();
}

/// This program in another network namespace.
fn again(role: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .arg("-n")
        .arg(std::env::current_exe().expect("this program"))
        .args(std::env::args_os().skip(1))
        .env(ROLE, role);
    command
}

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let plan = if test {
        Plan {
            bytes: 4 << 20,
            frames: 1000,
            enough: 1,
            tries: 1,
        }
    } else {
        Plan {
            bytes: 192 << 20,
            frames: 200_000,
            enough: 15,
            tries: 40,
        }
    };
    match std::env::var(ROLE).as_deref() {
        Ok("floor") => floor(),
        Ok(_) => subject(&plan),
        Err(_) => {
            let possible = Command::new("unshare").args(["-n", "true"]).status();
            if !possible.is_ok_and(|status| status.success()) {
                println!("skipped: it takes root and unshare(1) to make network namespaces");
                return;
            }
            let status = again("subject").status().expect("started");
            assert!(status.success(), "failed in its network namespace");
        }
    }
}
