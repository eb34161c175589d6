// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve` with tap interfaces and sockets, a driver on the bus, and the host's kernel at the other end. Each test runs
//! in a network namespace of its own: it starts itself again there.

#[path = "../../../vmsg-net/benches/guest_tcp/mod.rs"]
#[allow(dead_code, unused_imports, reason = "tests need its TCP only")]
mod guest_tcp;

mod flows;
#[path = "../program/mod.rs"]
mod program;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use guest_tcp::{BATCH, Frame, Guest, HEADERS, SEGMENT, Wire};
use program::Running;
use virtio_msg::{DevNum, FeatureSet};
use vmsg_bus::DriverBus;
use vmsg_bus::unix::Connector;
use vmsg_device::net::bits;
use vmsg_driver::net::{HEADER_LEN, NetDriver, NetOptions};
use vmsg_driver::{BusClient, DmaPool, Sleep};
use vmsg_mem::BusAddr;

/// Nothing takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NET: DevNum = DevNum(0);
const TOTAL: usize = 16 << 20;

/// Runs the test `name` in a network namespace of its own; true in there.
fn in_own_network(name: &str) -> bool {
    if std::env::var_os("VMSG_TEST_NETNS").is_some_and(|inside| inside == name) {
        return true;
    }
    let missing = if !std::path::Path::new("/dev/net/tun").exists() {
        Some("/dev/net/tun")
    } else {
        let possible = Command::new("unshare").args(["-n", "true"]).status();
        (!possible.is_ok_and(|status| status.success())).then_some("unshare -n")
    };
    if let Some(what) = missing {
        let required = std::env::var_os("VMSG_REQUIRE_TOOLS").is_some_and(|value| value == "1");
        assert!(!required, "missing: {what}");
        println!("skipped: missing: {what}");
        return false;
    }
    let status = Command::new("unshare")
        .arg("-n")
        .arg(std::env::current_exe().expect("this program"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env("VMSG_TEST_NETNS", name)
        .status()
        .expect("started");
    assert!(status.success(), "{name} failed in its network namespace");
    false
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip(8)");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// An interface like the gateway that the guest's TCP talks to.
fn gateway(name: &str) {
    gateway_with(name, "");
}

/// As [`gateway`], with more arguments for `ip tuntap add`.
fn gateway_with(name: &str, arguments: &str) {
    ip("link set lo up");
    ip(&format!("tuntap add dev {name} mode tap{arguments}"));
    ip(&format!("link set {name} address 52:55:0a:00:02:02"));
    ip(&format!("address add {HOST}/24 dev {name}"));
    ip(&format!("link set {name} up"));
    let mac = guest_tcp::MAC.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!(
        "neigh add 10.0.2.15 lladdr {mac} dev {name} nud permanent"
    ));
}

/// A running `vmsg serve`.
struct Serve {
    _process: Running,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Serve {
    fn start(device: &str) -> Self {
        Self::with(&["--device", device])
    }

    fn with(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bus");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmsg"));
        command
            .args(["serve", "--bus"])
            .arg(format!("unix,path={}", path.display()))
            .args(arguments);
        Self {
            _process: Running::start(&mut command),
            path,
            _dir: dir,
        }
    }

    fn connect(&self) -> BusClient {
        let bus = Connector::new(&self.path, "test")
            .connect()
            .expect("connected");
        let mut client = BusClient::on_bus(bus);
        client.set_timeout(PATIENCE);
        client
    }
}

/// Byte `at` of a stream.
fn pattern(at: u32) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]
}

/// The guest's TCP on a network driver. Says what it sends, and checks what it gets.
struct Driver<'p> {
    net: NetDriver<'p, DriverBus, Sleep, Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    incoming: Vec<u8>,
    /// Sequence number of the peer's first byte.
    first: u32,
    sent_large: u32,
    received_large: u32,
    received_partial: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(*bytes[at..].first_chunk().expect("long enough"))
}

