// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue of the guest and its copy in the segment.

mod renew;

use super::division::Place;
use super::pool::Pool;
use super::record::Recorder;
use super::shared::NewQueue;
use super::types::{Broken, Counters};
use crate::memory::{GuestMemory, MemoryError};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vmsg_mem::{BusAddr, Doorbell, RamSlice};
use vmsg_queue::remote::{RemoteChain, RemoteError, RemoteQueue, RemoteStorage};
use vmsg_queue::{
    Buffer, ChainHead, DriverQueue, DriverSlot, Layout, QueueConfig, QueueError, QueueFeatures,
    Used,
};

/// Requests of one queue before others have their turn.
const BATCH: usize = 64;
/// Bytes of one queue before others have their turn.
const BATCH_BYTES: u64 = 1 << 20;
/// A list that grew longer than this for one request does not stay so long.
const USUAL_PARTS: usize = 64;

/// What all queues use.
pub(super) struct Common<'m> {
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) pool: Pool<'m>,
    /// Buffers of the request at hand.
    pub(super) parts: Vec<Buffer>,
    pub(super) counters: Counters,
    /// Buffers were given back: those who wait may look again.
    pub(super) freed: bool,
}

/// Why a queue stopped in the middle of its turn.
#[derive(Debug)]
pub(super) enum Halt {
    /// An access to the guest's memory was cancelled: the turn is to be done again.
    Cancelled,
    /// The device needs a reset.
    Broken(Broken),
}

/// What a turn came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turn {
    /// There is more to do.
    pub(super) more: bool,
    /// The guest's driver wants to know.
    pub(super) interrupt: bool,
}

/// A request that the device has.
#[derive(Debug, Default)]
struct Flight {
    /// As the guest names it; `None`: there is no request.
    head: Option<ChainHead>,
    /// Its buffers in the segment, those that the device reads first.
    parts: Vec<Buffer>,
    /// How many of them the device reads.
    readable: usize,
    /// The guest's buffers that the device's go to.
    targets: Vec<Buffer>,
    /// Counts the requests of the queue.
    order: u64,
}

impl Flight {
    /// Forgets the request. Lists of an unusual length do not stay.
    fn clear(&mut self) {
        self.head = None;
        for list in [&mut self.parts, &mut self.targets] {
            if list.capacity() > USUAL_PARTS {
                *list = Vec::new();
            }
            list.clear();
        }
    }
}

/// How a queue in the segment is made.
#[derive(Clone, Copy)]
struct Make {
    layout: Layout,
    features: QueueFeatures,
    /// Bus address of the rings.
    at: BusAddr,
}

impl Make {
    fn queue<'m>(
        &self,
        rings: RamSlice<'m>,
    ) -> Result<DriverQueue<'m, Vec<DriverSlot>>, QueueError> {
        let slots = vec![DriverSlot::default(); self.layout.size().into()];
        DriverQueue::new(self.layout, self.features, rings, self.at, slots)
    }
}

/// A queue that runs.
pub(super) struct Lane<'m> {
    queue: usize,
    guest: RemoteQueue,
    recorder: Option<Recorder>,
    device: DriverQueue<'m, Vec<DriverSlot>>,
    /// As the device's queue was made.
    make: Make,
    rings: RamSlice<'m>,
    /// By the index of the device queue's token.
    flights: Vec<Flight>,
    /// Came back from the device, and did not reach the guest yet.
    returning: Option<Used>,
    /// The same, from a device that is gone: with how many bytes it wrote. These come first.
    done: VecDeque<(Flight, u32)>,
    /// Requests so far.
    count: u64,
    /// The guest's buffers that are remembered in `flights`.
    targets: usize,
    most_targets: usize,
    /// The most buffers of a request in the segment.
    most_parts: usize,
    /// As long as the indirect tables are.
    table: usize,
    /// The next request of the guest finds no room.
    waits: bool,
    /// The guest's driver was asked to kick, and did not.
    guest_armed: bool,
    /// The device was asked to call, and did not.
    device_armed: bool,
    kick: Doorbell,
    pub(super) call: Arc<OwnedFd>,
}

/// Where the rings of a queue of `size` entries are.
pub(super) fn config(place: &Place, base: u64, size: u16, table: u16) -> Option<QueueConfig> {
    let layout = Layout::new(size, table).ok()?;
    let begin = base + place.rings.start as u64;
    Some(QueueConfig {
        size,
        desc: BusAddr(begin),
        driver: BusAddr(begin + layout.driver_offset() as u64),
        device: BusAddr(begin + layout.device_offset() as u64),
    })
}

