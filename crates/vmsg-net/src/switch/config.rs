// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a switch and its ports are set up.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::{Rule, VlanSet};
use crate::Mac;

/// Most ports of a switch.
pub const MAX_PORTS: usize = 1024;
/// Most addresses that a switch can be told to remember.
pub const MAX_TABLE: usize = 1 << 20;
/// Most rules of a switch.
pub const MAX_RULES: usize = 4096;

/// How a switch looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Its name, for messages.
    pub name: String,
    /// Addresses that it remembers at most, learned and fixed ones: 1 to [`MAX_TABLE`]; 8192.
    pub table: usize,
    /// How long a learned address is remembered after its last frame: 1 ms to 24 days; 300 s.
    pub age: Duration,
    /// What becomes of frames to a single address that it does not know.
    pub unknown: Unknown,
    /// Who may send to whom. Of several rules for a pair the last one counts; without any the pair is apart.
    pub rules: Vec<Rule>,
}

impl SwitchConfig {
    /// A switch on which nobody reaches anybody.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            table: 8192,
            age: Duration::from_secs(300),
            unknown: Unknown::Flood,
            rules: Vec::new(),
        }
    }
}

/// What becomes of frames to a single address that the switch does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// They go to all ports, as far as VLANs and rules let them.
    #[default]
    Flood,
    /// They are dropped.
    Drop,
    /// They go to the port of this name, as far as VLANs and rules let them. While there is none they are dropped, and so
    /// are those that come from it.
    Uplink(String),
}

impl FromStr for Unknown {
    type Err = Infallible;

    /// `flood`, `drop`, or the name of a port.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "flood" => Self::Flood,
            "drop" => Self::Drop,
            name => Self::Uplink(name.to_owned()),
        })
    }
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flood => "flood",
            Self::Drop => "drop",
            Self::Uplink(name) => name,
        })
    }
}

/// The VLANs of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Vlans {
    /// It knows of none: frames pass as they are, tagged or not, to and from other such ports only.
    #[default]
    Plain,
    /// Untagged frames, all in this VLAN: 1 to 4094. Frames with a tag are refused, unless it carries a priority only.
    Access(u16),
    /// Tagged frames.
    Trunk {
        /// The VLANs it carries.
        allowed: VlanSet,
        /// The VLAN of untagged frames, in both directions; it need not be among those allowed. `None`: they are refused.
        native: Option<u16>,
    },
}

impl Vlans {
    /// True if frames of `vlan` may enter and leave by the port; 0 is the network of the plain ports.
    pub fn contains(&self, vlan: u16) -> bool {
        match self {
            Self::Plain => vlan == 0,
            Self::Access(own) => vlan == *own,
            Self::Trunk { allowed, native } => allowed.contains(vlan) || *native == Some(vlan),
        }
    }
}

impl fmt::Display for Vlans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("plain"),
            Self::Access(vlan) => write!(f, "vlan {vlan}"),
            Self::Trunk {
                allowed,
                native: None,
            } => write!(f, "trunk {allowed}"),
            Self::Trunk {
                allowed,
                native: Some(native),
            } => write!(f, "trunk {allowed} native {native}"),
        }
    }
}

/// Where the frames of a port are recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// A pcap file; what is there is overwritten, unless `append` says otherwise.
    pub path: PathBuf,
    /// Bytes recorded of each frame at most; 65536.
    pub snaplen: u32,
    /// Goes on with the capture that is there, if it is one with the same settings. If it is something else it stays as it is: a port
    /// that comes with such a mirror has none, [`Control::capture`](super::Control::capture) refuses it.
    pub append: bool,
}

impl Mirror {
    /// Whole frames to the file at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            snaplen: 65536,
            append: false,
        }
    }
}

