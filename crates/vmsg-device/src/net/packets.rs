// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames for the tests.

use std::net::{Ipv4Addr, Ipv6Addr};

/// An Ethernet header of type `kind`, to 52:54:00:00:00:01.
fn ethernet(kind: u16) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9];
    frame.extend(kind.to_be_bytes());
    frame
}

/// Ports and some payload.
fn payload(frame: &mut Vec<u8>, src: u16, dst: u16) {
    frame.extend(src.to_be_bytes());
    frame.extend(dst.to_be_bytes());
    frame.extend([0x55; 16]);
}

/// An IPv4 packet with ports, in a frame.
pub(super) fn ipv4(protocol: u8, src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16)) -> Vec<u8> {
    let mut frame = ethernet(0x0800);
    frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend(src.0.octets());
    frame.extend(dst.0.octets());
    payload(&mut frame, src.1, dst.1);
    frame
}

/// A header between IPv6 and what it carries.
#[derive(Clone, Copy)]
pub(super) enum Extension {
    HopByHop,
    /// A destination options header with the home address option.
    Home(Ipv6Addr),
    /// A routing header of type 2.
    Routed(Ipv6Addr),
    /// A fragment header of the first of several fragments.
    Fragment,
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Self::HopByHop => 0,
            Self::Home(_) => 60,
            Self::Routed(_) => 43,
            Self::Fragment => 44,
        }
    }

    fn bytes(self, next: u8) -> Vec<u8> {
        match self {
            Self::HopByHop => vec![next, 0, 1, 4, 0, 0, 0, 0],
            Self::Home(address) => {
                let mut bytes = vec![next, 2, 1, 2, 0, 0, 201, 16];
                bytes.extend(address.octets());
                bytes
            }
            Self::Routed(address) => {
                let mut bytes = vec![next, 2, 2, 1, 0, 0, 0, 0];
                bytes.extend(address.octets());
                bytes
            }
            Self::Fragment => vec![next, 0, 0, 1, 0, 0, 0, 7],
        }
    }
}

/// An IPv6 packet with ports, in a frame.
pub(super) fn ipv6(
    protocol: u8,
    src: (Ipv6Addr, u16),
    dst: (Ipv6Addr, u16),
    extensions: &[Extension],
) -> Vec<u8> {
    let mut numbers = extensions.iter().map(|extension| extension.number());
    let first = numbers.next().unwrap_or(protocol);
    let mut frame = ethernet(0x86dd);
    frame.extend([0x60, 0, 0, 0, 0, 20, first, 64]);
    frame.extend(src.0.octets());
    frame.extend(dst.0.octets());
    for extension in extensions {
        frame.extend(extension.bytes(numbers.next().unwrap_or(protocol)));
    }
    payload(&mut frame, src.1, dst.1);
    frame
}

/// `frame` with a VLAN tag.
pub(super) fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend([0x81, 0]);
    tagged.extend(vlan.to_be_bytes());
    tagged.extend(&frame[12..]);
    tagged
}

/// `frame` for somebody else.
pub(super) fn to(mac: [u8; 6], frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&mac);
    frame
}
