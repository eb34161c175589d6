// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other devices of a worker, lent to the one whose turn it is.

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use vmsg_mem::Pieces;
use vmsg_net::{Closed, NoOutlets, Outlets, RxSink, Target, VnetHeader, Wanted};
use vmsg_queue::ChainStorage;

use super::command::{Notice, Reply, Slot};
use super::entry::Entry;
use super::fault::Fault;
use super::ready::Ready;
use crate::device::Io;

/// What [`Outlets::fill`] finds the device by that is at `slot` from now on. No other device of this process, whichever worker it is on, has
/// the same until four thousand million others have come and gone.
pub(super) fn new_key(slot: Slot) -> u64 {
    static DEVICES: AtomicU32 = AtomicU32::new(1);
    u64::from(DEVICES.fetch_add(1, Ordering::Relaxed)) << 32 | u64::from(slot.0)
}

/// All devices of a worker but one.
pub(super) struct Others<'a> {
    /// Those at the slots before that one.
    pub(super) before: &'a mut [Option<Entry>],
    /// Those at the slots behind it.
    pub(super) after: &'a mut [Option<Entry>],
    /// Room for a batch of theirs: the worker's own holds a batch of that one.
    pub(super) storage: &'a mut ChainStorage,
    /// Empty between the calls, as `again` is: those of that one are elsewhere.
    pub(super) notices: &'a mut Vec<Notice>,
    pub(super) again: &'a mut Vec<usize>,
    pub(super) replies: &'a mut Vec<Reply>,
    pub(super) ready: &'a mut Ready,
    pub(super) timers: &'a mut BTreeSet<(Instant, u32)>,
    pub(super) rewatch: &'a mut Vec<Slot>,
    pub(super) now: Instant,
}

impl Outlets for Others<'_> {
    fn fill(&mut self, key: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        self.lend(key, None, fill)
    }

    fn fill_with(
        &mut self,
        key: u64,
        wanted: Wanted,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<(), Closed> {
        self.lend(key, Some(wanted), fill)
    }
}

impl Others<'_> {
    fn lend(
        &mut self,
        key: u64,
        wanted: Option<Wanted>,
        fill: &mut dyn FnMut(&mut dyn RxSink),
    ) -> Result<(), Closed> {
        let slot = Slot(u32::try_from(key & 0xffff_ffff).expect("masked to 32 bits"));
        let index = slot.0 as usize;
        let place = match index.checked_sub(self.before.len()) {
            None => self.before.get_mut(index),
            // The one that asks.
            Some(0) => None,
            Some(behind) => self.after.get_mut(behind - 1),
        };
        let entry = place
            .and_then(Option::as_mut)
            .filter(|entry| entry.key == key)
            .ok_or(Closed::Gone)?;
        if entry.broken {
            return Err(Closed::Broken);
        }
        if entry.waits() {
            return Err(Closed::NoDriver);
        }
        let mut memory = entry.memory.lock();
        let mut io = Io {
            queues: &mut entry.active,
            space: memory.table.space(),
            table: &memory.table,
            storage: self.storage,
            now: self.now,
            others: &mut NoOutlets,
            wanted,
            notices: self.notices,
            again: self.again,
        };
        let device = entry.device.as_mut();
        let mut panic = None;
        // As for the device whose turn it is: after a panic nothing but `reset` is called.
        let result = catch_unwind(AssertUnwindSafe(|| {
            let result = device.accept(&mut io, &mut |sink| guard(sink, fill, &mut panic));
            (result, device.is_touching_memory())
        }));
        memory.touched = result.as_ref().map_or(true, |(_, touching)| *touching);
        let (result, fault) = match result {
            Ok((Ok(result), _)) => {
                let lost = Fault::of_memory(&entry.active, &memory.table, &mut entry.next_mapping);
                (result, lost)
            }
            Ok((Err(error), _)) => (Ok(()), Some(Fault::of_device(&error))),
            Err(panic) => (Ok(()), Some(Fault::of_panic(&*panic))),
        };
        drop(memory);
        let result = match fault {
            None => result,
            Some(Fault { why, unmapped }) => {
                entry.broken = true;
                if let Some(due) = entry.timer.take() {
                    self.timers.remove(&(due, slot.0));
                }
                self.rewatch.push(slot);
                self.notices.push(Notice::Broken { why, unmapped });
                Err(Closed::Broken)
            }
        };
        for queue in self.again.drain(..) {
            if let Ok(queue) = u16::try_from(queue) {
                self.ready.push(slot.0, queue);
            }
        }
        let notices = self.notices.drain(..);
        self.replies
            .extend(notices.map(|notice| Reply::Notice(slot, notice)));
        match panic {
            // It is the one that asked who is to blame.
            Some(panic) => resume_unwind(panic),
            None => result,
        }
    }
}

/// Calls `fill`, and tells whose panic is whose: one of `sink`, which is a part of the device that receives, goes on, through `fill` and
/// no further than to the caller of that device; one of `fill` itself is put into `panic`, and does not hurt that device.
fn guard(
    sink: &mut dyn RxSink,
    fill: &mut dyn FnMut(&mut dyn RxSink),
    panic: &mut Option<Box<dyn Any + Send>>,
) {
    if panic.is_some() {
        return;
    }
    let mut guarded = Guarded {
        sink,
        inside: false,
    };
    let result = catch_unwind(AssertUnwindSafe(|| fill(&mut guarded)));
    match (result, guarded.inside) {
        (result, false) => *panic = result.err(),
        (Err(panic), true) => resume_unwind(panic),
        // `fill` has kept it to itself.
        (Ok(()), true) => panic!("the device's buffers"),
    }
}

/// A sink that knows whether a panic is its own.
struct Guarded<'a> {
    sink: &'a mut dyn RxSink,
    /// It is at work, or a panic has ended that: nothing is called on it then.
    inside: bool,
}

impl RxSink for Guarded<'_> {
    #[inline]
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        if self.inside {
            return None;
        }
        self.inside = true;
        let room = self.sink.offer(to, len);
        self.inside = false;
        room
    }

    fn offer_between(&mut self, to: Target<'_>, least: usize, most: usize) -> Option<Pieces<'_>> {
        if self.inside {
            return None;
        }
        self.inside = true;
        let room = self.sink.offer_between(to, least, most);
        self.inside = false;
        room
    }

    #[inline]
    fn commit(&mut self, header: &VnetHeader, len: usize) {
        if !self.inside {
            self.inside = true;
            self.sink.commit(header, len);
            self.inside = false;
        }
    }

    #[inline]
    fn put(&mut self, to: Target<'_>, header: VnetHeader, front: &[u8], rest: Pieces<'_>) -> bool {
        if self.inside {
            return false;
        }
        self.inside = true;
        let taken = self.sink.put(to, header, front, rest);
        self.inside = false;
        taken
    }
}

#[cfg(test)]
#[path = "others_test.rs"]
mod tests;
