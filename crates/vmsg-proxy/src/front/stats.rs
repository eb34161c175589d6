// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What went through a front.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a front has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontStats {
    /// VMMs that connected.
    pub connections: u64,
    /// Requests handled.
    pub requests: u64,
    /// Connections ended because of what came over them.
    pub malformed: u64,
    /// Requests that could not be done.
    pub refused: u64,
    /// Times the thread woke up.
    pub wakeups: u64,
}

/// The same, while it is counted.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) connections: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) wakeups: AtomicU64,
}

impl Counts {
    pub(crate) fn get(&self) -> FrontStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        FrontStats {
            connections: get(&self.connections),
            requests: get(&self.requests),
            malformed: get(&self.malformed),
            refused: get(&self.refused),
            wakeups: get(&self.wakeups),
        }
    }
}