/// How a port looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Its name: rules and the control speak of it. Letters, digits, and `-_.:@/+`.
    pub name: String,
    /// Its VLANs.
    pub vlan: Vlans,
    /// Frames are taken from these addresses only, and the addresses are nobody else's. Empty: from any.
    pub pin: Vec<Mac>,
    /// Addresses that are known to be behind this port, whatever is seen elsewhere.
    pub statics: Vec<Mac>,
    /// Addresses learned at this port at most; 256.
    pub macs: usize,
    /// Broadcast, multicast and unknown frames that it may send, in frames each second; as many at once.
    pub storm: Option<u32>,
    /// What it may send: what is more waits in its own queue.
    pub rate_in: Option<Rate>,
    /// What it is sent: what is more is dropped.
    pub rate_out: Option<Rate>,
    /// Where its frames are recorded, in both directions.
    pub capture: Option<Mirror>,
    /// Whether its cable is in.
    pub link: bool,
}

impl PortConfig {
    /// A port without VLANs and limits.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            vlan: Vlans::Plain,
            pin: Vec::new(),
            statics: Vec::new(),
            macs: 256,
            storm: None,
            rate_in: None,
            rate_out: None,
            capture: None,
            link: true,
        }
    }
}

/// What is to be different at a port; `None`: it stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortChange {
    /// [`PortConfig::vlan`].
    pub vlan: Option<Vlans>,
    /// [`PortConfig::pin`].
    pub pin: Option<Vec<Mac>>,
    /// [`PortConfig::statics`].
    pub statics: Option<Vec<Mac>>,
    /// [`PortConfig::macs`]; what was learned already stays.
    pub macs: Option<usize>,
    /// [`PortConfig::storm`]; `Some(None)`: no limit.
    pub storm: Option<Option<u32>>,
    /// [`PortConfig::rate_in`]; `Some(None)`: no limit.
    pub rate_in: Option<Option<Rate>>,
    /// [`PortConfig::rate_out`]; `Some(None)`: no limit.
    pub rate_out: Option<Option<Rate>>,
    /// [`PortConfig::link`].
    pub link: Option<bool>,
}

/// Bits each second; of a frame, everything from its addresses to its last byte of data counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u64);

impl Rate {
    /// The least, one byte each second.
    pub const LEAST: Self = Self(8);
    /// The most, 1 Tbit/s.
    pub const MOST: Self = Self(1_000_000_000_000);

    /// A number of bits each second; `None` if it is not between [`LEAST`](Self::LEAST) and [`MOST`](Self::MOST).
    pub fn from_bits(bits: u64) -> Option<Self> {
        (Self::LEAST.0..=Self::MOST.0)
            .contains(&bits)
            .then_some(Self(bits))
    }

    /// Bits each second.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

/// The text is not a rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a rate in bit/s from 8 to 1000G, such as 100M or 2500K")]
pub struct BadRate(String);

impl FromStr for Rate {
    type Err = BadRate;

    /// A whole number, perhaps with `K`, `M` or `G` for thousands, millions, milliards.
    fn from_str(text: &str) -> Result<Self, BadRate> {
        let bad = || BadRate(text.to_owned());
        let (digits, unit) = match text.as_bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 1_000),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 1_000_000),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 1_000_000_000),
            _ => (text, 1),
        };
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(bad());
        }
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let bits = number.checked_mul(unit).ok_or_else(bad)?;
        Self::from_bits(bits).ok_or_else(bad)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, letter) in [(1_000_000_000, 'G'), (1_000_000, 'M'), (1_000, 'K')] {
            if self.0.is_multiple_of(unit) {
                return write!(f, "{}{letter}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_written_as_they_are_read() {
        for text in ["8", "100M", "2500K", "1G", "1000G", "12345"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        assert_eq!("1000000".parse::<Rate>().unwrap().to_string(), "1M");
        for text in [
            "",
            "K",
            "7",
            "-1",
            "+9",
            "1.5M",
            "1001G",
            "99999999999999999999G",
            "1 M",
        ] {
            text.parse::<Rate>().unwrap_err();
        }
    }
}
