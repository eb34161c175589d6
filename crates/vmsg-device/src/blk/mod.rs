// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block device (VIRTIO 1.3, 5.2).
//!
//! It hands the requests of its queues to a [`Disk`], which does them in any order, and answers them in batches. Requests that are
//! under way when the process ends are in the record of what is in flight ([`ActiveQueue`](crate::device::ActiveQueue)), and the next
//! process begins them again.

pub mod bits;
mod config;
mod counters;
mod end;
mod flights;
mod places;
mod report;
mod request;
mod work;

use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use virtio_msg::FeatureSet;
use vmsg_block::{Completion, Disk, Facts, NullDisk};

use self::counters::Counters;
use self::flights::Flights;
use self::report::Report;
use self::request::Limits;
use crate::device::{
    Device, DeviceError, Identity, Io, Monitor, Operation, Progress, QUEUE_SIZE, ReadOnly,
    Upcoming, VENDOR_ID, transport_features,
};

pub use self::bits::SERIAL_BYTES;
pub use self::end::End;

/// Device id of a block device.
pub const DEVICE_ID: u32 = 2;

/// Queues that a device may have.
pub const MAX_QUEUES: u16 = 256;

/// How long requests that were given up are waited for, if they leave the driver's memory alone.
const CANCEL_PATIENCE: Duration = Duration::from_secs(2);

/// How often the counters of the disk are looked at while it works.
const LOOK: Duration = Duration::from_millis(200);

/// How a block device looks to its driver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its name, for the log.
    pub name: String,
    /// Its serial number: [`SERIAL_BYTES`] bytes of it at most are told.
    pub serial: String,
    /// Queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Whether writes are cached as long as the driver does not choose.
    pub write_back: bool,
    /// Offer discard, and that zeroes written may give space up, if the disk can.
    pub discard: bool,
}

impl Settings {
    /// A device with one queue and all that it can do.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            serial: name.to_owned(),
            queues: 1,
            write_back: true,
            discard: true,
        }
    }
}

/// What the driver has agreed to.
#[derive(Clone, Copy, Debug, Default)]
struct Agreed {
    discard: bool,
    write_zeroes: bool,
    config_wce: bool,
}

/// A block device and its disk.
pub struct Blk {
    settings: Settings,
    disk: Box<dyn Disk>,
    /// Goes behind the disk.
    alive: Option<Sender<Infallible>>,
    /// What the disk was like when the device was made: what is offered stays the same.
    offered: Facts,
    facts: Facts,
    /// Nothing before the driver is ready.
    agreed: Option<Agreed>,
    /// Writes are cached.
    write_back: bool,
    /// The driver has the byte otherwise.
    tell_write_back: bool,
    flights: Flights,
    /// Which of the windows the last status was in.
    near: usize,
    /// Requests whose next part the disk had no room for.
    stalled: Vec<u32>,
    /// Queues with chains that the disk had no room for.
    blocked: Vec<bool>,
    /// Queues with completed chains that the driver has not been told of.
    dirty: Vec<bool>,
    /// The disk has no room although it has nothing to do: when it is asked again.
    retry: Option<Instant>,
    /// The disk was told to give up; until when all of it is waited for.
    canceling: Option<Instant>,
    /// When the counters of the disk are looked at next.
    look: Option<Instant>,
    /// Room for what is completed.
    done: Vec<Completion>,
    counters: Arc<Counters>,
    report: Report,
}

