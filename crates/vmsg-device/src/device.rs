// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device is to the host, and what it may touch.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use virtio_msg::{FeatureSet, feature};
use vmsg_mem::{AddressSpace, Doorbell, Mapping, WindowTable};
use vmsg_net::{Closed, Outlets, RxSink, Wanted};
use vmsg_queue::{Batch, ChainHead, ChainStorage, DeviceQueue, QueueError, RecordedQueue};

use crate::worker::{Notice, QueueStart};

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

    /// Whether the chains of `queue` are always used in the order in which they were made available. Where they are
    /// not, a record of what is in flight is kept, as far as the driver's side lends memory for it; without one such a
    /// queue cannot go on after the device's process ended with requests in flight.
    fn in_order(&self, queue: usize) -> bool {
        let _ = queue;
        true
    }

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

    /// Whether the device can work with the `features` that the driver wants (FEATURES_OK); all of
    /// them were offered.
    ///
    /// # Errors
    ///
    /// Why it cannot, for the log; the driver sees that FEATURES_OK is not set.
    fn check_features(&self, features: &FeatureSet) -> Result<(), String> {
        let _ = features;
        Ok(())
    }

    /// The driver is ready (DRIVER_OK); `features` are the negotiated ones.
    fn activate(&mut self, features: &FeatureSet);

    /// Back to the state after creation; requests in flight, and what the driver
    /// has changed in the configuration, are forgotten.
    fn reset(&mut self);

    /// The driver has set up queues since the last call, or taken them away. `resumed`: at least
    /// one of them was in use before this device was there.
    fn queues_changed(&mut self, io: &mut Io<'_>, resumed: bool) {
        let _ = (io, resumed);
    }

    /// Does what the operator wants.
    ///
    /// # Errors
    ///
    /// Why that cannot be.
    fn operate(&mut self, operation: Operation, io: &mut Io<'_>) -> Result<(), String> {
        let _ = io;
        Err(match operation {
            Operation::SetLink(_) => "the device has no link".to_owned(),
            Operation::Announce => "the device has no addresses".to_owned(),
            Operation::Rescan => "the device has no disk".to_owned(),
        })
    }

    /// The device's shared-memory regions, which its driver may map (virtio 1.3, 2.10): asked once, when the device is put on a bus.
    /// At most [`MAX_REGIONS`](virtio_msg::device::MAX_REGIONS) of them, each with an id of its own.
    fn shared_memory(&self) -> Vec<SharedRegion> {
        Vec::new()
    }

    /// Where other threads see how the device does.
    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        None
    }

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

    /// A worker has taken the device: `key` is what [`Io::others`] of the worker's other devices find it by, until it is removed.
    fn placed(&mut self, key: u64) {
        let _ = key;
    }

    /// The device was taken away, after a last reset: lets go of what it has outside this process. Not called when the process ends.
    fn removed(&mut self) {}

    /// Something is about to change that requests under way may stand in the way of. True: it may be done now. False: the device was
    /// asked to end them; it is asked again, with the same `upcoming`, after each [`poll`](Self::poll), and meanwhile its queues are not
    /// processed. What it completes and publishes is still seen by the driver. Also asked of a device that is out of order: what was
    /// begun for it may still be under way; it is polled too while it is waited for, and what goes wrong in that is no news. One that
    /// panics here is waited for no longer. Must become true by itself, whatever the driver or anybody else does. Not asked for memory
    /// that only grows, unless there is a [`passthrough`](Self::passthrough).
    fn prepare(&mut self, upcoming: Upcoming<'_>, io: &mut Io<'_>) -> bool {
        let _ = (upcoming, io);
        true
    }

    /// Whether requests that are under way may touch the driver's memory when this call is over; asked after each call. While it says
    /// false, windows come and go without [`prepare`](Self::prepare) and, while the device sleeps, without its worker. Requests begin in
    /// calls of the device only. A device with a [`passthrough`](Self::passthrough) is always taken to say true.
    fn is_touching_memory(&self) -> bool {
        false
    }

    /// For a device whose queues another process works on: then the worker makes no rings of them, and tells this instead. Whether there
    /// is one never changes.
    fn passthrough(&mut self) -> Option<&mut dyn Passthrough> {
        None
    }

    /// Another device of the worker has frames for this one: calls `fill` once with the driver's buffers, publishes what it has put into
    /// them, and tells the driver. `fill` works for that other device, which may just be at work in what both are plugged into: the
    /// device must not call its own back end here. [`Io::others`] is empty.
    ///
    /// # Errors
    ///
    /// The outer error breaks the device until its driver resets it, and what `fill` has committed is lost; the inner one says why the
    /// device takes no frames now: `fill` was not called.
    fn accept(
        &mut self,
        io: &mut Io<'_>,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<Result<(), Closed>, DeviceError> {
        let _ = (io, fill);
        Ok(Err(Closed::Gone))
    }

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

