// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that sends anything it likes: no panic, no endless loop, bounded tables.

mod common;
mod exercise;

use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use common::{GATEWAY, GUEST, MAC, Random, guest, memory, receive, transmit};
use proptest::prelude::*;
use smoltcp::wire::checksum;
use vmsg_net::user::{Limits, User, UserConfig};
use vmsg_net::{Backend, Offloads, VnetHeader};

fn offloads() -> Offloads {
    common::World::offloads()
}

/// Nothing here may reach beyond this machine.
fn config() -> UserConfig {
    UserConfig {
        resolvers: vec!["127.0.0.1:9".parse().expect("address")],
        limits: Limits {
            tcp_flows: 40,
            tcp_half_open: 20,
            datagram_flows: 10,
            neighbours: 4,
            ..Limits::default()
        },
        ..UserConfig::default()
    }
}

fn ipv4(protocol: u8, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&[0x52, 0x55, 0x0a, 0, 2, 2]);
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(
        &u16::try_from(20 + payload.len())
            .expect("short")
            .to_be_bytes(),
    );
    frame.extend_from_slice(&[0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend_from_slice(&GUEST.octets());
    frame.extend_from_slice(&dst.octets());
    let sum = !checksum::data(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

struct Tcp {
    src: u16,
    dst: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn tcp(head: &Tcp, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend_from_slice(&head.src.to_be_bytes());
    segment.extend_from_slice(&head.dst.to_be_bytes());
    segment.extend_from_slice(&head.seq.to_be_bytes());
    segment.extend_from_slice(&head.ack.to_be_bytes());
    let words = u8::try_from((20 + options.len()) / 4).expect("short");
    segment.extend_from_slice(&[words << 4, head.flags]);
    segment.extend_from_slice(&head.window.to_be_bytes());
    segment.extend_from_slice(&[0; 4]);
    segment.extend_from_slice(options);
    segment.extend_from_slice(payload);
    ipv4(6, GATEWAY, &segment)
}

/// The stack takes the frame as one whose checksum is still to be completed.
const PARTIAL: VnetHeader = VnetHeader {
    flags: VnetHeader::NEEDS_CSUM,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
};

fn drain(user: &mut User) -> Vec<Vec<u8>> {
    user.poll(Instant::now());
    receive(user).into_iter().map(|(_, frame)| frame).collect()
}

/// Sequence number, acknowledgement, flags of the TCP segments.
fn segments(frames: &[Vec<u8>]) -> Vec<(u32, u32, u8)> {
    let word = |frame: &[u8], at: usize| {
        u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
    };
    frames
        .iter()
        .filter(|frame| frame.len() >= 54 && frame[23] == 6)
        .map(|frame| (word(frame, 38), word(frame, 42), frame[47]))
        .collect()
}

#[test]
fn a_flood_of_syns_is_bounded_and_passes() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let dst = listener.local_addr().expect("address").port();
    let mut user = User::new(config()).expect("a stack");
    for src in 1..=5000 {
        let head = Tcp {
            src,
            dst,
            seq: 7,
            ack: 0,
            flags: SYN,
            window: 1000,
        };
        transmit(&mut user, PARTIAL, &tcp(&head, &[], &[]));
    }
    assert!(user.flows().0 <= 20);
    assert!(user.counters().limited >= 4900);
    drain(&mut user);
    // In the end they go.
    let mut later = Instant::now();
    for _ in 0..100 {
        later += Duration::from_secs(5);
        user.poll(later);
        receive(&mut user);
    }
    assert_eq!(user.flows().0, 0);
    assert_eq!(user.next_timeout(), None);
}

#[test]
fn a_scan_of_ports_leaves_nothing_behind() {
    let mut user = User::new(config()).expect("a stack");
    let mut resets = 0;
    for dst in 1..=2000 {
        let head = Tcp {
            src: 1000,
            dst,
            seq: 7,
            ack: 0,
            flags: SYN,
            window: 1000,
        };
        transmit(&mut user, PARTIAL, &tcp(&head, &[], &[]));
        let frames = drain(&mut user);
        resets += segments(&frames)
            .iter()
            .filter(|(.., flags)| flags & RST != 0)
            .count();
    }
    assert!(resets > 1900, "{resets}");
    assert!(user.flows().0 < 40);
}

/// Opens a connection; returns our next sequence number and the stack's.
fn open(user: &mut User, dst: u16, window: u16) -> (u32, u32) {
    let head = Tcp {
        src: 1000,
        dst,
        seq: 99,
        ack: 0,
        flags: SYN,
        window,
    };
    transmit(
        user,
        PARTIAL,
        &tcp(&head, &[2, 4, 5, 0xb4, 3, 3, 14, 0], &[]),
    );
    let start = Instant::now();
    loop {
        let frames = drain(user);
        if let Some((seq, ack, flags)) = segments(&frames).first() {
            assert_eq!((*ack, *flags), (100, SYN | ACK));
            let head = Tcp {
                src: 1000,
                dst,
                seq: 100,
                ack: seq + 1,
                flags: ACK,
                window,
            };
            transmit(user, PARTIAL, &tcp(&head, &[], &[]));
            drain(user);
            return (100, seq + 1);
        }
        assert!(start.elapsed() < common::PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn acknowledgements_of_what_was_not_sent_are_ignored() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let dst = listener.local_addr().expect("address").port();
    let mut user = User::new(config()).expect("a stack");
    let (seq, ack) = open(&mut user, dst, 1000);
    for far in [1, 1000, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, 0xc000_0000] {
        let head = Tcp {
            src: 1000,
            dst,
            seq,
            ack: ack.wrapping_add(far),
            flags: ACK,
            window: 0,
        };
        transmit(&mut user, PARTIAL, &tcp(&head, &[], b"x"));
        let frames = drain(&mut user);
        assert!(
            segments(&frames)
                .iter()
                .all(|(s, _, flags)| *s == ack && flags & RST == 0)
        );
    }
    assert_eq!(user.flows().0, 1);
}

#[test]
fn resets_beside_the_window_are_ignored() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let dst = listener.local_addr().expect("address").port();
    let mut user = User::new(config()).expect("a stack");
    let (seq, ack) = open(&mut user, dst, 1000);
    for off in [1, 100, 70000, 0x8000_0000] {
        let head = Tcp {
            src: 1000,
            dst,
            seq: seq + off,
            ack,
            flags: RST | ACK,
            window: 0,
        };
        transmit(&mut user, PARTIAL, &tcp(&head, &[], &[]));
        assert_eq!(user.flows().0, 1);
    }
    let head = Tcp {
        src: 1000,
        dst,
        seq,
        ack,
        flags: RST,
        window: 0,
    };
    transmit(&mut user, PARTIAL, &tcp(&head, &[], &[]));
    assert_eq!(user.flows().0, 0);
}

#[test]
fn a_wrong_checksum_is_noticed_unless_it_is_to_be_completed() {
    let mut user = User::new(config()).expect("a stack");
    let head = Tcp {
        src: 1000,
        dst: 1,
        seq: 7,
        ack: 0,
        flags: SYN,
        window: 1000,
    };
    transmit(&mut user, VnetHeader::default(), &tcp(&head, &[], &[]));
    assert_eq!(user.counters().malformed, 1);
}

#[test]
fn any_order_of_segments_is_survived() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    listener.set_nonblocking(true).expect("nonblocking");
    let dst = listener.local_addr().expect("address").port();
    for seed in 1..=30u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut user = User::new(config()).expect("a stack");
        if seed % 2 == 0 {
            user.set_guest(&guest(offloads()));
        }
        let mut now = Instant::now();
        let (mut seq, mut ack) = (99u32, 0u32);
        let mut peers = Vec::new();
        for _ in 0..400 {
            let near = |random: &mut Random, n: u32| match random.below(8) {
                0 => n.wrapping_add(u32::try_from(random.below(3000)).expect("small")),
                1 => n.wrapping_sub(u32::try_from(random.below(3000)).expect("small")),
                2 => u32::try_from(random.next() >> 32).expect("32 bits"),
                _ => n,
            };
            let flags = [SYN, ACK, ACK, ACK, ACK | FIN, RST, SYN | ACK, FIN, 0x3f, 0]
                [usize::try_from(random.below(10)).expect("small")];
            let head = Tcp {
                src: 1000 + u16::try_from(random.below(3)).expect("small"),
                dst,
                seq: near(&mut random, seq),
                ack: near(&mut random, ack),
                flags,
                window: u16::try_from(random.next() >> 48).expect("16 bits"),
            };
            let payload = vec![1; usize::try_from(random.below(2000)).expect("small")];
            let options: Vec<u8> = (0..random.below(11) * 4)
                .map(|_| (random.next() >> 56) as u8)
                .collect();
            transmit(&mut user, PARTIAL, &tcp(&head, &options, &payload));
            if let Ok((peer, _)) = listener.accept() {
                use std::io::Write;
                let _ = (&peer).write_all(&[7; 3000]);
                if random.below(2) == 0 {
                    peers.push(peer);
                }
            }
            if random.below(10) == 0 {
                now += Duration::from_millis(random.below(3000));
            }
            user.poll(now);
            for (s, a, _) in segments(
                &receive(&mut user)
                    .into_iter()
                    .map(|(_, f)| f)
                    .collect::<Vec<_>>(),
            ) {
                (seq, ack) = (a, s.wrapping_add(1));
            }
        }
        assert!(user.flows().0 <= 40);
        // With nobody there any more, everything is let go in the end.
        for _ in 0..900 {
            now += Duration::from_secs(10);
            user.poll(now);
            receive(&mut user);
        }
        assert_eq!(user.flows(), (0, 0), "seed {seed}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_frames_are_survived(
        frames in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..200), any::<[u8; 10]>()), 0..20)
    ) {
        let mut user = User::new(config()).expect("a stack");
        for (frame, header) in frames {
            transmit(&mut user, VnetHeader::from_bytes(&header), &frame);
        }
        drain(&mut user);
    }

    /// Of both versions, with any number of fragments, extensions and messages of routers.
    #[test]
    fn any_stories_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        exercise::stack(&bytes);
    }

    /// Headers are right up to some point, so that the rest is looked at.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec(
            (
                prop::sample::select(vec![1u8, 6, 17, 2]),
                prop::sample::select(vec![GATEWAY, common::DNS, Ipv4Addr::BROADCAST, GUEST]),
                prop::collection::vec(any::<u8>(), 0..400),
                any::<bool>(),
                any::<Option<(u16, u8)>>(),
                any::<Option<u16>>(),
            ),
            0..20,
        )
    ) {
        let mut user = User::new(config()).expect("a stack");
        user.set_guest(&guest(offloads()));
        for (protocol, dst, mut payload, dhcp, spoil, fragment) in packets {
            if dhcp && payload.len() > 250 {
                // To the DHCP server, with the magic number and a type.
                let len = u16::try_from(payload.len()).expect("short");
                payload[..8].copy_from_slice(&[0, 68, 0, 67, (len >> 8) as u8, (len & 0xff) as u8, 0, 0]);
                payload[8..11].copy_from_slice(&[1, 1, 6]);
                payload[244..248].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
                payload[248..250].copy_from_slice(&[53, 1]);
            }
            if !dhcp && protocol != 1 && payload.len() >= 4 {
                // The port for what nobody reads: no other service of this machine shall suffer.
                payload[2..4].copy_from_slice(&[0, 9]);
            }
            let mut frame = ipv4(protocol, dst, &payload);
            if let Some(fragment) = fragment {
                frame[20..22].copy_from_slice(&fragment.to_be_bytes());
            }
            if let Some((at, value)) = spoil {
                let at = 14 + usize::from(at) % 20;
                frame[at] = value;
            }
            frame[24..26].fill(0);
            let sum = !checksum::data(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
            transmit(&mut user, PARTIAL, &frame);
        }
        drain(&mut user);
        let (tcp, datagrams) = user.flows();
        prop_assert!(tcp <= 40 && datagrams <= 10);
    }
}

