// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest whose frames are made of any bytes, for the user-mode stack: what tests and fuzzing
//! have in common.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each user needs another part of it"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::user::{Limits, User, UserConfig};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0a, 0, 2, 2];
const NET6: [u16; 4] = [0xfd00, 0x10, 0, 2];

/// Nothing here may reach beyond this machine.
pub fn config(restrict: bool) -> UserConfig {
    UserConfig {
        resolvers: vec!["127.0.0.1:9".parse().expect("address")],
        restrict,
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

/// Bytes to be used up; zeros after the end.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn half(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }
}

fn local6(n: u16) -> Ipv6Addr {
    let [a, b, c, d] = NET6;
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, n)
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

/// A packet whose headers are right up to some point, so that the rest is looked at.
fn packet(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let choice = bytes.byte();
    let v6 = choice & 1 != 0;
    let protocol = match choice >> 1 & 7 {
        0 | 1 if v6 => 58,
        0 | 1 => 1,
        2 => 6,
        3 => 17,
        4 if v6 => 44,
        5 if v6 => 0,
        6 if v6 => 60,
        _ => bytes.byte(),
    };
    let to = bytes.byte();
    let dst: IpAddr = match (v6, to & 7) {
        (false, 0) => Ipv4Addr::new(10, 0, 2, 3).into(),
        (false, 1) => Ipv4Addr::BROADCAST.into(),
        (false, 2) => Ipv4Addr::new(10, 0, 2, 15).into(),
        (false, _) => Ipv4Addr::new(10, 0, 2, 2).into(),
        (true, 0) => local6(3).into(),
        (true, 1) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2).into(),
        (true, 2) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2).into(),
        (true, 3) => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 2).into(),
        (true, _) => local6(2).into(),
    };
    let src: IpAddr = match (v6, to >> 3 & 3) {
        (false, 0) => Ipv4Addr::UNSPECIFIED.into(),
        (false, _) => Ipv4Addr::new(10, 0, 2, 15).into(),
        (true, 0) => Ipv6Addr::UNSPECIFIED.into(),
        (true, 1) => Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9).into(),
        (true, _) => local6(0x15).into(),
    };
    let hops = if choice & 0x10 != 0 {
        255
    } else {
        bytes.byte()
    };
    let fragment = bytes.half();
    let len = usize::from(bytes.half()) % 1500;
    let mut payload = bytes.take(len).to_vec();
    let dhcp = choice & 0x20 != 0;
    if protocol == 17 && payload.len() >= 8 {
        let port = match (dhcp, v6) {
            (true, false) => 67u16,
            (true, true) => 547,
            // The port for what nobody reads: no other service of this machine shall suffer.
            (false, _) => 9,
        };
        payload[2..4].copy_from_slice(&port.to_be_bytes());
        if choice & 0x40 != 0 {
            let len = u16::try_from(payload.len()).expect("short");
            payload[4..6].copy_from_slice(&len.to_be_bytes());
        }
        if dhcp && !v6 && payload.len() > 250 {
            payload[8..11].copy_from_slice(&[1, 1, 6]);
            payload[244..248].copy_from_slice(&[0x63, 0x82, 0x53, 0x63]);
            payload[248..250].copy_from_slice(&[53, 1]);
        }
    }
    if protocol == 6 && payload.len() >= 4 {
        payload[2..4].copy_from_slice(&9u16.to_be_bytes());
    }
    let mut frame = GATEWAY_MAC.to_vec();
    frame.extend_from_slice(&GUEST_MAC);
    let len = |n: usize| u16::try_from(n).expect("short").to_be_bytes();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            if protocol == 1 && payload.len() >= 4 {
                payload[2..4].fill(0);
                let sum = sum(&[&payload]);
                payload[2..4].copy_from_slice(&sum.to_be_bytes());
            }
            frame.extend_from_slice(&[8, 0, 0x45, 0]);
            frame.extend_from_slice(&len(20 + payload.len()));
            frame.extend_from_slice(&[0, 0]);
            let place = if choice & 0x80 != 0 { fragment } else { 0 };
            frame.extend_from_slice(&place.to_be_bytes());
            frame.extend_from_slice(&[hops, protocol, 0, 0]);
            frame.extend_from_slice(&src.octets());
            frame.extend_from_slice(&dst.octets());
            let sum = sum(&[&frame[14..34]]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            if protocol == 58 && payload.len() >= 4 {
                payload[2..4].fill(0);
                let tail = [len(payload.len()), [0, 58]].concat();
                let sum = sum(&[&src.octets(), &dst.octets(), &tail, &payload]);
                payload[2..4].copy_from_slice(&sum.to_be_bytes());
            }
            if protocol == 44 && payload.len() >= 8 {
                payload[2..4].copy_from_slice(&fragment.to_be_bytes());
                payload[4..8].fill(0);
            }
            frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend_from_slice(&len(payload.len()));
            frame.extend_from_slice(&[protocol, hops]);
            frame.extend_from_slice(&src.octets());
            frame.extend_from_slice(&dst.octets());
        }
        _ => unreachable!("of the same version"),
    }
    frame.extend_from_slice(&payload);
    frame
}

