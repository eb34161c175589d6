// SPDX-License-Identifier: Apache-2.0 OR MIT
//! UDP: datagrams of a guest, and datagrams to it, in fragments if need be.

use std::net::SocketAddr;

use vmsg_mem::Pieces;

use super::net::Net;
use super::packet::{ETHERNET, FRAGMENT6, IpIn, IpOut, MAX_HEADERS, UDP, headers};
use crate::checksum::Sum;
use crate::{RxSink, VnetHeader};

/// Bytes of a UDP header.
pub(super) const HEADER: usize = 8;

/// Most datagrams in one frame: as many as Linux makes one of (`UDP_MAX_SEGMENTS`).
const MAX_SEGMENTS: usize = 128;

/// A UDP datagram of a guest, or several of the same flow in one frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram<'a> {
    pub(super) guest: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) payload: Pieces<'a>,
    /// Payload of each datagram but the last, if there are several.
    pub(super) segment: Option<u16>,
}

impl<'a> Datagram<'a> {
    /// Reads a datagram; `None` if it is malformed. Its checksum is looked at unless it is to be
    /// completed.
    pub(super) fn parse(packet: &IpIn<'a>, vnet: &VnetHeader) -> Option<Self> {
        let bytes = packet.payload;
        let header: [u8; HEADER] = bytes.read_array()?;
        let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let len = usize::from(half(4));
        if len < HEADER || len > bytes.len() {
            return None;
        }
        let bytes = bytes.take(len);
        // IPv6 has none without a checksum (RFC 8200, 8.1).
        let summed = half(6) != 0 || packet.src.is_ipv6();
        if summed && !vnet.needs_csum() {
            let mut sum = Sum::pseudo(packet.src, packet.dst, UDP, len);
            sum.add_pieces(bytes);
            if half(6) == 0 || !sum.is_valid() {
                return None;
            }
        }
        let payload = bytes.skip(HEADER);
        let mut segment = None;
        if vnet.gso_type & !VnetHeader::GSO_ECN == VnetHeader::GSO_UDP_L4 {
            let size = usize::from(vnet.gso_size);
            if size == 0 || payload.len() > size * MAX_SEGMENTS {
                return None;
            }
            segment = (payload.len() > size).then_some(vnet.gso_size);
        }
        Some(Self {
            guest: SocketAddr::new(packet.src, half(0)),
            peer: SocketAddr::new(packet.dst, half(2)),
            payload,
            segment,
        })
    }

    /// The payloads of the datagrams that it stands for.
    pub(super) fn payloads(&self) -> impl Iterator<Item = Pieces<'a>> {
        let size = self.segment.map_or(self.payload.len(), usize::from);
        let mut rest = Some(self.payload);
        std::iter::from_fn(move || {
            let all = rest.take()?;
            if all.len() > size {
                rest = Some(all.skip(size));
            }
            Some(all.take(size))
        })
    }
}

/// Room that a payload of an IP packet for `addr` needs in its first frame.
pub(super) fn first_frame(net: &Net, addr: std::net::IpAddr, len: usize) -> usize {
    (headers(addr) + len).min(ETHERNET + net.mtu(addr))
}

/// Bytes of [`head`] that count.
pub(super) const fn head_len(addr: std::net::IpAddr) -> usize {
    headers(addr) + 4
}

/// The first bytes of the frames of a flow, as far as a device chooses by them.
pub(super) fn head(net: &Net, ip: &IpOut, ports: [u16; 2]) -> [u8; MAX_HEADERS + 4] {
    let mut bytes = [0; MAX_HEADERS + 4];
    let at = net.emit_headers(&mut bytes, ip, HEADER);
    bytes[at..at + 2].copy_from_slice(&ports[0].to_be_bytes());
    bytes[at + 2..at + 4].copy_from_slice(&ports[1].to_be_bytes());
    bytes
}

/// Puts the UDP header before a payload. `message` has [`HEADER`] bytes of room at its beginning.
pub(super) fn seal(message: &mut [u8], peer: SocketAddr, guest: SocketAddr) {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    message[0..2].copy_from_slice(&peer.port().to_be_bytes());
    message[2..4].copy_from_slice(&guest.port().to_be_bytes());
    message[4..6].copy_from_slice(&len.to_be_bytes());
    message[6..8].fill(0);
    let mut sum = Sum::pseudo(peer.ip(), guest.ip(), UDP, message.len());
    sum.add(message);
    let sum = match sum.finish() {
        0 => 0xffff,
        sum => sum,
    };
    message[6..8].copy_from_slice(&sum.to_be_bytes());
}

/// Hands the payload of an IP packet to a guest that speaks of it on `pair`, in fragments if it
/// is longer than the MTU. What finds no buffer is lost. Returns the bytes of its frames.
pub(super) fn send(
    net: &mut Net,
    sink: &mut dyn RxSink,
    pair: u16,
    ip: IpOut,
    message: &[u8],
) -> usize {
    let mut sent = 0;
    net.in_parts(ip, message, |net, ip, part| {
        let mut head = [0; MAX_HEADERS + FRAGMENT6 + HEADER];
        let at = net.emit_headers(&mut head, ip, part.len());
        let ports = part.len().min(HEADER);
        head[at..at + ports].copy_from_slice(&part[..ports]);
        let to = net.target(pair, &head[..at + ports]);
        let Some(frame) = sink.offer(to, at + part.len()) else {
            net.counters.limited += 1;
            return false;
        };
        let (room, body) = frame.split_at(at);
        room.write(&head[..at]);
        body.write(part);
        sink.commit(&VnetHeader::default(), at + part.len());
        net.counters.frames_to_guest += 1;
        sent += at + part.len();
        true
    });
    sent
}
