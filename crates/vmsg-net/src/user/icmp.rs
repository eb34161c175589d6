// SPDX-License-Identifier: Apache-2.0 OR MIT
//! ICMP of both versions: echo replies of the gateway, and telling the guest what cannot be
//! reached.

use std::net::{IpAddr, SocketAddr};

use super::net::Net;
use super::packet::{ICMP, ICMP6, IPV6, IpIn, IpOut, TCP, UDP};
use crate::checksum::Sum;

/// Bytes of an echo header: type, code, checksum, identifier, sequence number.
pub(super) const ECHO: usize = 8;

/// What errors quote of the payload of a packet: ports, and the sequence number of TCP.
const QUOTE: usize = 8;

/// Message types (RFC 792, RFC 4443).
mod kind {
    pub(super) const ECHO_REPLY: u8 = 0;
    pub(super) const UNREACHABLE: u8 = 3;
    pub(super) const ECHO_REQUEST: u8 = 8;
    pub(super) const TIME_EXCEEDED: u8 = 11;

    pub(super) const UNREACHABLE6: u8 = 1;
    pub(super) const TOO_BIG6: u8 = 2;
    pub(super) const TIME_EXCEEDED6: u8 = 3;
    pub(super) const ECHO_REQUEST6: u8 = 128;
    pub(super) const ECHO_REPLY6: u8 = 129;
    pub(super) const LISTENER_REPORT: u8 = 131;
    pub(super) const LISTENER_DONE: u8 = 132;
    pub(super) const LISTENER_REPORT2: u8 = 143;
}

/// Code of [`kind::UNREACHABLE`]: a packet is too long (RFC 1191).
const CODE_TOO_BIG: u8 = 4;

/// Why a packet does not arrive (RFC 792, RFC 1812, RFC 4443).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    Net,
    Host,
    Port,
    Prohibited,
    /// Longer than what the way takes, in bytes.
    TooBig(u16),
    HopLimit,
}

impl Unreachable {
    const fn type_and_code(self, v6: bool) -> (u8, u8) {
        match (self, v6) {
            (Self::Net, false) => (kind::UNREACHABLE, 0),
            (Self::Host, false) => (kind::UNREACHABLE, 1),
            (Self::Port, false) => (kind::UNREACHABLE, 3),
            (Self::Prohibited, false) => (kind::UNREACHABLE, 13),
            (Self::TooBig(_), false) => (kind::UNREACHABLE, CODE_TOO_BIG),
            (Self::HopLimit, false) => (kind::TIME_EXCEEDED, 0),
            (Self::Net, true) => (kind::UNREACHABLE6, 0),
            (Self::Host, true) => (kind::UNREACHABLE6, 3),
            (Self::Port, true) => (kind::UNREACHABLE6, 4),
            (Self::Prohibited, true) => (kind::UNREACHABLE6, 1),
            (Self::TooBig(_), true) => (kind::TOO_BIG6, 0),
            (Self::HopLimit, true) => (kind::TIME_EXCEEDED6, 0),
        }
    }
}

/// An echo request for somebody else than the gateway.
#[derive(Debug)]
pub(super) struct Echo {
    pub(super) ident: u16,
    pub(super) message: Vec<u8>,
}

/// A guest cannot take packets of this length to `peer`: what it quotes is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooBig {
    /// Of the TCP connection.
    pub(super) guest: SocketAddr,
    pub(super) peer: SocketAddr,
    /// Where in the stream the packet began.
    pub(super) seq: u32,
    pub(super) mtu: usize,
}

/// What an ICMP message is to others.
#[derive(Debug)]
pub(super) enum Message {
    Echo(Echo),
    TooBig(TooBig),
}

/// The protocol number of ICMP packets to `addr`.
pub(super) const fn protocol(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => ICMP,
        IpAddr::V6(_) => ICMP6,
    }
}

/// The sum of a message, with the pseudo-header that IPv6 wants.
fn sum(src: IpAddr, dst: IpAddr, message: &[u8]) -> Sum {
    let mut sum = match dst {
        IpAddr::V4(_) => Sum::default(),
        IpAddr::V6(_) => Sum::pseudo(src, dst, ICMP6, message.len()),
    };
    sum.add(message);
    sum
}

/// True if the checksum is right.
pub(super) fn is_valid(src: IpAddr, dst: IpAddr, message: &[u8]) -> bool {
    sum(src, dst, message).is_valid()
}

/// Puts in the checksum of an ICMP message from `src` to `dst`.
pub(super) fn seal(src: IpAddr, dst: IpAddr, message: &mut [u8]) {
    message[2..4].fill(0);
    let sum = sum(src, dst, message).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
}

/// Makes the answer to an echo request with the identifier that the guest knows.
pub(super) fn seal_echo_reply(src: IpAddr, dst: IpAddr, ident: u16, message: &mut [u8]) {
    message[0] = if dst.is_ipv6() {
        kind::ECHO_REPLY6
    } else {
        kind::ECHO_REPLY
    };
    message[4..6].copy_from_slice(&ident.to_be_bytes());
    seal(src, dst, message);
}

/// Whether an ICMPv6 message tells which groups somebody listens to (RFC 2710, RFC 3810). Who has no
/// address yet tells so without one (RFC 3590), as every Linux guest does when its link comes up.
pub(super) fn is_of_listener(message: &[u8]) -> bool {
    matches!(
        message.first(),
        Some(&(kind::LISTENER_REPORT | kind::LISTENER_DONE | kind::LISTENER_REPORT2))
    )
}