/// What a device is asked to [prepare](Device::prepare) for.
#[derive(Clone, Copy, Debug)]
pub enum Upcoming<'a> {
    /// All queues are taken away and the device is reset, or goes for good.
    Reset,
    /// This queue is taken away.
    QueueReset(usize),
    /// This is the driver's memory from now on; what is not in it will be unmapped, or belong to somebody else.
    Memory(&'a Arc<WindowTable>),
}

/// A device whose queues another process works on. Comes beside the calls of [`Device`]: `activate`, `reset`, `poll` and so on come too,
/// `process`, `queues_changed` and `accept` with queues do not. [`Device::reset`] takes all queues and their descriptors away, without a
/// call for each; the memory stays.
///
/// The files of the memory are in [`WindowTable::places`], by [`Mapping::file`]. Some have none: what was lent before the host had
/// such a device, and what is too much for one driver.
pub trait Passthrough {
    /// The driver's memory from now on, after [`Device::prepare`] has said that it can be.
    fn set_memory(&mut self, table: &Arc<WindowTable>);

    /// The driver has set a queue up, whose rings are in its memory; it may be used after [`Device::activate`], or at once if that was
    /// before. `resume` says where it goes on, as found in the ring if need be: `None` or [`At`](crate::worker::Resume::At); with a record
    /// to go on with, at the used index. `record` comes for queues that are not used [in order](Device::in_order), untouched. The driver
    /// is interrupted by the worker once if the queue was in use before.
    ///
    /// # Errors
    ///
    /// Why it cannot be; the driver's request fails.
    fn start_queue(&mut self, start: &QueueStart) -> Result<(), String>;

    /// What the queue is kicked by and the driver interrupted with, before or after [`start_queue`](Self::start_queue). The worker does
    /// not look at `kick`. `None` for `kick`: kicks come by [`kick`](Self::kick). `None` for `call`: the device says by [`Io::used`] that
    /// something was used.
    fn set_notify(&mut self, queue: usize, kick: Option<&Doorbell>, call: Option<&Doorbell>);

    /// The driver has kicked a queue by a message, now or before it was at work. What it kicks by a descriptor is told nowhere, before
    /// [`set_notify`](Self::set_notify) neither: the descriptor keeps it.
    fn kick(&mut self, queue: usize);

    /// The queue is taken away, after [`Device::prepare`] has said that it can be. Its descriptors stay.
    fn stop_queue(&mut self, queue: usize);
}

/// A shared-memory region of a device. Whoever drives the device gets the file whole, and keeps it as long as it likes: what the next driver
/// must not share with the last does not belong there.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// Its id, whose meaning the device type says.
    pub id: u8,
    /// Its length in bytes; not zero.
    pub len: u64,
    /// The file that it is a part of; sealed against shrinking, or a driver that maps it must be ready for SIGBUS.
    pub file: Arc<OwnedFd>,
    /// Where it begins in the file, in bytes; a multiple of the page size.
    pub file_offset: u64,
}

/// What an operator may want of a running device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Put the cable in (true) or take it out.
    SetLink(bool),
    /// Have the driver announce its addresses to the network.
    Announce,
    /// Look at once whether what is behind the device has another size.
    Rescan,
}

/// How a device does, for other threads; never blocks and costs the device nothing.
pub trait Monitor: fmt::Debug + Send + Sync {
    /// The state now. The numbers need not be of the very same moment.
    fn snapshot(&self) -> Snapshot;
}

/// The state of a device's cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The operator has it in.
    pub up: bool,
    /// It leads somewhere.
    pub carrier: bool,
}

