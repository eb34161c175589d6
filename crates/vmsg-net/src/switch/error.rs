// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be wrong with what a switch is asked.

use std::io;
use std::path::PathBuf;

use super::MAX_PORTS;
use crate::Mac;

/// Why a switch does not do what it is asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// A setting that cannot be.
    #[error("{key}: {reason}")]
    Setting {
        /// The name of the setting.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A port has this name already.
    #[error("there is a port `{0}` already")]
    NameTaken(String),
    /// No port has this name.
    #[error("there is no port `{0}`")]
    NoSuchPort(String),
    /// There are too many.
    #[error("a switch has at most {MAX_PORTS} ports")]
    TooManyPorts,
    /// The address is fixed at another port already.
    #[error("{mac} is the address of port `{port}`")]
    MacTaken {
        /// The address.
        mac: Mac,
        /// Whose it is.
        port: String,
    },
    /// There is no room for more fixed addresses.
    #[error("the table has no room for so many fixed addresses")]
    TableFull,
    /// A capture file cannot be made.
    #[error("capture to {}: {source}", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The switch's worker does not answer. What was asked will be done when it does.
    #[error("the switch does not answer; what was asked is done when it does")]
    NoAnswer,
    /// The system has no descriptors left.
    #[error("the system gives the switch no descriptors: {0}")]
    System(#[from] io::Error),
}

impl SwitchError {
    pub(super) fn setting(key: &'static str, reason: impl Into<String>) -> Self {
        Self::Setting {
            key,
            reason: reason.into(),
        }
    }
}
