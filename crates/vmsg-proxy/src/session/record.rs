// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has negotiated.

use super::inflight::Inflight;
use super::types::{QueueSetup, ResumeAt};
use super::windows::Windows;
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

/// All of it. Queues by index.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    pub(super) claimed: bool,
    pub(super) windows: Windows,
    pub(super) features: FeatureSet,
    pub(super) status: DeviceStatus,
    pub(super) queues: BTreeMap<u32, QueueSetup>,
    notify: BTreeMap<u32, Notify>,
    /// Another value whenever `notify` changes.
    notify_version: u64,
    /// Configuration space as last seen. Kept over resets: it is the device's.
    pub(super) config: Vec<u8>,
    pub(super) generation: u32,
    /// Records of what is in flight. Kept over resets: a front may stop a queue with a reset and go on with it.
    pub(super) inflight: Inflight,
}

impl Record {
    /// Whether a guest would notice another device.
    pub(super) fn is_negotiated(&self) -> bool {
        !self.status.is_empty() || !self.queues.is_empty()
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
        self.queues.clear();
        self.notify.clear();
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
        self.notify_version += 1;
    }

    /// What the end of a guest undoes.
    pub(super) fn release(&mut self) {
        self.reset();
        self.windows.clear();
        self.claimed = false;
        self.inflight.release();
    }

    /// From now on a device may have moved in the queues: they resume at their used index.
    pub(super) fn mark_running(&mut self) {
        for queue in self.queues.values_mut() {
            queue.resume = ResumeAt::UsedIndex;
        }
    }
}
