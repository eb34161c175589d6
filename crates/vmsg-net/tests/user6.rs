// SPDX-License-Identifier: Apache-2.0 OR MIT
//! IPv6 through the user-mode stack, with smoltcp as the guest and with packets made by hand.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::{
    DNS6, Exchange, GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST, GUEST_LOCAL, GUEST6, MAC, ROUTER, World,
    frame6, is_summed6, pattern, receive, stream, sum6, transmit, udp6,
};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::IpAddress;
use vmsg_net::user::{HostForward, Limits, Protocol, User, UserConfig, UserError};
use vmsg_net::{Backend, Offloads, VnetHeader};

const MIB: usize = 1 << 20;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const ICMP6: u8 = 58;
const UDP: u8 = 17;

fn stack() -> User {
    User::new(UserConfig::default()).expect("a stack")
}

fn send(user: &mut User, frame: &[u8]) {
    transmit(user, VnetHeader::default(), frame);
}

fn icmp(src: Ipv6Addr, dst: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    sum6(src, dst, ICMP6, 2, &mut message);
    frame6(src, dst, ICMP6, 255, &message)
}

fn addr(frame: &[u8], at: usize) -> Ipv6Addr {
    let octets: [u8; 16] = frame[at..at + 16].try_into().expect("an address");
    Ipv6Addr::from(octets)
}

/// Source, destination and message of an ICMPv6 packet, whose checksum is right.
fn open_icmp(frame: &[u8]) -> (Ipv6Addr, Ipv6Addr, &[u8]) {
    assert_eq!(frame[12..14], [0x86, 0xdd]);
    assert_eq!(frame[20], ICMP6, "next header");
    let (src, dst) = (addr(frame, 22), addr(frame, 38));
    let len = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let message = &frame[54..];
    assert_eq!(message.len(), len);
    assert!(is_summed6(src, dst, ICMP6, message), "checksum");
    (src, dst, message)
}

/// The only frame there is.
fn one(user: &mut User) -> Vec<u8> {
    let mut frames = receive(user);
    assert_eq!(frames.len(), 1, "{frames:?}");
    frames.remove(0).1
}

fn solicitation(target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message
}

fn group(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

#[test]
fn the_gateway_tells_of_itself_when_asked_and_now_and_then() {
    let mut user = User::new(UserConfig {
        mtu: 9000,
        domain: Some("lan.example".into()),
        ..UserConfig::default()
    })
    .expect("a stack");
    let mut ask = vec![133, 0, 0, 0, 0, 0, 0, 0, 1, 1];
    ask.extend_from_slice(&MAC);
    send(&mut user, &icmp(GUEST_LOCAL, ALL_ROUTERS, &ask));
    let frame = one(&mut user);
    assert_eq!(frame[..6], MAC);
    let (src, dst, message) = open_icmp(&frame);
    assert_eq!((src, dst, frame[21]), (ROUTER, GUEST_LOCAL, 255));
    assert_eq!(message[..2], [134, 0]);
    assert_eq!(message[5], 0x40, "other settings by DHCPv6");
    assert!(
        u16::from_be_bytes([message[6], message[7]]) >= 1800,
        "a router"
    );
    let mut options = &message[16..];
    let mut seen = Vec::new();
    while !options.is_empty() {
        let (option, rest) = options.split_at(8 * usize::from(options[1]));
        seen.push(option[0]);
        match option[0] {
            1 => assert_eq!(option[2..8], GATEWAY_MAC),
            5 => assert_eq!(option[4..8], 9000u32.to_be_bytes()),
            3 => {
                assert_eq!(option[2..4], [64, 0xc0]);
                assert_eq!(
                    addr(option, 16),
                    Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 0)
                );
            }
            25 => assert_eq!(addr(option, 8), DNS6),
            31 => assert_eq!(&option[8..21], b"\x03lan\x07example\0"),
            other => panic!("option {other}"),
        }
        options = rest;
    }
    seen.sort_unstable();
    assert_eq!(seen, [1, 3, 5, 25, 31]);
    // Without an address yet: everybody is told.
    send(
        &mut user,
        &icmp(
            Ipv6Addr::UNSPECIFIED,
            ALL_ROUTERS,
            &[133, 0, 0, 0, 0, 0, 0, 0],
        ),
    );
    let frame = one(&mut user);
    assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!(open_icmp(&frame).1, ALL_NODES);
    // Again, some time later, and never in a storm.
    let at = user.next_timeout().expect("a time");
    user.poll(at);
    assert_eq!(open_icmp(&one(&mut user)).1, ALL_NODES);
    assert!(user.next_timeout().expect("a time") > at + Duration::from_secs(100));
}