/// Buffers that take so many frames.
struct Sink<'a> {
    memory: [RamSlice<'a>; 1],
    left: usize,
    offered: Option<usize>,
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        if let Target::Head(head) = to {
            assert!(head.len() >= 14);
        }
        let all = Pieces::new(&self.memory);
        self.offered = (self.left > 0 && len <= all.len()).then_some(len);
        self.offered.map(|_| all)
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let offered = self.offered.take().expect("an offer");
        assert!(len <= offered, "more than was asked for");
        assert!(len >= 14, "no frame");
        self.left -= 1;
        if header.needs_csum() {
            let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
            assert!(end <= len);
        }
    }
}

/// Hands frames that are made of `bytes` to two stacks, which survive, and keep to their limits.
pub fn stack(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let words: Vec<AtomicU64> = (0..9000).map(|_| AtomicU64::new(0)).collect();
    let memory = [RamSlice::from_atomics(&words)];
    let first = bytes.byte();
    // Whole frames of any bytes could be for anybody.
    let mut stacks = [false, true].map(|restrict| User::new(config(restrict)).expect("a stack"));
    for user in &mut stacks {
        user.set_guest(&Guest {
            offloads: if first & 1 != 0 {
                Offloads::ALL
            } else {
                Offloads::NONE
            },
            pairs: 1 + u16::from(first >> 1 & 3),
            heads: first & 8 != 0,
            ..Guest::NONE
        });
    }
    let mut now = Instant::now();
    for _ in 0..64 {
        if bytes.0.is_empty() {
            break;
        }
        let kind = bytes.byte();
        let raw = kind & 3 == 0;
        let user = &mut stacks[usize::from(raw)];
        let mut header = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            ..VnetHeader::default()
        };
        if kind & 4 != 0 {
            let mut raw = [0; VnetHeader::LEN];
            raw.iter_mut().for_each(|byte| *byte = bytes.byte());
            header = VnetHeader::from_bytes(&raw);
        }
        let frame = if raw {
            let len = usize::from(bytes.half()) % 1600;
            bytes.take(len).to_vec()
        } else {
            packet(&mut bytes)
        };
        let all = Pieces::new(&memory);
        all.write(&frame);
        let frame = TxFrame {
            header,
            payload: all.take(frame.len()),
        };
        assert_eq!(user.transmit(now, u16::from(kind >> 6), &[frame]), 1);
        if kind & 8 != 0 {
            now += Duration::from_millis(u64::from(bytes.half()));
        }
        user.poll(now);
        let mut sink = Sink {
            memory,
            left: usize::from(kind >> 4 & 3) * 2,
            offered: None,
        };
        user.receive(now, &mut sink);
    }
    for user in &mut stacks {
        let (tcp, datagrams) = user.flows();
        assert!(tcp <= 40 && datagrams <= 10);
        // A guest that takes all there is finds an end.
        let mut sink = Sink {
            memory,
            left: 100_000,
            offered: None,
        };
        user.poll(now);
        while user.has_frames() && sink.left > 0 {
            user.receive(now, &mut sink);
        }
        assert!(!user.has_frames());
        user.shutdown();
    }
}
