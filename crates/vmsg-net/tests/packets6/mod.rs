// SPDX-License-Identifier: Apache-2.0 OR MIT
//! IPv6 packets made and read by hand.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test needs another part of it"
)]

use std::net::Ipv6Addr;

use vmsg_net::VnetHeader;
use vmsg_net::user::{User, UserConfig};

use crate::common::{frame6, is_summed6, receive, sum6, transmit};

pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
pub const ICMP6: u8 = 58;
pub const UDP: u8 = 17;

pub fn stack() -> User {
    User::new(UserConfig::default()).expect("a stack")
}

pub fn send(user: &mut User, frame: &[u8]) {
    transmit(user, VnetHeader::default(), frame);
}

pub fn icmp(src: Ipv6Addr, dst: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    sum6(src, dst, ICMP6, 2, &mut message);
    frame6(src, dst, ICMP6, 255, &message)
}

pub fn addr(frame: &[u8], at: usize) -> Ipv6Addr {
    let octets: [u8; 16] = frame[at..at + 16].try_into().expect("an address");
    Ipv6Addr::from(octets)
}

/// Source, destination and message of an ICMPv6 packet, whose checksum is right.
pub fn open_icmp(frame: &[u8]) -> (Ipv6Addr, Ipv6Addr, &[u8]) {
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
pub fn one(user: &mut User) -> Vec<u8> {
    let mut frames = receive(user);
    assert_eq!(frames.len(), 1, "{frames:?}");
    frames.remove(0).1
}

pub fn solicitation(target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&target.octets());
    message
}

pub fn group(target: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = target.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}
