// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end whose guest's memory stays here: the device host has the segment, and what is needed is copied.
//!
//! The guest's rings are served by [`Shadow`], which knows its memory as the memory table describes it. The session is told of the queues in the
//! segment, and of nothing else: no window, no descriptor of the front end's ever gets to it.

use super::guest::{Guest, GuestError, op};
use super::memory::GuestMemory;
use super::news::ring_bell;
use crate::memory::{FileError, TableMemory};
use crate::session::{InflightMemory, Op, QueueSetup, ResumeAt};
use crate::shadow::{self, Event, Interrupt, Shadow};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::{FeatureSet, QueueIndex};

/// What there is of copies.
#[derive(Debug)]
pub(super) struct Copies {
    /// Where the segment comes from.
    source: shadow::Source,
    name: String,
    /// What the memory table describes.
    memory: Arc<TableMemory>,
    /// Made when it is first needed: many a front end only asks for something.
    shadow: Option<Shadow>,
    /// The session was told of the segment.
    lent: bool,
    /// Where the front end keeps what its guest has in flight. It is noted here: the device host has other requests, with other numbers.
    pub(super) inflight: Option<InflightMemory>,
}

impl Copies {
    pub(super) fn new(name: &str, source: shadow::Source) -> Copies {
        Copies {
            source,
            name: name.to_owned(),
            memory: Arc::default(),
            shadow: None,
            lent: false,
            inflight: None,
        }
    }

    /// Readable when [`Guest::take_copies_news`] has something to do.
    pub(super) fn news_fd(&self) -> Option<BorrowedFd<'_>> {
        self.shadow.as_ref().map(Shadow::event_fd)
    }

    /// Once the device was reset. Nothing of the guest's is touched after that, and the segment is empty.
    pub(super) fn reset(&self) {
        if let Some(shadow) = &self.shadow {
            shadow.reset();
        }
    }

    /// Once the device lets go of the segment.
    pub(super) fn end(&mut self) {
        self.shadow = None;
        self.lent = false;
    }

    /// What to set at the device for what the driver has accepted.
    pub(super) fn towards_device(&self, features: FeatureSet) -> FeatureSet {
        match &self.shadow {
            Some(shadow) => shadow.set_features(features),
            None => features,
        }
    }

    fn of_queue(&self) -> Result<&Shadow, GuestError> {
        let none = GuestError::Invalid("a ring without memory for copies");
        self.shadow.as_ref().ok_or(none)
    }
}

fn interrupt(call: Option<&Arc<OwnedFd>>) -> Interrupt {
    call.map_or(Interrupt::Nobody, |fd| Interrupt::Eventfd(fd.clone()))
}

impl Guest {
    /// Makes the segment known to the device host, if that was not done yet. The front end holds the device.
    pub(super) fn prepare_copies(&mut self) -> Result<(), GuestError> {
        let Some(copies) = &mut self.copies else {
            return Ok(());
        };
        if !self.live && copies.shadow.as_ref().is_some_and(Shadow::is_lost) {
            copies.end();
        }
        let shadow = match &copies.shadow {
            Some(shadow) => shadow,
            None => {
                let options = shadow::Options {
                    name: copies.name.clone(),
                    segment: copies.source.segment()?,
                };
                let new = Shadow::new(copies.memory.clone(), &self.facts, options)?;
                copies.shadow.insert(new)
            }
        };
        if !copies.lent {
            self.session
                .call(Op::SetWindows(vec![shadow.window()]))
                .map_err(op("lending the memory for copies"))?;
            self.session
                .call(Op::SetRenewal(Some(shadow.renewal())))
                .map_err(op("saying how copies go on"))?;
            copies.lent = true;
        }
        Ok(())
    }