#[test]
fn a_guest_without_buffers_costs_nothing_but_waiting() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let dst = listener.local_addr().expect("address").port();
    let mut user = User::new(config()).expect("a stack");
    open(&mut user, dst, 1000);
    use std::io::Write;
    listener
        .accept()
        .expect("accept")
        .0
        .write_all(&[1; 5000])
        .expect("write");
    let memory = memory(2000);
    let mut now = Instant::now();
    let start = Instant::now();
    while !user.has_frames() {
        user.poll(now);
        assert!(start.elapsed() < common::PATIENCE);
    }
    for _ in 0..100 {
        now += Duration::from_secs(1);
        user.poll(now);
        let mut sink = common::Sink::new(&memory, 0);
        assert_eq!(user.receive(now, &mut sink), 0);
        assert!(user.has_frames());
    }
    assert_eq!(user.flows().0, 1, "the guest may come back");
}

/// How often in a row the stack has something to do, while nothing comes from outside.
fn wakes(user: &mut User) -> (usize, Vec<Vec<u8>>) {
    let mut frames = Vec::new();
    for count in 0..100 {
        let at_once = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let fd = user.event_fd().expect("a descriptor");
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            fd,
            rustix::event::PollFlags::IN,
        )];
        if rustix::event::poll(&mut fds, Some(&at_once)).expect("poll") == 0 {
            return (count, frames);
        }
        frames.extend(drain(user));
    }
    (100, frames)
}

