// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The user-mode stack but for TCP, with smoltcp as the guest.

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use common::{DNS, GATEWAY, GUEST, MAC, World, receive, transmit};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, checksum,
};
use vmsg_net::user::{HostForward, Limits, Protocol, User, UserConfig, UserError};
use vmsg_net::{Backend, VnetHeader};

fn udp_socket(world: &mut World, port: u16) -> smoltcp::iface::SocketHandle {
    let buffer =
        || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 << 10]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).expect("bind");
    world.sockets.add(socket)
}

#[test]
fn a_guest_gets_a_lease_and_what_goes_with_it() {
    let mut world = World::new(UserConfig {
        hostname: Some("box".into()),
        ..UserConfig::default()
    });
    world.iface.update_ip_addrs(|addrs| addrs.clear());
    let mut socket = dhcpv4::Socket::new();
    socket.set_outgoing_options(&[]);
    let handle = world.sockets.add(socket);
    let mut lease = None;
    world.run("lease", |world| {
        match world.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                assert_eq!(config.router, Some(GATEWAY));
                assert_eq!(config.dns_servers.as_slice(), [DNS]);
                lease = Some(config.address);
            }
            Some(dhcpv4::Event::Deconfigured) | None => {}
        }
        lease.is_some()
    });
    let lease = lease.expect("a lease");
    assert_eq!((lease.address(), lease.prefix_len()), (GUEST, 24));
}

/// The payload of the DHCP answer to a DISCOVER with the given options.
fn discover(user: &mut User, options: &[u8]) -> Option<Vec<u8>> {
    let mut message = vec![0; 240];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&[1, 2, 3, 4]);
    message[28..34].copy_from_slice(&MAC);
    message[236..240].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
    message.extend_from_slice(options);
    let len = u16::try_from(message.len()).expect("short");
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&(28 + len).to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum = !checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&[0, 68, 0, 67]);
    frame.extend_from_slice(&(8 + len).to_be_bytes());
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(&message);
    transmit(user, VnetHeader::default(), &frame);
    let (_, answer) = receive(user).pop()?;
    Some(answer[42..].to_vec())
}

#[test]
fn clients_get_their_identifier_back_whatever_it_is() {
    // A hardware address, a DUID as of systemd-networkd, and one as long as an address.
    let ids: [&[u8]; 3] = [
        &[1, 0x52, 0x54, 0, 0x12, 0x34, 0x56],
        &[
            255, 1, 2, 3, 4, 0, 2, 0, 0, 0xab, 0x11, 1, 2, 3, 4, 5, 6, 7, 8,
        ],
        b"\0myname",
    ];
    for id in ids {
        let mut user = User::new(UserConfig::default()).expect("a stack");
        let mut options = vec![53, 1, 1, 61, u8::try_from(id.len()).expect("short")];
        options.extend_from_slice(id);
        options.push(255);
        let answer = discover(&mut user, &options).expect("an offer");
        assert_eq!(answer[16..20], GUEST.octets());
        let at = answer[240..]
            .windows(id.len() + 2)
            .position(|window| window[..2] == options[3..5] && window[2..] == *id);
        assert!(at.is_some(), "{id:?} is not in {answer:?}");
    }
    // Options that end too early.
    let mut user = User::new(UserConfig::default()).expect("a stack");
    for options in [&[53, 1, 1, 61][..], &[53, 1, 1, 61, 7, 1], &[61]] {
        let _ = discover(&mut user, options);
    }
}

