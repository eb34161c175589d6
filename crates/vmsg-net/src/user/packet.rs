// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ethernet and IP headers, of both versions behind one face.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{EthernetAddress, Ipv4Packet};
use vmsg_mem::Pieces;

use super::packet6;
use crate::checksum::Sum;

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Bytes of an IPv6 header without extensions.
pub(super) const IPV6: usize = 40;
/// Bytes of the extension header that makes an IPv6 packet a fragment.
pub(super) const FRAGMENT6: usize = 8;
/// Longest headers before the payload of a packet that is no fragment.
pub(super) const MAX_HEADERS: usize = ETHERNET + IPV6;
/// Longest IPv4 packet, longest payload of an IPv6 packet.
pub(super) const MAX_PACKET: usize = 65535;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A length within a few packets as the 32 bits of sequence numbers.
pub(super) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP6: u8 = 58;

/// Hop limit of packets that begin here.
pub(super) const HOPS: u8 = 64;

/// Bytes of the IP header of packets to `addr`, without options and extensions.
pub(super) const fn ip_header(addr: IpAddr) -> usize {
    match addr {
        IpAddr::V4(_) => IPV4,
        IpAddr::V6(_) => IPV6,
    }
}

/// Bytes of the Ethernet and the IP header of packets to `addr`.
pub(super) const fn headers(addr: IpAddr) -> usize {
    ETHERNET + ip_header(addr)
}

/// Ethernet header of a frame to the guest.
pub(super) fn emit_ethernet(
    out: &mut [u8],
    src: EthernetAddress,
    dst: EthernetAddress,
    ethertype: u16,
) {
    out[..6].copy_from_slice(dst.as_bytes());
    out[6..12].copy_from_slice(src.as_bytes());
    out[12..14].copy_from_slice(&ethertype.to_be_bytes());
}

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    /// The same in all fragments of a packet; 16 bits of it count in IPv4.
    pub(super) ident: u32,
    /// Where it belongs in the whole, in bytes; a multiple of eight.
    pub(super) offset: usize,
    /// It is not the last one.
    pub(super) more: bool,
}

/// The IP header of a packet to the guest. Both addresses are of the same version.
#[derive(Clone, Copy, Debug)]
pub(super) struct IpOut {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: u8,
    pub(super) hop_limit: u8,
    pub(super) fragment: Option<Fragment>,
}

impl IpOut {
    pub(super) const fn new(src: IpAddr, dst: IpAddr, protocol: u8) -> Self {
        Self {
            src,
            dst,
            protocol,
            hop_limit: HOPS,
            fragment: None,
        }
    }

    /// Bytes that [`emit`](Self::emit) writes.
    pub(super) const fn len(&self) -> usize {
        match (self.dst, self.fragment) {
            (IpAddr::V4(_), _) => IPV4,
            (IpAddr::V6(_), None) => IPV6,
            (IpAddr::V6(_), Some(_)) => IPV6 + FRAGMENT6,
        }
    }

    pub(super) const fn ethertype(&self) -> u16 {
        match self.dst {
            IpAddr::V4(_) => ETHERTYPE_IPV4,
            IpAddr::V6(_) => ETHERTYPE_IPV6,
        }
    }