    /// This is the guest's memory from now on: what is not in it any more is neither mapped nor used when this returns.
    pub(super) fn lend(&mut self, memory: &GuestMemory) -> Result<(), GuestError> {
        if self.copies.is_none() {
            return self
                .session
                .call(Op::SetWindows(memory.windows()))
                .map(drop)
                .map_err(op("lending the memory"));
        }
        self.prepare_copies()?;
        let table = memory.table()?;
        if let Some(copies) = &self.copies {
            copies.memory.replace(table);
        }
        Ok(())
    }

    /// Sets a ring up. `used` is what stands in its device area as the used index.
    pub(super) fn start_ring(
        &mut self,
        index: u32,
        setup: QueueSetup,
        used: Option<u16>,
    ) -> Result<(), GuestError> {
        let queue = QueueIndex(index);
        let Some(copies) = &self.copies else {
            self.notify(index)?;
            return self
                .session
                .call(Op::SetQueue(queue, setup))
                .map(drop)
                .map_err(op("setting a ring up"));
        };
        let shadow = copies.of_queue()?;
        let resume = match setup.resume {
            // What was not given back is copied again: who had it has lost it.
            ResumeAt::UsedIndex => {
                let used = used.ok_or(GuestError::OutOfMemoryTable(index))?;
                ResumeAt::Explicit { avail: used, used }
            }
            other => other,
        };
        let record = copies.inflight.as_ref();
        let record = record.and_then(|kept| kept.map(index, setup.size));
        let record = record.transpose().map_err(|error| {
            GuestError::Memory(super::MemoryError::File(FileError::Look(error)))
        })?;
        let setup = QueueSetup { resume, ..setup };
        let started = shadow.start_queue_recorded(queue, setup, record)?;
        let ring = &self.rings[queue.to_usize()];
        shadow.set_interrupt(queue, interrupt(ring.call.as_ref()));
        shadow.set_kick(queue, ring.kick.clone());
        let notify = Op::SetNotify {
            queue,
            kick: Some(started.kick),
            call: Some(started.call),
        };
        let told = self
            .session
            .call(notify)
            .map_err(op("passing kick and call on"))
            .and_then(|_| {
                self.session
                    .call(Op::SetQueue(queue, started.setup))
                    .map_err(op("setting a ring up"))
            });
        if told.is_err() {
            shadow.stop_queue(queue);
        }
        told.map(drop)
    }

    /// The device works, and the guest's driver is there.
    pub(super) fn run_copies(&self) {
        if let Some(shadow) = self
            .copies
            .as_ref()
            .and_then(|copies| copies.shadow.as_ref())
        {
            shadow.run();
        }
    }

    /// The front end has changed an eventfd of a ring that runs.
    pub(super) fn renotify(&mut self, index: u32) -> Result<(), GuestError> {
        let Some(copies) = &self.copies else {
            return self.notify(index);
        };
        let queue = QueueIndex(index);
        let shadow = copies.of_queue()?;
        let ring = &self.rings[queue.to_usize()];
        shadow.set_interrupt(queue, interrupt(ring.call.as_ref()));
        shadow.set_kick(queue, ring.kick.clone());
        Ok(())
    }

    /// After the device was made to stop a ring, or not: nothing is copied for it any more.
    pub(super) fn stop_copies(&self, index: u32) {
        if let Some(shadow) = self
            .copies
            .as_ref()
            .and_then(|copies| copies.shadow.as_ref())
        {
            shadow.stop_queue(QueueIndex(index));
        }
    }

    /// News of the copies, passed on to the front end.
    pub(super) fn take_copies_news(&self) {
        let Some(shadow) = self
            .copies
            .as_ref()
            .and_then(|copies| copies.shadow.as_ref())
        else {
            return;
        };
        shadow.clear();
        // Each queue is told of once until it is taken.
        for event in std::iter::from_fn(|| shadow.poll_event()).take(self.rings.len() + 1) {
            if let Event::NeedsReset(why) = event {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(unsaid, "the device needs a reset: {why}");
                }
                for fd in self.rings.iter().filter_map(|ring| ring.err.as_ref()) {
                    ring_bell(fd);
                }
            }
        }
    }
}