#[test]
fn another_network_is_as_configured() {
    let config = UserConfig {
        net: (Ipv4Addr::new(192, 168, 7, 0), 24),
        host: Some(Ipv4Addr::new(192, 168, 7, 1)),
        dns: Some(Ipv4Addr::new(192, 168, 7, 9)),
        dhcp_start: Some(Ipv4Addr::new(192, 168, 7, 100)),
        ..UserConfig::default()
    };
    let mut world = World::new(config);
    world.iface.update_ip_addrs(|addrs| addrs.clear());
    let handle = world.sockets.add(dhcpv4::Socket::new());
    let mut seen = None;
    world.run("lease", |world| {
        if let Some(dhcpv4::Event::Configured(config)) =
            world.sockets.get_mut::<dhcpv4::Socket>(handle).poll()
        {
            seen = Some((
                config.address.address(),
                config.router,
                config.dns_servers[0],
            ));
        }
        seen.is_some()
    });
    assert_eq!(
        seen,
        Some((
            Ipv4Addr::new(192, 168, 7, 100),
            Some(Ipv4Addr::new(192, 168, 7, 1)),
            Ipv4Addr::new(192, 168, 7, 9)
        ))
    );
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let new = |config| User::new(config).expect_err("refused");
    let base = UserConfig::default;
    let net = (Ipv4Addr::new(10, 0, 2, 0), 31);
    assert!(matches!(
        new(UserConfig { net, ..base() }),
        UserError::Prefix { .. }
    ));
    let host = Some(Ipv4Addr::new(10, 0, 3, 2));
    assert!(matches!(
        new(UserConfig { host, ..base() }),
        UserError::OutsideNet { key: "host", .. }
    ));
    let dns = Some(GATEWAY);
    assert!(matches!(
        new(UserConfig { dns, ..base() }),
        UserError::SameAddress
    ));
    assert!(matches!(
        new(UserConfig { mtu: 100, ..base() }),
        UserError::Mtu(100)
    ));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let forwards = vec![HostForward {
        protocol: Protocol::Tcp,
        host: taken.local_addr().expect("address"),
        guest_addr: None,
        guest_port: 1,
    }];
    assert!(matches!(
        new(UserConfig { forwards, ..base() }),
        UserError::Forward { .. }
    ));
}

#[test]
fn arp_is_answered_for_the_gateway_and_the_name_server_only() {
    let mut user = User::new(UserConfig::default()).expect("a stack");
    for (target, answered) in [
        (GATEWAY, true),
        (DNS, true),
        (GUEST, false),
        (Ipv4Addr::new(10, 0, 2, 77), false),
    ] {
        let mut frame = vec![0; 42];
        EthernetRepr {
            src_addr: EthernetAddress(MAC),
            dst_addr: EthernetAddress::BROADCAST,
            ethertype: EthernetProtocol::Arp,
        }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame));
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: EthernetAddress(MAC),
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        }
        .emit(&mut ArpPacket::new_unchecked(&mut frame[14..]));
        transmit(&mut user, VnetHeader::default(), &frame);
        let frames = receive(&mut user);
        assert_eq!(frames.len(), usize::from(answered), "{target}");
        if let Some((_, frame)) = frames.first() {
            let packet = ArpPacket::new_checked(&frame[14..]).expect("arp");
            let ArpRepr::EthernetIpv4 {
                operation,
                source_protocol_addr,
                target_hardware_addr,
                ..
            } = ArpRepr::parse(&packet).expect("arp")
            else {
                panic!("not Ethernet");
            };
            assert_eq!(operation, ArpOperation::Reply);
            assert_eq!(source_protocol_addr, target);
            assert_eq!(target_hardware_addr, EthernetAddress(MAC));
        }
    }
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut world = World::new(UserConfig::default());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(99)).expect("bind");
    let handle = world.sockets.add(socket);
    for to in [GATEWAY, DNS] {
        let request = Icmpv4Repr::EchoRequest {
            ident: 99,
            seq_no: 3,
            data: b"is anybody there?",
        };
        let socket = world.sockets.get_mut::<icmp::Socket>(handle);
        let room = socket
            .send(request.buffer_len(), IpAddress::Ipv4(to))
            .expect("room");
        request.emit(&mut Icmpv4Packet::new_unchecked(room), &Default::default());
        world.run("reply", |world| {
            world.sockets.get::<icmp::Socket>(handle).can_recv()
        });
        let socket = world.sockets.get_mut::<icmp::Socket>(handle);
        let (reply, from) = socket.recv().expect("reply");
        assert_eq!(from, IpAddress::Ipv4(to));
        let packet = Icmpv4Packet::new_checked(reply).expect("icmp");
        let reply = Icmpv4Repr::parse(&packet, &Default::default()).expect("checksum");
        assert_eq!(
            reply,
            Icmpv4Repr::EchoReply {
                ident: 99,
                seq_no: 3,
                data: b"is anybody there?"
            }
        );
    }
}

