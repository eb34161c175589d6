// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a device keeps what is in flight in its queues, so that the next device host knows which requests are done.
//!
//! A queue that is used in order goes on at its used index. Where requests overtake each other that is not enough: the device notes them in a
//! record, and the memory of that must outlive it. So it is lent from here, with QUEUE_INFLIGHT before each SET_VQUEUE, on buses that pass
//! descriptors; a device with queues in order takes no notice. The form of a record is that of vhost-user's in-flight region, so a
//! front end that keeps such memory can have it lent in place of the session's own, and the record outlives this process as well.

use super::machine::{Failure, Session};
use super::record::Record;
use super::script::{self, Step};
use super::types::{QueueSetup, ResetReason, ResumeAt};
use crate::shadow::Renewal;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::Instant;
use vmsg_bus::Capabilities;
use vmsg_bus::control::Status;
use vmsg_mem::{Access, Error, Mapping};

/// Bytes of a record before its first entry, and of each entry.
const UNIT: u64 = 16;
/// Records begin at multiples of this, as in the back ends of QEMU and DPDK.
const ALIGN: u64 = 64;
/// Entries of the largest queue.
const MAX_SIZE: u16 = 1 << 15;

/// Memory for one record for each queue of a device.
#[derive(Clone, Debug)]
pub struct InflightMemory {
    file: Arc<OwnedFd>,
    offset: u64,
    queues: u16,
    size: u16,
}

impl InflightMemory {
    /// Bytes for `queues` queues of up to `size` entries.
    pub fn bytes_for(queues: u16, size: u16) -> u64 {
        u64::from(queues) * stride(size)
    }

    /// New memory, all zero, in a memfd that cannot shrink.
    ///
    /// # Errors
    /// If there are no queues, or the system has no more memory or descriptors.
    pub fn new(queues: u16, size: u16) -> Result<InflightMemory, Error> {
        Self::with_room(queues, size, 0)
    }

    /// The same with so many bytes behind the records.
    pub(crate) fn with_room(queues: u16, size: u16, room: u64) -> Result<InflightMemory, Error> {
        let len = Self::bytes_for(queues, size) + room;
        let (_, file) = Mapping::memfd("vmsg-inflight", len, true)?;
        Ok(Self::of_file(Arc::new(file), 0, queues, size))
    }

    /// Memory that somebody else has, from `offset` of a file on.
    pub fn of_file(file: Arc<OwnedFd>, offset: u64, queues: u16, size: u16) -> InflightMemory {
        InflightMemory {
            file,
            offset,
            queues,
            size,
        }
    }

    /// The file.
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// The record of a queue of `size` entries, mapped; `None` if it has none here.
    pub(crate) fn map(&self, queue: u32, size: u16) -> Option<Result<Mapping, Error>> {
        let Place {
            file, offset, len, ..
        } = self.place(queue, size)?;
        Some(Mapping::of_fd(file.as_fd(), offset, len, Access::ReadWrite))
    }

    /// Where the record of a queue of `size` entries lies.
    fn place(&self, queue: u32, size: u16) -> Option<Place> {
        if queue >= u32::from(self.queues) || size > self.size {
            return None;
        }
        let into = u64::from(queue).checked_mul(stride(self.size))?;
        Some(Place {
            file: Arc::clone(&self.file),
            offset: self.offset.checked_add(into)?,
            len: UNIT + UNIT * u64::from(size),
            resume: false,
        })
    }
}

/// From one record to the next.
fn stride(size: u16) -> u64 {
    (UNIT + UNIT * u64::from(size)).next_multiple_of(ALIGN)
}

/// The memory of one record, as it is lent.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) file: Arc<OwnedFd>,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Go on with what it says.
    pub(super) resume: bool,
}

/// What a session knows of records.
#[derive(Clone, Debug, Default)]
pub(super) struct Inflight {
    /// Kept by the front end.
    pub(super) front: Option<InflightMemory>,
    own: Option<InflightMemory>,
    /// The device host does not know the message.
    unknown: bool,
}

