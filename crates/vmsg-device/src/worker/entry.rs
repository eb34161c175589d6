// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of a worker, with its queues.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use vmsg_mem::{AddressSpace, Doorbell};
use vmsg_queue::{DeviceQueue, QueueConfig, QueueError, QueueFeatures, RecordedQueue};

use super::command::{Notice, QueueStart, Resume, Slot};
use super::core::Fds;
use super::seat::Seat;
use crate::device::{ActiveQueue, Device, Ring};

/// A queue's descriptors and, once it is set up, the queue itself.
#[derive(Debug, Default)]
pub(super) struct QueueSlot {
    kick: Option<Doorbell>,
    call: Option<Doorbell>,
    /// Set up, but the driver is not ready yet.
    waiting: Option<Ring>,
    /// It was in use before: an interrupt may have been lost in between.
    resumed: bool,
}

pub(super) struct Entry {
    pub(super) device: Box<dyn Device>,
    /// What others find it by.
    pub(super) key: u64,
    pub(super) memory: Arc<Seat>,
    pub(super) slots: Vec<QueueSlot>,
    pub(super) active: Vec<Option<ActiveQueue>>,
    pub(super) running: bool,
    pub(super) broken: bool,
    /// Its entry in the worker's timers.
    pub(super) timer: Option<Instant>,
    /// Which mapping is looked at next for memory that is gone.
    pub(super) next_mapping: usize,
}

/// The used index that stands in the ring, or 0 if the driver has not made available what goes with it.
fn used_as_found(
    config: QueueConfig,
    features: QueueFeatures,
    space: AddressSpace<'_>,
) -> Result<u16, QueueError> {
    let used = DeviceQueue::read_used_index(config, space)?;
    let fits = DeviceQueue::resume(config, features, space, used, used)?
        .available(space)
        .is_ok();
    Ok(if fits { used } else { 0 })
}

impl Entry {
    pub(super) fn start_queue(&mut self, start: &QueueStart) -> Result<(), String> {
        let slot = self.slots.get_mut(start.queue).ok_or("no such queue")?;
        let memory = self.memory.lock();
        let space = memory.space();
        let features = QueueFeatures::from_bits(start.features.low_u64());
        let failed = |error: QueueError| format!("queue {}: {error}", start.queue);
        let in_order = self.device.in_order(start.queue);
        if let Some(record) = start.record.as_ref().filter(|_| !in_order) {
            let (config, memory) = (start.config, record.memory.ram());
            let ring = if record.resume {
                RecordedQueue::resume(config, features, space, memory)
            } else {
                RecordedQueue::new(config, features, space, memory)
            };
            let memory = Arc::clone(&record.memory);
            slot.waiting = Some(Ring::Recorded(ring.map_err(failed)?, memory));
            slot.resumed = record.resume;
            return Ok(());
        }
        let (avail, used) = match start.resume {
            None => (0, 0),
            Some(Resume::At { avail, used }) => (avail, used),
            Some(Resume::AsFound) => {
                let used = used_as_found(start.config, features, space).map_err(failed)?;
                (used, used)
            }
            Some(Resume::FromUsedRing) => {
                let used = DeviceQueue::read_used_index(start.config, space).map_err(failed)?;
                (used, used)
            }
        };
        let mut ring =
            DeviceQueue::resume(start.config, features, space, avail, used).map_err(failed)?;
        // A queue that is found at its beginning is a new one.
        let resumed =
            start.resume.is_some() && (start.resume != Some(Resume::AsFound) || used != 0);
        if !in_order && resumed && ring.available(space).map_err(failed)? > 0 {
            // Some of what is available may be done, and nobody knows which.
            return Err("requests may be in flight, and there is no record of them".to_owned());
        }
        slot.waiting = Some(Ring::Plain(ring));
        slot.resumed = resumed;
        Ok(())
    }

    /// Takes a queue away; true if it was at work.
    pub(super) fn stop_queue(&mut self, queue: usize) -> Result<bool, String> {
        let slot = self.slots.get_mut(queue).ok_or("no such queue")?;
        slot.waiting = None;
        let stopped = self.active[queue].take();
        let was_active = stopped.is_some();
        if let Some(stopped) = stopped {
            // Descriptors outlive the queue: only the driver, or a reset, takes them away.
            slot.call = stopped.call;
        }
        Ok(was_active)
    }

    /// Puts the queues that are set up to work, if the driver is ready. `None` if there are none;
    /// otherwise whether any of them was in use before.
    pub(super) fn start_waiting(&mut self, notices: &mut Vec<Notice>) -> Option<bool> {
        if !self.running {
            return None;
        }
        let mut started = None;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(ring) = slot.waiting.take() else {
                continue;
            };
            let call = slot.call.take();
            let active = self.active[index].insert(ActiveQueue::new(ring, call));
            let resumed = std::mem::take(&mut slot.resumed);
            started = Some(started.unwrap_or(false) || resumed);
            if resumed {
                // Whoever served the queue before may have died between using a chain and saying so.
                active.interrupt(index, notices);
            }
        }
        started
    }

    pub(super) fn set_notify(
        &mut self,
        at: Slot,
        queue: usize,
        kick: Option<Doorbell>,
        call: Option<Doorbell>,
        fds: &mut dyn Fds,
    ) -> Result<(), String> {
        let slot = self.slots.get_mut(queue).ok_or("no such queue")?;
        if let Some(old) = slot.kick.take() {
            fds.remove(old.as_fd());
        }
        if let Some(kick) = kick {
            fds.add_kick(at, queue, kick.as_fd());
            slot.kick = Some(kick);
        }
        match &mut self.active[queue] {
            Some(active) => active.call = call,
            None => slot.call = call,
        }
        Ok(())
    }

    /// Stops everything; true if the device was broken until now.
    pub(super) fn reset(&mut self, fds: &mut dyn Fds) -> bool {
        for slot in &mut self.slots {
            if let Some(kick) = slot.kick.take() {
                fds.remove(kick.as_fd());
            }
            *slot = QueueSlot::default();
        }
        self.active.fill_with(|| None);
        self.device.reset();
        self.running = false;
        std::mem::take(&mut self.broken)
    }
}