#[test]
fn udp_goes_to_the_host_and_back() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut world = World::new(UserConfig::default());
    let handle = udp_socket(&mut world, 5000);
    for len in [0, 1, 1472, 700] {
        let bytes = common::stream(len as u64, len);
        world
            .sockets
            .get_mut::<udp::Socket>(handle)
            .send_slice(&bytes, (IpAddress::Ipv4(GATEWAY), port))
            .expect("send");
        world.run("echo", |world| {
            let mut buffer = [0; 2000];
            if let Ok((n, from)) = server.recv_from(&mut buffer) {
                server.send_to(&buffer[..n], from).expect("send");
            }
            world.sockets.get::<udp::Socket>(handle).can_recv()
        });
        let (echo, from) = world
            .sockets
            .get_mut::<udp::Socket>(handle)
            .recv()
            .expect("echo");
        assert_eq!(
            (from.endpoint.addr, from.endpoint.port),
            (IpAddress::Ipv4(GATEWAY), port)
        );
        assert_eq!(echo, bytes);
    }
    assert_eq!(world.user.counters().datagram_flows, 1);
}

/// An IPv4 fragment of a UDP datagram.
fn fragment(src_port: u16, dst_port: u16, all: &[u8], offset: usize, len: usize) -> Vec<u8> {
    let mut message = Vec::new();
    message.extend_from_slice(&src_port.to_be_bytes());
    message.extend_from_slice(&dst_port.to_be_bytes());
    message.extend_from_slice(&u16::try_from(8 + all.len()).expect("short").to_be_bytes());
    message.extend_from_slice(&[0, 0]);
    message.extend_from_slice(all);
    let part = &message[offset..(offset + len).min(message.len())];
    let more = offset + part.len() < message.len();
    let mut frame = Vec::new();
    frame.extend_from_slice(&[0x52, 0x55, 0x0a, 0, 2, 2]);
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&u16::try_from(20 + part.len()).expect("short").to_be_bytes());
    let field = u16::try_from(offset / 8).expect("short") | if more { 0x2000 } else { 0 };
    frame.extend_from_slice(&[0, 7]);
    frame.extend_from_slice(&field.to_be_bytes());
    frame.extend_from_slice(&[64, 17, 0, 0]);
    frame.extend_from_slice(&GUEST.octets());
    frame.extend_from_slice(&GATEWAY.octets());
    let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(part);
    frame
}

#[test]
fn datagrams_longer_than_the_mtu_go_both_ways_in_fragments() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    server
        .set_read_timeout(Some(common::PATIENCE))
        .expect("timeout");
    let port = server.local_addr().expect("address").port();
    let mut world = World::new(UserConfig::default());
    let all = common::stream(1, 9000);
    // Out of order, and one twice, which makes the first attempt void.
    for offset in [1480, 0, 0] {
        transmit(
            &mut world.user,
            VnetHeader::default(),
            &fragment(4000, port, &all, offset, 1480),
        );
    }
    for offset in (0..9008).step_by(1480).rev() {
        transmit(
            &mut world.user,
            VnetHeader::default(),
            &fragment(4000, port, &all, offset, 1480),
        );
    }
    let mut buffer = [0; 10000];
    let (n, from) = server.recv_from(&mut buffer).expect("datagram");
    assert_eq!(buffer[..n], all);
    server.send_to(&all, from).expect("send");
    let mut whole = vec![0; 9008];
    let mut have = 0;
    world.run("fragments", |world| {
        while let Some(frame) = world.nic.rx.pop_front() {
            assert!(frame.len() <= 1514);
            let field = u16::from_be_bytes([frame[20], frame[21]]);
            let offset = usize::from(field & 0x1fff) * 8;
            whole[offset..offset + frame.len() - 34].copy_from_slice(&frame[34..]);
            have += frame.len() - 34;
        }
        world.user.poll(std::time::Instant::now());
        world
            .nic
            .rx
            .extend(receive(&mut world.user).into_iter().map(|(_, frame)| frame));
        have >= 9008
    });
    assert_eq!(whole[8..], all);
}

