// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses as the command line names them.

use std::path::PathBuf;

use serde::Deserialize;
use vmsg_bus::keyval;

use crate::Usage;

/// A bus: `unix,…`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusSpec {
    /// A Unix socket, docs/bus-unix.md.
    Unix(UnixSpec),
}

/// `unix,path=SOCKET`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UnixSpec {
    /// The socket's path.
    pub path: PathBuf,
    /// What devices call the bus; `b0`, `b1`, … by default.
    #[serde(default)]
    pub id: Option<String>,
    /// Largest message in bytes, 48 to 512.
    #[serde(default)]
    pub message_size: Option<u32>,
}

impl UnixSpec {
    /// Largest message in bytes.
    pub(crate) fn max_message(&self) -> usize {
        self.message_size
            .and_then(|size| usize::try_from(size).ok())
            .unwrap_or(vmsg_bus::DEFAULT_MESSAGE_SIZE)
    }
}

/// Reads what stands behind `--bus`.
pub(crate) fn parse(text: &str) -> Result<UnixSpec, Usage> {
    let BusSpec::Unix(spec) = keyval::from_str(text)
        .map_err(|error| Usage(format!("--bus {text}: {error}")))?;
    if spec.message_size.is_some_and(|size| !(48..=512).contains(&size)) {
        return Err(Usage(format!("--bus {text}: message-size must be from 48 to 512")));
    }
    Ok(spec)
}
