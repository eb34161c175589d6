// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ethernet and IPv4 headers.

use std::net::Ipv4Addr;

use smoltcp::wire::{EthernetAddress, Ipv4Packet};
use vmsg_mem::Pieces;

use crate::checksum::Sum;

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Both.
pub(super) const HEADERS: usize = ETHERNET + IPV4;
/// Longest IPv4 packet.
pub(super) const MAX_PACKET: usize = 65535;

/// A length within a few packets as the 32 bits of sequence numbers.
pub(super) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

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

/// The IPv4 header of a packet to the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ipv4Out {
    pub(super) src: Ipv4Addr,
    pub(super) dst: Ipv4Addr,
    pub(super) protocol: u8,
    pub(super) ident: u16,
    /// Flags and fragment offset as they stand in the header.
    pub(super) fragment: u16,
}

impl Ipv4Out {
    pub(super) const DONT_FRAGMENT: u16 = 0x4000;
    pub(super) const MORE_FRAGMENTS: u16 = 0x2000;

    /// Writes the header to the first [`IPV4`] bytes of `out`. `payload` is its payload's length,
    /// which callers keep within [`MAX_PACKET`].
    pub(super) fn emit(&self, out: &mut [u8], payload: usize) {
        let total = u16::try_from(IPV4 + payload).unwrap_or(u16::MAX);
        let out = &mut out[..IPV4];
        out[0] = 0x45;
        out[1] = 0;
        out[2..4].copy_from_slice(&total.to_be_bytes());
        out[4..6].copy_from_slice(&self.ident.to_be_bytes());
        out[6..8].copy_from_slice(&self.fragment.to_be_bytes());
        out[8] = 64;
        out[9] = self.protocol;
        out[10..12].fill(0);
        out[12..16].copy_from_slice(&self.src.octets());
        out[16..20].copy_from_slice(&self.dst.octets());
        let mut sum = Sum::default();
        sum.add(out);
        out[10..12].copy_from_slice(&sum.finish().to_be_bytes());
    }
}

/// An IPv4 packet from the guest whose header has been checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ipv4In<'a> {
    pub(super) src: Ipv4Addr,
    pub(super) dst: Ipv4Addr,
    pub(super) protocol: u8,
    pub(super) ident: u16,
    /// Where the payload belongs in the whole, in bytes.
    pub(super) fragment_offset: usize,
    pub(super) more_fragments: bool,
    pub(super) payload: Pieces<'a>,
}

impl<'a> Ipv4In<'a> {
    /// Reads a packet; `None` if it is malformed. What follows the packet in the frame is padding.
    pub(super) fn parse(pieces: Pieces<'a>) -> Option<Self> {
        let mut bytes = [0; 60];
        let have = pieces.read(&mut bytes);
        if have < IPV4 {
            return None;
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
            return None;
        }
        let mut sum = Sum::default();
        sum.add(&bytes[..header_len]);
        if !sum.is_valid() {
            return None;
        }
        let this = Self {
            src: packet.src_addr(),
            dst: packet.dst_addr(),
            protocol: u8::from(packet.next_header()),
            ident: packet.ident(),
            fragment_offset: usize::from(packet.frag_offset()),
            more_fragments: packet.more_frags(),
            payload: pieces.take(total_len).skip(header_len),
        };
        (this.fragment_offset + this.payload.len() <= MAX_PACKET).then_some(this)
    }

    pub(super) const fn is_fragment(&self) -> bool {
        self.fragment_offset != 0 || self.more_fragments
    }
}