#[test]
fn a_closed_udp_port_is_told_by_icmp() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = server.local_addr().expect("address").port();
    drop(server);
    let mut world = World::new(UserConfig::default());
    let handle = udp_socket(&mut world, 5000);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut errors = icmp::Socket::new(buffer(), buffer());
    errors.bind(icmp::Endpoint::Udp(5000.into())).expect("bind");
    let errors = world.sockets.add(errors);
    world
        .sockets
        .get_mut::<udp::Socket>(handle)
        .send_slice(b"x", (IpAddress::Ipv4(GATEWAY), port))
        .expect("send");
    world.run("unreachable", |world| {
        world.sockets.get::<icmp::Socket>(errors).can_recv()
    });
}

#[test]
fn questions_for_the_name_server_go_to_the_hosts() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let mut world = World::new(UserConfig {
        resolvers: vec![server.local_addr().expect("address")],
        ..UserConfig::default()
    });
    let handle = udp_socket(&mut world, 5353);
    world
        .sockets
        .get_mut::<udp::Socket>(handle)
        .send_slice(b"who is who?", (IpAddress::Ipv4(DNS), 53))
        .expect("send");
    world.run("answer", |world| {
        let mut buffer = [0; 100];
        if let Ok((n, from)) = server.recv_from(&mut buffer) {
            assert_eq!(&buffer[..n], b"who is who?");
            server.send_to(b"me", from).expect("send");
        }
        world.sockets.get::<udp::Socket>(handle).can_recv()
    });
    let (answer, from) = world
        .sockets
        .get_mut::<udp::Socket>(handle)
        .recv()
        .expect("answer");
    assert_eq!(
        (answer, from.endpoint.addr, from.endpoint.port),
        (&b"me"[..], IpAddress::Ipv4(DNS), 53)
    );
}

/// A server that says nothing, one that cannot be reached, one that refuses, one that answers.
#[test]
fn name_servers_that_do_not_answer_make_way_for_one_that_does() {
    let silent = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let refusing = UdpSocket::bind("127.0.0.1:0").expect("bind").local_addr();
    let good = UdpSocket::bind("127.0.0.1:0").expect("bind");
    good.set_nonblocking(true).expect("nonblocking");
    let bad: [std::net::SocketAddr; 3] = [
        silent.local_addr().expect("address"),
        // Multicast, without an interface to go by.
        "[ff02::1]:53".parse().expect("address"),
        refusing.expect("address"),
    ];
    for bad in bad {
        let mut world = World::new(UserConfig {
            resolvers: vec![bad, good.local_addr().expect("address")],
            ..UserConfig::default()
        });
        let handle = udp_socket(&mut world, 5353);
        let mut asked: Option<std::time::Instant> = None;
        world.run("answer", |world| {
            // As often as resolvers ask.
            if asked.is_none_or(|at| at.elapsed().as_millis() > 1100) {
                asked = Some(std::time::Instant::now());
                world
                    .sockets
                    .get_mut::<udp::Socket>(handle)
                    .send_slice(b"who is who?", (IpAddress::Ipv4(DNS), 53))
                    .expect("send");
            }
            let mut buffer = [0; 100];
            if let Ok((_, from)) = good.recv_from(&mut buffer) {
                good.send_to(b"me", from).expect("send");
            }
            world.sockets.get::<udp::Socket>(handle).can_recv()
        });
        assert!(world.user.counters().datagram_flows <= 3, "{bad}");
    }
}