impl Wire for Driver<'_> {
    fn send(&mut self, frames: &[Frame]) {
        for (frame, bytes) in frames.iter().zip(&mut self.outgoing) {
            let head = frame.head();
            bytes[..head.len()].copy_from_slice(head);
            // The guest's first byte has this number.
            let at = word(head, 38).wrapping_sub(0x7000_0001);
            let payload = &mut bytes[head.len()..head.len() + frame.payload];
            for (byte, at) in payload.iter_mut().zip(at..) {
                *byte = pattern(at);
            }
            self.sent_large += u32::from(frame.vnet.gso_type != 0);
        }
        let mut sent = 0;
        while sent < frames.len() {
            let rest = frames.iter().zip(&self.outgoing).skip(sent);
            let rest = rest.map(|(frame, bytes)| {
                let mut header = [0; HEADER_LEN];
                let vnet = frame.vnet.to_bytes();
                header[..vnet.len()].copy_from_slice(&vnet);
                (header, &bytes[..frame.head().len() + frame.payload])
            });
            let count = self.net.transmit_with(rest).expect("sent");
            sent += count;
            if count == 0 {
                self.net.wait_sent(PATIENCE).expect("a live device");
            }
        }
    }

    fn receive(&mut self, each: &mut dyn FnMut(&[u8; HEADERS])) {
        let Self {
            net,
            incoming,
            first,
            received_large,
            received_partial,
            ..
        } = self;
        let count = net.receive(64, |frame| {
            let header = frame.header;
            let bytes = frame.copy_to(incoming);
            let Some(head) = bytes.first_chunk::<HEADERS>() else {
                return;
            };
            if head[12..14] == [8, 0] && head[23] == 6 {
                if head[47] & 2 != 0 {
                    *first = word(head, 38).wrapping_add(1);
                }
                let start = 34 + usize::from(head[46] >> 4) * 4;
                let end = 14 + usize::from(u16::from_be_bytes([head[16], head[17]]));
                let at = word(head, 38).wrapping_sub(*first);
                for (byte, at) in bytes[start..end].iter().zip(at..) {
                    assert_eq!(*byte, pattern(at), "byte {at}");
                }
                *received_partial += u32::from(header[0] & 1 != 0);
                *received_large += u32::from(header[1] == 1);
            }
            each(head);
        });
        if count.expect("a sound queue") == 0 {
            net.wait(Duration::from_millis(5)).expect("a live device");
        }
    }
}

fn options(features: &[u32]) -> NetOptions {
    let defaults = NetOptions::default();
    NetOptions {
        buffer_len: 68 << 10,
        rx_buffer_len: Some(4096),
        features: defaults.features.union(&FeatureSet::from_bits(features)),
        ..defaults
    }
}

/// All bytes go from the guest to the host over one connection, and from the host to the guest over another.
fn there_and_back(wire: &mut Driver<'_>) {
    let mut guest = Guest::new(wire);
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let up = std::thread::spawn(move || {
        check_all(listener.accept().unwrap().0);
        listener
    });
    guest.upload(port, TOTAL as u64);
    let listener = up.join().unwrap();
    guest.hang_up(port);
    let down = std::thread::spawn(move || write_all(listener.accept().unwrap().0));
    guest.download(port, TOTAL as u64);
    guest.hang_up(port);
    down.join().unwrap();
}

fn driver<'p>(serve: &Serve, pool: &'p DmaPool, features: &[u32]) -> Driver<'p> {
    let mut client = serve.connect();
    pool.lend(&mut client, 1).expect("lent");
    let net = NetDriver::new(client, NET, pool, &options(features)).expect("a device");
    for bit in features {
        assert!(net.device().features().contains(*bit), "feature {bit}");
    }
    let begin = Instant::now();
    while !ip("link show t0").contains("state UP") {
        assert!(begin.elapsed() < PATIENCE, "no carrier");
    }
    Driver {
        net,
        outgoing: vec![vec![0; 64 + SEGMENT]; BATCH],
        incoming: vec![0; 80 << 10],
        first: 0,
        sent_large: 0,
        received_large: 0,
        received_partial: 0,
    }
}

fn check_all(mut socket: TcpStream) {
    let mut bytes = vec![0; 256 << 10];
    let mut at = 0;
    while at < TOTAL {
        let count = socket.read(&mut bytes).expect("read");
        assert!(count > 0, "closed after {at} bytes");
        for byte in &bytes[..count] {
            assert_eq!(*byte, pattern(u32::try_from(at).unwrap()), "byte {at}");
            at += 1;
        }
    }
}

fn write_all(mut socket: TcpStream) {
    let bytes: Vec<u8> = (0..u32::try_from(TOTAL).unwrap()).map(pattern).collect();
    socket.write_all(&bytes).expect("write");
    // Stays open until the other end has everything.
    let _ = socket.read(&mut [0]);
}

const LARGE: [u32; 4] = [
    bits::CSUM,
    bits::HOST_TSO4,
    bits::GUEST_CSUM,
    bits::GUEST_TSO4,
];