#[test]
fn a_guest_that_says_nothing_is_told_as_long_as_it_runs() {
    let mut user = stack();
    let mut guest = common::guest(Offloads::NONE);
    guest.running = true;
    user.set_guest(&guest);
    let at = user.next_timeout().expect("a time");
    user.poll(at);
    assert_eq!(open_icmp(&one(&mut user)).1, ALL_NODES);
    // Not again and again while nobody listens.
    for _ in 0..5 {
        let at = user.next_timeout().expect("a time");
        user.poll(at);
    }
    assert_eq!(receive(&mut user).len(), 1);
    guest.running = false;
    user.set_guest(&guest);
    assert_eq!(user.next_timeout(), None);
}

#[test]
fn nothing_is_told_without_ipv6() {
    for config in [
        UserConfig {
            ipv6: false,
            ..UserConfig::default()
        },
        UserConfig {
            mtu: 1279,
            ..UserConfig::default()
        },
    ] {
        let mut user = User::new(config).expect("a stack");
        assert!(!user.offloads().tso6);
        let ask = [133, 0, 0, 0, 0, 0, 0, 0];
        send(&mut user, &icmp(GUEST_LOCAL, ALL_ROUTERS, &ask));
        assert!(receive(&mut user).is_empty());
        assert_eq!(user.counters().unsupported, 1);
        assert_eq!(user.next_timeout(), None);
    }
}

#[test]
fn prefixes_and_addresses_that_make_no_sense_are_named() {
    let new = |config| User::new(config).expect_err("refused");
    let parse = |text: &str| text.parse::<Ipv6Addr>().expect("an address");
    for (net, prefix) in [
        ("fd00::", 48),
        ("fe80::", 64),
        ("ff02::", 64),
        ("::", 64),
        ("::ffff:0:0", 64),
    ] {
        let config = UserConfig {
            net6: (parse(net), prefix),
            ..UserConfig::default()
        };
        assert!(matches!(new(config), UserError::Prefix6 { .. }), "{net}");
    }
    let config = UserConfig {
        host6: Some(parse("fd01::1")),
        ..UserConfig::default()
    };
    assert!(matches!(
        new(config),
        UserError::OutsideNet {
            key: "ipv6-host",
            ..
        }
    ));
    let config = UserConfig {
        dns6: Some(GATEWAY6),
        ..UserConfig::default()
    };
    assert!(matches!(new(config), UserError::SameAddress));
    let forward = |guest: &str| HostForward {
        protocol: Protocol::Tcp,
        host: "127.0.0.1:0".parse().expect("address"),
        guest_addr: guest.parse().ok(),
        guest_port: 1,
    };
    let config = UserConfig {
        ipv6: false,
        forwards: vec![forward("fd00:10:0:2::15")],
        ..UserConfig::default()
    };
    assert!(matches!(new(config), UserError::NoIpv6(_)));
    let config = UserConfig {
        forwards: vec![forward("2001:db8::1")],
        ..UserConfig::default()
    };
    assert!(matches!(new(config), UserError::OutsideNet { .. }));
}

#[test]
fn neighbours_find_the_gateway_and_the_name_server_only() {
    let mut user = stack();
    for (target, ours) in [
        (GATEWAY6, true),
        (DNS6, true),
        (ROUTER, true),
        (GUEST6, false),
        (GUEST_LOCAL, false),
        (Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, 4), false),
    ] {
        send(
            &mut user,
            &icmp(GUEST_LOCAL, group(target), &solicitation(target)),
        );
        let frames = receive(&mut user);
        assert_eq!(frames.len(), usize::from(ours), "{target}");
        if let Some((_, frame)) = frames.first() {
            let (src, dst, message) = open_icmp(frame);
            assert_eq!((src, dst, frame[21]), (target, GUEST_LOCAL, 255));
            assert_eq!(message[..2], [136, 0]);
            assert_eq!(message[4], 0xe0, "router, solicited, override");
            assert_eq!(addr(message, 8), target);
            assert_eq!(message[24..26], [2, 1]);
            assert_eq!(message[26..32], GATEWAY_MAC);
        }
        // Whether the address is free: nobody else answers for the guest's own.
        let probe = icmp(Ipv6Addr::UNSPECIFIED, group(target), &solicitation(target));
        send(&mut user, &probe);
        let frames = receive(&mut user);
        assert_eq!(frames.len(), usize::from(ours), "{target}");
        if let Some((_, frame)) = frames.first() {
            let (src, dst, message) = open_icmp(frame);
            assert_eq!((src, dst), (target, ALL_NODES));
            assert_eq!(message[4], 0xa0, "router, override");
            assert_eq!(frame[..6], [0x33, 0x33, 0, 0, 0, 1]);
        }
    }
    assert_eq!(user.counters().malformed, 0);
}

