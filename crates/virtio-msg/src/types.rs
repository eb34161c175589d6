// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of the protocol, each with a type of its own.

use core::fmt;
use core::time::Duration;

/// A device number: which device behind one bus a message is about. Bus messages carry 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevNum(pub u16);

impl fmt::Display for DevNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The index of a virtqueue within its device, as it stands on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueIndex(pub u32);

impl QueueIndex {
    /// The index as a `usize`; an index that does not fit is past the end of every slice.
    pub fn to_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The size of a virtqueue in entries, as it stands on the wire: not checked, 0 means "none".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueSize(pub u32);

impl QueueSize {
    /// The largest size a virtqueue can have (virtio 1.3 §2.7 and §2.8).
    pub const MAX: QueueSize = QueueSize(32768);

    /// The size as a `u16`, if it is one a virtqueue can have: 1 to 32768 entries.
    pub fn to_u16(self) -> Option<u16> {
        if self.0 == 0 || self > Self::MAX {
            return None;
        }
        u16::try_from(self.0).ok()
    }

    /// Whether a virtqueue can have this size: 1 to 32768, and a power of two if it is split.
    pub fn is_valid(self, packed: bool) -> bool {
        self.to_u16().is_some() && (packed || self.0.is_power_of_two())
    }
}

impl fmt::Display for QueueSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What joins a response to its request. 0 in events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u16);

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The generation of a configuration space: another number after each change that a driver can see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Generation {
        Generation(self.0.wrapping_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A moment on the caller's clock, in nanoseconds. The crate has no clock: where the zero lies is the caller's business.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// The moment `d` later, or the last moment there is.
    #[must_use]
    pub fn saturating_add(self, d: Duration) -> Instant {
        Instant(
            self.0
                .saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    pub fn saturating_since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl core::ops::Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, d: Duration) -> Instant {
        self.saturating_add(d)
    }
}