#[test]
fn sixteen_mebibytes_each_way_in_large_segments() {
    if !in_own_network("sixteen_mebibytes_each_way_in_large_segments") {
        return;
    }
    gateway("t0");
    let serve = Serve::start("net,backend=tap,ifname=t0");
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 64 << 20).expect("memory");
    let mut wire = driver(&serve, &pool, &LARGE);
    there_and_back(&mut wire);
    assert!(
        wire.sent_large > 200,
        "{} large frames sent",
        wire.sent_large
    );
    assert!(
        wire.received_large > 200,
        "{} large frames received",
        wire.received_large
    );
    assert!(
        wire.received_partial > 200,
        "{} partial checksums",
        wire.received_partial
    );
    let net = &mut wire.net;
    assert_eq!(net.counters().bad, 0);
}

/// A `vmsg proxy` that shows a device to who comes to `socket`, as a vhost-user back end.
fn front(serve: &Serve, socket: &Path) -> Running {
    let child = Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .args(["proxy", "--bus"])
        .arg(format!("unix,path={}", serve.path.display()))
        .arg("--front")
        .arg(format!("vhost-user,socket={},dev=0", socket.display()))
        .spawn();
    Running(child.expect("started"))
}

/// Frames that the interface `t0` has got of its other side.
fn arrived() -> u64 {
    let text = ip("-json -stats link show t0");
    let count = text
        .split_once("\"rx\":{")
        .and_then(|(_, rx)| rx.split_once("\"packets\":"))
        .and_then(|(_, rest)| rest.split([',', '}']).next());
    count.and_then(|count| count.parse().ok()).expect("a count")
}

/// Sends frames of no meaning until some come out of `t0`.
fn until_frames_arrive(wire: &mut Driver<'_>) {
    let mut frame = [0xff; 60];
    frame[6..12].copy_from_slice(&guest_tcp::MAC);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let (before, begin) = (arrived(), Instant::now());
    while arrived() == before {
        assert!(begin.elapsed() < PATIENCE, "nothing comes through");
        wire.net
            .transmit_with([([0; HEADER_LEN], &frame[..])])
            .expect("sent");
    }
}

/// The back end is the proxy of another host's device, whose back end is a tap; what stands in its way is another one of its kind.
#[test]
fn sixteen_mebibytes_each_way_through_a_vhost_user_back_end() {
    if !in_own_network("sixteen_mebibytes_each_way_through_a_vhost_user_back_end") {
        return;
    }
    gateway("t0");
    let far = Serve::start("net,backend=tap,ifname=t0");
    let socket = far.path.with_file_name("port");
    let _front = front(&far, &socket);
    let near = Serve::start(&format!("net,backend=vhost-user,path={}", socket.display()));
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 64 << 20).expect("memory");
    let mut wire = driver(&near, &pool, &LARGE);
    until_frames_arrive(&mut wire);
    there_and_back(&mut wire);
    let large = (wire.sent_large, wire.received_large);
    assert!(large.0 > 200 && large.1 > 200, "large frames: {large:?}");
    assert_eq!(wire.net.counters().bad, 0);
}

/// Asks for the hardware address of [`HOST`], again and again, until it is told.
fn until_the_host_answers(wire: &mut Driver<'_>) {
    let mut request = [0xff; 60];
    request[6..12].copy_from_slice(&guest_tcp::MAC);
    request[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request[22..28].copy_from_slice(&guest_tcp::MAC);
    request[28..32].copy_from_slice(&[10, 0, 2, 15]);
    request[38..42].copy_from_slice(&HOST.octets());
    let begin = Instant::now();
    let mut answered = false;
    while !answered {
        assert!(begin.elapsed() < PATIENCE, "no answer");
        wire.net
            .transmit_with([([0; HEADER_LEN], &request[..])])
            .expect("sent");
        wire.net
            .wait(Duration::from_millis(5))
            .expect("a live device");
        let Driver { net, incoming, .. } = wire;
        net.receive(64, |frame| {
            let bytes = frame.copy_to(incoming);
            let is_arp = bytes.get(12..14) == Some(&[8, 6]);
            answered |= is_arp && bytes[21] == 2 && bytes[28..32] == HOST.octets();
        })
        .expect("a sound queue");
    }
}

/// Guest, switch, its uplink, which is the front end of a vhost-user back end, that is started again.
#[test]
fn a_switch_reaches_the_world_through_a_vhost_user_back_end_whenever_there_is_one() {
    let name = "a_switch_reaches_the_world_through_a_vhost_user_back_end_whenever_there_is_one";
    if !in_own_network(name) {
        return;
    }
    gateway("t0");
    let far = Serve::start("net,backend=tap,ifname=t0");
    let socket = far.path.with_file_name("port");
    let uplink = format!(
        "id=up0,switch=s0,backend=vhost-user,path={}",
        socket.display()
    );
    let near = Serve::with(&[
        "--switch",
        "id=s0,allow=* <> *",
        "--device",
        "net,id=net0,switch=s0",
        "--uplink",
        &uplink,
    ]);
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 64 << 20).expect("memory");
    let before = front(&far, &socket);
    let mut wire = driver(&near, &pool, &LARGE);
    until_the_host_answers(&mut wire);
    drop(before);
    for _ in 0..2 {
        let _front = front(&far, &socket);
        until_the_host_answers(&mut wire);
    }
}