#[test]
fn neighbour_messages_from_further_away_or_out_of_shape_are_dropped() {
    let mut user = stack();
    let asking = solicitation(GATEWAY6);
    let mut far = icmp(GUEST_LOCAL, group(GATEWAY6), &asking);
    far[21] = 254;
    let mut endless = asking.clone();
    endless.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    let mut long = asking.clone();
    long.extend_from_slice(&[1, 9, 0, 0, 0, 0, 0, 0]);
    let frames = [
        far,
        icmp(GUEST_LOCAL, GATEWAY6, &endless),
        icmp(GUEST_LOCAL, GATEWAY6, &long),
        icmp(GUEST_LOCAL, GATEWAY6, &asking[..20]),
        icmp(GUEST_LOCAL, GATEWAY6, &solicitation(ALL_NODES)),
        // Without an address, not to the group.
        icmp(Ipv6Addr::UNSPECIFIED, GATEWAY6, &asking),
    ];
    let count = frames.len() as u64;
    for frame in &frames {
        send(&mut user, frame);
        assert!(receive(&mut user).is_empty());
    }
    assert_eq!(user.counters().malformed, count);
    let mut wrong = icmp(GUEST_LOCAL, GATEWAY6, &asking);
    wrong[60] ^= 1;
    send(&mut user, &wrong);
    assert_eq!(user.counters().malformed, count + 1);
    // Another router has no business here.
    send(&mut user, &icmp(GUEST_LOCAL, ALL_NODES, &[134; 16]));
    assert_eq!(user.counters().malformed, count + 2);
    let mut router = [0; 16];
    router[0] = 134;
    send(&mut user, &icmp(GUEST_LOCAL, ALL_NODES, &router));
    assert_eq!(user.counters().refused, 1);
}

#[test]
fn the_gateway_answers_echo_requests_of_any_length() {
    for len in [0, 56, 1440, 3000, 65480] {
        let mut user = stack();
        let data = stream(3, len);
        for to in [GATEWAY6, DNS6, ROUTER] {
            let mut message = vec![128, 0, 0, 0, 0, 9, 0, 7];
            message.extend_from_slice(&data);
            sum6(GUEST6, to, ICMP6, 2, &mut message);
            // In fragments as the guest would, the last one first.
            let parts: Vec<_> = message.chunks(1440).enumerate().collect();
            let single = parts.len() == 1;
            for (i, part) in parts.iter().rev() {
                let frame = if single {
                    frame6(GUEST6, to, ICMP6, 64, part)
                } else {
                    let more = i + 1 < parts.len();
                    let place = u16::try_from(i * 1440).expect("short") | u16::from(more);
                    let mut payload = vec![ICMP6, 0];
                    payload.extend_from_slice(&place.to_be_bytes());
                    payload.extend_from_slice(&77u32.to_be_bytes());
                    payload.extend_from_slice(part);
                    frame6(GUEST6, to, 44, 64, &payload)
                };
                send(&mut user, &frame);
            }
            let mut whole = vec![0; message.len()];
            let mut have = 0;
            for (_, frame) in receive(&mut user) {
                assert!(frame.len() <= 1514);
                assert_eq!((addr(&frame, 22), addr(&frame, 38)), (to, GUEST6));
                let (at, part) = match frame[20] {
                    ICMP6 => (0, &frame[54..]),
                    44 => {
                        assert_eq!(frame[54], ICMP6);
                        let place = u16::from_be_bytes([frame[56], frame[57]]);
                        (usize::from(place & !7), &frame[62..])
                    }
                    other => panic!("{other}"),
                };
                whole[at..at + part.len()].copy_from_slice(part);
                have += part.len();
            }
            assert_eq!(have, message.len());
            assert!(is_summed6(to, GUEST6, ICMP6, &whole));
            assert_eq!(whole[..2], [129, 0]);
            assert_eq!(whole[4..8], [0, 9, 0, 7]);
            assert_eq!(whole[8..], data);
        }
        assert_eq!(user.counters().malformed, 0);
    }
}

