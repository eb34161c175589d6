// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a block device has done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use crate::device::{Monitor, Snapshot};

/// A number that one thread changes and others may read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, more: u64) {
        // There is one writer: no read-modify-write is needed.
        self.set(self.get().wrapping_add(more));
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident,)*) => {
        /// All counters of a device.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($(#[$doc])* pub(super) $field: Count,)*
            /// Those of the disk, as they were when somebody last looked.
            pub(super) disk: Mutex<Vec<(&'static str, u64)>>,
            /// How the disk is used.
            details: OnceLock<Vec<(&'static str, String)>>,
        }

        impl Counters {
            fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field.get()),)*]
            }
        }
    };
}

counters! {
    /// Size of the disk in bytes.
    size,
    /// Requests that are under way.
    in_flight,
    /// Reads done.
    reads,
    /// Their bytes.
    read_bytes,
    /// Writes done.
    writes,
    /// Their bytes.
    write_bytes,
    /// Flushes done.
    flushes,
    /// Discards done.
    discards,
    /// Requests to write zeroes done.
    write_zeroes,
    /// Requests that the disk could not do.
    errors,
    /// Requests that cannot be: behind the end of the disk, cut off, a write to what is read-only.
    refused,
    /// Requests of a kind that the device does not have.
    unsupported,
    /// Requests that a process before had begun, and this one has begun again.
    repeated,
    /// Times the disk was found to have another size.
    resized,
}

impl Counters {
    /// The disk is used so; only the first call counts.
    pub(super) fn set_details(&self, details: Vec<(&'static str, String)>) {
        let _ = self.details.set(details);
    }

    /// Those of the disk are these now.
    pub(super) fn set_disk(&self, counters: Vec<(&'static str, u64)>) {
        if let Ok(mut known) = self.disk.lock() {
            *known = counters;
        }
    }
}

impl Monitor for Counters {
    fn snapshot(&self) -> Snapshot {
        let mut counters = self.list();
        if let Ok(disk) = self.disk.lock() {
            counters.extend(disk.iter().copied());
        }
        Snapshot {
            counters,
            details: self.details.get().cloned().unwrap_or_default(),
            ..Snapshot::default()
        }
    }
}
