// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What goes into shadow queues and what comes out of them.

use super::segment::Segment;
use crate::memory::MemoryError;
use crate::session::QueueSetup;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use thiserror::Error;
use virtio_msg::QueueIndex;
use vmsg_queue::QueueError;

/// How shadow queues are made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of the thread and of the memory, for people who look; a thread's name is cut after 15 bytes.
    pub name: String,
    /// Where the segment lies: rings and buffers of all queues.
    pub segment: Segment,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            name: "shadow".to_owned(),
            segment: Segment::default(),
        }
    }
}

/// Why there are no shadow queues.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NewError {
    /// The queues of the device do not fit.
    #[error(
        "a segment of {have} bytes is too small for the {queues} queues of this device, which need {need}"
    )]
    TooSmall {
        /// Bytes asked for.
        have: u64,
        /// Bytes that the smallest possible one has.
        need: u64,
        /// Queues of the device.
        queues: usize,
    },
    /// The segment has no place on the bus.
    #[error("a segment of {len} bytes cannot be at bus address {base:#x}")]
    BadBase {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// There is a segment in the same part of the memory in common.
    #[error("its part of the memory in common is in use")]
    InUse,
    /// The bus was never connected: what it has in common is not known.
    #[error("the memory that the bus has in common is not known yet")]
    NotKnown,
    /// No memory, descriptors or threads.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The error of the system.
        source: std::io::Error,
    },
}

/// Why a queue does not start.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The device has no such queue.
    #[error("the device has no queue {0}")]
    NoQueue(u32),
    /// It is in use.
    #[error("queue {0} is in use already")]
    InUse(u32),
    /// Not a power of two, or more than the device has.
    #[error("queue {queue} cannot have {size} entries")]
    BadSize {
        /// Which queue.
        queue: u32,
        /// The size asked for.
        size: u16,
    },
    /// A ring is not aligned, or goes on where it could not be.
    #[error("queue {queue} is nothing to start: {why}")]
    BadQueue {
        /// Which queue.
        queue: u32,
        /// What is wrong with it.
        why: String,
    },
    /// No descriptors are left, or the thread has ended.
    #[error("queue {queue}: {why}")]
    Os {
        /// Which queue.
        queue: u32,
        /// The error of the system.
        why: String,
    },
}

/// What to tell the device of a queue that was started.
#[derive(Clone, Debug)]
pub struct Started {
    /// Where its rings are, in the segment.
    pub setup: QueueSetup,
    /// Rung towards the device.
    pub kick: Arc<OwnedFd>,
    /// Rung by the device.
    pub call: Arc<OwnedFd>,
}

/// How the guest's driver learns of used buffers.
#[derive(Clone, Debug, Default)]
pub enum Interrupt {
    /// Not at all: the vector is masked, or there is none.
    Nobody,
    /// This eventfd is rung.
    Eventfd(Arc<OwnedFd>),
    /// The front is told with [`Event::QueueUsed`].
    #[default]
    Front,
}

/// News for the front.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Buffers of this queue were used, and the driver wants to know; only with [`Interrupt::Front`].
    QueueUsed(QueueIndex),
    /// All queues stand still until the device is reset: the driver must be told that it needs one.
    NeedsReset(Broken),
}

/// Why all queues stand still.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Broken {
    /// The guest's driver did what no driver may do.
    #[error("queue {queue}: {why}")]
    Driver {
        /// Which queue.
        queue: u32,
        /// What it was: a [`QueueError`] in words.
        why: String,
    },
    /// The device did what no device may do.
    #[error("queue {queue}, in the hands of the device: {why}")]
    Device {
        /// Which queue.
        queue: u32,
        /// What it was: a [`QueueError`] in words.
        why: String,
    },
    /// A request that the segment can never hold.
    #[error(
        "queue {queue}: a request of {bytes} bytes does not fit the segment, where this queue has {most} at most"
    )]
    TooLarge {
        /// Which queue.
        queue: u32,
        /// Bytes of all its buffers.
        bytes: u64,
        /// Bytes that there are for it.
        most: u64,
    },
    /// A request that is read and written takes two entries, and the queue has one.
    #[error("queue {queue}: with {size} entries it cannot hold a request that is read and written")]
    TooShort {
        /// Which queue.
        queue: u32,
        /// Its entries.
        size: u16,
    },
    /// Memory of the guest could not be reached.
    #[error("queue {queue}: {error}")]
    Memory {
        /// Which queue.
        queue: u32,
        /// What happened.
        error: MemoryError,
    },
    /// The memory of the segment was taken away (its file was truncated).
    #[error("the memory of the segment is gone")]
    Lost,
    /// The thread of the shadow queues has ended by a mistake of its own.
    #[error("the shadow queues have ended by themselves")]
    Ended,
}

impl Broken {
    pub(super) fn driver(queue: u32, error: &QueueError) -> Broken {
        let why = error.to_string();
        Broken::Driver { queue, why }
    }

    pub(super) fn device(queue: u32, error: &QueueError) -> Broken {
        let why = error.to_string();
        Broken::Device { queue, why }
    }
}

/// What went through shadow queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests given to the device.
    pub requests: u64,
    /// Requests that came back.
    pub completed: u64,
    /// Bytes copied out of the guest's memory.
    pub bytes_out: u64,
    /// Bytes copied into the guest's memory.
    pub bytes_in: u64,
    /// Times a queue had to wait for room in the segment.
    pub waits: u64,
    /// Times the thread slept.
    pub sleeps: u64,
    /// Times another device host was given all that the one before had.
    pub renewals: u64,
    /// Kicks of the device.
    pub kicks: u64,
    /// Interrupts of the guest, or news to the front instead.
    pub interrupts: u64,
}
