// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ICMP: echo replies of the gateway, and telling the guest what cannot be reached.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::net::Net;
use super::packet::{ICMP, IPV4, Ipv4In, Ipv4Out};
use crate::checksum::Sum;

/// Bytes of an echo header: type, code, checksum, identifier, sequence number.
pub(super) const ECHO: usize = 8;
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;

/// Why a destination is unreachable (RFC 792, RFC 1812).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    Net = 0,
    Host = 1,
    Port = 3,
    Prohibited = 13,
}

/// An echo request for somebody else than the gateway.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) ident: u16,
    pub(super) message: Vec<u8>,
}

/// Puts in the checksum of an ICMP message.
pub(super) fn seal(message: &mut [u8]) {
    message[2..4].fill(0);
    let mut sum = Sum::default();
    sum.add(message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
}

/// Takes an ICMP message of a guest; returns an echo request that must go further.
pub(super) fn receive(net: &mut Net, packet: &Ipv4In<'_>) -> Option<Echo> {
    let mut message = vec![0; packet.payload.len()];
    packet.payload.read(&mut message);
    let mut sum = Sum::default();
    sum.add(&message);
    if message.len() < ECHO || !sum.is_valid() {
        net.counters.malformed += 1;
        return None;
    }
    if message[0] != ECHO_REQUEST || message[1] != 0 {
        net.counters.unsupported += 1;
        return None;
    }
    if packet.dst == net.addresses.host || packet.dst == net.addresses.dns {
        message[0] = ECHO_REPLY;
        seal(&mut message);
        net.reply_ipv4(packet.dst, packet.src, ICMP, &message);
        return None;
    }
    let ident = u16::from_be_bytes([message[4], message[5]]);
    Some(Echo { ident, message })
}

/// Tells a guest that a packet it sent from `guest` to `peer` did not arrive. `first` are the
/// first eight bytes of that packet's payload.
pub(super) fn unreachable(
    net: &mut Net,
    why: Unreachable,
    guest: Ipv4Addr,
    peer: Ipv4Addr,
    protocol: u8,
    first: [u8; 8],
) {
    let mut message = [0; 8 + IPV4 + 8];
    message[0] = UNREACHABLE;
    message[1] = why as u8;
    Ipv4Out {
        src: guest,
        dst: peer,
        protocol,
        ident: 0,
        fragment: 0,
    }
    .emit(&mut message[8..], 8);
    message[8 + IPV4..].copy_from_slice(&first);
    seal(&mut message);
    // The router says so, except that a port is refused by the host itself.
    let from = if why == Unreachable::Port {
        peer
    } else {
        net.addresses.host
    };
    net.reply_ipv4(from, guest, ICMP, &message);
}

/// The first eight bytes of a UDP datagram or, with `rest` as its sequence number, of a TCP segment.
pub(super) fn first_eight(guest: SocketAddrV4, peer: SocketAddrV4, rest: u32) -> [u8; 8] {
    let [a, b] = guest.port().to_be_bytes();
    let [c, d] = peer.port().to_be_bytes();
    let [e, f, g, h] = rest.to_be_bytes();
    [a, b, c, d, e, f, g, h]
}
