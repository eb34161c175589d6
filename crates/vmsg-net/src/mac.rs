// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Addresses of network interfaces.

use std::fmt;
use std::str::FromStr;

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A locally administered address that only depends on `seed`, so that a
    /// device has the same one in every run.
    pub fn derived(seed: &str) -> Self {
        // FNV-1a: any stable hash with good spread in its low bits will do.
        let hash = seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let b = hash.to_le_bytes();
        // 52:54:00 is what QEMU and libvirt use for virtual machines: locally administered, unicast.
        Self([0x52, 0x54, 0x00, b[0] ^ b[3], b[1] ^ b[4], b[2] ^ b[5]])
    }

    /// True for an address that a single interface may have.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The text is not a MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a unicast MAC address such as 52:54:00:12:34:56")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        let mac = Self(bytes);
        if parts.next().is_some() || !mac.is_unicast() {
            return Err(bad());
        }
        Ok(mac)
    }
}