/// Takes an ICMP message of a guest, whose checksum is right; returns what others have to look
/// after.
pub(super) fn receive(net: &mut Net, packet: &IpIn<'_>, mut message: Vec<u8>) -> Option<Message> {
    let (src, dst) = (packet.src, packet.dst);
    if message.len() < ECHO {
        net.counters.malformed += 1;
        return None;
    }
    match (message[0], message[1], dst.is_ipv6()) {
        (kind::ECHO_REQUEST, 0, false) | (kind::ECHO_REQUEST6, 0, true) => {
            let ident = u16::from_be_bytes([message[4], message[5]]);
            if net.addresses.is_ours(dst) {
                seal_echo_reply(dst, src, ident, &mut message);
                net.reply_ip(IpOut::new(dst, src, protocol(src)), &message);
                return None;
            }
            Some(Message::Echo(Echo { ident, message }))
        }
        (kind::UNREACHABLE, CODE_TOO_BIG, false) | (kind::TOO_BIG6, 0, true) => {
            let found = too_big(&message, dst.is_ipv6());
            if found.is_none() {
                net.counters.unsupported += 1;
            }
            found.map(Message::TooBig)
        }
        _ => {
            net.counters.unsupported += 1;
            None
        }
    }
}

/// Which of our segments was too long for the guest.
fn too_big(message: &[u8], v6: bool) -> Option<TooBig> {
    let half = |at: usize| {
        let bytes: [u8; 2] = message.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_be_bytes(bytes))
    };
    let word = |at: usize| Some(u32::from(half(at)?) << 16 | u32::from(half(at + 2)?));
    let ip = ECHO;
    let (mtu, protocol, src, dst, at): (usize, u8, IpAddr, IpAddr, usize) = if v6 {
        let addr = |at: usize| {
            let octets: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
            Some(IpAddr::from(octets))
        };
        (
            usize::try_from(word(4)?).ok()?,
            *message.get(ip + 6)?,
            addr(ip + 8)?,
            addr(ip + 24)?,
            ip + IPV6,
        )
    } else {
        let addr = |at: usize| Some(IpAddr::from(word(at)?.to_be_bytes()));
        (
            usize::from(half(6)?),
            *message.get(ip + 9)?,
            addr(ip + 12)?,
            addr(ip + 16)?,
            ip + 4 * usize::from(message.get(ip)? & 15),
        )
    };
    (protocol == TCP).then_some(())?;
    Some(TooBig {
        peer: SocketAddr::new(src, half(at)?),
        guest: SocketAddr::new(dst, half(at + 2)?),
        seq: word(at + 4)?,
        mtu,
    })
}

/// A packet of a guest that errors speak of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quoted {
    pub(super) guest: IpAddr,
    pub(super) peer: IpAddr,
    pub(super) protocol: u8,
    /// The beginning of its payload.
    pub(super) first: [u8; QUOTE],
}

impl Quoted {
    /// A packet that was just read.
    pub(super) fn of(packet: &IpIn<'_>) -> Self {
        let mut first = [0; QUOTE];
        packet.payload.read(&mut first);
        Self {
            guest: packet.src,
            peer: packet.dst,
            protocol: packet.protocol,
            first,
        }
    }

    /// A UDP datagram, or a TCP segment of the sequence number `seq`.
    pub(super) fn ports(guest: SocketAddr, peer: SocketAddr, seq: Option<u32>) -> Self {
        let [a, b] = guest.port().to_be_bytes();
        let [c, d] = peer.port().to_be_bytes();
        // In UDP: an empty datagram.
        let [e, f, g, h] = seq.unwrap_or(8 << 16).to_be_bytes();
        Self {
            guest: guest.ip(),
            peer: peer.ip(),
            protocol: if seq.is_some() { TCP } else { UDP },
            first: [a, b, c, d, e, f, g, h],
        }
    }

    /// An echo request.
    pub(super) const fn echo(guest: IpAddr, peer: IpAddr, ident: u16) -> Self {
        let [a, b] = ident.to_be_bytes();
        let kind = match guest {
            IpAddr::V4(_) => kind::ECHO_REQUEST,
            IpAddr::V6(_) => kind::ECHO_REQUEST6,
        };
        Self {
            guest,
            peer,
            protocol: protocol(guest),
            first: [kind, 0, 0, 0, a, b, 0, 0],
        }
    }
}

/// Tells a guest that a packet it sent did not arrive.
pub(super) fn unreachable(net: &mut Net, why: Unreachable, quoted: &Quoted) {
    let v6 = quoted.guest.is_ipv6();
    let mut message = [0; ECHO + IPV6 + QUOTE];
    (message[0], message[1]) = why.type_and_code(v6);
    if let Unreachable::TooBig(mtu) = why {
        // The same place, 32 bits long there, 16 here.
        message[6..8].copy_from_slice(&mtu.to_be_bytes());
    }
    let original = IpOut::new(quoted.guest, quoted.peer, quoted.protocol);
    original.emit(&mut message[ECHO..], QUOTE);
    let end = ECHO + original.len();
    message[end..end + QUOTE].copy_from_slice(&quoted.first);
    let message = &mut message[..end + QUOTE];
    // The router says so, except that a port is refused by the host itself.
    let from = if why == Unreachable::Port {
        quoted.peer
    } else {
        net.addresses.gateway(quoted.guest)
    };
    seal(from, quoted.guest, message);
    net.reply_ip(
        IpOut::new(from, quoted.guest, protocol(quoted.guest)),
        message,
    );
}
