// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tap back end on real interfaces, each test in a network namespace of its own.

mod netns;
mod wire;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Instant;

use netns::{GUEST, HOST, config, ip, own_network, running};
use rustix::net::ipproto::ICMP;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use vmsg_net::tap::{Tap, TapConfig};
use vmsg_net::{Backend, Guest, Offloads, VnetHeader};
use wire::{Arrived, MAC, PATIENCE, Sink, World, echo_server, memory, receive, send, until};

/// An interface with [`HOST`]'s address, that knows the guest's.
fn tap(config: &TapConfig) -> Tap {
    let tap = Tap::open(config).expect("an interface");
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!(
        "neigh replace {GUEST} lladdr {mac} dev {} nud permanent",
        tap.name()
    ));
    tap
}

/// Brings the guest's driver up and waits until the host's side of the interface sends: the kernel
/// sees to that a moment after the carrier is there.
fn start(tap: &mut Tap, guest: &Guest) {
    tap.set_guest(guest);
    until(tap, "the interface is up", |tap| {
        ip(&format!("link show {}", tap.name())).contains("state UP")
    });
}

fn interface_mac(name: &str) -> [u8; 6] {
    let text = ip(&format!("-o link show {name}"));
    let mac = text.split("link/ether ").nth(1).expect("an address");
    let mut bytes = [0; 6];
    for (byte, hex) in bytes.iter_mut().zip(mac[..17].split(':')) {
        *byte = u8::from_str_radix(hex, 16).expect("hex");
    }
    bytes
}

/// A UDP datagram from the guest, with a right checksum of IPv4 and none of UDP.
fn datagram(to_mac: [u8; 6], ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&to_mac);
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    let short = |len: usize| u16::try_from(len).expect("short").to_be_bytes();
    frame.extend_from_slice(&short(28 + payload.len()));
    frame.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend_from_slice(&GUEST.octets());
    frame.extend_from_slice(&HOST.octets());
    let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&ports.0.to_be_bytes());
    frame.extend_from_slice(&ports.1.to_be_bytes());
    frame.extend_from_slice(&short(8 + payload.len()));
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(payload);
    frame
}

fn is_datagram(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0] && frame[23] == 17
}

/// Datagrams that come for the guest until there are `count`.
fn datagrams(tap: &mut Tap, size: usize, count: usize) -> Vec<Arrived> {
    let mut all = Vec::new();
    until(tap, "datagrams for the guest", |tap| {
        let new = receive(tap, size);
        all.extend(
            new.into_iter()
                .filter(|arrived| is_datagram(&arrived.frame)),
        );
        all.len() >= count
    });
    all
}

fn timeout(socket: &UdpSocket) {
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
}

#[test]
fn the_guest_pings_the_host_and_the_host_the_guest() {
    if !own_network() {
        return;
    }
    let mut world = World::new(Tap::open(&config()).unwrap(), Some(GUEST), 1500);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 2048]);
    let handle = world.sockets.add(icmp::Socket::new(buffer(), buffer()));
    let socket = world.sockets.get_mut::<icmp::Socket<'_>>(handle);
    socket.bind(icmp::Endpoint::Ident(7)).unwrap();
    let echo = Icmpv4Repr::EchoRequest {
        ident: 7,
        seq_no: 1,
        data: b"hello",
    };
    let room = socket.send(echo.buffer_len(), HOST.into()).unwrap();
    echo.emit(
        &mut Icmpv4Packet::new_unchecked(room),
        &smoltcp::phy::ChecksumCapabilities::default(),
    );
    world.run("the host answers", |world| {
        let socket = world.sockets.get_mut::<icmp::Socket<'_>>(handle);
        socket.can_recv() && socket.recv().unwrap().0.ends_with(b"hello")
    });

    // The host's kernel resolves the guest's address itself.
    ip("neigh flush dev t0");
    let pinger = socket_icmp();
    let mut request = vec![8, 0, 0, 0, 0, 9, 0, 1];
    request.extend_from_slice(b"hallo!");
    let sum = !smoltcp::wire::checksum::data(&request);
    request[2..4].copy_from_slice(&sum.to_be_bytes());
    let to = SocketAddr::from((GUEST, 0));
    sendto(&pinger, &request, SendFlags::empty(), &to).unwrap();
    world.run("the guest answers", |_| {
        let mut bytes = [0; 256];
        match recv(&pinger, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((_, len)) => bytes[20] == 0 && bytes[..len].ends_with(b"hallo!"),
            Err(_) => false,
        }
    });
    assert!(ip("neigh show dev t0").contains("52:54:00:12:34:56"));
}

fn socket_icmp() -> std::os::fd::OwnedFd {
    socket(AddressFamily::INET, SocketType::RAW, Some(ICMP)).unwrap()
}

