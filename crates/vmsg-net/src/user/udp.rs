// SPDX-License-Identifier: Apache-2.0 OR MIT
//! UDP datagrams to a guest, in fragments if need be.

use std::net::SocketAddrV4;

use super::net::Net;
use super::packet::{HEADERS, IPV4, Ipv4Out, UDP};
use crate::checksum::Sum;
use crate::{RxSink, Target, VnetHeader};

/// Bytes of a UDP header.
pub(super) const HEADER: usize = 8;

/// The header of a UDP datagram from a guest and what follows, or `None` if it is malformed.
pub(super) struct Datagram<'a> {
    pub(super) src_port: u16,
    pub(super) dst_port: u16,
    pub(super) payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Reads a datagram; with `verify`, its checksum is looked at, too.
    pub(super) fn parse(
        src: std::net::Ipv4Addr,
        dst: std::net::Ipv4Addr,
        bytes: &'a [u8],
        verify: bool,
    ) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER>()?;
        let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let len = usize::from(half(4));
        if len < HEADER || len > bytes.len() {
            return None;
        }
        if verify && half(6) != 0 {
            let mut sum = Sum::pseudo(src, dst, UDP, len);
            sum.add(&bytes[..len]);
            if !sum.is_valid() {
                return None;
            }
        }
        Some(Self {
            src_port: half(0),
            dst_port: half(2),
            payload: &bytes[HEADER..len],
        })
    }
}

/// Room that a datagram of `len` bytes needs in its first frame.
pub(super) fn first_frame(net: &Net, len: usize) -> usize {
    (HEADERS + HEADER + len).min(HEADERS - IPV4 + usize::from(net.offloads.mtu))
}

/// Puts the UDP header before a payload. `message` has [`HEADER`] bytes of room at its beginning.
pub(super) fn seal(message: &mut [u8], peer: SocketAddrV4, guest: SocketAddrV4) {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    message[0..2].copy_from_slice(&peer.port().to_be_bytes());
    message[2..4].copy_from_slice(&guest.port().to_be_bytes());
    message[4..6].copy_from_slice(&len.to_be_bytes());
    message[6..8].fill(0);
    let mut sum = Sum::pseudo(*peer.ip(), *guest.ip(), UDP, message.len());
    sum.add(message);
    let sum = match sum.finish() {
        0 => 0xffff,
        sum => sum,
    };
    message[6..8].copy_from_slice(&sum.to_be_bytes());
}

/// Hands an IPv4 payload to a guest, in fragments if it is longer than the MTU. Returns the
/// number of frames; what finds no buffer is lost.
pub(super) fn send(net: &mut Net, sink: &mut dyn RxSink, mut ip: Ipv4Out, message: &[u8]) -> usize {
    // Offsets count in units of eight bytes.
    let room = (usize::from(net.offloads.mtu) - IPV4) / 8 * 8;
    let whole = message.len() <= usize::from(net.offloads.mtu) - IPV4;
    ip.ident = (net.random() & 0xffff) as u16;
    let mut frames = 0;
    let mut at = 0;
    loop {
        let len = if whole {
            message.len()
        } else {
            room.min(message.len() - at)
        };
        let more = at + len < message.len();
        ip.fragment =
            u16::try_from(at / 8).unwrap_or(0) | if more { Ipv4Out::MORE_FRAGMENTS } else { 0 };
        let Some(frame) = sink.offer(Target::Pair(0), HEADERS + len) else {
            net.counters.limited += 1;
            return frames;
        };
        let mut headers = [0; HEADERS];
        net.emit_headers(&mut headers, &ip, len);
        let (head, body) = frame.split_at(HEADERS);
        head.write(&headers);
        body.write(&message[at..at + len]);
        sink.commit(&VnetHeader::default(), HEADERS + len);
        net.counters.frames_to_guest += 1;
        frames += 1;
        at += len;
        if !more {
            return frames;
        }
    }
}
