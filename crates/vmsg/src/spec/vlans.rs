// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sets of VLANs.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::text;

/// The ids that a VLAN may have (IEEE 802.1Q: 0 is none, 4095 is reserved).
const IDS: RangeInclusive<u16> = 1..=4094;

/// VLANs of a trunk: `all`, or ids and ranges as in `10:20:30-40`; in TOML and JSON also a list of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vlans {
    /// All there are.
    All,
    /// These, in the order given.
    Some(Vec<RangeInclusive<u16>>),
}

impl Vlans {
    /// As ranges of ids.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        const ALL: &[RangeInclusive<u16>] = &[IDS];
        match self {
            Self::All => ALL,
            Self::Some(ranges) => ranges,
        }
    }

    /// Whether `id` is among them.
    pub fn contains(&self, id: u16) -> bool {
        self.ranges().iter().any(|range| range.contains(&id))
    }
}

/// Whether a VLAN may have this id.
pub(super) fn is_id(id: u16) -> bool {
    IDS.contains(&id)
}

impl fmt::Display for Vlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Some(ranges) = self else {
            return f.write_str("all");
        };
        for (index, range) in ranges.iter().enumerate() {
            let colon = if index == 0 { "" } else { ":" };
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{colon}{first}")?,
                (first, last) => write!(f, "{colon}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Vlans {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let id = |text: &str| text.parse().ok().filter(|id| is_id(*id));
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let (first, last) = (id(first)?, id(last)?);
            (first <= last).then_some(first..=last)
        };
        let ranges: Option<Vec<_>> = text.split(':').map(range).collect();
        ranges.map(Self::Some).ok_or_else(|| {
            format!("expected `all`, or VLANs 1 to 4094 such as 10:20:30-40, not `{text}`")
        })
    }
}

impl Serialize for Vlans {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Vlans {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut sets: Vec<Self> = text::many(deserializer)?;
        match sets.len() {
            0 => Err(D::Error::custom("expected at least one VLAN")),
            1 => Ok(sets.remove(0)),
            _ if sets.contains(&Self::All) => Ok(Self::All),
            _ => Ok(Self::Some(
                sets.iter().flat_map(Self::ranges).cloned().collect(),
            )),
        }
    }
}
