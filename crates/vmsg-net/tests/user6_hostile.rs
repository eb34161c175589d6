// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that means harm, over IPv6.

mod common;
mod packets6;

use std::net::{Ipv6Addr, UdpSocket};
use std::time::Instant;

use common::{
    DNS6, GATEWAY_MAC, GATEWAY6, GUEST_LOCAL, GUEST6, MAC, ROUTER, Random, frame6, receive, sum6,
    transmit, udp6,
};
use packets6::{ALL_NODES, UDP, group, icmp, send, solicitation, stack};
use vmsg_net::user::{Limits, User, UserConfig};
use vmsg_net::{Backend, VnetHeader};

const TCP: u8 = 6;

/// Two octets of UDP to everywhere.
fn knock(user: &mut User, src: Ipv6Addr, to: Ipv6Addr, port: u16) {
    let message = udp6((src, 4000), (to, port), b"hi");
    send(user, &frame6(src, to, UDP, 64, &message));
}

fn syn(user: &mut User, src: Ipv6Addr, from: u16, to: Ipv6Addr, port: u16) {
    let mut segment = Vec::new();
    segment.extend_from_slice(&from.to_be_bytes());
    segment.extend_from_slice(&port.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 7, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    sum6(src, to, TCP, 16, &mut segment);
    send(user, &frame6(src, to, TCP, 64, &segment));
}

#[test]
fn restrict_is_for_all_protocols_of_ipv6() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut user = User::new(UserConfig {
        restrict: true,
        ..UserConfig::default()
    })
    .expect("a stack");
    let out = "2001:db8::1".parse().expect("address");
    for to in [GATEWAY6, DNS6, out, Ipv6Addr::LOCALHOST] {
        knock(&mut user, GUEST6, to, port);
        knock(&mut user, GUEST6, to, 53);
        syn(&mut user, GUEST6, 4001, to, port);
        syn(&mut user, GUEST6, 4002, to, 53);
    }
    // Echoes beyond the wire; the gateway itself may answer.
    send(&mut user, &icmp(GUEST6, out, &[128, 0, 0, 0, 1, 2, 3, 4]));
    assert_eq!(user.flows(), (0, 0));
    assert!(server.recv_from(&mut [0; 10]).is_err());
    assert!(user.counters().refused >= 5, "{:?}", user.counters());
}

#[test]
fn a_guest_that_plays_router_or_another_neighbour_turns_nothing_round() {
    let mut user = stack();
    knock(&mut user, GUEST6, GATEWAY6, 9);
    receive(&mut user);
    let evil = [0x52, 0x54, 0, 0x66, 0x66, 0x66];
    let mut advertised = vec![
        134, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
    ];
    advertised.extend_from_slice(&evil);
    // As the gateway, and of oneself.
    for src in [ROUTER, GUEST_LOCAL] {
        send(&mut user, &icmp(src, ALL_NODES, &advertised));
    }
    for target in [
        GATEWAY6,
        DNS6,
        ROUTER,
        Ipv6Addr::LOCALHOST,
        "2001:db8::7".parse().expect("address"),
    ] {
        let mut message = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
        message.extend_from_slice(&target.octets());
        message.extend_from_slice(&[2, 1]);
        message.extend_from_slice(&evil);
        send(&mut user, &icmp(GUEST_LOCAL, ALL_NODES, &message));
    }
    // A redirect of everything.
    let mut redirect = vec![137, 0, 0, 0, 0, 0, 0, 0];
    redirect.extend_from_slice(&GUEST_LOCAL.octets());
    redirect.extend_from_slice(&DNS6.octets());
    send(&mut user, &icmp(ROUTER, GUEST6, &redirect));
    send(&mut user, &icmp(GUEST_LOCAL, GUEST6, &redirect));
    receive(&mut user);
    // The gateway still answers for itself, with its own address.
    send(
        &mut user,
        &icmp(GUEST6, group(GATEWAY6), &solicitation(GATEWAY6)),
    );
    let frames = receive(&mut user);
    assert_eq!(frames.len(), 1);
    assert_eq!(
        (&frames[0].1[..6], &frames[0].1[6..12]),
        (&MAC[..], &GATEWAY_MAC[..])
    );
}

#[test]
fn jumbograms_endless_extensions_and_random_packets_are_survived() {
    let mut user = stack();
    // A jumbo payload option, in a packet that says it has no length.
    let jumbo = [UDP, 0, 0xc2, 4, 0, 1, 0, 0];
    let mut frame = frame6(GUEST6, GATEWAY6, 0, 64, &jumbo);
    frame[18..20].fill(0);
    frame.resize(60_000, 1);
    send(&mut user, &frame);
    // Destination options one after another, to the end of the longest packet.
    let chain = [60, 0, 1, 4, 0, 0, 0, 0].repeat(8000);
    send(&mut user, &frame6(GUEST6, GATEWAY6, 60, 64, &chain));
    // A fragment within a fragment within a fragment.
    let nested = [44, 0, 0, 0, 0, 0, 0, 1].repeat(100);
    send(&mut user, &frame6(GUEST6, GATEWAY6, 44, 64, &nested));
    let counters = user.counters();
    assert_eq!(counters.malformed + counters.unsupported, 3, "{counters:?}");
    let mut random = Random(11);
    for _ in 0..5_000 {
        let len = usize::try_from(random.below(120)).expect("small");
        let payload: Vec<u8> = (0..len).map(|_| random.next().to_le_bytes()[0]).collect();
        let next = [0, 43, 44, 50, 51, 58, 59, 60, 6, 17]
            [usize::try_from(random.below(10)).expect("small")];
        let src = [GUEST6, GUEST_LOCAL, Ipv6Addr::UNSPECIFIED]
            [usize::try_from(random.below(3)).expect("small")];
        let dst =
            [GATEWAY6, DNS6, ROUTER, ALL_NODES][usize::try_from(random.below(4)).expect("small")];
        send(&mut user, &frame6(src, dst, next, 255, &payload));
        receive(&mut user);
    }
    assert!(user.flows().1 < 600);
}

