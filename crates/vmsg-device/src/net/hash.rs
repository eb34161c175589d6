// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hash of incoming packets (VIRTIO 1.3, 5.1.6.4.3).

use super::flow::{Flow, Transport};

/// Longest key, in bytes: as many as the longest input needs.
pub(super) const KEY_LEN: usize = 40;

/// Two IPv6 addresses and two ports.
const INPUT: usize = 36;

/// Hash types (VIRTIO 1.3, 5.1.6.4.3.1).
mod types {
    pub(super) const IPV4: u32 = 1 << 0;
    pub(super) const TCPV4: u32 = 1 << 1;
    pub(super) const UDPV4: u32 = 1 << 2;
    pub(super) const IPV6: u32 = 1 << 3;
    pub(super) const TCPV6: u32 = 1 << 4;
    pub(super) const UDPV6: u32 = 1 << 5;
    pub(super) const IP_EX: u32 = 1 << 6;
    pub(super) const TCP_EX: u32 = 1 << 7;
    pub(super) const UDP_EX: u32 = 1 << 8;
}

/// All hash types there are.
pub(super) const SUPPORTED: u32 = 0x1ff;

/// The hash function of receive-side scaling. Each bit of the input that is
/// set contributes the 32 bits of the key at its place.
struct Toeplitz {
    /// For each half of each byte of the input, what each of its values contributes.
    table: Box<[[u32; 16]; 2 * INPUT]>,
}

impl Toeplitz {
    /// `key` has up to [`KEY_LEN`] bytes; missing ones are 0.
    fn new(key: &[u8]) -> Self {
        let mut padded = [0; KEY_LEN];
        let len = key.len().min(KEY_LEN);
        padded[..len].copy_from_slice(&key[..len]);
        let window = |bit: usize| {
            let at = bit / 8;
            let bytes = padded[at..]
                .iter()
                .chain(std::iter::repeat(&0))
                .take(5)
                .fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
            // 40 bits, of which those from `bit` on are wanted.
            u32::try_from(bits_of(bytes, bit % 8)).expect("32 bits")
        };
        let mut table = Box::new([[0; 16]; 2 * INPUT]);
        for (half, entry) in table.iter_mut().enumerate() {
            for (value, sum) in entry.iter_mut().enumerate() {
                for bit in 0..4 {
                    if value & (8 >> bit) != 0 {
                        *sum ^= window(half * 4 + bit);
                    }
                }
            }
        }
        Self { table }
    }

    fn hash(&self, input: &[u8]) -> u32 {
        let mut hash = 0;
        for (byte, halves) in input.iter().zip(self.table.chunks_exact(2)) {
            hash ^= halves[0][usize::from(byte >> 4)] ^ halves[1][usize::from(byte & 15)];
        }
        hash
    }
}

/// 32 of the 40 bits in `bits`, from the `skip`th on.
const fn bits_of(bits: u64, skip: usize) -> u64 {
    bits >> (8 - skip) & 0xffff_ffff
}

/// A packet's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hash {
    pub(super) value: u32,
    /// `VIRTIO_NET_HASH_REPORT_…`: over what it was calculated.
    pub(super) report: u16,
}

/// How the driver wants packets to be hashed.
pub(super) struct Hasher {
    types: u32,
    toeplitz: Toeplitz,
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hasher({:#x})", self.types)
    }
}

impl Hasher {
    /// `None` if no packet is to be hashed.
    pub(super) fn new(types: u32, key: &[u8]) -> Option<Self> {
        (types & SUPPORTED != 0).then(|| Self {
            types: types & SUPPORTED,
            toeplitz: Toeplitz::new(key),
        })
    }

    /// The hash of a packet, if it is of a kind that the driver wants hashed.
    pub(super) fn hash(&self, flow: &Flow) -> Option<Hash> {
        let (report, ports) = self.choose(flow)?;
        let (src, dst) = if report > 6 {
            (
                flow.home.unwrap_or(flow.src),
                flow.routed.unwrap_or(flow.dst),
            )
        } else {
            (flow.src, flow.dst)
        };
        let width = if flow.v6 { 16 } else { 4 };
        let mut input = [0; INPUT];
        input[..width].copy_from_slice(&src[..width]);
        input[width..2 * width].copy_from_slice(&dst[..width]);
        let mut len = 2 * width;
        if let Some(ports) = ports {
            input[len..len + 4].copy_from_slice(&ports);
            len += 4;
        }
        Some(Hash {
            value: self.toeplitz.hash(&input[..len]),
            report,
        })
    }

    /// The type of hash, as it is reported, and the ports if they are part of it.
    fn choose(&self, flow: &Flow) -> Option<(u16, Option<[u8; 4]>)> {
        let (tcp, udp) = match flow.transport {
            Transport::Tcp(ports) => (Some(ports), None),
            Transport::Udp(ports) => (None, Some(ports)),
            Transport::Other => (None, None),
        };
        let wanted = |bit: u32| self.types & bit != 0;
        let among = |tcp_type: u32, udp_type: u32, ip_type: u32| {
            // A type's report is its bit's number and one.
            let report = |bit: u32| u16::try_from(bit.trailing_zeros() + 1).expect("nine bits");
            match (tcp, udp) {
                (Some(_), _) if wanted(tcp_type) => Some((report(tcp_type), tcp)),
                (_, Some(_)) if wanted(udp_type) => Some((report(udp_type), udp)),
                _ if wanted(ip_type) => Some((report(ip_type), None)),
                _ => None,
            }
        };
        if !flow.v6 {
            return among(types::TCPV4, types::UDPV4, types::IPV4);
        }
        flow.extended
            .then(|| among(types::TCP_EX, types::UDP_EX, types::IP_EX))
            .flatten()
            .or_else(|| among(types::TCPV6, types::UDPV6, types::IPV6))
    }
}

#[cfg(test)]
#[path = "hash_test.rs"]
pub(super) mod tests;
