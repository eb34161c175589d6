// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device is to the host, and what it may touch.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_msg::{FeatureSet, feature};
use vmsg_mem::AddressSpace;
use vmsg_queue::{ChainStorage, DeviceQueue, QueueError};

use crate::worker::Notice;

/// A virtio device, polled by a worker. It never blocks and owns no thread.
///
/// The worker calls [`process`](Device::process) when the driver has kicked a
/// queue and [`poll`](Device::poll) when the device's own file descriptor is
/// readable or its time has come.
pub trait Device: Send {
    /// Device and vendor id, as GET_DEVICE_INFO reports them.
    fn identity(&self) -> Identity;

    /// The features it offers, transport features included.
    fn features(&self) -> FeatureSet;

    /// Largest size of each queue, in entries.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The configuration space as it is now.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes `data` at `offset` (already inside the space).
    ///
    /// # Errors
    ///
    /// [`ReadOnly`] when these bytes cannot be written; nothing changes then.
    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), ReadOnly> {
        let _ = (offset, data);
        Err(ReadOnly)
    }

    /// The driver is ready (DRIVER_OK); `features` are the negotiated ones.
    fn activate(&mut self, features: &FeatureSet);

    /// Back to the state after creation; requests in flight, and what the driver
    /// has changed in the configuration, are forgotten.
    fn reset(&mut self);

    /// Works on `queue`, at most about `budget` chains of it.
    ///
    /// # Errors
    ///
    /// Any error breaks the device until the driver resets it.
    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError>;

    /// A file descriptor that is readable when [`poll`](Device::poll) has work.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// When [`poll`](Device::poll) is to be called at the latest.
    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    /// Handles what `event_fd` or `next_timeout` announced. Also called, with
    /// no active queue, while no driver is there.
    ///
    /// # Errors
    ///
    /// Any error breaks the device until the driver resets it.
    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let _ = io;
        Ok(())
    }
}

/// Who a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Virtio device id: 1 network, 2 block, 4 entropy, …
    pub device_id: u32,
    /// Vendor id.
    pub vendor_id: u32,
}

/// "vmsg" in ASCII, little-endian: the vendor id of our own devices.
pub const VENDOR_ID: u32 = u32::from_le_bytes(*b"vmsg");

/// The transport features (VIRTIO 1.3, 6) that the workers and queues support,
/// whatever the device.
pub fn transport_features() -> FeatureSet {
    FeatureSet::from_bits(&[
        feature::VERSION_1,
        feature::ACCESS_PLATFORM,
        feature::RING_INDIRECT_DESC,
        feature::RING_EVENT_IDX,
        feature::RING_RESET,
    ])
}

/// Entries that queues have by default. QEMU's virtio-mmio lets a driver set up
/// 1,024, whatever size the device behind it asks for.
pub const QUEUE_SIZE: u16 = 1024;

/// The configuration bytes cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("these configuration bytes are read-only")]
pub struct ReadOnly;

/// How far [`Device::process`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The queue is empty: let the driver kick again.
    Idle,
    /// There is more to do; call again when others had their turn.
    More,
    /// Nothing can be done until the device's own [`poll`](Device::poll); kicks are not needed.
    Blocked,
}

/// Why a device stopped working; the driver sees NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver put something impossible into a queue.
    #[error("queue {queue}: {source}")]
    Queue {
        /// Which queue.
        queue: usize,
        /// What was wrong.
        source: QueueError,
    },
    /// The device itself cannot go on.
    #[error("{0}")]
    Local(String),
}

/// A queue that the driver has set up, with the way to notify the driver.
#[derive(Debug)]
pub struct ActiveQueue {
    pub(crate) ring: DeviceQueue,
    pub(crate) call: Option<vmsg_mem::Doorbell>,
}

impl ActiveQueue {
    /// Tells the driver that something was used.
    pub(crate) fn interrupt(&mut self, queue: usize, notices: &mut Vec<Notice>) {
        let Some(call) = &self.call else {
            notices.push(Notice::Used { queue });
            return;
        };
        if let Err(error) = call.ring() {
            // The interrupt's other end belongs to the peer; a stuck one is its own loss.
            notices.push(Notice::CallStuck {
                queue,
                error: error.to_string(),
            });
            self.call = None;
        }
    }

    /// The ring itself.
    pub fn ring(&mut self) -> &mut DeviceQueue {
        &mut self.ring
    }
}

/// What a device may touch during one call: its queues, the driver's memory
/// and room for a batch of chains.
#[derive(Debug)]
pub struct Io<'a> {
    /// The device's queues by index; `None` until the driver has set one up and said DRIVER_OK.
    pub queues: &'a mut [Option<ActiveQueue>],
    /// The memory that the driver has lent.
    pub space: AddressSpace<'a>,
    /// Room for the pieces of a batch, shared by all devices of the worker.
    pub storage: &'a mut ChainStorage,
    /// The present time.
    pub now: Instant,
    /// Where what the driver must hear goes, if it cannot be told directly.
    pub(crate) notices: &'a mut Vec<Notice>,
    /// Queues to be processed again without a kick.
    pub(crate) again: &'a mut Vec<usize>,
}

impl Io<'_> {
    /// Makes the completed chains of `queue` visible to the driver and
    /// interrupts it if it asked for that.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Queue`] if the ring is not in the driver's memory any more.
    pub fn publish(&mut self, queue: usize) -> Result<(), DeviceError> {
        publish(self.queues, queue, self.space, self.notices)
    }

    /// Has `queue` processed again, after others had their turn.
    pub fn again(&mut self, queue: usize) {
        self.again.push(queue);
    }

    /// Tells the driver that configuration bytes have changed.
    pub fn config_changed(&mut self, offset: usize, data: &[u8]) {
        self.notices.push(Notice::Config {
            offset,
            data: data.to_vec(),
        });
    }
}

/// [`Io::publish`], for callers that have taken an [`Io`] apart.
pub(crate) fn publish(
    queues: &mut [Option<ActiveQueue>],
    queue: usize,
    space: AddressSpace<'_>,
    notices: &mut Vec<Notice>,
) -> Result<(), DeviceError> {
    let Some(Some(active)) = queues.get_mut(queue) else {
        return Ok(());
    };
    if !active
        .ring
        .publish(space)
        .map_err(|source| DeviceError::Queue { queue, source })?
    {
        return Ok(());
    }
    active.interrupt(queue, notices);
    Ok(())
}