#[test]
fn fragments_that_are_never_completed_make_way() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server
        .set_read_timeout(Some(common::PATIENCE))
        .expect("a timeout");
    let port = server.local_addr().expect("address").port();
    let mut user = stack();
    let fragment = |user: &mut User, ident: u32, at: u16, more: u16, part: &[u8]| {
        let mut payload = vec![UDP, 0];
        payload.extend_from_slice(&(at | more).to_be_bytes());
        payload.extend_from_slice(&ident.to_be_bytes());
        payload.extend_from_slice(part);
        send(user, &frame6(GUEST6, GATEWAY6, 44, 64, &payload));
    };
    let begin = Instant::now();
    for ident in 0..5_000 {
        // Far out, so that each would take much memory.
        fragment(&mut user, ident, 64_000, 1, &[1; 8]);
    }
    assert!(begin.elapsed() < common::PATIENCE);
    assert!(user.counters().limited > 4_000);
    // One that is completed is heard all the same.
    let message = udp6((GUEST6, 4000), (GATEWAY6, port), &[5; 2000]);
    fragment(&mut user, 77_777, 0, 1, &message[..1440]);
    fragment(&mut user, 77_777, 1440, 0, &message[1440..]);
    assert_eq!(server.recv_from(&mut [0; 4000]).expect("it comes").0, 2000);
}

#[test]
fn flows_from_thousands_of_addresses_are_bounded() {
    let limits = Limits {
        tcp_flows: 50,
        tcp_half_open: 20,
        datagram_flows: 30,
        neighbours: 8,
        ..Limits::default()
    };
    let mut user = User::new(UserConfig {
        limits,
        ..UserConfig::default()
    })
    .expect("a stack");
    let fds = || {
        std::fs::read_dir("/proc/self/fd")
            .expect("a process")
            .count()
    };
    let before = fds();
    for number in 0..5000u16 {
        let [.., a, b] = number.to_be_bytes();
        let src = Ipv6Addr::new(0xfd00, 0x10, 0, 2, 1, 2, 3, u16::from_be_bytes([a, b]));
        knock(&mut user, src, GATEWAY6, 9);
        syn(&mut user, src, 1000 + number, GATEWAY6, 1 + number % 5);
        let flows = user.flows();
        assert!(flows.0 <= 50 && flows.1 <= 30, "{flows:?}");
    }
    assert!(fds() < before + 200);
    receive(&mut user);
}

/// Headers whose numbers lead out of the frame, for every kind of segmentation.
#[test]
fn offload_headers_that_contradict_the_frame_are_survived() {
    let server = UdpSocket::bind("[::1]:0").expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    let mut user = stack();
    let offloads = user.offloads();
    user.set_guest(&common::guest(offloads));
    let message = udp6((GUEST6, 4000), (GATEWAY6, port), &[7; 3000]);
    let udp = frame6(GUEST6, GATEWAY6, UDP, 64, &message);
    let mut segment = vec![0; 3000];
    segment[..4].copy_from_slice(&[0x0f, 0xa0, 0, 9]);
    segment[12..14].copy_from_slice(&[5 << 4, 0x10]);
    sum6(GUEST6, GATEWAY6, TCP, 16, &mut segment);
    let tcp = frame6(GUEST6, GATEWAY6, TCP, 64, &segment);
    let numbers = [0, 1, 7, 8, 40, 54, 62, 1440, 3053, 0xfffe, 0xffff];
    let mut frames = 0u64;
    for frame in [&udp, &tcp, &udp[..55].to_vec(), &tcp[..70].to_vec()] {
        for gso_type in [0, 1, 3, 4, 5, 0x80, 0x81, 0x83, 0x84, 0x85, 0xff] {
            for flags in [0, 1, 2, 3, 0xff] {
                for &one in &numbers {
                    for &other in &numbers {
                        let header = VnetHeader {
                            flags,
                            gso_type,
                            hdr_len: one,
                            gso_size: other,
                            csum_start: other,
                            csum_offset: one,
                        };
                        transmit(&mut user, header, frame);
                        frames += 1;
                    }
                }
            }
        }
        receive(&mut user);
    }
    // Whatever came through is a run of the datagram's own bytes.
    let mut buffer = [0; 4000];
    while let Ok((len, _)) = server.recv_from(&mut buffer) {
        assert!(len <= 3000 && buffer[..len].iter().all(|byte| *byte == 7));
    }
    assert_eq!(user.counters().frames_from_guest, frames);
    let good = udp6((GUEST6, 4000), (GATEWAY6, port), b"good");
    send(&mut user, &frame6(GUEST6, GATEWAY6, UDP, 64, &good));
    assert_eq!(server.recv_from(&mut buffer).expect("it comes").0, 4);
}
