// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sets of VLANs.

use std::fmt;
use std::str::FromStr;

/// The largest number of a VLAN; 0 means none and 4095 is reserved (IEEE 802.1Q, 9.6).
pub(super) const LAST: u16 = 4094;

/// A set of VLANs, of 1 to 4094.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// None.
    pub fn none() -> Self {
        Self(Box::new([0; 64]))
    }

    /// All.
    pub fn all() -> Self {
        let mut all = Box::new([u64::MAX; 64]);
        all[0] &= !1;
        all[63] &= !(1 << 63);
        Self(all)
    }

    /// Adds one; returns false if it is none that exists.
    pub fn insert(&mut self, vlan: u16) -> bool {
        let valid = (1..=LAST).contains(&vlan);
        if valid {
            self.0[usize::from(vlan / 64)] |= 1 << (vlan % 64);
        }
        valid
    }

    /// True if `vlan` is in the set.
    #[inline]
    pub fn contains(&self, vlan: u16) -> bool {
        self.0
            .get(usize::from(vlan / 64))
            .is_some_and(|word| word >> (vlan % 64) & 1 != 0)
    }

    /// True if nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Those in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (1..=LAST).filter(|vlan| self.contains(*vlan))
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VlanSet({self})")
    }
}

impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::all() {
            return f.write_str("all");
        }
        let mut between = "";
        let mut next = 1;
        while next <= LAST {
            let first = next;
            next += 1;
            if !self.contains(first) {
                continue;
            }
            while self.contains(next) {
                next += 1;
            }
            write!(f, "{between}{first}")?;
            if next - first > 1 {
                write!(f, "-{}", next - 1)?;
            }
            between = ":";
        }
        Ok(())
    }
}

/// The text is no set of VLANs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither `all` nor a list of VLANs from 1 to 4094 such as 10:20:30-40")]
pub struct BadVlans(String);

impl FromStr for VlanSet {
    type Err = BadVlans;

    /// `all`, or numbers and ranges with colons between them.
    fn from_str(text: &str) -> Result<Self, BadVlans> {
        let bad = || BadVlans(text.to_owned());
        if text == "all" {
            return Ok(Self::all());
        }
        let number = |text: &str| -> Result<u16, BadVlans> {
            if !text.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(bad());
            }
            text.parse()
                .ok()
                .filter(|vlan| (1..=LAST).contains(vlan))
                .ok_or_else(bad)
        };
        let mut set = Self::none();
        for part in text.split(':') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(bad());
            }
            for vlan in first..=last {
                set.insert(vlan);
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_written_as_they_are_read() {
        for text in ["all", "1", "4094", "10:20:30-40", "1-4093", "63-64:127-129"] {
            assert_eq!(text.parse::<VlanSet>().unwrap().to_string(), text);
        }
        assert_eq!("3:1:2".parse::<VlanSet>().unwrap().to_string(), "1-3");
        assert_eq!("1-4094".parse::<VlanSet>().unwrap(), VlanSet::all());
        for text in ["", "0", "4095", "5-3", "1:", "a", "1--2", "+1", "65537"] {
            text.parse::<VlanSet>().unwrap_err();
        }
    }

    #[test]
    fn nothing_outside_is_in_any_set() {
        let mut all = VlanSet::all();
        assert!(!all.insert(0) && !all.insert(4095));
        for vlan in [0, 4095, 4096, u16::MAX] {
            assert!(!all.contains(vlan));
        }
        assert_eq!(all.iter().count(), 4094);
        assert!(VlanSet::none().is_empty());
    }
}