#[test]
fn tcp_comes_back_whole() {
    if !own_network() {
        return;
    }
    let mut world = World::new(Tap::open(&config()).unwrap(), Some(GUEST), 1500);
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = echo_server(listener, 1);
    let handle = world.connect((HOST, port), 40000);
    world.echo(handle, 4 << 20);
    world
        .sockets
        .get_mut::<smoltcp::socket::tcp::Socket<'_>>(handle)
        .abort();
    world.run("gone", |world| {
        !world
            .sockets
            .get::<smoltcp::socket::tcp::Socket<'_>>(handle)
            .is_open()
    });
    world.step();
    server.join().unwrap();
    let counters = world.backend.counters();
    assert_eq!(
        (counters.tx_bad, counters.tx_refused),
        (0, 0),
        "{counters:?}"
    );
}

#[test]
fn the_carrier_is_the_driver_and_the_link_is_the_interface() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    assert!(tap.link_is_up(), "created here, so set up here");
    assert!(ip("link show t0").contains("NO-CARRIER"), "no driver yet");
    tap.set_guest(&running(Offloads::NONE));
    assert!(ip("link show t0").contains("LOWER_UP"));
    ip("link set t0 down");
    until(&mut tap, "down", |tap| !tap.link_is_up());
    // What the guest sends now goes nowhere, and does no harm.
    let mac = interface_mac("t0");
    assert!(send(
        &mut tap,
        0,
        VnetHeader::default(),
        &datagram(mac, (1, 2), b"x")
    ));
    assert_eq!(tap.counters().tx_refused, 1);
    ip("link set t0 up");
    until(&mut tap, "up", |tap| tap.link_is_up());
    tap.set_guest(&Guest::NONE);
    assert!(ip("link show t0").contains("NO-CARRIER"));
    ip("link delete t0");
    until(&mut tap, "deleted", |tap| !tap.link_is_up());
    assert!(send(&mut tap, 0, VnetHeader::default(), &[0; 60]));
    assert!(receive(&mut tap, 1514).is_empty());
    assert!(!tap.has_frames());
    tap.set_guest(&running(Offloads::NONE));
    tap.shutdown();
}

#[test]
fn frames_of_9000_bytes_go_both_ways_whatever_the_buffers() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&TapConfig {
        mtu: Some(9000),
        ..config()
    });
    assert_eq!(tap.offloads().mtu, 9000);
    assert!(ip("link show t0").contains("mtu 9000"));
    start(&mut tap, &running(Offloads::NONE));
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    timeout(&socket);
    let port = socket.local_addr().unwrap().port();
    let payload: Vec<u8> = (0..8972u32)
        .map(|i| (i * 7).to_le_bytes()[0] ^ (i >> 8).to_le_bytes()[0])
        .collect();
    let frame = datagram(interface_mac("t0"), (99, port), &payload);
    assert_eq!(frame.len(), 9014);
    assert!(send(&mut tap, 0, VnetHeader::default(), &frame));
    let mut bytes = vec![0; 10000];
    let (len, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(bytes[..len], payload);
    // Small and large in turn, into buffers of all kinds.
    for size in [1514, 2000, 9014, 70000] {
        let mut sent = Vec::new();
        for len in [8972, 10, 8972, 8972, 1472, 1473, 1, 8000] {
            socket.send_to(&payload[..len], from).unwrap();
            sent.push(payload[..len].to_vec());
        }
        let arrived = datagrams(&mut tap, size, sent.len());
        for (arrived, sent) in arrived.iter().zip(&sent) {
            assert_eq!(arrived.frame[42..], **sent, "{size}");
        }
        assert_eq!(arrived.len(), sent.len());
    }
}

#[test]
fn a_guest_without_buffers_loses_nothing_that_the_kernel_can_keep() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    start(&mut tap, &running(Offloads::NONE));
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    for number in 0..100u8 {
        socket.send_to(&[number; 100], (GUEST, 5)).unwrap();
    }
    let memory = memory(66000);
    let mut got = Vec::new();
    until(&mut tap, "all", |tap| {
        // None at all, then three.
        let mut none = Sink::new(&memory, 1514, 0);
        assert_eq!(tap.receive(Instant::now(), &mut none), 0);
        let mut few = Sink::new(&memory, 1514, 3);
        let count = tap.receive(Instant::now(), &mut few);
        assert_eq!(count, few.arrived.len());
        let frames = few.arrived.into_iter().map(|arrived| arrived.frame);
        got.extend(
            frames
                .filter(|frame| is_datagram(frame))
                .map(|frame| frame[42]),
        );
        got.len() == 100
    });
    assert_eq!(got, (0..100).collect::<Vec<u8>>());
}

