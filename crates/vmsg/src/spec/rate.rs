// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rates: bits a second.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::text;

/// Bits a second, not 0: a number, or one with `K`, `M` or `G` (powers of 1000), such as `100M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// In bits a second.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

const UNITS: [(char, u64); 3] = [('G', 1_000_000_000), ('M', 1_000_000), ('K', 1000)];

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| {
                let digits = text.strip_suffix([*name, name.to_ascii_lowercase()])?;
                Some((digits, *unit))
            })
            .unwrap_or((text, 1));
        // `parse` would take a sign.
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        let number = digits.parse::<u64>().ok().filter(|_| plain);
        let bits = number.and_then(|number| number.checked_mul(unit));
        bits.filter(|bits| *bits > 0).map(Self).ok_or_else(|| {
            format!("expected bits a second such as 64K, 100M or 1G (powers of 1000), not `{text}`")
        })
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::one(deserializer)
    }
}