/// A server for one client: reads stream `seed` to its end while it sends `len` bytes of stream
/// `seed + 1`; returns how much it read.
fn server(seed: u64, len: usize) -> (u16, thread::JoinHandle<usize>) {
    let listener = TcpListener::bind("[::1]:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let thread = thread::spawn(move || peer(listener.accept().expect("accept").0, seed, len));
    (port, thread)
}

fn peer(mut socket: TcpStream, seed: u64, len: usize) -> usize {
    let mut out = socket.try_clone().expect("clone");
    socket
        .set_read_timeout(Some(Duration::from_secs(50)))
        .expect("timeout");
    let writer = thread::spawn(move || {
        out.write_all(&stream(seed + 1, len)).expect("write");
        out.shutdown(Shutdown::Write).expect("shutdown");
    });
    let mut buffer = vec![0; 65536];
    let mut at = 0;
    loop {
        let n = socket.read(&mut buffer).expect("read");
        if n == 0 {
            break;
        }
        for byte in &buffer[..n] {
            assert_eq!(*byte, pattern(seed, at), "at {at}");
            at += 1;
        }
    }
    writer.join().expect("writer");
    at
}

fn both_ways(world: &mut World, up: usize, down: usize, buffer: usize) {
    let (port, server) = server(7, down);
    let handle = world.connect((GATEWAY6, port), 40001, buffer);
    let mut exchange = Exchange::new(handle, 7, up);
    world.run("exchange", |world| exchange.step(world));
    assert_eq!(exchange.received, down);
    world.run("server", |_| server.is_finished());
    assert_eq!(server.join().expect("server"), up);
}

#[test]
fn tcp_goes_both_ways_with_right_checksums() {
    let mut world = World::new(UserConfig::default());
    both_ways(&mut world, 4 * MIB, 4 * MIB, 256 << 10);
    world.run("flow is gone", |world| world.user.flows().0 == 0);
    assert_eq!(world.user.counters().malformed, 0);
}

#[test]
fn tcp_goes_both_ways_in_large_segments() {
    let mut world = World::with(UserConfig::default(), World::offloads());
    assert!(world.user.offloads().guest_tso6 && world.user.offloads().tso6);
    both_ways(&mut world, 4 * MIB, 8 * MIB, MIB);
    // Not one frame for each segment.
    let frames = world.user.counters().frames_to_guest;
    assert!(frames < 8 * MIB as u64 / 1440, "{frames}");
}

#[test]
fn lost_frames_are_sent_again() {
    let mut world = World::new(UserConfig::default());
    world.loss = 20;
    both_ways(&mut world, MIB / 4, MIB, 64 << 10);
    assert!(world.user.counters().tcp_retransmits > 0);
}

/// Frames as large as they get, without segmentation by anybody.
#[test]
fn a_larger_mtu_is_used_by_both_versions() {
    for mtu in [9000, 65520] {
        let offloads = Offloads {
            mtu,
            ..Offloads::NONE
        };
        let config = UserConfig {
            mtu,
            ..UserConfig::default()
        };
        for to in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
            let listener = TcpListener::bind(match to {
                IpAddr::V4(_) => "127.0.0.1:0",
                IpAddr::V6(_) => "[::1]:0",
            })
            .expect("listen");
            let port = listener.local_addr().expect("address").port();
            let down = 4 * MIB;
            let server = thread::spawn(move || peer(listener.accept().expect("accept").0, 7, down));
            let mut world = World::with(config.clone(), offloads);
            let handle = world.connect((to, port), 40001, MIB);
            let mut exchange = Exchange::new(handle, 7, MIB);
            world.run("exchange", |world| exchange.step(world));
            assert_eq!(exchange.received, down);
            world.run("server", |_| server.is_finished());
            assert_eq!(server.join().expect("server"), MIB);
            let frames = world.user.counters().frames_to_guest;
            let least = down as u64 / u64::from(mtu);
            assert!(frames < 4 * least + 200, "{frames} frames of {mtu}");
        }
        // A datagram in one frame each way.
        let server = UdpSocket::bind("[::1]:0").expect("bind");
        let port = server.local_addr().expect("address").port();
        let mut user = User::new(config).expect("a stack");
        user.set_guest(&common::guest(offloads));
        let bytes = stream(1, usize::from(mtu) - 48);
        let message = udp6((GUEST6, 4000), (GATEWAY6, port), &bytes);
        send(&mut user, &frame6(GUEST6, GATEWAY6, UDP, 64, &message));
        let mut buffer = vec![0; 70000];
        let (n, from) = server.recv_from(&mut buffer).expect("datagram");
        assert_eq!(buffer[..n], bytes);
        server.send_to(&bytes, from).expect("send");
        user.poll(Instant::now());
        let frame = one(&mut user);
        assert_eq!(frame[62..], bytes);
        assert!(is_summed6(GATEWAY6, GUEST6, UDP, &frame[54..]));
    }
}

fn udp_socket(world: &mut World, port: u16) -> smoltcp::iface::SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 64 << 10]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).expect("bind");
    world.sockets.add(socket)
}

#[test]
fn udp_goes_to_the_host_and_to_its_name_server() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut world = World::new(UserConfig {
        resolvers: vec![server.local_addr().expect("address")],
        ..UserConfig::default()
    });
    let handle = udp_socket(&mut world, 5000);
    for (to, port) in [(GATEWAY6, port), (DNS6, 53)] {
        for len in [0, 1, 1452] {
            let bytes = stream(len as u64, len);
            world
                .sockets
                .get_mut::<udp::Socket>(handle)
                .send_slice(&bytes, (IpAddress::Ipv6(to), port))
                .expect("send");
            world.run("echo", |world| {
                let mut buffer = [0; 2000];
                if let Ok((n, from)) = server.recv_from(&mut buffer) {
                    server.send_to(&buffer[..n], from).expect("send");
                }
                world.sockets.get::<udp::Socket>(handle).can_recv()
            });
            let socket = world.sockets.get_mut::<udp::Socket>(handle);
            let (echo, from) = socket.recv().expect("echo");
            assert_eq!(
                (from.endpoint.addr, from.endpoint.port),
                (IpAddress::Ipv6(to), port)
            );
            assert_eq!(echo, bytes);
        }
    }
    assert_eq!(world.user.counters().datagram_flows, 2);
}