impl std::fmt::Debug for Blk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blk")
            .field("name", &self.settings.name)
            .field("disk", &self.disk)
            .field("facts", &self.facts)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Blk {
    /// A device whose blocks are on `disk`.
    pub fn new(settings: &Settings, mut disk: Box<dyn Disk>) -> Self {
        let mut settings = settings.clone();
        settings.queues = settings.queues.clamp(1, MAX_QUEUES);
        let queues = usize::from(settings.queues);
        let facts = disk.facts();
        disk.set_write_back(settings.write_back);
        let counters = Arc::new(Counters::default());
        counters.size.set(facts.size);
        counters.set_disk(disk.counters());
        counters.set_details(disk.details());
        Self {
            alive: None,
            write_back: settings.write_back,
            tell_write_back: false,
            report: Report::new(&settings.name),
            flights: Flights::new(queues),
            near: 0,
            stalled: Vec::new(),
            blocked: vec![false; queues],
            dirty: vec![false; queues],
            retry: None,
            canceling: None,
            look: None,
            done: Vec::new(),
            agreed: None,
            offered: facts,
            facts,
            counters,
            settings,
            disk,
        }
    }

    /// For whoever waits for the end of the disk, after the device was removed. The latest caller hears of it.
    pub fn end(&mut self) -> End {
        let (alive, end) = End::new();
        self.alive = Some(alive);
        end
    }

    fn offers_discard(&self) -> bool {
        self.settings.discard && self.offered.discard && !self.offered.read_only
    }

    fn offers_write_zeroes(&self) -> bool {
        self.offered.write_zeroes && !self.offered.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            facts: self.facts,
            discard: self.agreed.is_some_and(|agreed| agreed.discard),
            write_zeroes: self.agreed.is_some_and(|agreed| agreed.write_zeroes),
            may_unmap: self.offers_discard(),
        }
    }

    fn config_bytes(&self) -> [u8; config::SIZE] {
        config::bytes(
            &self.facts,
            config::Rest {
                queues: self.settings.queues,
                write_back: self.write_back,
                discard: self.offers_discard(),
                write_zeroes: self.offers_write_zeroes(),
            },
        )
    }

    fn set_write_back(&mut self, on: bool) {
        self.write_back = on;
        self.disk.set_write_back(on);
    }

    /// Does what the disk has to do beside requests, and tells the driver if it was resized.
    fn look_at_disk(&mut self, io: &mut Io<'_>) {
        if !self.disk.poll(io.now) {
            return;
        }
        let facts = self.disk.facts();
        if facts == self.facts {
            return;
        }
        let before = self.config_bytes();
        let size = std::mem::replace(&mut self.facts, facts).size;
        let now = self.config_bytes();
        if size != facts.size {
            self.counters.size.set(facts.size);
            self.counters.resized.add(1);
            self.report.resized(size, facts.size, io.now);
        }
        if before[8..] != now[8..] {
            io.config_changed(0, &now);
        } else if before != now {
            io.config_changed(0, &now[..8]);
        }
    }
}

