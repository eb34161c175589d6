// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Large UDP frames of a guest, which of its queue pairs frames come back on, and who gives way
//! to whom among conversations.

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::{GATEWAY, GATEWAY_MAC, GATEWAY6, GUEST, GUEST6, MAC, frame6, memory, stream, udp6};
use smoltcp::wire::checksum;
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::user::{HostForward, Limits, Protocol, User, UserConfig};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

fn server(to: IpAddr) -> (UdpSocket, u16) {
    let loopback = match to {
        IpAddr::V4(_) => "127.0.0.1:0",
        IpAddr::V6(_) => "[::1]:0",
    };
    let server = UdpSocket::bind(loopback).expect("bind");
    server.set_nonblocking(true).expect("nonblocking");
    let port = server.local_addr().expect("address").port();
    (server, port)
}

/// A frame with a UDP datagram to the gateway whose checksum is to be completed.
fn datagram(to: IpAddr, src: u16, dst: u16, payload: &[u8]) -> (Vec<u8>, VnetHeader) {
    let mut header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    if to.is_ipv6() {
        let message = udp6((GUEST6, src), (GATEWAY6, dst), payload);
        header.csum_start = 54;
        return (frame6(GUEST6, GATEWAY6, 17, 64, &message), header);
    }
    header.csum_start = 34;
    let mut frame = GATEWAY_MAC.to_vec();
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    let len = |n: usize| u16::try_from(n).expect("short").to_be_bytes();
    frame.extend_from_slice(&len(28 + payload.len()));
    frame.extend_from_slice(&[0, 7, 0, 0, 64, 17, 0, 0]);
    frame.extend_from_slice(&GUEST.octets());
    frame.extend_from_slice(&GATEWAY.octets());
    let sum = !checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&src.to_be_bytes());
    frame.extend_from_slice(&dst.to_be_bytes());
    frame.extend_from_slice(&len(8 + payload.len()));
    frame.extend_from_slice(&[0, 0]);
    frame.extend_from_slice(payload);
    (frame, header)
}

/// Sends on a queue pair.
fn send(user: &mut User, pair: u16, header: VnetHeader, frame: &[u8]) {
    let memory = memory(frame.len());
    let pieces = [RamSlice::from_atomics(&memory)];
    let all = Pieces::new(&pieces);
    all.write(frame);
    let frame = TxFrame {
        header,
        payload: all.take(frame.len()),
    };
    assert_eq!(user.transmit(Instant::now(), pair, &[frame]), 1);
}

fn all(server: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = vec![0; 70000];
    let mut datagrams = Vec::new();
    while let Ok((n, _)) = server.recv_from(&mut buffer) {
        datagrams.push(buffer[..n].to_vec());
    }
    datagrams
}

#[test]
fn a_run_of_datagrams_in_one_frame_arrives_as_datagrams() {
    for to in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        let (server, port) = server(to);
        let mut user = User::new(UserConfig::default()).expect("a stack");
        assert!(user.offloads().uso);
        for (size, len) in [
            (1000, 9500),
            (1400, 1401),
            (1200, 1200),
            (8, 1000),
            (100, 42),
        ] {
            let bytes = stream(len as u64, len);
            let (frame, header) = datagram(to, 4000, port, &bytes);
            let header = VnetHeader {
                gso_type: VnetHeader::GSO_UDP_L4,
                gso_size: size,
                hdr_len: header.csum_start + 8,
                ..header
            };
            send(&mut user, 0, header, &frame);
            let whole: Vec<_> = bytes
                .chunks(usize::from(size))
                .map(<[u8]>::to_vec)
                .collect();
            assert_eq!(all(&server), whole, "{len} in {size}");
            // One as long as it is, in between.
            let (frame, header) = datagram(to, 4000, port, &bytes);
            send(&mut user, 0, header, &frame);
            assert_eq!(all(&server), [bytes]);
        }
        assert_eq!(user.counters().datagram_flows, 1);
        assert_eq!(user.counters().malformed, 0);
    }
}

/// Longer than what the way takes, so that the kernel does not cut it.
#[test]
fn runs_that_the_host_does_not_cut_are_cut_here() {
    let to = GATEWAY.into();
    let (server, port) = server(to);
    let mut user = User::new(UserConfig::default()).expect("a stack");
    let bytes = stream(1, 60_000);
    let (frame, header) = datagram(to, 4000, port, &bytes);
    let header = VnetHeader {
        gso_type: VnetHeader::GSO_UDP_L4,
        gso_size: 30_000,
        ..header
    };
    send(&mut user, 0, header, &frame);
    let whole: Vec<_> = bytes.chunks(30_000).map(<[u8]>::to_vec).collect();
    assert_eq!(all(&server), whole);
}