#[test]
fn tcp_finds_the_name_server() {
    let listener = TcpListener::bind("[::1]:0").expect("listen");
    let mut world = World::new(UserConfig {
        resolvers: vec![listener.local_addr().expect("address")],
        ..UserConfig::default()
    });
    let handle = world.connect((DNS6, 53), 40001, 4096);
    world.run("open", |world| world.tcp(handle).may_send());
}

#[test]
fn closed_ports_are_told() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    let port = server.local_addr().expect("address").port();
    drop(server);
    let mut user = stack();
    let message = udp6((GUEST6, 4000), (GATEWAY6, port), b"x");
    let frame = frame6(GUEST6, GATEWAY6, UDP, 64, &message);
    let start = Instant::now();
    let told = loop {
        send(&mut user, &frame);
        user.poll(Instant::now());
        if let Some((_, frame)) = receive(&mut user).pop() {
            break frame;
        }
        assert!(start.elapsed() < common::PATIENCE);
    };
    let (src, dst, error) = open_icmp(&told);
    assert_eq!((src, dst), (GATEWAY6, GUEST6));
    assert_eq!(error[..2], [1, 4], "port unreachable");
    // What it speaks of.
    assert_eq!(error[8] >> 4, 6);
    assert_eq!(error[14], UDP);
    assert_eq!((addr(error, 16), addr(error, 32)), (GUEST6, GATEWAY6));
    assert_eq!(error[48..52], message[..4]);
    let mut world = World::new(UserConfig::default());
    let handle = world.connect((GATEWAY6, port), 40001, 4096);
    world.run("refused", |world| {
        world.tcp(handle).state() == tcp::State::Closed
    });
}

#[test]
fn what_must_not_be_reached_is_refused() {
    let server = UdpSocket::bind("[::]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut user = User::new(UserConfig {
        host_loopback: false,
        ..UserConfig::default()
    })
    .expect("a stack");
    let closed = [
        GATEWAY6,
        Ipv6Addr::LOCALHOST,
        Ipv6Addr::UNSPECIFIED,
        "::ffff:127.0.0.1".parse().expect("address"),
        "::127.0.0.1".parse().expect("address"),
        "fe80::1".parse().expect("address"),
        "ff02::fb".parse().expect("address"),
        "ff0e::1".parse().expect("address"),
        "fd00:10:0:2::99".parse().expect("address"),
    ];
    for to in closed {
        let message = udp6((GUEST6, 4000), (to, port), b"x");
        send(&mut user, &frame6(GUEST6, to, UDP, 64, &message));
    }
    // Nor does an address that nobody else knows reach further.
    let message = udp6((GUEST_LOCAL, 4000), (DNS6, 53), b"x");
    send(&mut user, &frame6(GUEST_LOCAL, DNS6, UDP, 64, &message));
    assert_eq!(user.counters().refused, closed.len() as u64 + 1);
    assert_eq!(user.flows(), (0, 0));
    assert!(server.recv_from(&mut [0; 10]).is_err());
    // Addresses that are not the guest's.
    for src in [
        GATEWAY6,
        DNS6,
        ROUTER,
        Ipv6Addr::LOCALHOST,
        Ipv6Addr::UNSPECIFIED,
    ] {
        let message = udp6((src, 4000), (GATEWAY6, port), b"x");
        send(&mut user, &frame6(src, GATEWAY6, UDP, 64, &message));
    }
    assert_eq!(user.counters().spoofed, 5);
}

#[test]
fn packets_that_may_go_no_further_are_told() {
    let mut user = stack();
    let far = "2001:db8::1".parse().expect("address");
    let message = udp6((GUEST6, 4000), (far, 33434), b"x");
    send(&mut user, &frame6(GUEST6, far, UDP, 1, &message));
    let frame = one(&mut user);
    let (src, dst, error) = open_icmp(&frame);
    assert_eq!((src, dst), (GATEWAY6, GUEST6));
    assert_eq!(error[..2], [3, 0], "hop limit exceeded");
    assert_eq!(error[48..52], message[..4]);
    assert_eq!(user.flows(), (0, 0));
}

