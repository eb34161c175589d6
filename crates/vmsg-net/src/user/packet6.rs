// SPDX-License-Identifier: Apache-2.0 OR MIT
//! IPv6 headers and their extensions (RFC 8200).

use std::net::Ipv6Addr;

use vmsg_mem::Pieces;

use super::packet::{FRAGMENT6, Fragment, IPV6, IpIn, IpOut, MAX_PACKET, Unfit};

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Extension headers of one packet, and bytes of them: more than anybody needs.
const MAX_EXTENSIONS: usize = 8;
const MAX_BYTES: usize = 512;

/// Writes the headers of a packet with `payload` bytes.
pub(super) fn emit(ip: &IpOut, src: Ipv6Addr, dst: Ipv6Addr, out: &mut [u8], payload: usize) {
    let extension = if ip.fragment.is_some() { FRAGMENT6 } else { 0 };
    let len = u16::try_from(extension + payload).unwrap_or(u16::MAX);
    out[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    out[4..6].copy_from_slice(&len.to_be_bytes());
    out[6] = ip.protocol;
    out[7] = ip.hop_limit;
    out[8..24].copy_from_slice(&src.octets());
    out[24..40].copy_from_slice(&dst.octets());
    if let Some(part) = ip.fragment {
        out[6] = FRAGMENT;
        let place = u16::try_from(part.offset & !7).unwrap_or(0) | u16::from(part.more);
        let out = &mut out[IPV6..IPV6 + FRAGMENT6];
        out[..2].copy_from_slice(&[ip.protocol, 0]);
        out[2..4].copy_from_slice(&place.to_be_bytes());
        out[4..8].copy_from_slice(&part.ident.to_be_bytes());
    }
}

/// Reads a packet. What follows it in the frame is padding.
pub(super) fn parse(pieces: Pieces<'_>) -> Result<IpIn<'_>, Unfit> {
    let header: [u8; IPV6] = pieces.read_array().ok_or(Unfit::Malformed)?;
    let addr = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        Ipv6Addr::from_octets(octets)
    };
    let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let payload = pieces.skip(IPV6);
    if header[0] >> 4 != 6 || len > payload.len() {
        return Err(Unfit::Malformed);
    }
    let (src, dst) = (addr(8), addr(24));
    if src.is_multicast() {
        return Err(Unfit::Malformed);
    }
    extensions(IpIn {
        src: src.into(),
        dst: dst.into(),
        protocol: header[6],
        hop_limit: header[7],
        fragment: None,
        payload: payload.take(len),
    })
}

/// Goes through the extension headers at the beginning of the payload, up to that of a fragment.
/// The payload of a packet that was put together again begins with what is left of them.
pub(super) fn extensions(mut packet: IpIn<'_>) -> Result<IpIn<'_>, Unfit> {
    let mut bytes = 0;
    for at in 0..=MAX_EXTENSIONS {
        let len = match packet.protocol {
            // Only directly behind the IPv6 header.
            HOP_BY_HOP if at == 0 && packet.fragment.is_none() => options(packet.payload)?,
            HOP_BY_HOP => return Err(Unfit::Malformed),
            DESTINATION => options(packet.payload)?,
            ROUTING => {
                let [_, words, _, left]: [u8; 4] =
                    packet.payload.read_array().ok_or(Unfit::Malformed)?;
                if left != 0 {
                    // This is no router for those who choose their way themselves (RFC 5095).
                    return Err(Unfit::Unsupported);
                }
                8 + 8 * usize::from(words)
            }
            FRAGMENT if packet.fragment.is_none() => {
                let [_, _, a, b, c, d, e, f]: [u8; FRAGMENT6] =
                    packet.payload.read_array().ok_or(Unfit::Malformed)?;
                let place = u16::from_be_bytes([a, b]);
                packet.fragment = Some(Fragment {
                    ident: u32::from_be_bytes([c, d, e, f]),
                    offset: usize::from(place & !7),
                    more: place & 1 != 0,
                });
                FRAGMENT6
            }
            FRAGMENT => return Err(Unfit::Malformed),
            _ => return Ok(packet),
        };
        bytes += len;
        if len > packet.payload.len() {
            return Err(Unfit::Malformed);
        }
        if bytes > MAX_BYTES {
            return Err(Unfit::Unsupported);
        }
        let [next]: [u8; 1] = packet.payload.read_array().ok_or(Unfit::Malformed)?;
        packet.protocol = next;
        packet.payload = packet.payload.skip(len);
        if let Some(part) = packet.fragment {
            if part.offset + packet.payload.len() > MAX_PACKET {
                return Err(Unfit::Malformed);
            }
            if part.offset != 0 || part.more {
                // What follows is only to be understood in the whole.
                return Ok(packet);
            }
            // A packet of one fragment is a whole one (RFC 6946).
            packet.fragment = None;
        }
    }
    Err(Unfit::Unsupported)
}

/// Length of a header with options, all of which must be such as may be passed over.
fn options(payload: Pieces<'_>) -> Result<usize, Unfit> {
    let [_, words]: [u8; 2] = payload.read_array().ok_or(Unfit::Malformed)?;
    let len = 8 + 8 * usize::from(words);
    if len > MAX_BYTES {
        return Err(Unfit::Unsupported);
    }
    let mut bytes = [0; MAX_BYTES];
    let bytes = &mut bytes[..len];
    if payload.read(bytes) < len {
        return Err(Unfit::Malformed);
    }
    let mut rest = &bytes[2..];
    while let Some((kind, tail)) = rest.split_first() {
        // One byte of padding has no length.
        if *kind == 0 {
            rest = tail;
            continue;
        }
        if kind >> 6 != 0 {
            return Err(Unfit::Unsupported);
        }
        let (len, tail) = tail.split_first().ok_or(Unfit::Malformed)?;
        rest = tail.get(usize::from(*len)..).ok_or(Unfit::Malformed)?;
    }
    Ok(len)
}

#[cfg(test)]
#[path = "packet6_test.rs"]
mod tests;