impl<'m> Lane<'m> {
    /// `ram` is the segment, at `base` on the bus.
    pub(super) fn new(
        new: NewQueue,
        place: &Place,
        table: u16,
        ram: RamSlice<'m>,
        base: u64,
        longest_chain: usize,
    ) -> Result<Lane<'m>, QueueError> {
        let size = new.config.size;
        let (guest, recorder) = match new.record {
            Some(record) => {
                let resumed = Recorder::resume(record, new.config, new.guest, new.at)?;
                (resumed.0, Some(resumed.1))
            }
            None => {
                let guest = RemoteQueue::resume(new.config, new.guest, new.at, new.at)?;
                (guest, None)
            }
        };
        let layout = Layout::new(size, table)?;
        let features = QueueFeatures {
            indirect: new.device.indirect && table > 0,
            ..new.device
        };
        let rings = ram
            .get(place.rings.start, place.rings.len())
            .ok_or(QueueError::BadMemory { size })?;
        let at = BusAddr(base + place.rings.start as u64);
        let make = Make {
            layout,
            features,
            at,
        };
        let device = make.queue(rings)?;
        let table = if features.indirect { table.into() } else { 0 };
        Ok(Lane {
            queue: new.index,
            guest,
            recorder,
            device,
            make,
            rings,
            flights: (0..size).map(|_| Flight::default()).collect(),
            returning: None,
            done: VecDeque::new(),
            count: 0,
            targets: 0,
            most_targets: 4 * usize::from(size) + longest_chain,
            most_parts: table.max(size.into()),
            table,
            waits: false,
            guest_armed: false,
            device_armed: false,
            kick: new.kick,
            call: new.call,
        })
    }

    fn number(&self) -> u32 {
        u32::try_from(self.queue).unwrap_or(u32::MAX)
    }

    /// The guest has kicked: it will not do so again until it is asked to.
    pub(super) fn kicked(&mut self) {
        self.guest_armed = false;
    }

    /// The device has called.
    pub(super) fn called(&mut self) {
        self.device_armed = false;
    }

    /// Whether the next request waits for room.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// Brings back what the device has done, then gives it what the guest has. What is cancelled goes on with the next turn.
    /// `storage` is where the guest's chains are collected.
    pub(super) fn turn(
        &mut self,
        common: &mut Common<'_>,
        storage: &mut RemoteStorage,
    ) -> Result<Turn, Halt> {
        let (more_back, interrupt) = self.back(common)?;
        let forth = self.forth(common, storage);
        // Whatever else: the device is to see what it was given.
        let wants_kick = self.device.publish().map_err(|e| self.device_fault(&e))?;
        if wants_kick {
            common.counters.kicks += 1;
            // A device that makes its eventfd unusable goes without; full means that it has been rung.
            let _ = self.kick.ring();
        }
        match forth {
            Ok(more) => Ok(Turn {
                more: more || more_back,
                interrupt,
            }),
            // The guest is not told of its interrupt twice.
            Err(Halt::Cancelled) => Ok(Turn {
                more: true,
                interrupt,
            }),
            Err(broken) => Err(broken),
        }
    }

    /// Requests that came back: true if there are more; true if the guest's driver wants to know of these.
    fn back(&mut self, common: &mut Common<'_>) -> Result<(bool, bool), Halt> {
        if self.device_armed {
            self.device_armed = false;
            self.device
                .disable_notifications()
                .map_err(|e| self.device_fault(&e))?;
        }
        let (mut count, mut bytes) = (0, 0);
        let more = loop {
            if count == BATCH || bytes >= BATCH_BYTES {
                break true;
            }
            let arrived = if self.done.is_empty() {
                let Some(used) = self.next_used()? else {
                    break false;
                };
                self.arrive(common, used).map(|()| used.written)
            } else {
                self.arrive_late(common)
            };
            match arrived {
                Ok(written) => bytes += u64::from(written),
                Err(Halt::Cancelled) => break true,
                Err(halt) => return Err(halt),
            }
            count += 1;
        };
        let memory = &*common.memory;
        let published = self.guest.publish(memory);
        let interrupt = match published {
            Ok(wanted) => wanted,
            Err(error) => return Err(self.guest_fault(error)),
        };
        let used = self.guest.used_index();
        self.note(|recorder| recorder.published(used))?;
        Ok((more, interrupt))
    }

    fn next_used(&mut self) -> Result<Option<Used>, Halt> {
        if self.returning.is_none() {
            self.returning = self.device.pop_used().map_err(|e| self.device_fault(&e))?;
        }
        Ok(self.returning)
    }

    /// Brings a request back to the guest.
    fn arrive(&mut self, common: &mut Common<'_>, used: Used) -> Result<(), Halt> {
        let at = used.token.index();
        let mut flight = std::mem::take(&mut self.flights[at]);
        let landed = self.land(common, &mut flight, used.written);
        // With its lists, for the next one.
        self.flights[at] = flight;
        landed?;
        self.returning = None;
        Ok(())
    }

    /// Copies what the device wrote to the guest, and wipes it.
    fn land(
        &mut self,
        common: &mut Common<'_>,
        flight: &mut Flight,
        used: u32,
    ) -> Result<(), Halt> {
        let written = &flight.parts[flight.readable..];
        let copied = copy(
            u64::from(used),
            flight.targets.iter().copied(),
            written.iter().copied(),
            |target, (addr, len)| {
                let from = common.pool.memory(addr, len);
                common.memory.write_from(target, from)
            },
        );
        if let Err(error) = copied {
            return Err(self.guest_fault(RemoteError::Memory(error)));
        }
        let head = flight.head.expect("the queue knows the token");
        let readable = flight.readable;
        common
            .pool
            .wipe_done(self.queue, &mut flight.parts, readable, used);
        self.targets -= flight.targets.len();
        flight.clear();
        self.note(|recorder| recorder.completed(head.id()))?;
        self.guest.complete(head, used);
        common.counters.completed += 1;
        common.counters.bytes_in += u64::from(used);
        common.freed = true;
        Ok(())
    }

    /// Gives the device what the guest has: true if there is more.
    fn forth(
        &mut self,
        common: &mut Common<'_>,
        storage: &mut RemoteStorage,
    ) -> Result<bool, Halt> {
        if self.guest_armed {
            self.guest_armed = false;
            let quiet = self.guest.disable_notifications(&*common.memory);
            quiet.map_err(|error| self.guest_fault(error))?;
        }
        self.waits = false;
        let memory = common.memory.clone();
        let mut old = 0;
        let popped = match &self.recorder {
            Some(recorder) if !recorder.again.is_empty() => {
                old = recorder.again.len();
                self.guest
                    .pop_again(&*memory, storage, &recorder.again, BATCH)
            }
            _ => self.guest.pop(&*memory, storage, BATCH),
        };
        let batch = match popped {
            Ok(batch) => batch,
            Err(error) => return Err(self.guest_fault(error)),
        };
        let mut bytes = 0;
        for (done, chain) in batch.iter().enumerate() {
            // Those of before are still noted, and are looked up again.
            let left = if old > 0 { 0 } else { batch.len() - done };
            if bytes >= BATCH_BYTES {
                self.guest.rewind(left);
                return Ok(true);
            }
            match self.forward(common, &chain) {
                Ok(Some(n)) => {
                    bytes += n;
                    self.note(|recorder| {
                        if old > 0 {
                            recorder.again.pop();
                            return Ok(());
                        }
                        recorder.taken(chain.head().id())
                    })?;
                }
                Ok(None) => {
                    self.guest.rewind(left);
                    self.waits = true;
                    common.counters.waits += 1;
                    return Ok(false);
                }
                Err(halt) => {
                    self.guest.rewind(left);
                    return Err(halt);
                }
            }
        }
        Ok(batch.len() == BATCH || old > 0)
    }

    /// Notes something of the guest's requests, where that is done.
    fn note(
        &mut self,
        what: impl FnOnce(&mut Recorder) -> Result<(), QueueError>,
    ) -> Result<(), Halt> {
        match self.recorder.as_mut().map(what) {
            Some(Err(error)) => Err(Halt::Broken(Broken::driver(self.number(), &error))),
            _ => Ok(()),
        }
    }

    /// Copies a request into the segment and gives it to the device: how many bytes it has, `None` if there is no room.
    fn forward(
        &mut self,
        common: &mut Common<'_>,
        chain: &RemoteChain<'_>,
    ) -> Result<Option<u64>, Halt> {
        let [readable, writable] = [chain.readable(), chain.writable()].map(length);
        let bytes = readable + writable;
        let too_large = |common: &Common<'_>| {
            Halt::Broken(Broken::TooLarge {
                queue: u32::try_from(self.queue).unwrap_or(u32::MAX),
                bytes,
                most: common.pool.most(self.queue),
            })
        };
        let pool = &mut common.pool;
        if !pool.can_ever_hold(self.queue, readable, writable) {
            return Err(too_large(common));
        }
        let fewest = usize::from(readable > 0) + usize::from(writable > 0);
        if fewest > self.most_parts {
            let (queue, size) = (self.number(), self.guest.config().size);
            return Err(Halt::Broken(Broken::TooShort { queue, size }));
        }
        if self.targets + chain.writable().len() > self.most_targets {
            return Ok(None);
        }
        let parts = &mut common.parts;
        parts.clear();
        let most = self.most_parts;
        let taken = pool.take(self.queue, readable, parts, most);
        let split = parts.len();
        if !taken || !pool.take(self.queue, writable, parts, most) {
            pool.release_all(self.queue, parts);
            if pool.is_unused_for(self.queue) {
                // In a queue as short as this it never fits.
                return Err(too_large(common));
            }
            pool.wait(self.queue);
            return Ok(None);
        }
        let descriptors = if (2..=self.table).contains(&parts.len()) {
            1
        } else {
            parts.len()
        };
        if descriptors > usize::from(self.device.free_descriptors()) {
            pool.release_all(self.queue, parts);
            if descriptors > self.flights.len() {
                return Err(too_large(common));
            }
            return Ok(None);
        }
        let copied = copy(
            readable,
            chain.readable().iter().copied(),
            parts[..split].iter().copied(),
            |source, (addr, len)| common.memory.read_into(source, pool.memory(addr, len)),
        );
        let added = match copied {
            Ok(()) => self.device.add(&parts[..split], &parts[split..]),
            Err(error) => {
                pool.wipe_all(self.queue, parts);
                return Err(self.guest_fault(RemoteError::Memory(error)));
            }
        };
        let token = match added {
            Ok(token) => token,
            Err(error) => {
                pool.wipe_all(self.queue, parts);
                return Err(self.device_fault(&error));
            }
        };
        pool.served(self.queue);
        let flight = &mut self.flights[token.index()];
        flight.head = Some(chain.head());
        flight.order = self.count;
        self.count += 1;
        flight.parts.extend_from_slice(parts);
        flight.readable = split;
        flight.targets.extend_from_slice(chain.writable());
        self.targets += flight.targets.len();
        common.counters.requests += 1;
        common.counters.bytes_out += readable;
        Ok(Some(bytes))
    }

    /// Asks both sides to tell when there is something. True if there is already.
    pub(super) fn arm(&mut self, common: &Common<'_>) -> Result<bool, Halt> {
        if !self.device_armed {
            let more = self.device.enable_notifications();
            if more.map_err(|e| self.device_fault(&e))? {
                self.device_armed = true;
                return Ok(true);
            }
            self.device_armed = true;
        }
        // With a request that waits for room, more of them are of no use.
        if !self.guest_armed && !self.waits {
            let more = self.guest.enable_notifications(&*common.memory);
            let more = more.map_err(|error| self.guest_fault(error))?;
            self.guest_armed = true;
            return Ok(more);
        }
        Ok(false)
    }

    /// Ends the queue: nothing of the guest's stays in the segment.
    pub(super) fn end(mut self, pool: &mut Pool<'_>) {
        for (flight, _) in &mut self.done {
            pool.wipe_all(self.queue, &mut flight.parts);
        }
        for flight in &mut self.flights {
            pool.wipe_all(self.queue, &mut flight.parts);
        }
        pool.served(self.queue);
        self.rings.fill(0);
    }

    #[cold]
    fn device_fault(&self, error: &QueueError) -> Halt {
        Halt::Broken(Broken::device(self.number(), error))
    }

    #[cold]
    fn guest_fault(&self, error: RemoteError<MemoryError>) -> Halt {
        match error {
            RemoteError::Memory(MemoryError::Cancelled) => Halt::Cancelled,
            RemoteError::Memory(error) => Halt::Broken(Broken::Memory {
                queue: self.number(),
                error,
            }),
            RemoteError::Queue(error) => Halt::Broken(Broken::driver(self.number(), &error)),
        }
    }
}

fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|&(_, len)| u64::from(len)).sum()
}

/// Goes through the first `len` bytes of two lists of buffers side by side: `step` gets an address in `guest`, and a buffer of the segment that
/// belongs there. The guest's buffers may be cut anywhere, and wrap around: addresses are for the memory to judge.
fn copy(
    len: u64,
    guest: impl Iterator<Item = Buffer>,
    segment: impl Iterator<Item = Buffer>,
    mut step: impl FnMut(BusAddr, Buffer) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let (mut guest, mut segment) = (guest, segment);
    let (mut here, mut there) = ((BusAddr(0), 0), (BusAddr(0), 0));
    let mut left = len;
    while left > 0 {
        if here.1 == 0 {
            let Some(next) = guest.next() else { break };
            here = next;
        }
        if there.1 == 0 {
            let Some(next) = segment.next() else { break };
            there = next;
        }
        let n = here
            .1
            .min(there.1)
            .min(u32::try_from(left).unwrap_or(u32::MAX));
        step(here.0, (there.0, n))?;
        for part in [&mut here, &mut there] {
            *part = (BusAddr(part.0.0.wrapping_add(n.into())), part.1 - n);
        }
        left -= u64::from(n);
    }
    Ok(())
}