#[test]
fn the_link_follows_the_interface_and_the_carrier_the_driver() {
    if !in_own_network("the_link_follows_the_interface_and_the_carrier_the_driver") {
        return;
    }
    gateway("t0");
    ip("link set t0 mtu 9000");
    let serve = Serve::start("net,backend=tap,ifname=t0");
    assert!(ip("link show t0").contains("NO-CARRIER"));
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 64 << 20).expect("memory");
    let mut wire = driver(&serve, &pool, &[]);
    let mut mtu = [0; 2];
    wire.net.read_config(10, &mut mtu).unwrap();
    assert_eq!(u16::from_le_bytes(mtu), 9000, "the guest is told");
    link_becomes(&mut wire.net, true);
    ip("link set t0 down");
    link_becomes(&mut wire.net, false);
    ip("link set t0 up");
    link_becomes(&mut wire.net, true);
    drop(wire);
    let begin = Instant::now();
    while !ip("link show t0").contains("NO-CARRIER") {
        assert!(begin.elapsed() < PATIENCE, "a carrier without a driver");
    }
}

#[test]
fn interfaces_that_cannot_be_had_are_errors_with_their_remedy() {
    let refused = |device: &str| {
        let dir = tempfile::tempdir().unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vmsg"))
            .args(["serve", "--bus"])
            .arg(format!("unix,path={}", dir.path().join("bus").display()))
            .args(["--device", device])
            .output()
            .expect("started");
        assert!(!output.status.success(), "{device}");
        String::from_utf8(output.stderr).expect("text")
    };
    for (device, says) in [
        ("net,backend=tap,ifname=lo", "no tap interface"),
        ("net,backend=tap,ifname=much-too-long-for-one", "15 bytes"),
        (
            "net,backend=tap,fd=77",
            "fd=77: was not handed to this process",
        ),
        ("net,backend=tap,path=/x", "path= needs backend=socket"),
        ("net,backend=socket", "needs either path="),
        (
            "net,backend=socket,path=/nowhere/s,reconnect=0",
            "reconnect=",
        ),
        ("net,queues=0", "1 to 256"),
    ] {
        let text = refused(device);
        assert!(text.contains(says), "{device}: {text}");
    }
}

#[test]
fn a_socket_s_peer_comes_and_goes_with_the_guest_s_link() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer");
    let device = format!("net,backend=socket,server=on,path={}", path.display());
    let serve = Serve::start(&device);
    let mut client = serve.connect();
    let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 16 << 20).expect("memory");
    pool.lend(&mut client, 1).expect("lent");
    let mut net = NetDriver::new(client, NET, &pool, &NetOptions::default()).expect("a device");
    for round in 0..3u8 {
        let mut peer = std::os::unix::net::UnixStream::connect(&path).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        link_becomes(&mut net, true);
        peer.write_all(&[0, 0, 0, 60]).unwrap();
        peer.write_all(&[0xff; 60]).unwrap();
        assert!(net.wait(PATIENCE).unwrap());
        let mut bytes = [0; 2048];
        let mut got = 0;
        net.receive(8, |frame| got += frame.copy_to(&mut bytes).len())
            .unwrap();
        assert_eq!((got, bytes[59]), (60, 0xff));
        assert_eq!(net.transmit([[round; 77].as_slice()]).unwrap(), 1);
        let mut bytes = [0; 81];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[3..], [&[77][..], &[round; 77]].concat());
        drop(peer);
        link_becomes(&mut net, false);
    }
}

fn link_becomes(net: &mut NetDriver<'_, DriverBus, Sleep, Vec<u8>>, up: bool) {
    let begin = Instant::now();
    loop {
        let mut status = [0; 2];
        net.read_config(6, &mut status).unwrap();
        if (status[0] & 1 == 1) == up {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the link is not up={up}");
    }
}
