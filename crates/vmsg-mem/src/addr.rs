// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Addresses as the peer writes them.

use core::fmt;

/// An address on a bus, in bytes: what SET_VQUEUE and descriptors carry.
///
/// It means nothing until an [`AddressSpace`](crate::AddressSpace) has
/// translated it; it is neither a pointer nor an offset into a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BusAddr(pub u64);

impl BusAddr {
    /// The address `bytes` further on, or `None` past the end of the 64-bit space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Display for BusAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for BusAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}