#[test]
fn an_idle_interface_does_not_wake_and_a_starved_guest_is_not_woken_twice_for_a_frame() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    start(&mut tap, &running(Offloads::NONE));
    receive(&mut tap, 1514);
    until(&mut tap, "quiet", |tap| {
        receive(tap, 1514);
        !is_readable(tap)
    });
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.send_to(b"x", (GUEST, 5)).unwrap();
    assert!(is_readable(&tap));
    tap.poll(Instant::now());
    assert!(tap.has_frames());
    assert!(!is_readable(&tap), "known, but there is no room");
    assert_eq!(datagrams(&mut tap, 1514, 1).len(), 1);
}

fn is_readable(tap: &Tap) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let fd = tap.event_fd().unwrap();
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&zero),
    )
    .unwrap()
        > 0
}

#[test]
fn large_segments_and_partial_checksums_pass_only_if_agreed_on() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    let can = tap.offloads();
    assert!(
        can.csum && can.tso4 && can.tso6 && can.guest_csum && can.guest_tso4,
        "{can:?}"
    );
    let mac = interface_mac("t0");
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    timeout(&socket);
    let port = socket.local_addr().unwrap().port();

    // A checksum to be completed: the kernel believes that it is right.
    let mut partial = datagram(mac, (9, port), b"partial");
    partial[40..42].copy_from_slice(&[1, 2]);
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    start(&mut tap, &running(Offloads::NONE));
    assert!(send(&mut tap, 0, header, &partial));
    assert_eq!((tap.counters().tx_bad, tap.counters().sent), (1, 0));
    start(&mut tap, &running(Offloads::ALL));
    assert!(send(&mut tap, 0, header, &partial));
    let mut bytes = [0; 64];
    let (len, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"partial");

    // The other way: UDP checksums are left to the guest, or not.
    socket.send_to(b"answer", from).unwrap();
    let arrived = datagrams(&mut tap, 1514, 1);
    assert!(arrived[0].header.needs_csum(), "{:?}", arrived[0].header);
    assert_eq!(
        (arrived[0].header.csum_start, arrived[0].header.csum_offset),
        (34, 6)
    );
    start(&mut tap, &running(Offloads::NONE));
    socket.send_to(b"answer", from).unwrap();
    let arrived = datagrams(&mut tap, 1514, 1);
    assert_eq!(arrived[0].header, VnetHeader::default());

    // Frames on their way when the driver goes are not for the next one.
    start(&mut tap, &running(Offloads::ALL));
    for _ in 0..10 {
        socket.send_to(b"late", from).unwrap();
    }
    tap.set_guest(&Guest::NONE);
    start(&mut tap, &running(Offloads::NONE));
    assert!(
        receive(&mut tap, 1514)
            .iter()
            .all(|arrived| !is_datagram(&arrived.frame))
    );
}

#[test]
fn headers_and_lengths_that_lie_are_dropped_and_hurt_nobody() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    start(&mut tap, &running(Offloads::ALL));
    let mac = interface_mac("t0");
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    timeout(&socket);
    let port = socket.local_addr().unwrap().port();
    let good = datagram(mac, (9, port), &[3; 100]);
    let none = VnetHeader::default();
    let mut sent = 0;
    for frame in [&[][..], &good[..13], &vec![0; 70000], &vec![0; 65554]] {
        assert!(send(&mut tap, 0, none, frame));
        sent += 1;
        assert_eq!(tap.counters().tx_bad, sent, "{} bytes", frame.len());
    }
    // Just Ethernet; longer than any MTU.
    assert!(send(&mut tap, 0, none, &good[..14]));
    assert!(send(&mut tap, 0, none, &vec![0; 65553]));
    // All that a header can say, over a frame that it does not fit.
    for gso_type in [0u8, 1, 2, 3, 4, 5, 6, 0x7f, 0x80, 0x81, 0x84, 0xff] {
        for flags in [0, 1, 2, 0xff] {
            for (start, offset) in [(0, 0), (34, 16), (34, 65535), (65535, 65535), (140, 2)] {
                for (hdr_len, gso_size) in [(0, 0), (54, 1460), (65535, 65535), (142, 1)] {
                    let header = VnetHeader {
                        flags,
                        gso_type,
                        hdr_len,
                        gso_size,
                        csum_start: start,
                        csum_offset: offset,
                    };
                    assert!(send(&mut tap, 0, header, &good));
                    assert!(send(&mut tap, 0, header, &good[..14]));
                }
            }
        }
    }
    let counters = tap.counters();
    assert!(
        counters.tx_bad > 10 && counters.tx_refused > 10,
        "{counters:?}"
    );
    let mut bytes = [0; 200];
    while socket.set_nonblocking(true).is_ok() && socket.recv(&mut bytes).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    assert!(send(
        &mut tap,
        0,
        none,
        &datagram(mac, (9, port), b"still alive")
    ));
    let (len, _) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"still alive");
}

