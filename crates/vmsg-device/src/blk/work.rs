// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the queues to the disk, and back.

use std::time::Duration;

use vmsg_block::{Failure, Request, Submitted};
use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window, WindowTable};
use vmsg_queue::Chain;

use super::bits::Status;
use super::flights::{Answer, Flight, Kind};
use super::request::{self, Order, Range, Refusal};
use super::{Blk, LOOK, places};
use crate::device::{DeviceError, Io, Progress};

/// Chains that are taken together.
const BATCH: usize = 64;

/// Bytes that are read or written in one turn, after which others have theirs: a disk in memory does them at once.
const MAX_TURN: u64 = 4 << 20;

/// Requests that are done after which a driver that is awake is shown them, while others of the same batch are still to be done: else it
/// and this side would only ever work in turns.
const SHOWN: usize = 8;

/// Or bytes of them.
const SHOWN_BYTES: u64 = 32 << 10;

/// When a disk is asked again that has no room and nothing to do.
const RETRY: Duration = Duration::from_millis(10);

/// What became of a chain.
enum Taken {
    /// It can be given back; the status is there.
    Done {
        /// The used length.
        written: u32,
        /// Bytes that were moved.
        bytes: u64,
    },
    /// The disk has it.
    Pending {
        /// Bytes that are moved.
        bytes: u64,
    },
    /// The disk cannot take it now.
    Full,
}

/// What became of a request.
enum Begun {
    Done(Flight, Result<(), Failure>),
    Pending(Flight),
    Full(Flight),
}