#[test]
fn extension_headers_are_passed_over_or_refused() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut user = stack();
    let message = udp6((GUEST6, 4000), (GATEWAY6, port), b"through");
    // Next header, and what precedes the datagram with the next header of each left open.
    let pad = [0, 0, 1, 4, 0, 0, 0, 0];
    let alert = [0, 0, 5, 2, 0, 0, 0, 0];
    let single = [0, 0, 0, 0, 0, 0, 0, 0];
    let spent = [0, 0, 0, 0, 0, 0, 0, 0];
    let atomic = [0, 0, 0, 0, 0, 0, 0, 5];
    let mut arrived = 0;
    let mut exts = |chain: &[(u8, [u8; 8])], fine: bool| {
        let mut payload = Vec::new();
        for (i, (_, bytes)) in chain.iter().enumerate() {
            let mut bytes = *bytes;
            bytes[0] = chain.get(i + 1).map_or(UDP, |(kind, _)| *kind);
            payload.extend_from_slice(&bytes);
        }
        payload.extend_from_slice(&message);
        let first = chain.first().map_or(UDP, |(kind, _)| *kind);
        send(&mut user, &frame6(GUEST6, GATEWAY6, first, 64, &payload));
        arrived += u64::from(fine);
        let mut buffer = [0; 100];
        let got = server.recv_from(&mut buffer);
        assert_eq!(got.is_ok(), fine, "{chain:?}");
    };
    exts(&[], true);
    exts(&[(0, pad)], true);
    exts(
        &[
            (0, alert),
            (60, single),
            (43, spent),
            (44, atomic),
            (60, pad),
        ],
        true,
    );
    // A route of its own, an option that must be known, the wrong place, no end.
    exts(&[(43, [0, 0, 0, 1, 0, 0, 0, 0])], false);
    exts(&[(60, [0, 0, 0xc2, 4, 0, 0, 0, 0])], false);
    exts(&[(60, pad), (0, pad)], false);
    exts(&[(0, [0, 200, 1, 4, 0, 0, 0, 0])], false);
    exts(&[(0, [0, 0, 1, 200, 0, 0, 0, 0])], false);
    exts(&[(60, pad); 12], false);
    exts(&[(59, pad)], false);
    exts(&[(51, pad)], false);
    assert_eq!(user.counters().datagram_flows, 1);
    assert_eq!(user.counters().malformed + user.counters().unsupported, 8);
}

/// The guest sends a fragment of a UDP datagram to the gateway.
fn fragment(user: &mut User, ident: u32, at: usize, more: bool, part: &[u8]) {
    let place = u16::try_from(at).expect("short") | u16::from(more);
    let mut payload = vec![UDP, 0];
    payload.extend_from_slice(&place.to_be_bytes());
    payload.extend_from_slice(&ident.to_be_bytes());
    payload.extend_from_slice(part);
    send(user, &frame6(GUEST6, GATEWAY6, 44, 64, &payload));
}

#[test]
fn fragments_are_put_together_and_overlaps_are_void() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut user = stack();
    let bytes = stream(1, 30000);
    let message = udp6((GUEST6, 4000), (GATEWAY6, port), &bytes);
    let parts: Vec<_> = message.chunks(1440).collect();
    let last = parts.len() - 1;
    let mut buffer = vec![0; 70000];
    // Four at the same time, in an order of their own.
    for i in 0..=last {
        for ident in 0..4 {
            let i = (i + ident * 3) % parts.len();
            let ident = u32::try_from(ident).expect("small");
            fragment(&mut user, ident, i * 1440, i < last, parts[i]);
        }
    }
    for _ in 0..4 {
        let (n, _) = server.recv_from(&mut buffer).expect("a datagram");
        assert_eq!(buffer[..n], bytes);
    }
    assert_eq!(user.counters().malformed, 0);
    // One that says something else about what came before makes all of it void.
    for (i, part) in parts.iter().enumerate() {
        fragment(&mut user, 9, i * 1440, i < last, part);
        if i == 2 {
            fragment(&mut user, 9, 1440 - 8, true, &part[..64]);
        }
    }
    assert!(server.recv_from(&mut buffer).is_err());
    assert!(user.counters().malformed > 0);
    // Ends and lengths that do not fit.
    let before = user.counters().malformed;
    fragment(&mut user, 10, 0, true, &[0; 13]);
    fragment(&mut user, 11, 65528, false, &[0; 64]);
    fragment(&mut user, 12, 0, true, &[]);
    assert_eq!(user.counters().malformed, before + 3);
    // Floods of beginnings are bounded.
    let before = user.counters().limited;
    for ident in 100..1100 {
        fragment(&mut user, ident, 64000, true, &[0; 1024]);
    }
    assert!(user.counters().limited - before > 900);
}

#[test]
fn ports_of_the_host_lead_to_the_guests_ipv6_address() {
    let forward = |protocol, guest: Ipv6Addr, port| HostForward {
        protocol,
        host: "[::1]:0".parse().expect("address"),
        guest_addr: Some(guest.into()),
        guest_port: port,
    };
    let mut world = World::new(UserConfig {
        restrict: true,
        forwards: vec![
            forward(Protocol::Tcp, GUEST6, 22),
            forward(Protocol::Udp, GUEST6, 7),
            forward(Protocol::Udp, Ipv6Addr::UNSPECIFIED, 9),
        ],
        ..UserConfig::default()
    });
    let addrs = world.user.forward_addresses();
    let to = addrs[0].expect("address");
    let handle = world.tcp_socket(32 << 10);
    world.tcp(handle).listen(22).expect("listen");
    let client = thread::spawn(move || peer(TcpStream::connect(to).expect("connect"), 5, 300_000));
    world.run("open", |world| world.tcp(handle).may_send());
    let remote = world.tcp(handle).remote_endpoint().expect("open");
    assert_eq!(remote.addr, IpAddress::Ipv6(GATEWAY6));
    let mut exchange = Exchange::new(handle, 5, 200_000);
    world.run("exchange", |world| exchange.step(world));
    assert_eq!(exchange.received, 300_000);
    world.run("client", |_| client.is_finished());
    assert_eq!(client.join().expect("client"), 200_000);
    // By then the guest is known: `::` is its address, too.
    for (index, port) in [(1, 7), (2, 9)] {
        let client = UdpSocket::bind("[::1]:0").expect("bind");
        client.set_nonblocking(true).expect("nonblocking");
        let handle = udp_socket(&mut world, port);
        let to = addrs[index].expect("address");
        client.send_to(b"knock", to).expect("send");
        world.run("echo", |world| {
            let socket = world.sockets.get_mut::<udp::Socket>(handle);
            if let Ok((bytes, from)) = socket.recv() {
                assert_eq!(from.endpoint.addr, IpAddress::Ipv6(GATEWAY6));
                let bytes = bytes.to_vec();
                socket.send_slice(&bytes, from).expect("send");
            }
            let mut buffer = [0; 100];
            client.recv_from(&mut buffer).is_ok_and(|(n, from)| {
                assert_eq!((&buffer[..n], from), (&b"knock"[..], to));
                true
            })
        });
    }
}

