// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a connection is of no use any more.

use std::time::Duration;

use rustix::io::Errno;

/// What went wrong between the two.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The daemon has closed the connection, or ended.
    #[error("the daemon has closed the connection")]
    Closed,
    /// There was no answer in time.
    #[error("the daemon does not answer {request} within {time:?}")]
    Silent {
        /// The request.
        request: &'static str,
        /// How long it was waited for.
        time: Duration,
    },
    /// It does not read.
    #[error("the daemon does not read its requests")]
    Deaf,
    /// It has refused something without which it cannot go on.
    #[error("the daemon refuses {request} (error {code})")]
    Refused {
        /// The request.
        request: &'static str,
        /// Its number for the error.
        code: u64,
    },
    /// Something else than the answer.
    #[error("message {id} with flags {flags:#x} and {len} bytes is not the answer to {request}")]
    Answer {
        /// What was asked.
        request: &'static str,
        /// Number of the message that came.
        id: u32,
        /// Its flags.
        flags: u32,
        /// Bytes of its body.
        len: u32,
    },
    /// A message that nobody has asked for.
    #[error("the daemon sends message {id} that it was not asked for")]
    Unasked {
        /// Its number.
        id: u32,
    },
    /// A message of more bytes than any has.
    #[error("message {id} has {len} bytes, more than any")]
    TooLong {
        /// Its number.
        id: u32,
        /// Its bytes.
        len: u32,
    },
    /// An answer that contradicts what was asked, or itself.
    #[error("the answer to {request}: {why}")]
    Nonsense {
        /// What was asked.
        request: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// A device of the time before virtio 1.
    #[error("the daemon has no VIRTIO_F_VERSION_1 among its features {features:#x}")]
    Legacy {
        /// What it offers.
        features: u64,
    },
    /// The system refuses something.
    #[error("{0}")]
    Os(Errno),
}

impl Fault {
    /// Whether it is the daemon's doing, and no ordinary end.
    pub const fn is_peer_fault(&self) -> bool {
        !matches!(self, Self::Closed | Self::Os(_))
    }
}