#[test]
fn flows_come_back_on_the_queue_they_are_sent_on() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&TapConfig {
        queues: 4,
        ..config()
    });
    assert_eq!(tap.queue_pairs(), 4);
    let all = Guest {
        pairs: 4,
        ..running(Offloads::NONE)
    };
    start(&mut tap, &all);
    let mac = interface_mac("t0");
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    timeout(&socket);
    let port = socket.local_addr().unwrap().port();
    let mut bytes = [0; 64];
    for round in 0..3 {
        for flow in 0..16u16 {
            let pair = flow % 4;
            assert!(send(
                &mut tap,
                pair,
                VnetHeader::default(),
                &datagram(mac, (1000 + flow, port), b"there")
            ));
            let (_, from) = socket.recv_from(&mut bytes).unwrap();
            socket.send_to(b"back", from).unwrap();
            let arrived = datagrams(&mut tap, 1514, 1);
            assert_eq!(arrived[0].pair, Some(pair), "flow {flow}, round {round}");
        }
    }
    // Fewer pairs: everything comes there, and queue numbers beyond are used modulo.
    start(&mut tap, &Guest { pairs: 2, ..all });
    for flow in 0..8u16 {
        assert!(send(
            &mut tap,
            3,
            VnetHeader::default(),
            &datagram(mac, (2000 + flow, port), b"there")
        ));
        let (_, from) = socket.recv_from(&mut bytes).unwrap();
        socket.send_to(b"back", from).unwrap();
        assert_eq!(datagrams(&mut tap, 1514, 1)[0].pair, Some(1));
    }
    // And more again, and none, and anew.
    start(&mut tap, &all);
    tap.set_guest(&Guest::NONE);
    start(&mut tap, &all);
    assert!(send(
        &mut tap,
        3,
        VnetHeader::default(),
        &datagram(mac, (3000, port), b"there")
    ));
    let (_, from) = socket.recv_from(&mut bytes).unwrap();
    socket.send_to(b"back", from).unwrap();
    assert_eq!(datagrams(&mut tap, 1514, 1)[0].pair, Some(3));
}

#[test]
fn one_queue_without_room_does_not_hold_up_the_others() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&TapConfig {
        queues: 2,
        ..config()
    });
    start(
        &mut tap,
        &Guest {
            pairs: 2,
            ..running(Offloads::NONE)
        },
    );
    let mac = interface_mac("t0");
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    timeout(&socket);
    let port = socket.local_addr().unwrap().port();
    let mut flows = Vec::new();
    for pair in 0..2 {
        assert!(send(
            &mut tap,
            pair,
            VnetHeader::default(),
            &datagram(mac, (1000 + pair, port), b"there")
        ));
        flows.push(socket.recv_from(&mut [0; 64]).unwrap().1);
    }
    for _ in 0..50 {
        socket.send_to(b"to nobody", flows[0]).unwrap();
    }
    socket.send_to(b"to somebody", flows[1]).unwrap();
    struct Second<'a>(Sink<'a>);
    impl vmsg_net::RxSink for Second<'_> {
        fn offer(&mut self, to: vmsg_net::Target<'_>, len: usize) -> Option<vmsg_mem::Pieces<'_>> {
            match to {
                vmsg_net::Target::Pair(1) => self.0.offer(to, len),
                _ => None,
            }
        }
        fn commit(&mut self, header: &VnetHeader, len: usize) {
            self.0.commit(header, len);
        }
    }
    let memory = memory(66000);
    let mut sink = Second(Sink::new(&memory, 1514, 10));
    until(&mut tap, "the second queue's frame", |tap| {
        tap.receive(Instant::now(), &mut sink);
        sink.0
            .arrived
            .iter()
            .any(|arrived| is_datagram(&arrived.frame))
    });
    assert_eq!(datagrams(&mut tap, 1514, 50).len(), 50);
}

#[test]
fn a_device_that_chooses_by_the_head_gets_it() {
    if !own_network() {
        return;
    }
    let mut tap = tap(&config());
    start(
        &mut tap,
        &Guest {
            heads: true,
            ..running(Offloads::NONE)
        },
    );
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    let memory = memory(66000);
    let mut sink = Sink::new(&memory, 70000, 1000);
    for len in [1, 60, 1000] {
        socket.send_to(&vec![7; len], (GUEST, 5)).unwrap();
        until(&mut tap, "the frame", |tap| {
            tap.receive(Instant::now(), &mut sink);
            let last = sink.arrived.last();
            let Some(last) = last.filter(|last| last.frame.ends_with(&vec![7; len])) else {
                return false;
            };
            assert_eq!(last.pair, None);
            assert_eq!(sink.head, last.frame[..last.frame.len().min(128)]);
            last.frame.len() == 42 + len
        });
    }
}
