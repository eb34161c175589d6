// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a switch tells about itself.

use std::fmt;
use std::time::Duration;

use super::{Mirror, Rate, Rule, Unknown, Vlans};
use crate::Mac;

/// Why a frame did not get where it was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Reason {
    /// It is too short or too long for a frame, or its headers and what is said about them do not fit together.
    Malformed,
    /// Its source is a group, or nobody.
    BadSource,
    /// It is for the neighbour on this cable only (01:80:c2:00:00:00 to 0f; IEEE 802.1Q, 8.6.3).
    LinkLocal,
    /// Its VLAN does not go in by this port, or not out by that one.
    Vlan,
    /// Its source may not be used by this port.
    Pin,
    /// No rule lets it through.
    Acl,
    /// Nobody knows where its destination is, and such frames are not to go anywhere.
    Unknown,
    /// Its port sends too many frames for everybody.
    Storm,
    /// Its destination is behind the port it came from.
    SamePort,
    /// There is no other port in its VLAN.
    NoReceiver,
    /// The receiver may not be sent so much.
    RateOut,
    /// The receiver's driver has no buffers for it.
    NoBuffers,
    /// The receiver has no driver.
    NoDriver,
    /// The sender's or the receiver's cable is out.
    LinkDown,
    /// The port has been removed.
    Gone,
    /// The receiver needs a reset.
    Broken,
    /// The uplink takes no more now.
    UplinkFull,
    /// The receiver cannot take so large a frame, and it cannot be cut.
    TooLarge,
}

impl Reason {
    /// How many there are.
    pub const COUNT: usize = 18;

    /// All of them, in order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Malformed,
        Self::BadSource,
        Self::LinkLocal,
        Self::Vlan,
        Self::Pin,
        Self::Acl,
        Self::Unknown,
        Self::Storm,
        Self::SamePort,
        Self::NoReceiver,
        Self::RateOut,
        Self::NoBuffers,
        Self::NoDriver,
        Self::LinkDown,
        Self::Gone,
        Self::Broken,
        Self::UplinkFull,
        Self::TooLarge,
    ];

    /// A short name, such as `no-buffers`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::BadSource => "bad-source",
            Self::LinkLocal => "link-local",
            Self::Vlan => "vlan",
            Self::Pin => "pin",
            Self::Acl => "acl",
            Self::Unknown => "unknown",
            Self::Storm => "storm",
            Self::SamePort => "same-port",
            Self::NoReceiver => "no-receiver",
            Self::RateOut => "rate-out",
            Self::NoBuffers => "no-buffers",
            Self::NoDriver => "no-driver",
            Self::LinkDown => "link-down",
            Self::Gone => "gone",
            Self::Broken => "broken",
            Self::UplinkFull => "uplink-full",
            Self::TooLarge => "too-large",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How many frames were dropped for which reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops(pub(super) [u64; Reason::COUNT]);

impl Drops {
    /// Those for `reason`.
    pub const fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }

    /// All.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Reasons for which there were any.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL
            .into_iter()
            .zip(self.0)
            .filter(|(_, frames)| *frames > 0)
    }
}

/// Frames and their bytes, from the addresses on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Frames; a large segment is one.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What passed in one direction, by its destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// To a single address.
    pub unicast: Count,
    /// To a group.
    pub multicast: Count,
    /// To everybody.
    pub broadcast: Count,
}

impl Traffic {
    /// All together.
    pub fn total(&self) -> Count {
        let parts = [self.unicast, self.multicast, self.broadcast];
        Count {
            frames: parts.iter().map(|part| part.frames).sum(),
            bytes: parts.iter().map(|part| part.bytes).sum(),
        }
    }
}

/// A port at one moment.
///
/// `input.total().frames` is `dropped_in.total()` and the frames that went on. These went to `copies` ports, and over
/// all ports `copies` add up to what `output` and `dropped_out` do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortReport {
    /// Its name.
    pub name: String,
    /// A back end is behind it, not a device.
    pub uplink: bool,
    /// Its VLANs.
    pub vlan: Vlans,
    /// Addresses it must use.
    pub pin: Vec<Mac>,
    /// Addresses known to be behind it.
    pub statics: Vec<Mac>,
    /// Its cable is in.
    pub link: bool,
    /// A driver runs it; of an uplink, it has a carrier.
    pub running: bool,
    /// Where it is recorded; `None` also after an error.
    pub capture: Option<Mirror>,
    /// Limit of frames for everybody, in frames each second.
    pub storm: Option<u32>,
    /// Limit of what it sends.
    pub rate_in: Option<Rate>,
    /// Limit of what it is sent.
    pub rate_out: Option<Rate>,
    /// Addresses learned at it.
    pub macs: usize,
    /// Most addresses learned at it.
    pub macs_limit: usize,
    /// What it has sent, dropped frames included.
    pub input: Traffic,
    /// What it has got.
    pub output: Traffic,
    /// Receivers of the frames it sent that were not dropped before.
    pub copies: u64,
    /// Its frames that went nowhere.
    pub dropped_in: Drops,
    /// Others' frames that it should have got.
    pub dropped_out: Drops,
    /// Frames among `output` that were cut.
    pub segmented: u64,
    /// What these became.
    pub segments: u64,
    /// Segments among these that found no buffers.
    pub segments_lost: u64,
    /// Addresses that came here from another port.
    pub moves: u64,
    /// Frames whose source was not learned, since the port, or the switch, has too many.
    pub not_learned: u64,
    /// Times that its own frames had to wait, as it sends too much.
    pub waits: u64,
}

/// A switch at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchReport {
    /// Its name.
    pub name: String,
    /// What becomes of unknown frames.
    pub unknown: Unknown,
    /// Its rules.
    pub rules: Vec<Rule>,
    /// How long an address is remembered.
    pub age: Duration,
    /// Most addresses it remembers.
    pub table: usize,
    /// Addresses it remembers, the fixed ones included.
    pub macs: usize,
    /// Changes that its worker has carried out, the first ones included.
    pub changes: u64,
    /// Its ports.
    pub ports: Vec<PortReport>,
}

/// An address that a switch knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MacEntry {
    /// The address.
    pub mac: Mac,
    /// Its VLAN; 0 in the network of the plain ports, `None` for a fixed address in all VLANs of a trunk.
    pub vlan: Option<u16>,
    /// The port it is behind.
    pub port: String,
    /// It was set, not learned.
    pub fixed: bool,
    /// Time since its last frame, roughly; of fixed ones zero.
    pub age: Duration,
}