#[test]
fn runs_of_impossible_sizes_are_dropped() {
    let to = GATEWAY.into();
    let (server, port) = server(to);
    let mut user = User::new(UserConfig::default()).expect("a stack");
    let bytes = stream(1, 60_000);
    let (frame, header) = datagram(to, 4000, port, &bytes);
    for gso_size in [0, 1, 400] {
        let header = VnetHeader {
            gso_type: VnetHeader::GSO_UDP_L4,
            gso_size,
            ..header
        };
        send(&mut user, 0, header, &frame);
    }
    assert_eq!(user.counters().malformed, 3);
    assert!(all(&server).is_empty());
}

#[test]
fn a_datagram_that_was_to_be_fragmented_arrives_as_a_whole() {
    for to in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
        let (server, port) = server(to);
        let mut user = User::new(UserConfig::default()).expect("a stack");
        assert!(user.offloads().ufo);
        let bytes = stream(1, 65_000);
        let (frame, header) = datagram(to, 4000, port, &bytes);
        let header = VnetHeader {
            gso_type: VnetHeader::GSO_UDP,
            gso_size: 1480,
            ..header
        };
        send(&mut user, 0, header, &frame);
        assert_eq!(all(&server), [bytes]);
    }
}

/// Buffers of several queue pairs: some frames for each, and which came where.
struct Pairs<'a> {
    memory: [RamSlice<'a>; 1],
    left: Vec<usize>,
    offered: usize,
    heads: bool,
    frames: Vec<(usize, Vec<u8>)>,
}

impl RxSink for Pairs<'_> {
    fn offer(&mut self, to: Target<'_>, _: usize) -> Option<Pieces<'_>> {
        self.offered = match to {
            Target::Pair(pair) => {
                assert!(!self.heads, "the device was to choose");
                usize::from(pair)
            }
            Target::Head(head) => {
                assert!(self.heads);
                // By the guest's port, which all heads have.
                let at = if head[12] == 8 { 34 } else { 54 };
                assert!(head.len() >= at + 4, "{head:?}");
                usize::from(head[at + 3]) % self.left.len()
            }
        };
        (self.left[self.offered] > 0).then_some(Pieces::new(&self.memory))
    }

    fn commit(&mut self, _: &VnetHeader, len: usize) {
        self.left[self.offered] -= 1;
        let mut frame = vec![0; len];
        Pieces::new(&self.memory).read(&mut frame);
        self.frames.push((self.offered, frame));
    }
}

/// What each pair got, by port of the guest.
fn ports(sink: &Pairs<'_>) -> BTreeSet<(usize, u16)> {
    sink.frames
        .iter()
        .map(|(pair, frame)| {
            let at = if frame[12] == 8 { 34 } else { 54 };
            (*pair, u16::from_be_bytes([frame[at + 2], frame[at + 3]]))
        })
        .collect()
}

#[test]
fn frames_come_on_the_pair_that_the_guest_speaks_on_and_a_full_one_holds_up_nobody_else() {
    for heads in [false, true] {
        for to in [IpAddr::from(GATEWAY), GATEWAY6.into()] {
            let (server, port) = server(to);
            let mut user = User::new(UserConfig::default()).expect("a stack");
            user.set_guest(&Guest {
                offloads: Offloads::ALL,
                pairs: 4,
                heads,
                ..Guest::NONE
            });
            for pair in 0..4u16 {
                for n in 0..5 {
                    let (frame, header) = datagram(to, 4000 + pair + 4 * n, port, b"hello");
                    send(&mut user, pair, header, &frame);
                }
            }
            let mut buffer = [0; 10];
            while let Ok((_, from)) = server.recv_from(&mut buffer) {
                server.send_to(b"one", from).expect("send");
                server.send_to(b"two", from).expect("send");
            }
            user.poll(Instant::now());
            let store = memory(70000);
            let mut sink = Pairs {
                memory: [RamSlice::from_atomics(&store)],
                left: vec![100, 0, 3, 100],
                offered: 0,
                heads,
                frames: Vec::new(),
            };
            user.receive(Instant::now(), &mut sink);
            assert_eq!(sink.left, [90, 0, 0, 90], "heads {heads}, {to}");
            assert!(user.has_frames());
            assert_eq!(user.receive(Instant::now(), &mut sink), 0);
            // The rest, in order.
            sink.left = vec![100; 4];
            user.receive(Instant::now(), &mut sink);
            assert_eq!(sink.frames.len(), 40);
            let expected: BTreeSet<_> = (0..20)
                .map(|n: u16| (usize::from(n % 4), 4000 + n))
                .collect();
            assert_eq!(ports(&sink), expected);
            for n in 0..20u16 {
                let mut mine = sink.frames.iter().filter(|(_, frame)| {
                    let at = if frame[12] == 8 { 34 } else { 54 };
                    frame[at + 2..at + 4] == (4000 + n).to_be_bytes()
                });
                assert!(
                    mine.next()
                        .is_some_and(|(_, frame)| frame.ends_with(b"one"))
                );
                assert!(
                    mine.next()
                        .is_some_and(|(_, frame)| frame.ends_with(b"two"))
                );
            }
            assert!(!user.has_frames());
        }
    }
}

