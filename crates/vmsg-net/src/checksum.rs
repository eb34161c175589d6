// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Internet checksum (RFC 1071) over bytes here and in guest memory.

use std::net::IpAddr;

use vmsg_mem::Pieces;

/// A running sum. Every part but the last must have an even length.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// The pseudo-header of TCP, UDP and ICMPv6.
    pub(crate) fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Self {
        let mut sum = Self::default();
        for addr in [src, dst] {
            match addr {
                IpAddr::V4(addr) => sum.add(&addr.octets()),
                IpAddr::V6(addr) => sum.add(&addr.octets()),
            }
        }
        sum.0 += u64::from(protocol) + len as u64;
        sum
    }

    /// Adds bytes.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        // In the order of this machine, which the sum does not mind (RFC 1071, 2 B): so the compiler
        // finds vector instructions for it.
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum = 0;
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_ne_bytes(last));
        // Folded once, so that nothing a caller does can overflow.
        self.0 = (self.0 & 0xffff_ffff) + (self.0 >> 32) + u64::from(fold(sum).to_be());
    }

    /// Takes away two bytes.
    pub(crate) fn take_away(&mut self, word: u16) {
        self.0 += u64::from(!word);
    }

    /// Adds what lies in guest memory.
    pub(crate) fn add_pieces(&mut self, mut pieces: Pieces<'_>) {
        let mut chunk = [0; 4096];
        while !pieces.is_empty() {
            let n = pieces.read(&mut chunk);
            if n == 0 {
                return;
            }
            self.add(&chunk[..n]);
            pieces = pieces.skip(n);
        }
    }

    /// The sum in 16 bits, without the final complement: what a partial checksum holds.
    pub(crate) const fn folded(self) -> u16 {
        fold(self.0)
    }

    /// The checksum.
    pub(crate) const fn finish(self) -> u16 {
        !self.folded()
    }

    /// True if the summed bytes included their own, right checksum.
    pub(crate) const fn is_valid(self) -> bool {
        self.folded() == 0xffff
    }
}

/// The sum of the four halves.
const fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded: the rest is zero.
    let [.., high, low] = sum.to_be_bytes();
    u16::from_be_bytes([high, low])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_as_rfc_1071_does() {
        let mut sum = Sum::default();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), 0xddf2);
    }

    #[test]
    fn parts_and_odd_ends_make_no_difference() {
        let bytes: Vec<u8> = (0..1001u32).map(|i| (i * 37 % 251) as u8).collect();
        let mut whole = Sum::default();
        whole.add(&bytes);
        let mut parts = Sum::default();
        parts.add(&bytes[..502]);
        parts.add(&bytes[502..]);
        assert_eq!(whole.folded(), parts.folded());
        assert_eq!(
            smoltcp::wire::checksum::data(&bytes),
            whole.folded(),
            "another implementation"
        );
    }
}
