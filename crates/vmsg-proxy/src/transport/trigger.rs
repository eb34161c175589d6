// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Eventfds of a VMM, by which it is told of interrupts.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use thiserror::Error;
use vmsg_mem::Doorbell;

/// Why a descriptor cannot be an interrupt.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TriggerError {
    /// The function has no such interrupt.
    #[error("there is no such interrupt")]
    NoSuchInterrupt,
    /// It is no eventfd, or cannot be used as one.
    #[error("not usable as an eventfd: {0}")]
    Unusable(#[source] io::Error),
}

/// One eventfd.
#[derive(Debug)]
pub(super) struct Trigger {
    file: Arc<OwnedFd>,
    bell: Doorbell,
}

impl Trigger {
    pub(super) fn new(file: Arc<OwnedFd>) -> Result<Trigger, TriggerError> {
        let bell = file
            .try_clone()
            .and_then(Doorbell::from_fd)
            .map_err(TriggerError::Unusable)?;
        Ok(Trigger { file, bell })
    }

    pub(super) fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    pub(super) fn ring(&self) {
        // Whoever makes its eventfd unusable goes without interrupts; full means that it has been rung.
        let _ = self.bell.ring();
    }
}
