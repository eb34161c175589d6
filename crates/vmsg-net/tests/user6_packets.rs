// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What belongs to IPv6 below TCP and UDP in the user-mode stack: routers, neighbours, echoes,
//! extension headers, fragments, DHCPv6.

mod common;
mod packets6;

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Duration;

use common::{
    DNS6, GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST, GUEST_LOCAL, GUEST6, MAC, ROUTER, frame6,
    is_summed6, receive, stream, sum6, udp6,
};
use packets6::{
    ALL_NODES, ALL_ROUTERS, ICMP6, UDP, addr, group, icmp, one, open_icmp, send, solicitation,
    stack,
};
use vmsg_net::user::{HostForward, Protocol, User, UserConfig, UserError};
use vmsg_net::{Backend, Offloads};

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
fn who_has_no_address_yet_may_tell_to_which_groups_it_listens() {
    let mut user = stack();
    let routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
    let tell = |user: &mut User, src: Ipv6Addr, kind: u8| {
        // One record, of a group that is new; behind a router alert, as Linux sends it.
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0];
        message.extend_from_slice(&group(GUEST_LOCAL).octets());
        sum6(src, routers, ICMP6, 2, &mut message);
        let mut payload = vec![ICMP6, 0, 5, 2, 0, 0, 1, 0];
        payload.extend_from_slice(&message);
        send(user, &frame6(src, routers, 0, 1, &payload));
    };
    for (kind, src) in [
        (143, Ipv6Addr::UNSPECIFIED),
        (143, GUEST_LOCAL),
        (131, Ipv6Addr::UNSPECIFIED),
        (132, Ipv6Addr::UNSPECIFIED),
    ] {
        tell(&mut user, src, kind);
    }
    let counters = user.counters();
    assert_eq!((counters.malformed, counters.spoofed), (0, 0));
    assert_eq!(counters.unsupported, 4);
    // An echo request without an address is none.
    tell(&mut user, Ipv6Addr::UNSPECIFIED, 128);
    assert_eq!(user.counters().spoofed, 1);
    assert!(receive(&mut user).is_empty());
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