#[test]
fn forwarded_datagrams_come_where_the_guest_answers() {
    let mut user = User::new(UserConfig {
        forwards: vec![HostForward {
            protocol: Protocol::Udp,
            host: "127.0.0.1:0".parse().expect("address"),
            guest_addr: None,
            guest_port: 7,
        }],
        ..UserConfig::default()
    })
    .expect("a stack");
    user.set_guest(&Guest {
        pairs: 4,
        ..Guest::NONE
    });
    let to = user.forward_addresses()[0].expect("address");
    let client = UdpSocket::bind("127.0.0.1:0").expect("bind");
    client
        .set_read_timeout(Some(common::PATIENCE))
        .expect("timeout");
    let store = memory(70000);
    let mut sink = Pairs {
        memory: [RamSlice::from_atomics(&store)],
        left: vec![100; 4],
        offered: 0,
        heads: false,
        frames: Vec::new(),
    };
    for expected in [0, 3] {
        client.send_to(b"knock", to).expect("send");
        sink.frames.clear();
        user.poll(Instant::now());
        user.receive(Instant::now(), &mut sink);
        // The first time, the guest is looked for, too.
        sink.frames.retain(|(_, frame)| frame[12..14] == [8, 0]);
        let (pair, frame) = sink.frames.pop().expect("a frame");
        assert_eq!(pair, expected);
        let port = u16::from_be_bytes([frame[34], frame[35]]);
        let (answer, header) = datagram(GATEWAY.into(), 7, port, b"who?");
        send(&mut user, 3, header, &answer);
        let (n, from) = client.recv_from(&mut [0; 10]).expect("an answer");
        assert_eq!((n, from), (4, to));
    }
}

/// The one that was used just now stays, of however many.
#[test]
fn the_conversation_that_rested_longest_makes_way() {
    let (server, port) = server(GATEWAY6.into());
    let mut user = User::new(UserConfig {
        limits: Limits {
            datagram_flows: 100,
            ..Limits::default()
        },
        ..UserConfig::default()
    })
    .expect("a stack");
    let ask = |user: &mut User, src: u16| -> SocketAddr {
        let (frame, header) = datagram(GATEWAY6.into(), src, port, b"x");
        send(user, 0, header, &frame);
        server.recv_from(&mut [0; 10]).expect("a datagram").1
    };
    let first = ask(&mut user, 1000);
    let second = ask(&mut user, 1001);
    for src in 2000..5000 {
        ask(&mut user, src);
        assert_eq!(ask(&mut user, 1000), first, "it is the same conversation");
    }
    assert_ne!(ask(&mut user, 1001), second, "it was forgotten");
    assert_eq!(user.flows().1, 100);
    assert_eq!(user.counters().datagram_flows, 3003);
    user.poll(Instant::now() + Duration::from_secs(1000));
    assert_eq!(user.flows().1, 0);
    assert!(user.next_timeout().is_some(), "the router's own");
}

/// A sender that the guest does not listen to fills its own buffer, and nothing here.
#[test]
fn a_flood_from_the_host_stays_with_the_host() {
    let (server, port) = server(GATEWAY.into());
    let mut user = User::new(UserConfig::default()).expect("a stack");
    let (frame, header) = datagram(GATEWAY.into(), 4000, port, b"x");
    send(&mut user, 0, header, &frame);
    let (_, from) = server.recv_from(&mut [0; 10]).expect("a datagram");
    let store = memory(70000);
    for _ in 0..20_000 {
        let _ = server.send_to(&[7; 1000], from);
        user.poll(Instant::now());
        let mut sink = Pairs {
            memory: [RamSlice::from_atomics(&store)],
            left: vec![0],
            offered: 0,
            heads: false,
            frames: Vec::new(),
        };
        assert_eq!(user.receive(Instant::now(), &mut sink), 0);
    }
    let mut sink = Pairs {
        memory: [RamSlice::from_atomics(&store)],
        left: vec![100_000],
        offered: 0,
        heads: false,
        frames: Vec::new(),
    };
    while user.has_frames() {
        user.receive(Instant::now(), &mut sink);
    }
    // As many as a socket's buffer holds.
    assert!(
        (10..2000).contains(&sink.frames.len()),
        "{}",
        sink.frames.len()
    );
}
