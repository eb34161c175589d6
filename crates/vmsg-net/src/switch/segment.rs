// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Large segments: handed on whole, or cut for who does not take them.
//!
//! What is cut are runs of TCP segments and UDP datagrams, as virtio's `VIRTIO_NET_HDR_GSO_TCPV4`, `…_TCPV6` and `…_UDP_L4` mean
//! them; the pieces are those that Linux makes (net/ipv4/tcp_offload.c, udp_offload.c, af_inet.c, net/ipv6/ip6_offload.c): the
//! identification of IPv4 counts up, FIN and PSH are in the last piece only, CWR in the first.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vmsg_mem::Pieces;

use super::copy::{Delivered, Front, Running, copy_and_sum};
use crate::checksum::Sum;
use crate::{Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Most bytes of headers, of all layers: three tags, IPv6 with a good hundred bytes of extensions, TCP with all options.
const ROOM: usize = 256;

/// Bytes of an IPv4 header without options.
const IPV4: usize = 20;
/// Bytes of an IPv6 header without extensions.
const IPV6: usize = 40;
/// Bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Bytes of a UDP header.
const UDP_HEADER: usize = 8;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Least payload of a TCP segment: what is left of the smallest MSS that Linux goes down to, 48 bytes, with all options.
const LEAST_TCP: usize = 8;
/// Most datagrams of one run (`UDP_MAX_SEGMENTS` of Linux).
const MOST_UDP: usize = 128;

/// The headers of a large segment do not fit together, or are more than these.
struct Malformed;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => TCP,
            Self::Udp => UDP,
        }
    }

    /// Where the checksum is in the header.
    const fn checksum(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// Where what is in the headers.
#[derive(Clone, Copy, Debug)]
struct Layout {
    transport: Transport,
    v6: bool,
    /// Where the IP header begins.
    network: usize,
    /// Where that of TCP or UDP begins.
    start: usize,
    /// Where the payload begins.
    end: usize,
    /// Where the packet still is to be routed to; the checksum is for the last address (RFC 8200, 8.1).
    routed: bool,
}

/// The headers, and the IP packet's length in bytes. All fields that say how long something is have been checked.
struct Headers {
    bytes: [u8; ROOM],
    have: usize,
    /// Bytes of the whole frame.
    len: usize,
}

impl Headers {
    /// Copies the headers, once.
    fn new(frame: &TxFrame<'_>, front: &Front) -> Self {
        let mut bytes = [0; ROOM];
        let first = front.bytes();
        bytes[..first.len()].copy_from_slice(first);
        Self {
            bytes,
            have: first.len(),
            len: front.moved(frame.payload.len()).max(first.len()),
        }
    }

    /// Copies the rest of longer headers, once.
    fn extend(&mut self, frame: &TxFrame<'_>, front: &Front) {
        let rest = frame.payload.skip(front.taken);
        self.have += rest.read(&mut self.bytes[self.have..]);
    }

    fn get<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes[..self.have].get(at..)?.first_chunk().copied()
    }

    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&bytes);
    }

    fn short(&self, at: usize) -> Option<usize> {
        self.get(at).map(u16::from_be_bytes).map(usize::from)
    }

    /// Reads the headers. `Ok(None)`: they go on behind what is here.
    fn parse(&self, network: usize) -> Result<Option<Layout>, Malformed> {
        let Some(kind) = self.get(network - 2) else {
            return Ok(None);
        };
        let ip = match kind {
            ETHERTYPE_IPV4 => self.ipv4(network)?,
            ETHERTYPE_IPV6 => self.ipv6(network)?,
            _ => return Err(Malformed),
        };
        ip.map_or(Ok(None), |(protocol, start, routed)| {
            self.transport(protocol, network, start, routed, kind == ETHERTYPE_IPV6)
        })
    }

    /// Protocol and offset of what is in an IPv4 packet.
    fn ipv4(&self, at: usize) -> Result<Option<(u8, usize, bool)>, Malformed> {
        let Some(header) = self.get::<IPV4>(at) else {
            return Ok(None);
        };
        let header_len = usize::from(header[0] & 0xf) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        // Neither more fragments nor an offset.
        let whole = u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
        if header[0] >> 4 != 4 || header_len < IPV4 || total != self.len - at || !whole {
            return Err(Malformed);
        }
        Ok(Some((header[9], at + header_len, false)))
    }

    /// The same of an IPv6 packet.
    fn ipv6(&self, at: usize) -> Result<Option<(u8, usize, bool)>, Malformed> {
        let Some(header) = self.get::<IPV6>(at) else {
            return Ok(None);
        };
        let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
        if header[0] >> 4 != 6 || at + IPV6 + payload != self.len {
            return Err(Malformed);
        }
        let mut protocol = header[6];
        let mut start = at + IPV6;
        let mut routed = false;
        // Each is of 8 bytes at least, and there is room for some only.
        while let HOP_BY_HOP | ROUTING | DESTINATION = protocol {
            let Some([next, words, _, left]) = self.get(start) else {
                return Ok(None);
            };
            routed |= protocol == ROUTING && left != 0;
            protocol = next;
            start += 8 + 8 * usize::from(words);
        }
        Ok(Some((protocol, start, routed)))
    }

    fn transport(
        &self,
        protocol: u8,
        network: usize,
        start: usize,
        routed: bool,
        v6: bool,
    ) -> Result<Option<Layout>, Malformed> {
        let (transport, len) = match protocol {
            TCP => {
                let Some(header) = self.get::<TCP_HEADER>(start) else {
                    return Ok(None);
                };
                let len = usize::from(header[12] >> 4) * 4;
                if len < TCP_HEADER {
                    return Err(Malformed);
                }
                (Transport::Tcp, len)
            }
            UDP => {
                let Some(len) = self.short(start + 4) else {
                    return Ok(None);
                };
                if start + len != self.len {
                    return Err(Malformed);
                }
                (Transport::Udp, UDP_HEADER)
            }
            _ => return Err(Malformed),
        };
        let end = start + len;
        Ok((end <= self.have).then_some(Layout {
            transport,
            v6,
            network,
            start,
            end,
            routed,
        }))
    }

    fn address(&self, v6: bool, at: usize) -> IpAddr {
        if v6 {
            let octets: [u8; 16] = self.get(at).unwrap_or_default();
            Ipv6Addr::from_octets(octets).into()
        } else {
            let octets: [u8; 4] = self.get(at).unwrap_or_default();
            Ipv4Addr::from_octets(octets).into()
        }
    }
}