impl Inflight {
    /// The guest is gone, and all that it had in flight.
    pub(super) fn release(&mut self) {
        self.front = None;
        self.own = None;
    }

    /// Where a queue's record is, if there is one and the bus can lend it.
    pub(super) fn place(
        &self,
        queue: u32,
        setup: &QueueSetup,
        caps: &Capabilities,
    ) -> Option<Place> {
        if self.unknown || !(caps.passes_fds && caps.runtime_windows) {
            return None;
        }
        if let Some(front) = &self.front {
            // What was never used stands for a queue that was not, either.
            let place = front.place(queue, setup.size)?;
            return Some(Place {
                resume: true,
                ..place
            });
        }
        let place = self.own.as_ref()?.place(queue, setup.size)?;
        Some(Place {
            resume: setup.resume != ResumeAt::Start,
            ..place
        })
    }
}

impl Record {
    /// Sees to it that there is memory for the record of a queue; `queues` is how many the device has.
    pub(super) fn prepare_inflight(&mut self, queues: usize) {
        let inflight = &mut self.inflight;
        if inflight.front.is_some() || inflight.unknown {
            return;
        }
        let enough = |own: &InflightMemory| usize::from(own.queues) >= queues;
        if inflight.own.as_ref().is_some_and(enough) {
            return;
        }
        let queues = u16::try_from(queues).unwrap_or(u16::MAX);
        // Pages that nobody touches cost nothing. Without a record it goes as well as on a bus that cannot lend one.
        match InflightMemory::new(queues, MAX_SIZE) {
            Ok(memory) => inflight.own = Some(memory),
            Err(error) => tracing::warn!(%error, "no record of what is in flight is kept"),
        }
    }
}

impl Session {
    /// The device host is another one, and may know more.
    pub(super) fn forget_unknown_inflight(&mut self) {
        self.record.inflight.unknown = false;
    }

    /// QUEUE_INFLIGHT was answered. A host that does not take the record does without; whether it can is said by its answer to SET_VQUEUE.
    pub(super) fn inflight_answered(&mut self, status: Status) {
        if status.is_ok() {
            return;
        }
        // What is done from here on is not noted: what stands there must not be believed later.
        self.record.inflight.own = None;
        if status == Status::UNSUPPORTED {
            self.do_without_inflight();
        }
    }

    /// If QUEUE_INFLIGHT is what was not answered in time: hosts that do not know a message say nothing. True if the script goes on.
    pub(super) fn inflight_unanswered(&mut self, now: Instant) -> bool {
        let is_late = self
            .exchange
            .take_if(|e| e.deadline <= now && matches!(e.step, Step::Inflight { .. }));
        if is_late.is_some() {
            self.record.inflight.own = None;
            self.do_without_inflight();
        }
        is_late.is_some()
    }

    /// Whether queues that are in use are begun anew in a replay, with what was in flight.
    pub(super) fn renews(&self) -> bool {
        let lends_records = self.caps.passes_fds && self.caps.runtime_windows;
        self.record.renewal.is_some() && !lends_records
    }

    /// The replay.
    pub(super) fn replay(&mut self) -> VecDeque<Step> {
        let moved = |setup: &QueueSetup| setup.resume != ResumeAt::Start;
        let renews = self.renews() && self.record.queues.values().any(moved);
        if renews {
            self.record.begin_anew();
        }
        self.renewing |= renews;
        script::replay(&self.record, &self.caps, self.renewing)
    }

    /// The device was reset, and nobody uses the queues.
    pub(super) fn renew(&mut self, now: Instant) {
        let renewal = self.record.renewal.as_ref();
        if renewal.is_some_and(Renewal::renew) {
            self.renewing = false;
            return;
        }
        let queue = self.record.queues.keys().next().copied().unwrap_or(0);
        self.fail(now, Failure::Reset(ResetReason::CannotResume { queue }));
    }

    fn do_without_inflight(&mut self) {
        self.record.inflight.unknown = true;
        self.script
            .retain(|step| !matches!(step, Step::Inflight { .. }));
    }
}
