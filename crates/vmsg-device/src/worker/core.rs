// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The worker without its thread: commands in, replies out, queues processed.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use vmsg_queue::ChainStorage;

use super::command::{Command, Notice, Reply, Slot};
use super::entry::{Entry, QueueSlot};
use super::fault::Fault;
use super::linger::Linger;
use super::others::{Others, new_key};
use super::ready::Ready;
use super::seat::Seats;
use super::waiting::Waiting;
use crate::device::{Device, DeviceError, Io, Progress};

/// Chains of one queue that are worked on before another queue has its turn.
const BUDGET: usize = 64;

/// Pieces of memory that one batch can have at least.
const MIN_PIECES: usize = 256;

/// Where the worker's file descriptors are watched: epoll in a thread, nothing
/// in a simulation.
pub trait Fds {
    /// Watch a queue's kick descriptor: each write is an event, it is never read.
    fn add_kick(&mut self, slot: Slot, queue: usize, fd: BorrowedFd<'_>);
    /// Watch a device's own descriptor.
    fn add_device(&mut self, slot: Slot, fd: BorrowedFd<'_>);
    /// Forget a descriptor, before it is closed.
    fn remove(&mut self, fd: BorrowedFd<'_>);
}

/// The devices of one worker.
pub struct Core {
    pub(super) entries: Vec<Option<Entry>>,
    ready: Ready,
    pub(super) linger: Linger,
    storage: ChainStorage,
    /// As `storage`, for a device that gets something from the one whose turn it is.
    storage_of_others: ChainStorage,
    /// How many pieces each of them has room for.
    pieces: usize,
    notices: Vec<Notice>,
    again: Vec<usize>,
    /// Empty, with the room that they need.
    notices_of_others: Vec<Notice>,
    again_of_others: Vec<usize>,
    pub(super) replies: Vec<Reply>,
    /// When which device wants to be polled: at most one entry for each.
    timers: BTreeSet<(Instant, u32)>,
    /// Those without queues.
    residents: Vec<Slot>,
    /// The devices' memory.
    seats: Arc<Seats>,
    /// Devices whose descriptors are perhaps to be watched no more, or again.
    pub(super) rewatch: Vec<Slot>,
    /// Devices that were polled since commands for them wait.
    pub(super) polled: Vec<Slot>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "worker::Core({} slots, {} ready)",
            self.entries.len(),
            self.ready.len()
        )
    }
}

impl Default for Core {
    fn default() -> Self {
        Self::new()
    }
}

impl Core {
    /// A worker without devices.
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            ready: Ready::default(),
            linger: Linger::default(),
            storage: ChainStorage::with_capacity(MIN_PIECES),
            storage_of_others: ChainStorage::with_capacity(MIN_PIECES),
            pieces: MIN_PIECES,
            notices: Vec::new(),
            again: Vec::new(),
            notices_of_others: Vec::new(),
            again_of_others: Vec::new(),
            replies: Vec::new(),
            timers: BTreeSet::new(),
            residents: Vec::new(),
            seats: Arc::default(),
            rewatch: Vec::new(),
            polled: Vec::new(),
        }
    }

    /// Carries out `command` for the device at `slot`, now or when the device is ready for it
    /// ([`carry_on`](Self::carry_on)). Answers and notices are
    /// collected by [`take_replies`](Self::take_replies).
    pub fn command(&mut self, slot: Slot, ticket: u64, command: Command, fds: &mut dyn Fds) {
        match command {
            Command::Add(device) => self.add(slot, device, fds),
            Command::Kick { queue, pending } => {
                // Before the queue is looked at: a kick that comes later is a command of its own.
                pending.take();
                if let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) {
                    entry.note_kick(queue);
                }
                self.kick(slot, queue);
            }
            command => self.take(slot, ticket, command, fds),
        }
    }

    /// Carries out a command that the device is ready for, and answers it.
    pub(super) fn carry_out(
        &mut self,
        slot: Slot,
        ticket: u64,
        command: Command,
        fds: &mut dyn Fds,
    ) {
        let before = self.replies.len();
        let result = match self.entries.get(slot.0 as usize) {
            // What a device leaves behind that panics here is only ever reset.
            Some(Some(_)) => catch_unwind(AssertUnwindSafe(|| self.change(slot, command, fds)))
                .unwrap_or_else(|panic| {
                    let fault = Fault::of_panic(&*panic);
                    let why = fault.why.clone();
                    self.break_device(slot, fault);
                    Err(why)
                }),
            _ => Err(format!("the worker has no device at slot {}", slot.0)),
        };
        // First: a device whose driver is not ready yet has nothing to tell it.
        self.replies.insert(before, Reply::Done { ticket, result });
        self.replies.extend(
            self.notices
                .drain(..)
                .map(|notice| Reply::Notice(slot, notice)),
        );
        if let Some(Some(entry)) = self.entries.get(slot.0 as usize) {
            entry.note_in_seat();
        }
    }

    /// Leaves a device alone until its driver resets it.
    fn break_device(&mut self, slot: Slot, fault: Fault) {
        let Fault { why, unmapped } = fault;
        if let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) {
            entry.broken = true;
            self.rewatch.push(slot);
            self.notices.push(Notice::Broken { why, unmapped });
        }
    }

    /// The driver has kicked a queue.
    pub fn kick(&mut self, slot: Slot, queue: usize) {
        if let Ok(queue) = u16::try_from(queue) {
            self.ready.push(slot.0, queue);
        }
    }

    /// Works on the queue whose turn it is; false if none waits.
    pub fn step(&mut self, now: Instant) -> bool {
        let Some((slot, queue)) = self.ready.pop() else {
            return false;
        };
        self.process(Slot(slot), usize::from(queue), now);
        true
    }

    /// True if a queue waits for [`step`](Self::step).
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The device's own descriptor is readable, or its time has come.
    pub fn poll_device(&mut self, slot: Slot, now: Instant) {
        if self.waits(slot) {
            return self.poll_while_waiting(slot, now);
        }
        self.with_device(slot, now, |device, io| device.poll(io).map(|()| None));
    }

    /// Calls [`Device::poll`] of every device whose time has come.
    pub fn handle_timeouts(&mut self, now: Instant) {
        // A device that wants to be polled at once, again and again, gets its turn once.
        let due: Vec<u32> = self
            .timers
            .iter()
            .take_while(|(due, _)| *due <= now)
            .map(|(_, slot)| *slot)
            .collect();
        for slot in due {
            self.poll_device(Slot(slot), now);
        }
    }

    /// When [`handle_timeouts`](Self::handle_timeouts) has something to do.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|(due, _)| *due)
    }

    /// Brings the watching of devices' own descriptors up to date: a broken
    /// device must not keep its worker awake.
    pub fn update_watched(&mut self, fds: &mut dyn Fds) {
        for slot in self.rewatch.drain(..) {
            let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
                continue;
            };
            let wanted = entry.is_polled();
            if std::mem::replace(&mut entry.watched, wanted) == wanted {
                continue;
            }
            let Some(fd) = entry.device.event_fd() else {
                continue;
            };
            if wanted {
                fds.add_device(slot, fd);
            } else {
                fds.remove(fd);
            }
        }
    }

    /// Asks those without queues when they want to be polled: other devices change that, which work for them.
    pub fn update_residents(&mut self) {
        for index in 0..self.residents.len() {
            self.set_timer(self.residents[index]);
        }
    }

    /// Notes when the device at `slot` wants to be polled.
    pub(super) fn set_timer(&mut self, slot: Slot) {
        let Some(Some(entry)) = self.entries.get_mut(slot.0 as usize) else {
            return;
        };
        let due = if entry.is_polled() {
            entry.device.next_timeout()
        } else {
            None
        };
        if due == entry.timer {
            return;
        }
        if let Some(old) = std::mem::replace(&mut entry.timer, due) {
            self.timers.remove(&(old, slot.0));
        }
        if let Some(due) = due {
            self.timers.insert((due, slot.0));
        }
    }

    /// Where control finds the devices' memory.
    pub(super) fn seats(&self) -> Arc<Seats> {
        Arc::clone(&self.seats)
    }

    /// What has been answered and noticed since the last call.
    pub fn take_replies(&mut self) -> std::vec::Drain<'_, Reply> {
        self.replies.drain(..)
    }

    fn add(&mut self, slot: Slot, mut device: Box<dyn Device>, fds: &mut dyn Fds) {
        let sizes = device.queue_sizes();
        let index = slot.0 as usize;
        if self.entries.len() <= index {
            self.entries.resize_with(index + 1, || None);
        }
        // One chain may be as long as its queue; the batch must have room for it.
        let longest = sizes.iter().copied().max().map_or(0, usize::from);
        if self.pieces < longest {
            self.pieces = longest;
            self.storage = ChainStorage::with_capacity(longest);
            self.storage_of_others = ChainStorage::with_capacity(longest);
        }
        self.ready.add(slot.0, sizes.len());
        if let Some(fd) = device.event_fd() {
            fds.add_device(slot, fd);
        }
        if sizes.is_empty() {
            self.residents.push(slot);
        }
        let key = new_key(slot);
        device.placed(key);
        let passthrough = device.passthrough().is_some();
        let entry = self.entries[index].insert(Entry {
            device,
            key,
            passthrough,
            memory: self.seats.at(slot),
            slots: sizes.iter().map(|_| QueueSlot::default()).collect(),
            active: sizes.iter().map(|_| None).collect(),
            running: false,
            broken: false,
            watched: true,
            waiting: Waiting::default(),
            timer: None,
            next_mapping: 0,
        });
        entry.note_in_seat();
        self.set_timer(slot);
    }

    /// Forgets a device. Whatever goes wrong with it, its place is free.
    fn remove(&mut self, slot: Slot, fds: &mut dyn Fds) {
        let Some(mut entry) = self.entries[slot.0 as usize].take() else {
            return;
        };
        self.ready.remove(slot.0);
        self.linger.remove(slot);
        self.rewatch.retain(|other| *other != slot);
        self.polled.retain(|other| *other != slot);
        self.residents.retain(|other| *other != slot);
        if let Some(due) = entry.timer.take() {
            self.timers.remove(&(due, slot.0));
        }
        if let Some(fd) = entry.device.event_fd() {
            fds.remove(fd);
        }
        entry.leave_seat();
        // Nothing is sent behind the end of a device; if it were, it would be answered.
        for ticket in entry.waiting.tickets() {
            let result = Err("the device is gone".to_owned());
            self.replies.push(Reply::Done { ticket, result });
        }
        entry.reset(fds);
        entry.device.removed();
    }

    fn change(&mut self, slot: Slot, command: Command, fds: &mut dyn Fds) -> Result<(), String> {
        let place = &mut self.entries[slot.0 as usize];
        let entry = place.as_mut().expect("the caller has looked");
        match command {
            Command::Add(_) | Command::Kick { .. } => unreachable!("handled by the caller"),
            Command::Remove => self.remove(slot, fds),
            Command::SetMemory(table) => entry.set_memory(table),
            Command::StartQueue(start) => {
                entry.start_queue(&start)?;
                let started = entry.start_waiting(&mut self.notices);
                self.queues_changed(slot, started);
                self.kick(slot, start.queue);
            }
            Command::SetNotify { queue, kick, call } => {
                entry.set_notify(slot, queue, kick, call, fds)?;
                // A kick may have been written before the descriptor was watched.
                self.kick(slot, queue);
            }
            Command::CheckFeatures(features) => entry.device.check_features(&features)?,
            Command::DriverOk(features) => {
                entry.device.activate(&features);
                entry.running = true;
                let queues = entry.active.len();
                let started = entry.start_waiting(&mut self.notices);
                self.queues_changed(slot, started);
                for queue in 0..queues {
                    self.kick(slot, queue);
                }
            }
            Command::ResetQueue(queue) => {
                let changed = entry.stop_queue(queue)?.then_some(false);
                self.queues_changed(slot, changed);
            }
            Command::Reset => {
                if entry.reset(fds) {
                    self.rewatch.push(slot);
                }
                // What the driver had changed is undone; the machine has a copy of it.
                let data = entry.device.config();
                self.notices.push(Notice::Config { offset: 0, data });
                self.set_timer(slot);
            }
            Command::WriteConfig { offset, data } => {
                entry
                    .device
                    .write_config(offset, &data)
                    .map_err(|error| error.to_string())?;
            }
            Command::Operate(operation) => {
                let broken = "the device is out of order until its driver resets it";
                let mut result = Err(broken.to_owned());
                self.with_device(slot, Instant::now(), |device, io| {
                    result = device.operate(operation, io);
                    Ok(None)
                });
                result?;
            }
        }
        Ok(())
    }

    /// Tells a device that queues have come or gone; `resumed` of [`Device::queues_changed`], or
    /// `None` if there are the same as before.
    fn queues_changed(&mut self, slot: Slot, resumed: Option<bool>) {
        if let Some(resumed) = resumed {
            self.with_device(slot, Instant::now(), |device, io| {
                device.queues_changed(io, resumed);
                Ok(None)
            });
        }
    }

    fn process(&mut self, slot: Slot, queue: usize, now: Instant) {
        match self.entries.get_mut(slot.0 as usize) {
            // All queues are looked at when that is over.
            Some(Some(entry)) if entry.waits() => return,
            Some(Some(entry)) if entry.passthrough => {
                // That it is its turn means that it may have been kicked; who works on it knows better.
                let kicked = entry.is_passed_on(queue) && entry.take_kick(queue);
                if kicked {
                    self.with_device(slot, now, |device, _| {
                        if let Some(passthrough) = device.passthrough() {
                            passthrough.kick(queue);
                        }
                        Ok(None)
                    });
                }
                return;
            }
            _ => {}
        }
        let mut linger = std::mem::take(&mut self.linger);
        self.with_device(slot, now, |device, io| {
            let Some(Some(active)) = io.queues.get_mut(queue) else {
                return Ok(None);
            };
            active
                .ring()
                .disable_notifications(io.space)
                .map_err(|source| queue_error(queue, source))?;
            let progress = device.process(queue, BUDGET, io)?;
            let again = match progress {
                Progress::More => true,
                Progress::Blocked => false,
                Progress::Idle => match io.queues.get_mut(queue) {
                    // What is under way elsewhere may need this processor.
                    Some(Some(active))
                        if active.recovered() == 0
                            && !device.is_touching_memory()
                            && linger.take(slot, queue) =>
                    {
                        false
                    }
                    Some(Some(active)) => {
                        active
                            .ring()
                            .enable_notifications(io.space)
                            .map_err(|source| queue_error(queue, source))?
                            || active.recovered() > 0
                    }
                    _ => false,
                },
            };
            Ok(again.then_some(queue))
        });
        self.linger = linger;
    }

    /// Calls a device, unless it is out of order, and keeps whatever it does wrong away from the others.
    pub(super) fn with_device(
        &mut self,
        slot: Slot,
        now: Instant,
        work: impl FnOnce(&mut dyn Device, &mut Io<'_>) -> Result<Option<usize>, DeviceError>,
    ) {
        if let Some(Some(entry)) = self.entries.get(slot.0 as usize)
            && !entry.broken
        {
            self.call(slot, now, work);
        }
    }

    /// As [`Self::with_device`], also of a device that is out of order, which then stays so without a word.
    pub(super) fn call(
        &mut self,
        slot: Slot,
        now: Instant,
        work: impl FnOnce(&mut dyn Device, &mut Io<'_>) -> Result<Option<usize>, DeviceError>,
    ) {
        let Some((before, [place, after @ ..])) =
            self.entries.split_at_mut_checked(slot.0 as usize)
        else {
            return;
        };
        let Some(entry) = place.as_mut() else {
            return;
        };
        let mut others = Others {
            before,
            after,
            storage: &mut self.storage_of_others,
            notices: &mut self.notices_of_others,
            again: &mut self.again_of_others,
            replies: &mut self.replies,
            ready: &mut self.ready,
            timers: &mut self.timers,
            rewatch: &mut self.rewatch,
            now,
        };
        let mut memory = entry.memory.lock();
        let mut io = Io {
            queues: &mut entry.active,
            space: memory.table.space(),
            table: &memory.table,
            storage: &mut self.storage,
            now,
            others: &mut others,
            wanted: None,
            notices: &mut self.notices,
            again: &mut self.again,
        };
        let device = entry.device.as_mut();
        // A panic leaves a device that nothing but `reset` is called on again, and a batch
        // that is cleared before its next use: no broken state is ever looked at.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let result = work(device, &mut io);
            (result, device.is_touching_memory())
        }));
        memory.touched = result.as_ref().map_or(true, |(_, touching)| *touching);
        let fault = match result {
            Ok((Ok(again), _)) => {
                self.again.extend(again);
                Fault::of_memory(&entry.active, &memory.table, &mut entry.next_mapping)
            }
            Ok((Err(error), _)) => Some(Fault::of_device(&error)),
            Err(panic) => Some(Fault::of_panic(&*panic)),
        };
        drop(memory);
        let broken = entry.broken;
        if let Some(fault) = fault.filter(|_| !broken) {
            self.break_device(slot, fault);
        }
        for queue in self.again.drain(..) {
            if let Ok(queue) = u16::try_from(queue) {
                self.ready.push(slot.0, queue);
            }
        }
        self.set_timer(slot);
        self.replies.extend(
            self.notices
                .drain(..)
                .map(|notice| Reply::Notice(slot, notice)),
        );
    }
}

pub(super) fn queue_error(queue: usize, source: vmsg_queue::QueueError) -> DeviceError {
    DeviceError::Queue { queue, source }
}

#[cfg(test)]
#[path = "core_test.rs"]
mod tests;
