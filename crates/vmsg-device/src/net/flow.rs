// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What of a frame's headers tells one flow from another.

/// An IP address of either version; IPv4 uses the first four bytes.
pub(super) type Address = [u8; 16];

/// What a packet carries, as far as flows are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// Source and destination port, as they stand in the header.
    Tcp([u8; 4]),
    /// The same.
    Udp([u8; 4]),
    /// Anything else, a fragment, or more headers than were looked at.
    Other,
}

/// The endpoints of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) v6: bool,
    pub(super) src: Address,
    pub(super) dst: Address,
    pub(super) transport: Transport,
    /// The last protocol number found.
    pub(super) protocol: u8,
    /// There are IPv6 extension headers.
    pub(super) extended: bool,
    /// The home address option (RFC 6275, 6.3), which stands for the source.
    pub(super) home: Option<Address>,
    /// The address in a routing header of type 2 (RFC 6275, 6.4), which stands for the destination.
    pub(super) routed: Option<Address>,
}

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const MOBILITY: u8 = 135;

/// VLAN tags and extension headers looked at.
const TAGS: usize = 2;
const EXTENSIONS: usize = 8;

impl Flow {
    /// Reads the headers at the beginning of a frame; `None` if it is no IP packet.
    pub(super) fn of(frame: &[u8]) -> Option<Self> {
        let mut at = 12;
        for _ in 0..=TAGS {
            match u16_at(frame, at)? {
                0x8100 | 0x88a8 | 0x9100 => at += 4,
                IPV4 => return Self::ipv4(&frame[at + 2..]),
                IPV6 => return Self::ipv6(&frame[at + 2..]),
                _ => return None,
            }
        }
        None
    }

    fn ipv4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let len = usize::from(header[0] & 15) * 4;
        if header[0] >> 4 != 4 || len < 20 {
            return None;
        }
        let address = |at: usize| {
            let mut address = [0; 16];
            address[..4].copy_from_slice(&header[at..at + 4]);
            address
        };
        // More fragments, or not the first one: ports are not in all of them.
        let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        let protocol = header[9];
        Some(Self {
            v6: false,
            src: address(12),
            dst: address(16),
            transport: if fragment {
                Transport::Other
            } else {
                transport(protocol, packet.get(len..))
            },
            protocol,
            extended: false,
            home: None,
            routed: None,
        })
    }

    fn ipv6(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<40>()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let mut flow = Self {
            v6: true,
            src: address_at(header, 8)?,
            dst: address_at(header, 24)?,
            transport: Transport::Other,
            protocol: header[6],
            extended: false,
            home: None,
            routed: None,
        };
        let mut rest = &packet[40..];
        for _ in 0..EXTENSIONS {
            let len = match (flow.protocol, rest) {
                (HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY, [_, len, ..]) => {
                    (usize::from(*len) + 1) * 8
                }
                (AUTHENTICATION, [_, len, ..]) => (usize::from(*len) + 2) * 4,
                (FRAGMENT, _) => 8,
                _ => {
                    flow.transport = transport(flow.protocol, Some(rest));
                    return Some(flow);
                }
            };
            flow.extended = true;
            let Some((extension, behind)) = rest.split_at_checked(len) else {
                return Some(flow);
            };
            match flow.protocol {
                // Atomic fragments are whole packets.
                FRAGMENT if u16_at(extension, 2)? & 0xfff9 != 0 => return Some(flow),
                ROUTING if extension[2] == 2 => flow.routed = address_at(extension, 8),
                DESTINATION => flow.home = flow.home.or_else(|| home_address(extension)),
                _ => {}
            }
            flow.protocol = extension[0];
            rest = behind;
        }
        Some(flow)
    }

    /// A number that both directions of the flow have in common, well spread.
    pub(super) fn symmetric_hash(&self) -> u64 {
        let ports = match self.transport {
            Transport::Tcp(ports) | Transport::Udp(ports) => ports,
            Transport::Other => [0; 4],
        };
        let [a, b, c, d] = ports;
        let one = endpoint(&self.src, u16::from_be_bytes([a, b]));
        let two = endpoint(&self.dst, u16::from_be_bytes([c, d]));
        mix(one.wrapping_add(two) ^ (one ^ two).rotate_left(32) ^ u64::from(self.protocol))
    }
}

fn endpoint(address: &Address, port: u16) -> u64 {
    let (high, low) = address.split_at(8);
    let high = u64::from_le_bytes(high.try_into().expect("eight bytes"));
    let low = u64::from_le_bytes(low.try_into().expect("eight bytes"));
    mix(mix(high ^ u64::from(port) << 48).wrapping_add(low))
}

/// The finalizer of splitmix64: each bit of the result depends on all of `x`.
const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

fn address_at(bytes: &[u8], at: usize) -> Option<Address> {
    bytes.get(at..at + 16)?.try_into().ok()
}

fn transport(protocol: u8, rest: Option<&[u8]>) -> Transport {
    match (protocol, rest.and_then(|rest| rest.first_chunk())) {
        (TCP, Some(ports)) => Transport::Tcp(*ports),
        (UDP, Some(ports)) => Transport::Udp(*ports),
        _ => Transport::Other,
    }
}

/// Finds the home address among the options of a destination options header.
fn home_address(extension: &[u8]) -> Option<Address> {
    const PAD1: u8 = 0;
    const HOME_ADDRESS: u8 = 201;
    let mut options = extension.get(2..)?;
    loop {
        match options {
            [PAD1, rest @ ..] => options = rest,
            [HOME_ADDRESS, 16, rest @ ..] => return address_at(rest, 0),
            [_, len, rest @ ..] => options = rest.get(usize::from(*len)..)?,
            _ => return None,
        }
    }
}

#[cfg(test)]
#[path = "flow_test.rs"]
mod tests;
