// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a bus with one driver at a time learns that its connection is over.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmsg_mem::Doorbell;

/// What a listener and its connection have in common.
#[derive(Clone, Debug)]
pub(crate) struct Taken(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bell: Doorbell,
    over: AtomicBool,
}

/// Lives as long as a connection.
struct Place(Taken);

impl Taken {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            bell: Doorbell::new()?,
            over: AtomicBool::new(false),
        })))
    }

    /// What a connection keeps; the listener is told when it is dropped.
    pub(crate) fn place(&self) -> Box<dyn std::any::Any + Send + Sync> {
        Box::new(Place(self.clone()))
    }

    /// Whether a connection has ended since the last time this was asked.
    pub(crate) fn has_ended(&self) -> bool {
        let over = self.0.over.swap(false, Ordering::AcqRel);
        if over {
            // Nobody else has it; empty it is as good.
            let _ = self.0.bell.drain();
        }
        over
    }
}

impl AsFd for Taken {
    /// Readable once a connection has ended, until [`Taken::has_ended`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.over.store(true, Ordering::Release);
        // Full: it is readable already.
        let _ = self.0.0.bell.ring();
    }
}
