// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where other threads see how a bridge does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::device::{Monitor, Snapshot};

/// Counters of a bridge.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) connected: AtomicBool,
    pub(super) connections: AtomicU64,
    pub(super) faults: AtomicU64,
    pub(super) queues_resumed: AtomicU64,
    pub(super) config_changes: AtomicU64,
    pub(super) refused_calls: AtomicU64,
    /// Queues that the daemon has now, and of how many of them kicks and interrupts go between driver and daemon directly.
    pub(super) queues: AtomicU64,
    pub(super) direct_kicks: AtomicU64,
    pub(super) direct_calls: AtomicU64,
    /// Kicks and interrupts that have passed through here.
    pub(super) kicks: AtomicU64,
    pub(super) calls: AtomicU64,
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Monitor for Counters {
    fn snapshot(&self) -> Snapshot {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Snapshot {
            counters: vec![
                (
                    "daemon-connected",
                    u64::from(self.connected.load(Ordering::Relaxed)),
                ),
                ("daemon-connections", load(&self.connections)),
                ("daemon-faults", load(&self.faults)),
                ("daemon-queues-resumed", load(&self.queues_resumed)),
                ("daemon-config-changes", load(&self.config_changes)),
                ("daemon-requests-refused", load(&self.refused_calls)),
                ("daemon-queues", load(&self.queues)),
                ("daemon-queues-kicked-directly", load(&self.direct_kicks)),
                ("daemon-queues-calling-directly", load(&self.direct_calls)),
                ("daemon-kicks", load(&self.kicks)),
                ("daemon-calls", load(&self.calls)),
            ],
            ..Snapshot::default()
        }
    }
}
