// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can go wrong between a driver and its device.

use virtio_msg::{ChannelError, DevNum, DeviceStatus, FeatureSet, QueueIndex, QueueSize};
#[cfg(feature = "queue")]
use vmsg_queue::QueueError;

/// An error of this crate. [`Error::fault`] tells whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The bus failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No answer in time. Peers drop what they do not like without a word, so this may also mean "not supported".
    #[error("no answer to {request} in time")]
    Timeout {
        /// Name of the request.
        request: &'static str,
    },
    /// The answer contradicts the request or itself.
    #[error("the answer to {request} makes no sense")]
    BadAnswer {
        /// Name of the request.
        request: &'static str,
    },
    /// A message does not fit the bus, or the buffers given to the client.
    #[error("{request} takes {need} bytes, {have} are there")]
    NoRoom {
        /// Name of the request.
        request: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// Too many requests are on their way already.
    #[error("too many requests are waiting for an answer")]
    Busy,
    /// There is no device with this number.
    #[error("there is no device {0}")]
    NoDevice(DevNum),
    /// The device has no such queue.
    #[error("the device has no queue {0}")]
    NoQueue(QueueIndex),
    /// The device has the queue, but not of this size, or not of a size that a queue can have.
    #[error("queue {queue} cannot have {size} entries; the device allows {max}")]
    QueueSize {
        /// Which queue.
        queue: QueueIndex,
        /// The size asked for.
        size: u16,
        /// What the device says it allows.
        max: QueueSize,
    },
    /// The device does not hold the queue as it was set up.
    #[error("the device did not take queue {0} as it was set up")]
    QueueRefused(QueueIndex),
    /// The device lacks features that the driver cannot do without.
    #[error("the device does not offer the features {0}")]
    MissingFeatures(FeatureSet),
    /// The device did not accept the driver's choice of features.
    #[error("the device refuses the features {0}")]
    FeaturesRefused(FeatureSet),
    /// The device did not take a status; the value is what it answered.
    #[error("the device refuses a status and stays at {0}")]
    StatusRefused(DeviceStatus),
    /// The device has failed and wants to be reset.
    #[error("the device needs a reset")]
    NeedsReset,
    /// The device was not asked in the right order: it has failed before, or it has started already.
    #[error("the device is not in a state to do this")]
    OutOfStep,
    /// The bytes are not all inside the configuration space.
    #[error("{len} bytes at {offset} are not in the configuration space")]
    ConfigRange {
        /// First byte.
        offset: u32,
        /// Number of bytes.
        len: usize,
    },
    /// The device did not accept a write to its configuration space.
    #[error("the device refuses the write to its configuration space")]
    ConfigRefused,
    /// The configuration space changed each time it was read.
    #[error("the configuration space does not hold still")]
    ConfigUnstable,
    /// The bus refused one of its own requests (`docs/bus-unix.md` §5).
    #[cfg(feature = "std")]
    #[error("the bus refuses {request}: {status}")]
    Refused {
        /// Name of the request.
        request: &'static str,
        /// Why.
        status: vmsg_bus::control::Status,
    },
    /// Another driver holds the device.
    #[cfg(feature = "std")]
    #[error("device {device} is held by {holder}")]
    Held {
        /// Which device.
        device: DevNum,
        /// Name of the other driver.
        holder: String,
    },
    /// The bus cannot do this.
    #[error("the bus cannot do {request}")]
    Unsupported {
        /// What was wanted.
        request: &'static str,
    },
    /// The memory for queues and buffers is used up.
    #[error("no {0} bytes of DMA memory are left")]
    NoMemory(usize),
    /// A queue failed.
    #[cfg(feature = "queue")]
    #[error("queue {queue}: {source}")]
    Queue {
        /// Which queue.
        queue: QueueIndex,
        /// What was wrong.
        source: QueueError,
    },
    /// No driver may make such a request of this device; the text says why.
    #[error("the request is not one for this device: {0}")]
    BadRequest(&'static str),
    /// A disk has not done what it was asked to.
    #[cfg(feature = "queue")]
    #[error("the disk says: {0}")]
    Disk(crate::blk::Failure),
    /// The operating system failed.
    #[cfg(feature = "std")]
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// Shared memory failed.
    #[cfg(feature = "queue")]
    #[error(transparent)]
    Mem(#[from] vmsg_mem::Error),
}

/// Whose fault an error is: each has another reaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The other side did something that no correct one does: give it up.
    Peer,
    /// The other side is gone or silent: connect again.
    Gone,
    /// The request cannot be granted, or this side asked for something impossible.
    Local,
}

impl Error {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            Error::Channel(ChannelError::Corrupt(_))
            | Error::BadAnswer { .. }
            | Error::ConfigUnstable => Fault::Peer,
            #[cfg(feature = "queue")]
            Error::Queue { source, .. } if source.is_peer_fault() => Fault::Peer,
            Error::Channel(ChannelError::Closed) | Error::Timeout { .. } => Fault::Gone,
            _ => Fault::Local,
        }
    }
}