/// A large segment whose headers have been checked.
struct Large<'a> {
    headers: Headers,
    layout: Layout,
    /// The sum over the pseudo-header without the length.
    pseudo: Sum,
    payload: Pieces<'a>,
    /// Payload of each piece, in bytes.
    size: usize,
    /// The flags of TCP, the sequence number and the identification of IPv4 of the whole.
    flags: u8,
    sequence: u32,
    ident: u16,
}

impl<'a> Large<'a> {
    fn new(frame: &TxFrame<'a>, front: &Front) -> Result<Self, Malformed> {
        let hints = &frame.header;
        let mut headers = Headers::new(frame, front);
        let layout = match headers.parse(front.network)? {
            Some(layout) => layout,
            None => {
                headers.extend(frame, front);
                headers.parse(front.network)?.ok_or(Malformed)?
            }
        };
        let Layout {
            transport,
            v6,
            network,
            start,
            end,
            routed,
        } = layout;
        let named = match hints.gso_type & !VnetHeader::GSO_ECN {
            VnetHeader::GSO_TCPV4 => transport == Transport::Tcp && !v6,
            VnetHeader::GSO_TCPV6 => transport == Transport::Tcp && v6,
            VnetHeader::GSO_UDP_L4 => {
                transport == Transport::Udp && hints.gso_type & VnetHeader::GSO_ECN == 0
            }
            _ => false,
        };
        let placed = !hints.needs_csum()
            || front.moved(usize::from(hints.csum_start)) == start
                && usize::from(hints.csum_offset) == transport.checksum();
        let payload = frame.payload.skip(front.original(end));
        let size = usize::from(hints.gso_size);
        let sized = match transport {
            Transport::Tcp => size >= LEAST_TCP,
            Transport::Udp => size > 0 && payload.len() <= size * MOST_UDP,
        };
        if !named || !placed || !sized {
            return Err(Malformed);
        }
        let pseudo = if routed {
            // Only the sender knows the last address: the partial checksum without the length.
            if !hints.needs_csum() {
                return Err(Malformed);
            }
            let mut sum = Sum::default();
            sum.add(
                &headers
                    .get::<2>(start + transport.checksum())
                    .unwrap_or_default(),
            );
            sum.take_away(narrow(headers.len - start));
            sum
        } else {
            let (src, dst) = if v6 { (8, 24) } else { (12, 16) };
            let src = headers.address(v6, network + src);
            let dst = headers.address(v6, network + dst);
            Sum::pseudo(src, dst, transport.protocol(), 0)
        };
        let word = |at| headers.get(at).map_or(0, u32::from_be_bytes);
        Ok(Self {
            flags: headers.get(start + 13).map_or(0, |[flags]| flags),
            sequence: word(start + 4),
            ident: headers.get(network + 4).map_or(0, u16::from_be_bytes),
            headers,
            layout,
            pseudo,
            payload,
            size,
        })
    }

