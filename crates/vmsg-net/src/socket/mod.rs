// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames over sockets, as QEMU's `-netdev stream`, `dgram` and `socket` send them: another virtual
//! machine, passt, or whoever speaks the same.
//!
//! * [`Stream`]: a stream socket (Unix or TCP). Before each frame stands its length, 4 bytes, big
//!   endian. One side listens; the peer may come late, go and come back: the guest's link is up
//!   while there is one.
//! * [`Dgram`]: one frame in each datagram (Unix or UDP, one peer or a multicast group).
//!
//! There is no vnet header: frames are complete, with checksums and of a size that the peer's link
//! has. Lengths are checked where they come in.

pub(crate) mod chatter;
mod dgram;
mod input;
pub(crate) mod open;
mod output;
mod stream;
pub(crate) mod watch;

pub use self::dgram::{Dgram, DgramConfig};
pub use self::open::{BoundPath, SocketError};
pub use self::stream::{Stream, StreamAddress, StreamConfig};

use crate::{Offloads, TxFrame, VnetHeader};

/// Longest frame: an IP packet of 65535 bytes behind an Ethernet header with a VLAN tag.
const LONGEST: usize = 65535 + 18;
/// Shorter than an Ethernet header is no frame.
const SHORTEST: usize = 14;

/// Frames handed over in one call: then others should have a turn.
const TURN: usize = 256;

/// What a socket allows: whole frames only, of any size.
const OFFLOADS: Offloads = Offloads {
    mtu: u16::MAX,
    ..Offloads::NONE
};

/// What went through a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketCounters {
    /// Frames that the system has taken for the peer.
    pub sent: u64,
    /// Frames that the guest has got.
    pub received: u64,
    /// Frames of the guest that cannot be: too short or long, or with offloads, of which there are none.
    pub tx_bad: u64,
    /// Frames of the guest while there was no peer.
    pub tx_no_peer: u64,
    /// Frames of the peer that cannot be, and those for no driver.
    pub rx_dropped: u64,
    /// Connections that the peer spoilt with a length that cannot be.
    pub bad_lengths: u64,
}

impl SocketCounters {
    /// Counts a frame of the guest that cannot go; the first one is told.
    fn refuse(&mut self) {
        self.tx_bad += 1;
        if self.tx_bad == 1 {
            tracing::warn!(
                "frames of the guest are no good; they are dropped and counted from now on"
            );
        }
    }
}

/// A frame of the guest that may go as it is.
fn is_plain(frame: &TxFrame<'_>) -> bool {
    !frame.header.needs_csum()
        && frame.header.gso_type == VnetHeader::GSO_NONE
        && (SHORTEST..=LONGEST).contains(&frame.payload.len())
}
