// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What control and workers tell each other.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_msg::FeatureSet;
use vmsg_mem::{Doorbell, Mapping, WindowTable};
use vmsg_queue::QueueConfig;

use crate::device::{Device, Operation};

/// Place of a device in its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// From where a queue that was in use before goes on (QUEUE_RESUME).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At these positions of the available and the used ring.
    At {
        /// Next entry of the available ring to look at.
        avail: u16,
        /// Next entry of the used ring to write.
        used: u16,
    },
    /// Where the used ring in the driver's memory says; right for a queue used in order.
    FromUsedRing,
    /// The same where nobody has said whether the queue was in use before: at the beginning, if
    /// what the rings say makes no sense.
    AsFound,
}

/// A queue to set up.
#[derive(Clone, Debug)]
pub struct QueueStart {
    /// Which queue.
    pub queue: usize,
    /// Size and addresses.
    pub config: QueueConfig,
    /// The features that shape the ring.
    pub features: FeatureSet,
    /// Where to go on; `None` is the beginning.
    pub resume: Option<Resume>,
    /// Where to keep what is in flight, for a queue that is not used in order.
    pub record: Option<Record>,
}

/// The record of what is in flight in a queue (QUEUE_INFLIGHT).
#[derive(Clone, Debug)]
pub struct Record {
    /// Its memory.
    pub memory: Arc<Mapping>,
    /// Go on with what is in it.
    pub resume: bool,
}

/// Whether a kick is on its way to a worker, so that a driver that kicks faster
/// than its queue is worked on does not make the worker's orders pile up.
#[derive(Debug, Default)]
pub struct Pending(AtomicBool);

impl Pending {
    /// True if none was on its way: send one.
    pub fn set(&self) -> bool {
        // The read-modify-writes of both sides form one sequence: whoever takes the flag sees
        // what everybody knew who set it or found it set.
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// The kick has arrived; the queue is looked at after this.
    pub fn take(&self) {
        self.0.swap(false, Ordering::AcqRel);
    }
}

/// What a worker is told about one of its devices.
pub enum Command {
    /// Take this device. Not answered.
    Add(Box<dyn Device>),
    /// Drop the device and all that belongs to it.
    Remove,
    /// See this memory from now on; the old table is let go before the answer.
    SetMemory(Arc<WindowTable>),
    /// Set up a queue; it runs after [`Command::DriverOk`].
    StartQueue(QueueStart),
    /// Replace the file descriptors through which a queue is kicked and the driver interrupted.
    SetNotify {
        /// Which queue.
        queue: usize,
        /// Readable when the driver has kicked; `None`: kicks come as messages.
        kick: Option<Doorbell>,
        /// Rung to interrupt the driver; `None`: EVENT_USED messages.
        call: Option<Doorbell>,
    },
    /// Say whether the device can work with these features (FEATURES_OK).
    CheckFeatures(FeatureSet),
    /// The driver is ready; queues start, and are looked at once without a kick.
    DriverOk(FeatureSet),
    /// Stop one queue and forget it.
    ResetQueue(usize),
    /// Stop all queues, reset the device, forget its notification descriptors.
    Reset,
    /// The driver writes configuration bytes.
    WriteConfig {
        /// Where.
        offset: usize,
        /// What.
        data: Vec<u8>,
    },
    /// Do what the operator wants.
    Operate(Operation),
    /// The driver has kicked a queue by message. Not answered.
    Kick {
        /// Which queue.
        queue: usize,
        /// Taken when the command is carried out.
        pending: Arc<Pending>,
    },
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add(_) => "Add",
            Self::Remove => "Remove",
            Self::SetMemory(_) => "SetMemory",
            Self::StartQueue(_) => "StartQueue",
            Self::SetNotify { .. } => "SetNotify",
            Self::CheckFeatures(_) => "CheckFeatures",
            Self::DriverOk(_) => "DriverOk",
            Self::ResetQueue(_) => "ResetQueue",
            Self::Reset => "Reset",
            Self::WriteConfig { .. } => "WriteConfig",
            Self::Operate(_) => "Operate",
            Self::Kick { .. } => "Kick",
        })
    }
}

/// What a device wants its driver, or the log, to hear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Chains were used in a queue whose driver listens for EVENT_USED messages.
    Used {
        /// Which queue.
        queue: usize,
    },
    /// Configuration bytes changed.
    Config {
        /// Where.
        offset: usize,
        /// The bytes that are there now.
        data: Vec<u8>,
    },
    /// The driver's interrupt descriptor could not be written; it is not used any more.
    CallStuck {
        /// Which queue.
        queue: usize,
        /// Why.
        error: String,
    },
    /// The device cannot go on: NEEDS_RESET.
    Broken {
        /// Why, for the log: names the queue and the address, if it is about one.
        why: String,
        /// The driver put an address into a queue that no window has, or not for that use.
        unmapped: bool,
    },
}

/// What a worker answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The command with this ticket was carried out, or refused with a reason.
    Done {
        /// The command's ticket.
        ticket: u64,
        /// Why it was refused.
        result: Result<(), String>,
    },
    /// Something happened by itself.
    Notice(Slot, Notice),
}
