// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is between us and the server at the moment.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::time::Instant;

use super::connect::Target;
use super::negotiate::Negotiation;
use super::stream::Stream;

/// From nothing to a connection on which requests go.
#[derive(Debug)]
pub(super) enum Link {
    /// Nothing, until it is tried again.
    Down { retry: Instant },
    /// Somebody asks where the server is.
    Asking {
        answer: mpsc::Receiver<std::io::Result<Vec<std::net::SocketAddr>>>,
        until: Instant,
    },
    /// A connection is begun; the others are tried after it.
    Connecting {
        socket: OwnedFd,
        others: Vec<Target>,
        until: Instant,
    },
    /// The server says what it has.
    Negotiating {
        socket: OwnedFd,
        negotiation: Negotiation,
        until: Instant,
    },
    /// Requests go.
    Up {
        socket: OwnedFd,
        stream: Box<Stream>,
    },
    /// The connection is given up, and the server may still be at work on what it has received. So that nothing of that is done
    /// after what is sent on the next connection, its end is waited for.
    Ending {
        socket: OwnedFd,
        until: Instant,
        /// Bytes that are received and thrown away, before patience ends.
        left: usize,
    },
}

impl Link {
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Down { .. } | Self::Asking { .. } => None,
            Self::Connecting { socket, .. }
            | Self::Negotiating { socket, .. }
            | Self::Up { socket, .. }
            | Self::Ending { socket, .. } => Some(socket.as_fd()),
        }
    }

    /// Room in the socket's buffer is waited for.
    pub(super) fn wants_to_send(&self) -> bool {
        match self {
            Self::Connecting { .. } => true,
            Self::Negotiating { negotiation, .. } => !negotiation.output().is_empty(),
            Self::Up { stream, .. } => stream.has_unsent(),
            Self::Down { .. } | Self::Asking { .. } | Self::Ending { .. } => false,
        }
    }

    /// When something is to be done even if nothing comes.
    pub(super) fn until(&self) -> Option<Instant> {
        match self {
            Self::Down { retry } => Some(*retry),
            Self::Asking { until, .. }
            | Self::Connecting { until, .. }
            | Self::Negotiating { until, .. }
            | Self::Ending { until, .. } => Some(*until),
            Self::Up { .. } => None,
        }
    }
}
