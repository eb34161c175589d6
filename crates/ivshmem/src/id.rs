// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who somebody is.

use std::fmt;

/// The number of a peer, given by the server: 0 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u16);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
