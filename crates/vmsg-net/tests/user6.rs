// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP and UDP over IPv6 through the user-mode stack, mostly with smoltcp as the guest.

mod common;
mod packets6;

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Instant;

use common::{
    DNS6, Exchange, GATEWAY, GATEWAY6, GUEST_LOCAL, GUEST6, ROUTER, World, frame6, is_summed6,
    peer, receive, stream, sum6, transmit, udp6,
};
use packets6::{UDP, addr, icmp, one, open_icmp, send, stack};
use smoltcp::socket::{tcp, udp};
use smoltcp::wire::IpAddress;
use vmsg_net::user::{HostForward, Limits, Protocol, User, UserConfig};
use vmsg_net::{Backend, Offloads, VnetHeader};

const MIB: usize = 1 << 20;

/// A server for one client: reads stream `seed` to its end while it sends `len` bytes of stream
/// `seed + 1`; returns how much it read.
fn server(seed: u64, len: usize) -> (u16, thread::JoinHandle<usize>) {
    let listener = TcpListener::bind("[::1]:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    let thread = thread::spawn(move || peer(listener.accept().expect("accept").0, seed, len));
    (port, thread)
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
