// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for room in a queue whose other side does not ring when there is some.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(1);
/// FIRST, doubled this many times, is the longest.
const DOUBLINGS: u32 = 6;

/// How long to sleep before looking again: 1 ms at first, up to 64 ms.
#[derive(Debug, Default)]
pub(crate) struct RoomWait(AtomicU32);

impl RoomWait {
    /// The next time, longer than the one before.
    pub(crate) fn next(&self) -> Duration {
        FIRST * (1 << self.0.fetch_add(1, Ordering::Relaxed).min(DOUBLINGS))
    }

    /// There was room.
    #[inline]
    pub(crate) fn found(&self) {
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }
}
