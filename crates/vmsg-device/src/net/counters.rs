// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes through a network device, and what does not.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::device::{Link, Monitor, Snapshot};

/// A number that one thread increases and others may read.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, more: u64) {
        // There is one writer: no read-modify-write is needed.
        let value = self.0.load(Ordering::Relaxed).wrapping_add(more);
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub(super) struct $name {
            $($(#[$doc])* pub(super) $field: Count,)*
        }

        impl $name {
            fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field.get()),)*]
            }
        }
    };
}

counters! {
    /// One queue pair.
    PairCounters {
        /// Frames given to the driver.
        rx_frames,
        /// Their bytes, without the virtio header.
        rx_bytes,
        /// Dropped: no buffer of the driver can hold the frame.
        rx_too_big,
        /// Dropped: longer than the negotiated MTU.
        rx_over_mtu,
        /// Frames taken from the driver.
        tx_frames,
        /// Their bytes, without the virtio header.
        tx_bytes,
        /// Dropped: chains too short for a header and a frame.
        tx_malformed,
        /// Dropped: the link is down.
        tx_link_down,
    }
}

counters! {
    /// The whole device.
    DeviceCounters {
        /// Dropped: the driver's filter does not let the frame in.
        rx_filtered,
        /// Dropped: the link is down.
        rx_link_down,
        /// Dropped: the receive queue for the frame is being reset.
        rx_no_queue,
        /// Commands taken from the control queue.
        control_commands,
        /// Those of them that were refused.
        control_refused,
        /// Times the link went up or down.
        link_changes,
        /// Times the driver was asked to announce itself.
        announcements,
    }
}

/// All counters of a device, and the state of its link.
#[derive(Debug)]
pub(super) struct Counters {
    pub(super) device: DeviceCounters,
    pub(super) pairs: Box<[PairCounters]>,
    /// What the operator wants.
    pub(super) link: AtomicBool,
    /// Whether the back end leads anywhere.
    pub(super) carrier: AtomicBool,
}

impl Counters {
    pub(super) fn new(pairs: u16) -> Self {
        Self {
            device: DeviceCounters::default(),
            pairs: (0..pairs).map(|_| PairCounters::default()).collect(),
            link: AtomicBool::new(true),
            carrier: AtomicBool::new(true),
        }
    }
}

impl Monitor for Counters {
    fn snapshot(&self) -> Snapshot {
        Snapshot {
            link: Some(Link {
                up: self.link.load(Ordering::Relaxed),
                carrier: self.carrier.load(Ordering::Relaxed),
            }),
            counters: self.device.list(),
            pairs: self.pairs.iter().map(PairCounters::list).collect(),
            details: Vec::new(),
        }
    }
}