#[test]
fn stateless_dhcp_tells_the_name_server() {
    let mut user = User::new(UserConfig {
        domain: Some("lan.example.".into()),
        ..UserConfig::default()
    })
    .expect("a stack");
    let servers = "ff02::1:2".parse().expect("address");
    let duid = [0, 4, 1, 2, 3, 4, 5, 6, 7, 8];
    let mut request = vec![11, 0xab, 0xcd, 0xef, 0, 1, 0, 10];
    request.extend_from_slice(&duid);
    request.extend_from_slice(&[0, 6, 0, 4, 0, 23, 0, 24, 0, 8, 0, 2, 0, 0]);
    let ask = |request: &[u8]| {
        let message = udp6((GUEST_LOCAL, 546), (servers, 547), request);
        frame6(GUEST_LOCAL, servers, UDP, 1, &message)
    };
    send(&mut user, &ask(&request));
    let frame = one(&mut user);
    assert_eq!((addr(&frame, 22), addr(&frame, 38)), (ROUTER, GUEST_LOCAL));
    assert!(is_summed6(ROUTER, GUEST_LOCAL, UDP, &frame[54..]));
    assert_eq!(frame[54..58], [2, 35, 2, 34], "ports");
    let answer = &frame[62..];
    assert_eq!(answer[..4], [7, 0xab, 0xcd, 0xef]);
    let mut options = &answer[4..];
    let mut seen = Vec::new();
    while !options.is_empty() {
        let half = |at: usize| u16::from_be_bytes([options[at], options[at + 1]]);
        let (option, rest) = options.split_at(4 + usize::from(half(2)));
        match half(0) {
            1 => assert_eq!(option[4..], duid),
            2 => assert!(option.ends_with(&GATEWAY_MAC)),
            23 => assert_eq!(addr(option, 4), DNS6),
            24 => assert_eq!(&option[4..], b"\x03lan\x07example\0"),
            other => panic!("option {other}"),
        }
        seen.push(half(0));
        options = rest;
    }
    assert_eq!(seen, [1, 2, 23, 24]);
    // Addresses are not to be had; and what makes no sense is dropped.
    request[0] = 1;
    send(&mut user, &ask(&request));
    request[0] = 11;
    request[7] = 200;
    send(&mut user, &ask(&request));
    send(&mut user, &ask(&request[..3]));
    assert!(receive(&mut user).is_empty());
    assert_eq!(user.counters().unsupported, 1);
    assert_eq!(user.counters().malformed, 2);
}

/// A connection made by hand; returns the numbers that the next segment of the guest has.
fn open(user: &mut User, to: (Ipv6Addr, u16)) -> (u32, u32) {
    let send = |user: &mut User, seq: u32, ack: u32, flags: u8, options: &[u8]| {
        segment(user, to, seq, ack, flags, options);
    };
    send(user, 99, 0, 2, &[2, 4, 5, 0xa0]);
    let start = Instant::now();
    loop {
        user.poll(Instant::now());
        if let Some((_, frame)) = receive(user).first() {
            let word =
                |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"));
            assert_eq!((frame[67], word(62)), (0x12, 100));
            let ack = word(58) + 1;
            send(user, 100, ack, 0x10, &[]);
            receive(user);
            return (100, ack);
        }
        assert!(start.elapsed() < common::PATIENCE);
    }
}