impl Device for Blk {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        // Flushes are offered even where writes are never cached: the driver may have them cached (5.2.5.2).
        let mut features = transport_features().union(&FeatureSet::from_bits(&[
            bits::SIZE_MAX,
            bits::SEG_MAX,
            bits::BLK_SIZE,
            bits::TOPOLOGY,
            bits::FLUSH,
            bits::CONFIG_WCE,
        ]));
        for (offered, bit) in [
            (self.offered.read_only, bits::RO),
            (self.settings.queues > 1, bits::MQ),
            (self.offers_discard(), bits::DISCARD),
            (self.offers_write_zeroes(), bits::WRITE_ZEROES),
        ] {
            if offered {
                features.insert(bit);
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.settings.queues)]
    }

    fn in_order(&self, _queue: usize) -> bool {
        false
    }

    fn config(&self) -> Vec<u8> {
        self.config_bytes().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> Result<(), ReadOnly> {
        let config = self.config_bytes();
        let end = offset.checked_add(data.len()).ok_or(ReadOnly)?;
        let old = config.get(offset..end).ok_or(ReadOnly)?;
        let mut write_back = self.write_back;
        // Somebody who goes on for a driver says how its writes are cached before the first of them is done.
        let may = self.agreed.is_none_or(|agreed| agreed.config_wce);
        for (at, (old, new)) in (offset..end).zip(old.iter().zip(data)) {
            match (at, new) {
                (config::WRITEBACK, 0) if may => write_back = false,
                (config::WRITEBACK, 1) if may => write_back = true,
                _ if old == new => {}
                _ => return Err(ReadOnly),
            }
        }
        if write_back != self.write_back {
            self.set_write_back(write_back);
        }
        Ok(())
    }

    fn activate(&mut self, features: &FeatureSet) {
        let agreed = Agreed {
            discard: features.contains(bits::DISCARD),
            write_zeroes: features.contains(bits::WRITE_ZEROES),
            config_wce: features.contains(bits::CONFIG_WCE),
        };
        self.agreed = Some(agreed);
        // A driver that knows no flushes must not need them (5.2.5.2, 5.2.6.2).
        let write_back = match (agreed.config_wce, features.contains(bits::FLUSH)) {
            (_, false) => false,
            (true, true) => self.write_back,
            (false, true) => self.settings.write_back,
        };
        if write_back != self.write_back {
            self.set_write_back(write_back);
            self.tell_write_back = true;
        }
    }

    fn reset(&mut self) {
        let Self {
            settings,
            disk,
            alive: _,
            offered: _,
            facts: _,
            agreed,
            write_back,
            tell_write_back,
            flights,
            near: _,
            stalled,
            blocked,
            dirty,
            retry,
            canceling,
            look: _,
            done: _,
            counters,
            report: _,
        } = self;
        *agreed = None;
        *write_back = settings.write_back;
        disk.set_write_back(settings.write_back);
        *tell_write_back = false;
        flights.abandon_all();
        flights.forget(stalled);
        blocked.fill(false);
        dirty.fill(false);
        *retry = None;
        *canceling = None;
        counters.in_flight.set(0);
    }

    fn queues_changed(&mut self, io: &mut Io<'_>, _resumed: bool) {
        if std::mem::take(&mut self.tell_write_back) {
            io.config_changed(config::WRITEBACK, &[u8::from(self.write_back)]);
        }
        for (queue, active) in io.queues.iter().enumerate() {
            if active.is_none() {
                // `prepare` has waited for them.
                self.flights.abandon(queue);
                self.blocked[queue] = false;
                self.dirty[queue] = false;
            }
        }
    }

    fn operate(&mut self, operation: Operation, io: &mut Io<'_>) -> Result<(), String> {
        match operation {
            Operation::Rescan => {
                self.disk.look_soon(io.now);
                self.look_at_disk(io);
                Ok(())
            }
            Operation::SetLink(_) => Err("the device has no link".to_owned()),
            Operation::Announce => Err("the device has no addresses".to_owned()),
        }
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        Some(Arc::<Counters>::clone(&self.counters))
    }

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let progress = self.take_requests(queue, budget, io)?;
        // What was in memory is done then.
        self.disk.commit();
        self.reap(io)?;
        Ok(progress)
    }

    fn prepare(&mut self, upcoming: Upcoming<'_>, io: &mut Io<'_>) -> bool {
        match upcoming {
            Upcoming::Reset => {
                // Nothing is told of them: a driver that goes on with another process has them in its record.
                self.flights.abandon_all();
                self.flights.forget(&mut self.stalled);
                let until = *self.canceling.get_or_insert_with(|| {
                    self.disk.cancel();
                    io.now + CANCEL_PATIENCE
                });
                let _ = self.reap(io);
                let ready = self.disk.in_flight() == 0
                    || (self.disk.touching_memory() == 0 && io.now >= until);
                self.canceling = match (ready, io.now < until) {
                    (true, _) => None,
                    (false, true) => Some(until),
                    // Asked again from time to time, not all the time.
                    (false, false) => Some(io.now + LOOK),
                };
                ready
            }
            Upcoming::QueueReset(queue) => {
                // Of a queue that is broken nothing can be told.
                let _ = self.reap(io);
                self.flights.of_queue(queue) == 0
            }
            Upcoming::Memory(table) => {
                let _ = self.reap(io);
                let gone = places::gone(io.table, table);
                !self.flights.has_memory_in(&gone)
            }
        }
    }

    fn removed(&mut self) {
        if self.disk.ends_at_once() {
            return;
        }
        let none = NullDisk { size: 0 };
        let disk = std::mem::replace(&mut self.disk, Box::new(none));
        let alive = self.alive.take();
        // Without a thread it ends here.
        let _ = std::thread::Builder::new()
            .name("vmsg-disk-end".to_owned())
            .spawn(move || {
                drop(disk);
                drop(alive);
            });
    }

    fn is_touching_memory(&self) -> bool {
        self.flights.waiting() > 0 || self.disk.touching_memory() > 0
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.disk.event_fd()
    }

    fn next_timeout(&self) -> Option<Instant> {
        let own = [self.retry, self.canceling, self.look];
        let times = own.into_iter().chain([self.disk.next_timeout()]);
        times.flatten().min()
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.look_at_disk(io);
        if self.look.is_some_and(|look| look <= io.now) {
            self.look = None;
            self.counters.set_disk(self.disk.counters());
        }
        let result = self.reap(io);
        self.disk.commit();
        result
    }
}

#[cfg(test)]
mod tests;
