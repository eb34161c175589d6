// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of a worker, with its queues.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use vmsg_mem::{AddressSpace, Doorbell, WindowTable};
use vmsg_queue::{DeviceQueue, QueueConfig, QueueError, QueueFeatures, RecordedQueue};

use super::command::{Notice, QueueStart, Resume, Slot};
use super::core::Fds;
use super::seat::Seat;
use super::waiting::Waiting;
use crate::device::{ActiveQueue, Device, Ring};

/// A queue's descriptors and, once it is set up, the queue itself.
#[derive(Debug, Default)]
pub(super) struct QueueSlot {
    pub(super) kick: Option<Doorbell>,
    pub(super) call: Option<Doorbell>,
    /// Set up, but the driver is not ready yet.
    waiting: Option<Ring>,
    /// It was in use before: an interrupt may have been lost in between.
    pub(super) resumed: bool,
    /// Set up by the driver, and another process works on it.
    pub(super) passed_on: bool,
    /// The driver has kicked it by a message, which whoever works on it has not been told.
    pub(super) kicked: bool,
}

pub(super) struct Entry {
    pub(super) device: Box<dyn Device>,
    /// What others find it by.
    pub(super) key: u64,
    /// Another process works on its queues.
    pub(super) passthrough: bool,
    pub(super) memory: Arc<Seat>,
    pub(super) slots: Vec<QueueSlot>,
    pub(super) active: Vec<Option<ActiveQueue>>,
    pub(super) running: bool,
    pub(super) broken: bool,
    /// Its own descriptor is watched.
    pub(super) watched: bool,
    pub(super) waiting: Waiting,
    /// Its entry in the worker's timers.
    pub(super) timer: Option<Instant>,
    /// Which mapping is looked at next for memory that is gone.
    pub(super) next_mapping: usize,
}

/// A queue as its driver describes it and as it is found in memory.
pub(super) struct Found {
    pub(super) ring: DeviceQueue,
    /// Where it goes on.
    pub(super) avail: u16,
    pub(super) used: u16,
    /// It was in use before.
    pub(super) resumed: bool,
}

impl Found {
    /// Looks at a queue of which there is no record.
    pub(super) fn look(
        start: &QueueStart,
        in_order: bool,
        space: AddressSpace<'_>,
    ) -> Result<Self, String> {
        let features = QueueFeatures::from_bits(start.features.low_u64());
        let failed = |error: QueueError| format!("queue {}: {error}", start.queue);
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
        Ok(Self {
            ring,
            avail,
            used,
            resumed,
        })
    }
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
    /// True while commands wait until the device is ready for the first of them.
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the device is polled.
    pub(super) fn is_polled(&self) -> bool {
        // What was begun before it broke may have to end.
        !self.broken || self.waits()
    }

    /// Tells control whether it may change the memory itself. To be called after whatever was done to the device.
    pub(super) fn note_in_seat(&self) {
        let touching = catch_unwind(AssertUnwindSafe(|| self.device.is_touching_memory()));
        let mut memory = self.memory.lock();
        memory.touched = touching.unwrap_or(true);
        memory.by_command = self.passthrough || self.waits();
    }

    /// Leaves the seat as the next device wants to find it.
    pub(super) fn leave_seat(&self) {
        self.memory.set(Arc::default());
        let mut memory = self.memory.lock();
        memory.touched = false;
        memory.by_command = false;
    }

    pub(super) fn set_memory(&mut self, table: Arc<WindowTable>) {
        self.memory.set(Arc::clone(&table));
        if let Some(passthrough) = self.device.passthrough() {
            passthrough.set_memory(&table);
        }
    }

    pub(super) fn start_queue(&mut self, start: &QueueStart) -> Result<(), String> {
        if self.passthrough {
            return self.pass_on(start);
        }
        let slot = self.slots.get_mut(start.queue).ok_or("no such queue")?;
        if self.active[start.queue].is_some() {
            // What is under way in it would come to its end in another ring. The device's state machine does not let it come to that.
            return Err(format!("queue {} is at work", start.queue));
        }
        let memory = self.memory.lock();
        let space = memory.table.space();
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
        let found = Found::look(start, in_order, space)?;
        slot.waiting = Some(Ring::Plain(found.ring));
        slot.resumed = found.resumed;
        Ok(())
    }

    /// Takes a queue away; true if it was at work.
    pub(super) fn stop_queue(&mut self, queue: usize) -> Result<bool, String> {
        let slot = self.slots.get_mut(queue).ok_or("no such queue")?;
        if std::mem::take(&mut slot.passed_on)
            && let Some(passthrough) = self.device.passthrough()
        {
            passthrough.stop_queue(queue);
        }
        slot.kicked = false;
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
        if self.passthrough {
            self.interrupt_resumed(notices);
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
        if self.passthrough {
            return self.pass_on_notify(queue, kick, call);
        }
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
            if let Some(kick) = slot.kick.take().filter(|_| !self.passthrough) {
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
