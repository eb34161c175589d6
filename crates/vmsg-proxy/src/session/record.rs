// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has negotiated.

use super::inflight::Inflight;
use super::types::{QueueSetup, ResumeAt};
use super::windows::Windows;
use crate::shadow::Renewal;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::{DeviceStatus, FeatureSet};

/// The eventfds of a queue.
#[derive(Clone, Debug, Default)]
pub(super) struct Notify {
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Arc<OwnedFd>>,
}

/// Doorbells of a queue: the device's end is kicked by the one, the driver's end hears calls by the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueVectors {
    /// Which vector of the device's end is rung for kicks. `None`: kicks are messages.
    pub kick: Option<u16>,
    /// Which vector of this end is rung for calls. `None`: calls are messages.
    pub call: Option<u16>,
}

/// All of it. Queues by index.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    pub(super) claimed: bool,
    pub(super) windows: Windows,
    pub(super) features: FeatureSet,
    pub(super) status: DeviceStatus,
    pub(super) queues: BTreeMap<u32, QueueSetup>,
    notify: BTreeMap<u32, Notify>,
    /// The vectors that the device has been told of.
    vectors: BTreeMap<u32, QueueVectors>,
    /// Those that queues can have, for one after another; nothing on a bus without such.
    pub(super) vectors_to_give: Vec<QueueVectors>,
    /// Another value whenever `notify` or `vectors` change.
    notify_version: u64,
    /// Configuration space as last seen. Kept over resets: it is the device's.
    pub(super) config: Vec<u8>,
    pub(super) generation: u32,
    /// The byte of a disk's configuration by which the guest has chosen whether writes are cached, if it has: the one that is of
    /// consequence for what a flush has to be asked for (virtio 1.3, 5.2.5.2).
    pub(super) write_cache: Option<u8>,
    /// Records of what is in flight. Kept over resets: a front may stop a queue with a reset and go on with it.
    pub(super) inflight: Inflight,
    /// What begins the queues anew for another device host.
    pub(super) renewal: Option<Renewal>,
}

impl Record {
    /// Whether a guest would notice another device.
    pub(super) fn is_negotiated(&self) -> bool {
        // Features may be told before anything is said of the status.
        !self.status.is_empty() || !self.queues.is_empty() || !self.features.is_empty()
    }

    /// Whether there is anything to replay.
    pub(super) fn is_blank(&self) -> bool {
        !self.claimed && self.windows.is_empty() && !self.is_negotiated()
    }

    pub(super) fn is_live(&self) -> bool {
        self.status.contains(DeviceStatus::DRIVER_OK)
    }

    /// What a device reset undoes.
    pub(super) fn reset(&mut self) {
        self.features = FeatureSet::EMPTY;
        self.status = DeviceStatus::RESET;
        self.write_cache = None;
        self.queues.clear();
        self.notify.clear();
        self.vectors.clear();
        self.notify_version += 1;
    }

    /// The vectors that the next set-up of a queue asks for.
    pub(super) fn next_vectors(&self, queue: u32) -> Option<QueueVectors> {
        let count = self.vectors_to_give.len();
        let queue = usize::try_from(queue).ok()?;
        self.vectors_to_give.get(queue.checked_rem(count)?).copied()
    }

    pub(super) fn vectors(&self) -> &BTreeMap<u32, QueueVectors> {
        &self.vectors
    }

    /// The device waits for these, and rings those.
    pub(super) fn set_vectors(&mut self, queue: u32, vectors: QueueVectors) {
        self.vectors.insert(queue, vectors);
        self.notify_version += 1;
    }

    /// The connection that the vectors belong to is gone.
    pub(super) fn forget_vectors(&mut self) {
        self.vectors.clear();
        self.notify_version += 1;
    }

    pub(super) fn notify(&self) -> &BTreeMap<u32, Notify> {
        &self.notify
    }

    pub(super) fn notify_version(&self) -> u64 {
        self.notify_version
    }

    /// The eventfds of a queue from now on.
    pub(super) fn set_notify(&mut self, queue: u32, notify: Notify) {
        self.notify.insert(queue, notify);
        self.notify_version += 1;
    }

    /// The queue is stopped.
    pub(super) fn remove_queue(&mut self, queue: u32) {
        self.queues.remove(&queue);
        self.notify.remove(&queue);
        self.vectors.remove(&queue);
        self.notify_version += 1;
    }

    /// What the end of a guest undoes.
    pub(super) fn release(&mut self) {
        self.reset();
        self.windows.clear();
        self.claimed = false;
        self.inflight.release();
        self.renewal = None;
    }

    /// The queues begin at their beginning again.
    pub(super) fn begin_anew(&mut self) {
        for queue in self.queues.values_mut() {
            queue.resume = ResumeAt::Start;
        }
    }

    /// From now on a device may have moved in the queues: they resume at their used index.
    pub(super) fn mark_running(&mut self) {
        for queue in self.queues.values_mut() {
            queue.resume = ResumeAt::UsedIndex;
        }
    }
}