/// What [`Monitor::snapshot`] sees. Counters have names and begin with the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The cable, if there is one.
    pub link: Option<Link>,
    /// Counters of the whole device.
    pub counters: Vec<(&'static str, u64)>,
    /// Counters of each queue pair.
    pub pairs: Vec<Vec<(&'static str, u64)>>,
    /// What stays the same, for operators.
    pub details: Vec<(&'static str, String)>,
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
    /// The driver put something into a queue that cannot be answered.
    #[error("queue {queue}: {what}")]
    Malformed {
        /// Which queue.
        queue: usize,
        /// What it is.
        what: &'static str,
    },
    /// The device itself cannot go on.
    #[error("{0}")]
    Local(String),
}

impl DeviceError {
    /// Whether it is about an address that no window has, or one in a window that does not allow what it was used for.
    pub fn is_unmapped(&self) -> bool {
        use vmsg_mem::Error::{ReadOnly, Scattered, Unmapped};
        matches!(
            self,
            Self::Queue {
                source: QueueError::Mem(Unmapped { .. } | ReadOnly { .. } | Scattered { .. }),
                ..
            }
        )
    }
}

/// A queue that the driver has set up, with the way to notify the driver.
#[derive(Debug)]
pub struct ActiveQueue {
    ring: Ring,
    pub(crate) call: Option<vmsg_mem::Doorbell>,
}

/// A ring, and what is in flight in it where that must be known after a restart.
#[derive(Debug)]
pub(crate) enum Ring {
    Plain(DeviceQueue),
    Recorded(RecordedQueue, Arc<Mapping>),
}

impl ActiveQueue {
    pub(crate) fn new(ring: Ring, call: Option<vmsg_mem::Doorbell>) -> Self {
        Self { ring, call }
    }

    /// Whether the file of the record has shrunk: then the next process would not find what is in flight.
    pub(crate) fn has_lost_record(&self) -> bool {
        matches!(&self.ring, Ring::Recorded(_, record) if record.is_lost())
    }

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

    /// The ring itself. A device that does not use it [in order](Device::in_order) takes, gives back, completes and
    /// publishes by the methods here, which keep the record of what is in flight.
    pub fn ring(&mut self) -> &mut DeviceQueue {
        match &mut self.ring {
            Ring::Plain(ring) => ring,
            Ring::Recorded(ring, _) => ring.queue(),
        }
    }

    /// As [`DeviceQueue::pop`]; what a process before has left in flight comes first.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn pop<'b>(
        &mut self,
        space: AddressSpace<'b>,
        storage: &'b mut ChainStorage,
        max: usize,
    ) -> Result<Batch<'b>, QueueError> {
        match &mut self.ring {
            Ring::Plain(ring) => ring.pop(space, storage, max),
            Ring::Recorded(ring, record) => ring.pop(space, record.ram(), storage, max),
        }
    }

    /// As [`DeviceQueue::rewind`].
    ///
    /// # Errors
    ///
    /// [`QueueError::BadRecord`].
    ///
    /// # Panics
    ///
    /// If the last `pop` returned fewer chains.
    pub fn rewind(&mut self, n: usize) -> Result<(), QueueError> {
        match &mut self.ring {
            Ring::Plain(ring) => {
                ring.rewind(n);
                Ok(())
            }
            Ring::Recorded(ring, record) => ring.rewind(record.ram(), n),
        }
    }

    /// As [`DeviceQueue::complete`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn complete(
        &mut self,
        space: AddressSpace<'_>,
        head: ChainHead,
        written: u32,
    ) -> Result<(), QueueError> {
        match &mut self.ring {
            Ring::Plain(ring) => ring.complete(space, head, written),
            Ring::Recorded(ring, record) => ring.complete(space, record.ram(), head, written),
        }
    }

    /// As [`DeviceQueue::publish`]; [`Io::publish`] also interrupts the driver.
    fn publish(&mut self, space: AddressSpace<'_>) -> Result<bool, QueueError> {
        match &mut self.ring {
            Ring::Plain(ring) => ring.publish(space),
            Ring::Recorded(ring, record) => ring.publish(space, record.ram()),
        }
    }

    /// [`Io::publish`] for this queue, whose index is `queue`.
    pub(crate) fn publish_and_notify(
        &mut self,
        queue: usize,
        space: AddressSpace<'_>,
        notices: &mut Vec<Notice>,
    ) -> Result<(), DeviceError> {
        let notify = self
            .publish(space)
            .map_err(|source| DeviceError::Queue { queue, source })?;
        if notify {
            self.interrupt(queue, notices);
        }
        Ok(())
    }

    /// Chains that a process before has left in flight and that [`pop`](Self::pop) has still to return.
    pub(crate) fn recovered(&self) -> usize {
        match &self.ring {
            Ring::Plain(_) => 0,
            Ring::Recorded(ring, _) => ring.recovered(),
        }
    }
}

/// What a device may touch during one call: its queues, the driver's memory
/// and room for a batch of chains.
pub struct Io<'a> {
    /// The device's queues by index; `None` until the driver has set one up and said DRIVER_OK.
    pub queues: &'a mut [Option<ActiveQueue>],
    /// The memory that the driver has lent.
    pub space: AddressSpace<'a>,
    /// What holds that memory, for requests that are under way when the call is over.
    pub table: &'a Arc<WindowTable>,
    /// Room for the pieces of a batch, shared by all devices of the worker.
    pub storage: &'a mut ChainStorage,
    /// The present time.
    pub now: Instant,
    /// The other devices of the worker.
    pub others: &'a mut dyn Outlets,
    /// What [`Device::accept`] is going to be given, if somebody knows.
    pub(crate) wanted: Option<Wanted>,
    /// Where what the driver must hear goes, if it cannot be told directly.
    pub(crate) notices: &'a mut Vec<Notice>,
    /// Queues to be processed again without a kick.
    pub(crate) again: &'a mut Vec<usize>,
}

impl fmt::Debug for Io<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            queues,
            space,
            table: _,
            storage: _,
            wanted: _,
            now,
            others: _,
            notices,
            again,
        } = self;
        f.debug_struct("Io")
            .field("queues", queues)
            .field("space", space)
            .field("now", now)
            .field("notices", notices)
            .field("again", again)
            .finish_non_exhaustive()
    }
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

    /// Tells the driver by a message that something was used in `queue`: for a queue that another process works on.
    pub fn used(&mut self, queue: usize) {
        self.notices.push(Notice::Used { queue });
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
    match queues.get_mut(queue) {
        Some(Some(active)) => active.publish_and_notify(queue, space, notices),
        _ => Ok(()),
    }
}
