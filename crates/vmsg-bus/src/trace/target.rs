// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `trace=FILE` of a bus means: a file that is opened when the bus is first used.

use super::{Interface, OpenError, Side, Writer};
use crate::{Capabilities, Peer};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The file that the ends of one bus are recorded to; clones share it. It is opened at the first use, so that it is not
/// touched by who only reads a specification, and stays open until all clones and interfaces are gone.
#[derive(Clone, Debug)]
pub struct Trace {
    path: PathBuf,
    bus: String,
    writer: Arc<Mutex<Option<Writer>>>,
}

impl Trace {
    /// Records to `path`; the bus is called `bus` there.
    pub fn new(path: impl Into<PathBuf>, bus: &str) -> Self {
        Self {
            path: path.into(),
            bus: bus.to_owned(),
            writer: Arc::default(),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file, unless it is open.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(&self) -> Result<Writer, OpenError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = &*writer {
            return Ok(writer.clone());
        }
        let opened = Writer::open(&self.path)?;
        Ok(writer.insert(opened).clone())
    }

    /// An end of the bus with `peer` at the other end. `None` when the file cannot be opened: that is logged, and the bus works
    /// without; who wants to fail calls [`Self::open`] before.
    pub fn interface(
        &self,
        side: Side,
        peer: &Peer,
        capabilities: &Capabilities,
    ) -> Option<Interface> {
        match self.open() {
            Ok(writer) => Some(writer.interface(&self.bus, side, peer, capabilities)),
            Err(error) => {
                tracing::warn!(%error, "messages are not recorded");
                None
            }
        }
    }
}
