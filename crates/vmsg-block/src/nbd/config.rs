// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an operator says about a disk that an NBD server has, and why it cannot be had.

use std::io;
use std::time::Duration;

use super::{NbdUri, ProtocolError};

/// How an export is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdConfig {
    /// Where it is.
    pub uri: NbdUri,
    /// Nothing is written, even if the server would let us.
    pub read_only: bool,
    /// How long to wait: at the start for the server, later for it to come back, and for the answer to a request. Requests
    /// that have waited as long fail with I/O errors.
    pub timeout: Duration,
}

impl NbdConfig {
    /// How long is waited if nobody says.
    pub const TIMEOUT: Duration = Duration::from_secs(30);

    /// The export at `uri`, for reading and writing.
    pub fn new(uri: NbdUri) -> Self {
        Self {
            uri,
            read_only: false,
            timeout: Self::TIMEOUT,
        }
    }
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdOpenError {
    /// Nobody answers there, or not in time.
    #[error("cannot reach {uri}: {source}")]
    Unreachable {
        /// Where.
        uri: NbdUri,
        /// The last attempt's error.
        source: io::Error,
    },
    /// What answers there does not speak the protocol.
    #[error("{uri} does not speak NBD as it should: {source}")]
    Protocol {
        /// Where.
        uri: NbdUri,
        /// How not.
        source: ProtocolError,
    },
    /// The server has said no.
    #[error("{uri}: the server says no: {reason}")]
    Refused {
        /// Where.
        uri: NbdUri,
        /// Its words.
        reason: String,
    },
    /// The export cannot be written.
    #[error("{0} can only be read: say so (ro)")]
    ReadOnly(NbdUri),
    /// The export's size or blocks are nothing a disk can have.
    #[error("{uri} is no disk: {reason}")]
    Unusable {
        /// Where.
        uri: NbdUri,
        /// What is wrong.
        reason: String,
    },
    /// Something of this host failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}
