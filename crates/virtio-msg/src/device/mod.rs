// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device side: one [`DeviceMachine`] for each device number.
//!
//! The owner feeds messages in and carries out what comes out:
//!
//! 1. [`handle_message`](DeviceMachine::handle_message) for each message with this device number. [`Busy`]: keep the message and offer
//!    it again after the next step; other devices are not concerned, and events never meet with it.
//! 2. [`poll_action`](DeviceMachine::poll_action) until `None`. Each action but [`Action::Avail`] is answered, now or later, by
//!    [`complete`](DeviceMachine::complete): only then does the driver get its response.
//! 3. [`poll_transmit`](DeviceMachine::poll_transmit) until `None`, to the bus.
//!
//! Every request that is accepted gets exactly one response, in the order of the requests.

mod answer;
mod config;
mod machine;
mod queues;

pub use answer::answer_absent;
pub use machine::DeviceMachine;
pub use queues::QueueSlot;

use crate::feature_set::FeatureSet;
use crate::message::VqueueConfig;
use crate::types::QueueIndex;
use crate::wire::{MAX_MESSAGE_SIZE, MIN_MESSAGE_SIZE};
use thiserror::Error;

/// Shared-memory regions that a [`DeviceMachine`] can have. No device type of virtio 1.3 has more than one.
pub const MAX_REGIONS: usize = 8;

/// What a device is, apart from what follows from its features, queues and configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Virtio device id (virtio 1.3 §5); not 0.
    pub device_id: u32,
    /// Vendor id.
    pub vendor_id: u32,
    /// Index of the first administration queue.
    pub admin_first: u16,
    /// Number of administration queues; they are among the queues of the machine.
    pub admin_count: u16,
}

/// How a [`DeviceMachine`] is to behave on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The message size of the bus, bytes: 48 to 65536. Other values are brought into this range.
    pub max_message_size: usize,
    /// Whether NOTIFICATION_DATA may be offered. Not on a bus that has notifications besides its messages.
    pub notification_data: bool,
    /// Whether SET_CONFIG with another generation than the present one is rejected, as revision 1 wants it.
    pub reject_stale_config: bool,
    /// A virtqueue may have up to so many entries although its largest size is smaller; 0: it may not, as the specification wants it.
    /// QEMU's virtio-mmio proxy needs 1024, whatever it is told.
    pub tolerated_queue_size: u16,
}

impl Options {
    /// What revision 1 says, for a bus with this message size.
    pub fn new(max_message_size: usize) -> Options {
        Options {
            max_message_size,
            notification_data: false,
            reject_stale_config: true,
            tolerated_queue_size: 0,
        }
    }

    fn clamped(self) -> Options {
        Options {
            max_message_size: self
                .max_message_size
                .clamp(MIN_MESSAGE_SIZE, MAX_MESSAGE_SIZE),
            ..self
        }
    }
}

/// What the owner of a machine is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Stop everything and forget what the driver has set. Complete when no buffer of the driver is touched any more.
    /// It cannot be refused. It comes for every reset, also of a device that was never used.
    Reset,
    /// The driver wants these features, all of them offered. Refuse to leave FEATURES_OK clear.
    FeaturesOk(FeatureSet),
    /// The driver is ready. Look into every queue that is set up: kicks may have come before. Refused: NEEDS_RESET.
    DriverOk,
    /// Set this queue up; size and alignment are checked, addresses are not. Also while the driver is running.
    /// Refused: the queue stays as if never set up.
    SetQueue(QueueIndex, VqueueConfig),
    /// Stop this queue. Complete when none of its buffers is touched any more. It cannot be refused.
    ResetQueue(QueueIndex),
    /// The driver writes to the configuration space; the bytes are in [`DeviceMachine::pending_config`] and may be changed there.
    /// Refused: the driver is told that nothing was written.
    WriteConfig {
        /// Offset, bytes; within the configuration space.
        offset: u32,
        /// Bytes; within the configuration space.
        len: u32,
    },
    /// The driver has made buffers available. Nothing to complete.
    Avail {
        /// The queue, which is set up.
        queue: QueueIndex,
        /// Next offset and wrap counter if NOTIFICATION_DATA was negotiated, else 0. Not checked.
        next: u32,
    },
    /// The driver has given up on the device. Stop; a reset comes next, if anything.
    Failed,
}

impl Action {
    /// Whether [`DeviceMachine::complete`] is to be called for it.
    pub fn wants_completion(&self) -> bool {
        !matches!(self, Action::Avail { .. })
    }
}

/// How an [`Action`] went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActionResult {
    /// It is done.
    Done,
    /// It was not done, see the action.
    Refused,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// It was a request, and there is or will be a response.
    Request,
    /// It was an event.
    Event,
    /// It was dropped; nothing answers it.
    Ignored(Ignored),
}

/// Why a message was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Ignored {
    /// It has another device number.
    #[error("message for another device")]
    OtherDevice,
    /// It is a bus message, a response, or an event that only devices send.
    #[error("not a message for a device")]
    NotForDevices,
    /// Its response would not fit the message size of the bus.
    #[error("response would be longer than a message")]
    ResponseTooLong,
    /// An event about a queue that is not set up.
    #[error("event about a queue that is not set up")]
    QueueNotReady,
}

/// A request is being worked on or its response was not fetched yet: offer the message again later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the device is busy with another request")]
pub struct Busy;

/// What a machine has seen. All counts wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests accepted.
    pub requests: u64,
    /// Responses sent.
    pub responses: u64,
    /// EVENT_AVAIL received for queues that are set up.
    pub avail_events: u64,
    /// EVENT_USED sent.
    pub used_events: u64,
    /// EVENT_CONFIG sent.
    pub config_events: u64,
    /// Messages dropped.
    pub ignored: u32,
    /// SET_VQUEUE in the wrong state, for a queue that is not there or already set up, or with a bad size or address.
    pub bad_queue_setups: u32,
    /// RESET_VQUEUE for a queue that is not there.
    pub bad_queue_resets: u32,
    /// SET_CONFIG rejected: stale generation, outside the configuration space, or refused by the device.
    pub rejected_config_writes: u32,
    /// GET_CONFIG that reached beyond the configuration space.
    pub config_reads_outside: u32,
    /// SET_DRIVER_FEATURES after FEATURES_OK; it has no effect.
    pub late_features: u32,
    /// FEATURES_OK or DRIVER_OK not granted.
    pub refused_status: u32,
}