    /// Writes the header to the first [`len`](Self::len) bytes of `out`. `payload` is the length
    /// of what follows, which callers keep within [`MAX_PACKET`].
    pub(super) fn emit(&self, out: &mut [u8], payload: usize) {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.emit4(src, dst, out, payload),
            (IpAddr::V6(src), IpAddr::V6(dst)) => packet6::emit(self, src, dst, out, payload),
            _ => debug_assert!(false, "{} to {}", self.src, self.dst),
        }
    }

    fn emit4(&self, src: Ipv4Addr, dst: Ipv4Addr, out: &mut [u8], payload: usize) {
        const DONT_FRAGMENT: u16 = 0x4000;
        const MORE_FRAGMENTS: u16 = 0x2000;
        let total = u16::try_from(IPV4 + payload).unwrap_or(u16::MAX);
        let (ident, flags) = match self.fragment {
            None if self.protocol == TCP => (0, DONT_FRAGMENT),
            None => (0, 0),
            Some(part) => {
                let offset = u16::try_from(part.offset / 8).unwrap_or(0) & 0x1fff;
                let more = if part.more { MORE_FRAGMENTS } else { 0 };
                ((part.ident & 0xffff) as u16, offset | more)
            }
        };
        let out = &mut out[..IPV4];
        out[0] = 0x45;
        out[1] = 0;
        out[2..4].copy_from_slice(&total.to_be_bytes());
        out[4..6].copy_from_slice(&ident.to_be_bytes());
        out[6..8].copy_from_slice(&flags.to_be_bytes());
        out[8] = self.hop_limit;
        out[9] = self.protocol;
        out[10..12].fill(0);
        out[12..16].copy_from_slice(&src.octets());
        out[16..20].copy_from_slice(&dst.octets());
        let mut sum = Sum::default();
        sum.add(out);
        out[10..12].copy_from_slice(&sum.finish().to_be_bytes());
    }
}

/// An IP packet from the guest whose headers have been checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct IpIn<'a> {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    /// What the payload is.
    pub(super) protocol: u8,
    pub(super) hop_limit: u8,
    /// Set if it is a part only; with its offset, the payload lies within [`MAX_PACKET`].
    pub(super) fragment: Option<Fragment>,
    pub(super) payload: Pieces<'a>,
}

/// What a packet that cannot be taken is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    Malformed,
    /// An extension or option that is not known here.
    Unsupported,
}

impl<'a> IpIn<'a> {
    /// Reads an IPv4 packet. What follows the packet in the frame is padding.
    pub(super) fn parse4(pieces: Pieces<'a>) -> Result<Self, Unfit> {
        let mut bytes = [0; 60];
        let have = pieces.read(&mut bytes);
        if have < IPV4 {
            return Err(Unfit::Malformed);
        }
        let packet = Ipv4Packet::new_unchecked(&bytes[..have]);
        let header_len = usize::from(packet.header_len());
        let total_len = usize::from(packet.total_len());
        if packet.version() != 4
            || header_len < IPV4
            || header_len > have
            || total_len < header_len
            || total_len > pieces.len()
        {
            return Err(Unfit::Malformed);
        }
        let mut sum = Sum::default();
        sum.add(&bytes[..header_len]);
        if !sum.is_valid() {
            return Err(Unfit::Malformed);
        }
        let offset = usize::from(packet.frag_offset());
        let more = packet.more_frags();
        let this = Self {
            src: packet.src_addr().into(),
            dst: packet.dst_addr().into(),
            protocol: u8::from(packet.next_header()),
            hop_limit: packet.hop_limit(),
            fragment: (offset != 0 || more).then(|| Fragment {
                ident: packet.ident().into(),
                offset,
                more,
            }),
            payload: pieces.take(total_len).skip(header_len),
        };
        if offset + this.payload.len() > MAX_PACKET {
            return Err(Unfit::Malformed);
        }
        Ok(this)
    }

    /// Reads an IPv6 packet and the extension headers that it has.
    pub(super) fn parse6(pieces: Pieces<'a>) -> Result<Self, Unfit> {
        packet6::parse(pieces)
    }
}

/// Address of an interface whose identifier comes from its hardware address (RFC 4291, A).
pub(super) const fn link_local(mac: EthernetAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0;
    Ipv6Addr::from_octets([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// The hardware address of an IPv6 multicast group (RFC 2464, 7).
pub(super) const fn multicast_mac(group: Ipv6Addr) -> EthernetAddress {
    let [.., a, b, c, d] = group.octets();
    EthernetAddress([0x33, 0x33, a, b, c, d])
}

/// The group that whoever has `addr` listens to (RFC 4291, 2.7.1).
pub(super) const fn solicited_node(addr: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = addr.octets();
    Ipv6Addr::from_octets([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}