fn segment(user: &mut User, to: (Ipv6Addr, u16), seq: u32, ack: u32, flags: u8, options: &[u8]) {
    let mut message = Vec::new();
    message.extend_from_slice(&4000u16.to_be_bytes());
    message.extend_from_slice(&to.1.to_be_bytes());
    message.extend_from_slice(&seq.to_be_bytes());
    message.extend_from_slice(&ack.to_be_bytes());
    let words = u8::try_from(5 + options.len() / 4).expect("short");
    message.extend_from_slice(&[words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    message.extend_from_slice(options);
    sum6(GUEST6, to.0, 6, 16, &mut message);
    transmit(
        user,
        VnetHeader::default(),
        &frame6(GUEST6, to.0, 6, 64, &message),
    );
}

#[test]
fn segments_become_shorter_where_a_router_behind_the_guest_asks_for_it() {
    let listener = TcpListener::bind("[::1]:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let mut user = stack();
    let (_, ack) = open(&mut user, (GATEWAY6, port));
    let (mut far, _) = listener.accept().expect("accept");
    far.write_all(&[7; 20_000]).expect("write");
    let lengths = |user: &mut User| -> Vec<usize> {
        user.poll(Instant::now());
        receive(user)
            .iter()
            .map(|(_, frame)| frame.len() - 74)
            .filter(|len| *len > 0)
            .collect()
    };
    let start = Instant::now();
    let mut first = Vec::new();
    while first.is_empty() {
        first = lengths(&mut user);
        assert!(start.elapsed() < common::PATIENCE);
    }
    assert_eq!(first[0], 1440);
    let quote = |seq: u32, mtu: u32| {
        let mut message = vec![2, 0, 0, 0];
        message.extend_from_slice(&mtu.to_be_bytes());
        let mut head = Vec::new();
        head.extend_from_slice(&port.to_be_bytes());
        head.extend_from_slice(&4000u16.to_be_bytes());
        head.extend_from_slice(&seq.to_be_bytes());
        message.extend_from_slice(&frame6(GATEWAY6, GUEST6, 6, 63, &head)[14..]);
        icmp(GUEST6, GATEWAY6, &message)
    };
    // About something that is not on the way, or of somebody else: no.
    send(&mut user, &quote(ack.wrapping_sub(1), 1300));
    send(&mut user, &quote(ack.wrapping_add(1 << 20), 1300));
    assert!(lengths(&mut user).is_empty());
    assert_eq!(user.counters().refused, 2);
    send(&mut user, &quote(ack, 1300));
    let again = lengths(&mut user);
    assert_eq!(again[0], 1240, "{again:?}");
    // Never less than any way of IPv6 takes.
    send(&mut user, &quote(ack, 68));
    assert_eq!(lengths(&mut user)[0], 1220);
    assert_eq!(user.counters().malformed, 0);
}

#[test]
fn echo_requests_over_ipv4_may_be_long_too() {
    let mut user = stack();
    let data = stream(9, 3000);
    let mut message = vec![8, 0, 0, 0, 0, 9, 0, 7];
    message.extend_from_slice(&data);
    let sum = !smoltcp::wire::checksum::data(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let parts: Vec<_> = message.chunks(1480).collect();
    for (i, part) in parts.iter().enumerate() {
        let mut frame = GATEWAY_MAC.to_vec();
        frame.extend_from_slice(&MAC);
        frame.extend_from_slice(&[8, 0, 0x45, 0]);
        frame.extend_from_slice(&u16::try_from(20 + part.len()).expect("short").to_be_bytes());
        let more = if i + 1 < parts.len() { 0x2000 } else { 0 };
        let place = u16::try_from(i * 1480 / 8).expect("short") | more;
        frame.extend_from_slice(&[0, 7]);
        frame.extend_from_slice(&place.to_be_bytes());
        frame.extend_from_slice(&[64, 1, 0, 0]);
        frame.extend_from_slice(&GUEST.octets());
        frame.extend_from_slice(&GATEWAY.octets());
        let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame.extend_from_slice(part);
        send(&mut user, &frame);
    }
    let frames = receive(&mut user);
    assert_eq!(frames.len(), 3);
    let mut whole = vec![0; message.len()];
    for (_, frame) in &frames {
        let place = u16::from_be_bytes([frame[20], frame[21]]);
        let at = 8 * usize::from(place & 0x1fff);
        whole[at..at + frame.len() - 34].copy_from_slice(&frame[34..]);
    }
    assert_eq!(smoltcp::wire::checksum::data(&whole), 0xffff);
    assert_eq!((whole[0], &whole[8..]), (0, &data[..]));
}

/// Neighbours and flows stay within the limits whatever the guest calls itself.
#[test]
fn a_guest_with_many_addresses_is_bounded() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    let port = server.local_addr().expect("address").port();
    let mut user = User::new(UserConfig {
        limits: Limits {
            neighbours: 4,
            datagram_flows: 10,
            ..Limits::default()
        },
        ..UserConfig::default()
    })
    .expect("a stack");
    for n in 0x100..0x400 {
        let src = Ipv6Addr::new(0xfd00, 0x10, 0, 2, 0, 0, 0, n);
        let message = udp6((src, 4000), (GATEWAY6, port), b"x");
        send(&mut user, &frame6(src, GATEWAY6, UDP, 64, &message));
    }
    assert_eq!(user.flows(), (0, 10));
    assert_eq!(user.counters().datagram_flows, 0x300);
}