#[test]
fn a_host_that_does_not_read_is_no_reason_to_stay_awake() {
    for size in [700, 1400] {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::STREAM,
            None,
        )
        .expect("a socket");
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 4096).expect("set");
        let any = std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        rustix::net::bind(&socket, &any).expect("bind");
        rustix::net::listen(&socket, 5).expect("listen");
        let listener = TcpListener::from(socket);
        let dst = listener.local_addr().expect("address").port();
        let mut user = User::new(config()).expect("a stack");
        let (mut seq, ack) = open(&mut user, dst, 1000);
        let _peer = listener.accept().expect("accept");
        let mut stuck = 0;
        while stuck < 10 {
            let head = Tcp {
                src: 1000,
                dst,
                seq,
                ack,
                flags: ACK,
                window: 1000,
            };
            transmit(&mut user, PARTIAL, &tcp(&head, &[], &vec![7; size]));
            let mut frames = drain(&mut user);
            let (count, more) = wakes(&mut user);
            frames.extend(more);
            assert!(count < 20, "awake with {} bytes on the way", seq - 100);
            let before = seq;
            seq = segments(&frames)
                .iter()
                .fold(seq, |seq, (_, ack, _)| seq.max(*ack));
            stuck = if seq == before { stuck + 1 } else { 0 };
        }
    }
}