    /// True if a receiver takes it as it is.
    fn is_taken_by(&self, to: &Offloads, ecn: bool) -> bool {
        to.guest_csum
            && (!ecn || to.guest_ecn)
            && match (self.layout.transport, self.layout.v6) {
                (Transport::Tcp, false) => to.guest_tso4,
                (Transport::Tcp, true) => to.guest_tso6,
                (Transport::Udp, false) => to.guest_uso4,
                (Transport::Udp, true) => to.guest_uso6,
            }
    }

    /// What a receiver chooses its queue by.
    fn target(&self) -> Target<'_> {
        Target::Head(&self.headers.bytes[..self.layout.end.min(Target::HEAD)])
    }

    /// What is said about a frame whose checksum is left to the receiver.
    fn partial(&self) -> VnetHeader {
        VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            csum_start: narrow(self.layout.start),
            csum_offset: narrow(self.layout.transport.checksum()),
            ..VnetHeader::default()
        }
    }

    /// The sum over the pseudo-header for `payload` bytes.
    fn pseudo(&self, payload: usize) -> Sum {
        let mut sum = self.pseudo;
        let len = narrow(self.layout.end - self.layout.start + payload);
        sum.add(&len.to_be_bytes());
        sum
    }

    fn put_checksum(&mut self, sum: u16) {
        let at = self.layout.start + self.layout.transport.checksum();
        self.headers.put(at, sum.to_be_bytes());
    }

    /// Hands it over whole.
    fn whole(&mut self, gso_type: u8, sink: &mut dyn RxSink) -> Delivered {
        let end = self.layout.end;
        let len = end + self.payload.len();
        // As the receiver expects it, whatever the sender had there.
        self.put_checksum(self.pseudo(self.payload.len()).folded());
        let header = VnetHeader {
            gso_type,
            hdr_len: narrow(end),
            gso_size: narrow(self.size),
            ..self.partial()
        };
        let Some(room) = sink.offer(self.target(), len) else {
            return Delivered::NoBuffers {
                count: 0,
                bytes: 0,
                lost: 1,
            };
        };
        room.write(&self.headers.bytes[..end]);
        self.payload.copy_to(room.skip(end));
        sink.commit(&header, len);
        Delivered::Frame(len)
    }

    /// Writes the fields that differ from piece to piece, without the checksum of TCP or UDP.
    fn set(&mut self, index: usize, payload: usize, last: bool) {
        let Layout {
            network,
            start,
            end,
            ..
        } = self.layout;
        let headers = &mut self.headers;
        if self.layout.v6 {
            let len = narrow(end - network - IPV6 + payload);
            headers.put(network + 4, len.to_be_bytes());
        } else {
            let len = narrow(end - network + payload);
            headers.put(network + 2, len.to_be_bytes());
            let ident = self.ident.wrapping_add(narrow(index));
            headers.put(network + 4, ident.to_be_bytes());
            headers.put(network + 10, [0, 0]);
            let header_len = usize::from(headers.bytes[network] & 0xf) * 4;
            let mut sum = Sum::default();
            sum.add(&headers.bytes[network..network + header_len]);
            headers.put(network + 10, sum.finish().to_be_bytes());
        }
        match self.layout.transport {
            Transport::Udp => {
                let len = narrow(UDP_HEADER + payload);
                headers.put(start + 4, len.to_be_bytes());
            }
            Transport::Tcp => {
                // No frame is as long as this could overflow.
                let offset = u32::try_from(index * self.size).unwrap_or(u32::MAX);
                let sequence = self.sequence.wrapping_add(offset);
                headers.put(start + 4, sequence.to_be_bytes());
                let mut flags = self.flags;
                if !last {
                    flags &= !(FIN | PSH);
                }
                if index > 0 {
                    flags &= !CWR;
                }
                headers.put(start + 13, [flags]);
            }
        }
    }

    /// Hands it over in pieces.
    fn cut(&mut self, to: &Offloads, sink: &mut dyn RxSink) -> Delivered {
        let Layout { start, end, .. } = self.layout;
        let pieces = self.payload.len().div_ceil(self.size).max(1);
        let mut rest = self.payload;
        let mut bytes = 0;
        for index in 0..pieces {
            let n = rest.len().min(self.size);
            self.set(index, n, index + 1 == pieces);
            let pseudo = self.pseudo(n);
            let Some(room) = sink.offer(self.target(), end + n) else {
                return Delivered::NoBuffers {
                    count: index,
                    bytes,
                    lost: pieces - index,
                };
            };
            let part = rest.take(n);
            let behind = room.skip(end);
            let header = if to.guest_csum {
                self.put_checksum(pseudo.folded());
                part.copy_to(behind);
                self.partial()
            } else {
                self.put_checksum(0);
                let mut sum = Running::from(pseudo);
                sum.add(&self.headers.bytes[start..end]);
                copy_and_sum(part, behind, &mut sum);
                let sum = match (sum.finish(), self.layout.transport) {
                    // Zero would mean that there is none.
                    (0, Transport::Udp) => 0xffff,
                    (sum, _) => sum,
                };
                self.put_checksum(sum);
                VnetHeader::default()
            };
            room.write(&self.headers.bytes[..end]);
            sink.commit(&header, end + n);
            bytes += end + n;
            rest = rest.skip(n);
        }
        match pieces {
            1 => Delivered::Frame(bytes),
            count => Delivered::Frames { count, bytes },
        }
    }
}

/// Lengths and offsets within an IP packet, whose length has 16 bits, and short headers before it.
fn narrow(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

/// Puts a large segment into the buffers of a receiver who has settled on `to`.
pub(super) fn deliver(
    frame: &TxFrame<'_>,
    front: &Front,
    to: &Offloads,
    sink: &mut dyn RxSink,
) -> Delivered {
    let Ok(mut large) = Large::new(frame, front) else {
        return Delivered::Malformed;
    };
    let most = large.payload.len().min(large.size);
    if large.layout.end - large.layout.network + most > usize::from(to.mtu) {
        return Delivered::TooLarge;
    }
    let gso_type = frame.header.gso_type;
    // One that fits into one piece is none: receivers refuse to call it that.
    if large.payload.len() > large.size
        && large.is_taken_by(to, gso_type & VnetHeader::GSO_ECN != 0)
    {
        large.whole(gso_type, sink)
    } else {
        large.cut(to, sink)
    }
}

#[cfg(test)]
#[path = "segment_test.rs"]
mod tests;