impl Blk {
    /// Takes chains from `queue`; what is done at once is completed, and told by [`reap`](Self::reap).
    pub(super) fn take_requests(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let failed = |source| DeviceError::Queue { queue, source };
        let again = active.recovered();
        let batch = active
            .pop(io.space, io.storage, budget.min(BATCH))
            .map_err(failed)?;
        let count = batch.len();
        let (mut taken, mut moved, mut full) = (0, 0, false);
        let (mut hidden, mut hidden_bytes) = (0, 0);
        for chain in batch.iter() {
            if moved >= MAX_TURN {
                break;
            }
            match self.take(queue, &chain, io.space, io.table, io.now)? {
                Taken::Done { written, bytes } => {
                    let head = chain.head();
                    active.complete(io.space, head, written).map_err(failed)?;
                    self.dirty[queue] = true;
                    moved += bytes;
                    hidden += 1;
                    hidden_bytes += bytes;
                    if (hidden >= SHOWN || hidden_bytes >= SHOWN_BYTES) && taken + 1 < count {
                        (hidden, hidden_bytes) = (0, 0);
                        // One that sleeps is woken once, for all of them.
                        let ring = active.ring();
                        if !ring.wants_notification(io.space).map_err(failed)? {
                            active.publish_and_notify(queue, io.space, io.notices)?;
                        }
                    }
                }
                Taken::Pending { bytes } => moved += bytes,
                Taken::Full => {
                    full = true;
                    break;
                }
            }
            taken += 1;
        }
        active.rewind(count - taken).map_err(failed)?;
        let repeated = again - active.recovered();
        if repeated > 0 {
            self.counters.repeated.add(repeated as u64);
        }
        if count > 0 {
            self.look.get_or_insert(io.now + LOOK);
        }
        Ok(if full {
            self.blocked[queue] = true;
            if self.disk.in_flight() == 0 {
                self.retry.get_or_insert(io.now + RETRY);
            }
            Progress::Blocked
        } else if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }

    fn take(
        &mut self,
        queue: usize,
        chain: &Chain<'_>,
        space: AddressSpace<'_>,
        table: &std::sync::Arc<WindowTable>,
        now: std::time::Instant,
    ) -> Result<Taken, DeviceError> {
        let place = chain.writable_slices().last();
        let Some(place) = place.and_then(|last| last.get(last.len() - 1, 1)) else {
            // Given back as it is, the driver would take whatever stands where it looks for a status for one, and there is nothing
            // to tell it otherwise. QEMU and SPDK give the device up, too.
            return Err(DeviceError::Malformed {
                queue,
                what: "a request without a byte for its status",
            });
        };
        let writable = chain.writable();
        // All of it, whatever came of the request: whoever copies what was written, and no more, copies the status too, which is
        // the last byte.
        let written = u32::try_from(writable.len()).unwrap_or(u32::MAX);
        let answer = Answer {
            queue,
            head: chain.head(),
            status: self.address_of(space, place)?,
            written,
        };
        let writable = writable.take(writable.len() - 1);
        let order = match request::read(chain.readable(), writable, &self.limits()) {
            Ok(order) => order,
            Err(refusal) => {
                place.write(0, &[self.refuse(refusal, now) as u8]);
                return Ok(Taken::Done { written, bytes: 0 });
            }
        };
        let (kind, bytes) = match &order {
            Order::Read { to, .. } => (Kind::Read, to.len() as u64),
            Order::Write { from, .. } => (Kind::Write, from.len() as u64),
            Order::Flush => (Kind::Flush, 0),
            // A disk in memory does these at once, too.
            Order::Discard(ranges) => (Kind::Discard, total(ranges)),
            Order::WriteZeroes(ranges) => (Kind::WriteZeroes, total(ranges)),
            Order::Id(to) => {
                let mut id = [0; super::SERIAL_BYTES];
                for (to, from) in id.iter_mut().zip(self.settings.serial.bytes()) {
                    *to = from;
                }
                to.write(&id);
                place.write(0, &[Status::Ok as u8]);
                return Ok(Taken::Done { written, bytes: 0 });
            }
        };
        let flight = Flight {
            answer: Some(answer),
            kind,
            bytes,
            then: Vec::new(),
            places: self.flights.room(),
        };
        match self.begin(order, flight, table) {
            Begun::Done(flight, result) => {
                self.flights.give_back(flight.places);
                let status = self.account(kind, bytes, result, now);
                place.write(0, &[status as u8]);
                Ok(Taken::Done { written, bytes })
            }
            Begun::Pending(mut flight) => {
                places::note(&mut flight.places, chain.readable_slices());
                places::note(&mut flight.places, chain.writable_slices());
                self.flights.insert(flight);
                Ok(Taken::Pending { bytes })
            }
            Begun::Full(flight) => {
                self.flights.give_back(flight.places);
                Ok(Taken::Full)
            }
        }
    }

    /// Hands a request to the disk, by the tag that comes next.
    fn begin(
        &mut self,
        order: Order<'_>,
        mut flight: Flight,
        table: &std::sync::Arc<WindowTable>,
    ) -> Begun {
        let tag = self.flights.next_tag();
        let request = match order {
            Order::Read { offset, to } => Request::Read { offset, to },
            Order::Write { offset, from } => Request::Write { offset, from },
            Order::Flush => Request::Flush,
            Order::Discard(ranges) | Order::WriteZeroes(ranges) => {
                flight.then = ranges;
                loop {
                    let Some(range) = flight.then.pop() else {
                        return Begun::Done(flight, Ok(()));
                    };
                    match self.disk.submit(tag, of_range(flight.kind, range), table) {
                        Submitted::Done(Ok(())) => {}
                        Submitted::Done(Err(failure)) => return Begun::Done(flight, Err(failure)),
                        Submitted::Pending => return Begun::Pending(flight),
                        // What was done of it is done once more.
                        Submitted::Full => return Begun::Full(flight),
                    }
                }
            }
            Order::Id(_) => unreachable!("needs no disk"),
        };
        match self.disk.submit(tag, request, table) {
            Submitted::Done(result) => Begun::Done(flight, result),
            Submitted::Pending => Begun::Pending(flight),
            Submitted::Full => Begun::Full(flight),
        }
    }

    /// Answers what the disk has done since the last call, and tells the driver of all that was completed.
    pub(super) fn reap(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let mut done = std::mem::take(&mut self.done);
        self.disk.completed(&mut done);
        let mut result = Ok(());
        let retry = self.retry.is_some_and(|retry| retry <= io.now);
        if retry || !done.is_empty() {
            self.retry = None;
            for completion in done.drain(..) {
                let finished = self.go_on(completion.tag, completion.result, io);
                result = result.and(finished);
            }
            for tag in std::mem::take(&mut self.stalled) {
                let finished = self.go_on(tag, Ok(()), io);
                result = result.and(finished);
            }
            self.unblock(io);
        }
        self.done = done;
        self.counters.in_flight.set(self.flights.waiting() as u64);
        for queue in 0..self.dirty.len() {
            if std::mem::take(&mut self.dirty[queue]) {
                result = result.and(io.publish(queue));
            }
        }
        result
    }

    /// A part of a request is done: begins the next one, or answers the request.
    fn go_on(
        &mut self,
        tag: u32,
        mut result: Result<(), Failure>,
        io: &mut Io<'_>,
    ) -> Result<(), DeviceError> {
        let Some(flight) = self.flights.get_mut(tag) else {
            return Ok(());
        };
        while result.is_ok() {
            let Some(range) = flight.then.pop() else {
                break;
            };
            match self
                .disk
                .submit(tag, of_range(flight.kind, range), io.table)
            {
                Submitted::Done(next) => result = next,
                Submitted::Pending => return Ok(()),
                Submitted::Full => {
                    flight.then.push(range);
                    self.stalled.push(tag);
                    if self.disk.in_flight() == 0 {
                        self.retry.get_or_insert(io.now + RETRY);
                    }
                    return Ok(());
                }
            }
        }
        let Some(flight) = self.flights.remove(tag) else {
            return Ok(());
        };
        let Some(answer) = flight.answer else {
            return Ok(());
        };
        let status = self.account(flight.kind, flight.bytes, result, io.now);
        let Some(Some(active)) = io.queues.get_mut(answer.queue) else {
            return Ok(());
        };
        // Memory that is gone took the answer with it.
        if let Some(place) = io.space.get(answer.status, 1, Access::ReadWrite) {
            place.write(0, &[status as u8]);
        }
        let queue = answer.queue;
        active
            .complete(io.space, answer.head, answer.written)
            .map_err(|source| DeviceError::Queue { queue, source })?;
        self.dirty[queue] = true;
        Ok(())
    }

    /// Has the queues processed that the disk had no room for.
    pub(super) fn unblock(&mut self, io: &mut Io<'_>) {
        for (queue, blocked) in self.blocked.iter_mut().enumerate() {
            if std::mem::take(blocked) {
                io.again(queue);
            }
        }
    }

    /// Counts a request that the disk has done, or failed to do.
    fn account(
        &mut self,
        kind: Kind,
        bytes: u64,
        result: Result<(), Failure>,
        now: std::time::Instant,
    ) -> Status {
        let counters = &self.counters;
        match result {
            Ok(()) => {
                match kind {
                    Kind::Read => {
                        counters.reads.add(1);
                        counters.read_bytes.add(bytes);
                    }
                    Kind::Write => {
                        counters.writes.add(1);
                        counters.write_bytes.add(bytes);
                    }
                    Kind::Flush => counters.flushes.add(1),
                    Kind::Discard => counters.discards.add(1),
                    Kind::WriteZeroes => counters.write_zeroes.add(1),
                }
                Status::Ok
            }
            Err(Failure::Unsupported) => {
                counters.unsupported.add(1);
                Status::Unsupp
            }
            Err(failure) => {
                counters.errors.add(1);
                self.report.failed(kind.name(), &failure, now);
                Status::IoErr
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal, now: std::time::Instant) -> Status {
        match refusal.status {
            Status::Unsupp => self.counters.unsupported.add(1),
            _ => {
                self.counters.refused.add(1);
                self.report.refused(refusal.why, now);
            }
        }
        refusal.status
    }

    /// The bus address of a byte of a chain: where it is looked for when the request is done, in the memory that there is then.
    fn address_of(
        &mut self,
        space: AddressSpace<'_>,
        byte: RamSlice<'_>,
    ) -> Result<BusAddr, DeviceError> {
        let at = byte.as_ptr().addr();
        let look = |window: &Window<'_>| {
            let ram = window.ram();
            let offset = at.checked_sub(ram.as_ptr().addr())?;
            let inside = offset < ram.len() && window.access() == Access::ReadWrite;
            inside.then(|| window.base().checked_add(offset as u64))?
        };
        let windows = space.windows();
        // Mostly in the same one as the last.
        if let Some(found) = windows.get(self.near).and_then(look) {
            return Ok(found);
        }
        for (index, window) in windows.iter().enumerate() {
            if let Some(found) = look(window) {
                self.near = index;
                return Ok(found);
            }
        }
        Err(DeviceError::Local(
            "a status outside of all windows".to_owned(),
        ))
    }
}

fn total(ranges: &[Range]) -> u64 {
    ranges.iter().map(|range| range.len).sum()
}

fn of_range(kind: Kind, range: Range) -> Request<'static> {
    let Range { offset, len, unmap } = range;
    match kind {
        Kind::WriteZeroes => Request::WriteZeroes { offset, len, unmap },
        _ => Request::Discard { offset, len },
    }
}