#[test]
fn a_udp_port_of_the_host_leads_into_the_guest() {
    let mut world = World::new(UserConfig {
        restrict: true,
        forwards: vec![HostForward {
            protocol: Protocol::Udp,
            host: "127.0.0.1:0".parse().expect("address"),
            guest_addr: None,
            guest_port: 7,
        }],
        ..UserConfig::default()
    });
    let addr = world.user.forward_addresses()[0].expect("address");
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client.set_nonblocking(true).expect("nonblocking");
    let handle = udp_socket(&mut world, 7);
    client.send_to(b"knock", addr).expect("send");
    world.run("echo", |world| {
        let socket = world.sockets.get_mut::<udp::Socket>(handle);
        if let Ok((bytes, from)) = socket.recv() {
            assert_eq!(from.endpoint.addr, IpAddress::Ipv4(GATEWAY));
            let bytes = bytes.to_vec();
            socket.send_slice(&bytes, from).expect("send");
        }
        let mut buffer = [0; 100];
        client.recv_from(&mut buffer).is_ok_and(|(n, from)| {
            assert_eq!((&buffer[..n], from), (&b"knock"[..], addr));
            true
        })
    });
}

#[test]
fn a_restricted_guest_reaches_nothing_by_itself() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let tcp_server = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = server.local_addr().expect("address").port();
    let mut world = World::new(UserConfig {
        restrict: true,
        resolvers: vec![server.local_addr().expect("address")],
        ..UserConfig::default()
    });
    let handle = udp_socket(&mut world, 5000);
    for to in [(GATEWAY, port), (DNS, 53)] {
        world
            .sockets
            .get_mut::<udp::Socket>(handle)
            .send_slice(b"x", (IpAddress::Ipv4(to.0), to.1))
            .expect("send");
    }
    let tcp_port = tcp_server.local_addr().expect("address").port();
    let handle = world.connect((GATEWAY, tcp_port), 40000, 4096);
    world.run("refused", |world| {
        world.tcp(handle).state() == tcp::State::Closed && world.user.counters().refused == 3
    });
    assert_eq!(world.user.flows(), (0, 0));
}

#[test]
fn the_oldest_conversation_makes_way_for_a_new_one() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("bind");
    let port = server.local_addr().expect("address").port();
    let mut user = User::new(UserConfig {
        limits: Limits {
            datagram_flows: 8,
            ..Limits::default()
        },
        ..UserConfig::default()
    })
    .expect("a stack");
    for src in 1000..1100 {
        let all = common::stream(1, 10);
        transmit(
            &mut user,
            VnetHeader::default(),
            &fragment(src, port, &all, 0, 1480),
        );
    }
    assert_eq!(user.flows().1, 8);
    assert_eq!(user.counters().datagram_flows, 100);
    let later = std::time::Instant::now() + Duration::from_secs(1000);
    user.poll(later);
    assert_eq!(user.flows().1, 0, "they are forgotten in the end");
    assert_eq!(user.next_timeout(), None);
}

#[test]
fn addresses_that_are_not_the_guests_are_dropped() {
    let mut user = User::new(UserConfig::default()).expect("a stack");
    for src in [
        GATEWAY,
        Ipv4Addr::new(8, 8, 8, 8),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::BROADCAST,
    ] {
        let mut frame = fragment(1000, 9, b"x", 0, 1480);
        frame[26..30].copy_from_slice(&src.octets());
        frame[24..26].fill(0);
        let sum = !smoltcp::wire::checksum::data(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        transmit(&mut user, VnetHeader::default(), &frame);
    }
    assert_eq!(user.counters().spoofed, 4);
    assert_eq!(user.flows(), (0, 0));
    let _ = IpCidr::new(IpAddress::Ipv4(GUEST), 24);
}
