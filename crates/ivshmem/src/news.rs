// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is said about peers and their doorbells.

use crate::PeerId;

/// What the server has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A peer is there, or has one vector more than before.
    Joined(PeerId),
    /// A peer has left.
    Left(PeerId),
    /// There will be no more news. Memory and doorbells go on as they are.
    ServerGone,
}

/// Why a doorbell was not rung.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The memory was reached without a server, or by a function without doorbells.
    #[error(
        "there are no doorbells here: the memory is an ivshmem-plain's or a file; look at it at intervals, or use \
         ivshmem-doorbell and a server"
    )]
    NoDoorbells,
    /// Nobody has this id, as far as the server has told.
    #[error("no peer has the id {0}")]
    NoSuchPeer(PeerId),
    /// The peer has fewer vectors.
    #[error("peer {peer} has {vectors} vectors, and no vector {vector}")]
    NoSuchVector {
        /// The peer.
        peer: PeerId,
        /// The vector that it does not have.
        vector: u16,
        /// How many it has.
        vectors: u16,
    },
    /// It could not be rung.
    #[error(transparent)]
    Bell(#[from] vmsg_mem::RingError),
}
