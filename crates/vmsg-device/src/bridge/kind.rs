// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known of the types of devices, where a daemon does not say it.

use std::borrow::Cow;
use std::ops::Range;

use virtio_msg::feature::device_name;

use super::Resume;

/// Transport features (virtio 1.3, 6) that are the daemon's and the driver's business alone: indirect descriptors, events by index, the
/// version, reset of single queues. Packed rings and rings in order could not go on after a restart, as nobody knows where they stand;
/// addresses are the bus's business; the rest needs a transport that vhost-user is not.
const TRANSPORT: u64 = 1 << 28 | 1 << 29 | 1 << 32 | 1 << 40;
/// Features of the types themselves: 0 to 23 and 50 to 63.
pub(super) const OF_TYPES: u64 = 0x00ff_ffff | 0xfffc_0000_0000_0000;

/// What is known of a type.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    /// Virtio id.
    pub(super) id: u32,
    /// Queues that a driver expects at least.
    pub(super) queues: u16,
    /// There are as many, whatever the daemon says of them.
    pub(super) queues_fixed: bool,
    /// Those that the daemon does not have are there, and nothing happens in them.
    pub(super) may_lack_queues: bool,
    /// Entries of a queue that the known daemons take.
    pub(super) queue_size: u16,
    /// What is to be done after a restart.
    pub(super) resume: Resume,
    /// Daemons wait for another connection when one ends.
    pub(super) reconnects: bool,
    /// Bytes of the configuration space.
    pub(super) config_len: fn(u64) -> u32,
    /// Bytes of the configuration that daemons take from a driver; `None`: any.
    pub(super) writable: Option<Range<usize>>,
    /// A queue that drivers fill and do not kick at first, and daemons do not look at.
    pub(super) quiet: Option<usize>,
    /// Features that need something vhost-user does not pass on.
    without: u64,
}

const fn any(id: u32) -> Kind {
    Kind {
        id,
        queues: 1,
        queues_fixed: false,
        may_lack_queues: false,
        queue_size: 256,
        resume: Resume::Never,
        reconnects: true,
        config_len: |_| 0,
        writable: None,
        quiet: None,
        without: 0,
    }
}

/// Types about which something is known.
const KINDS: &[Kind] = &[
    // Network. Without a control queue, which is the front end's business, nor several pairs, which need one.
    Kind {
        queues: 2,
        queues_fixed: true,
        queue_size: 1024,
        resume: Resume::InOrder,
        config_len: |_| 12,
        without: 1 << 2 | 1 << 3 | 0xff << 16 | 1 << 52 | 1 << 53 | 1 << 57 | 1 << 60 | 1 << 63,
        ..any(1)
    },
    // Block: the lengths of the configuration without and with what came later (5.2.4).
    Kind {
        queue_size: 1024,
        resume: Resume::Record,
        config_len: |features| match features >> 16 & 3 {
            0 => 60,
            1 => 72,
            _ => 96,
        },
        // The write cache.
        writable: Some(32..33),
        ..any(2)
    },
    // Console: vhost-device-console 0.1.
    Kind {
        queues: 2,
        queue_size: 128,
        resume: Resume::InOrder,
        config_len: |_| 12,
        ..any(3)
    },
    // Entropy. In vhost-device-rng 0.1, and others as old, the used index begins at 0 after a restart, wherever the driver is.
    Kind { ..any(4) },
    // SCSI host. As entropy: vhost-device-scsi 0.1. Linux writes the sizes of sense data and commands; no VMM passes that on.
    Kind {
        queues: 3,
        queue_size: 128,
        config_len: |_| 36,
        writable: Some(0..0),
        ..any(8)
    },
    // GPU.
    Kind {
        queues: 2,
        config_len: |_| 16,
        ..any(16)
    },
    // Input.
    Kind {
        queues: 2,
        resume: Resume::InOrder,
        config_len: |_| 136,
        ..any(18)
    },
    // Socket: daemons leave the queue of events to the front end.
    Kind {
        queues: 3,
        may_lack_queues: true,
        resume: Resume::InOrder,
        config_len: |_| 8,
        ..any(19)
    },
    // Crypto.
    Kind {
        queues: 2,
        config_len: |_| 56,
        ..any(20)
    },
    // Sound. When the queue of events was kicked, vhost-device-sound 0.3 turns in a circle: it does not take what is there, and looks whether
    // something is.
    Kind {
        queues: 4,
        queue_size: 64,
        quiet: Some(1),
        config_len: |_| 12,
        ..any(25)
    },
    // File system: the tag and a number. Without the queue of notifications, which no daemon has.
    Kind {
        queues: 2,
        queue_size: 1024,
        config_len: |_| 40,
        // virtiofsd ends with its connection.
        reconnects: false,
        without: 1,
        ..any(26)
    },
    // I2C adapter. As entropy: vhost-device-i2c 0.1.
    Kind { ..any(34) },
    // SCMI.
    Kind {
        queues: 2,
        ..any(32)
    },
    // GPIO.
    Kind {
        queues: 2,
        config_len: |_| 8,
        ..any(41)
    },
];

impl Kind {
    /// What is known of the type with this virtio id.
    pub(super) fn of(id: u32) -> Self {
        let known = KINDS.iter().find(|kind| kind.id == id);
        known.cloned().unwrap_or_else(|| any(id))
    }

    /// What the type is called.
    pub(super) fn name(&self) -> Cow<'static, str> {
        match device_name(self.id) {
            Some(name) => name.into(),
            None => self.id.to_string().into(),
        }
    }

    /// Whether a driver waits for what is in this queue, and has not only put room there for what may come some time.
    pub(super) const fn is_asked(&self, queue: usize) -> bool {
        match self.id {
            // Received by network, console, socket; entropy may be rationed.
            1 | 3 => queue % 2 == 1,
            19 => queue == 1,
            4 => false,
            // Events of input come some time; the other queue is asked.
            18 => queue != 0,
            // Events of scsi, sound, scmi and gpio.
            8 | 25 | 32 | 41 => queue != 1,
            _ => true,
        }
    }

    /// Of a daemon's features, those that its device can have here.
    pub(super) const fn offered(&self, daemon: u64) -> u64 {
        daemon & (OF_TYPES | TRANSPORT) & !self.without
    }
}
