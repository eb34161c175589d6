// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When a disk that was taken away has ended.

use std::convert::Infallible;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Tells when the disk of a device has ended: what it is on is closed, and its locks are given back. That may be some time after
/// the device was removed.
#[derive(Debug)]
pub struct End(Receiver<Infallible>);

impl End {
    /// And what is to be kept as long as the disk is there.
    pub(super) fn new() -> (Sender<Infallible>, Self) {
        let (alive, end) = channel();
        (alive, Self(end))
    }

    /// Waits for it. False: it takes longer than `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        !matches!(
            self.0.recv_timeout(patience),
            Err(RecvTimeoutError::Timeout)
        )
    }
}
