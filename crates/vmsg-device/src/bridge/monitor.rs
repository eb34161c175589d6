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
            ],
            ..Snapshot::default()
        }
    }
}
