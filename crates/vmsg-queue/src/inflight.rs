// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The record of what is in flight, in memory that outlives the device's process.
//!
//! A queue whose chains are used in order needs no record: what is in flight is what stands between its used and its
//! available index. Where requests overtake each other, the next process could not know which of them are done. So each
//! is marked in a record that somebody else keeps and lends.
//!
//! The record has the form of the in-flight region of a split queue in the vhost-user protocol ("Inflight I/O
//! tracking" in QEMU's docs/interop/vhost-user.rst), so that it can be handed on to and from vhost-user programs.
//! All fields are in the byte order of the machine, which both sides share:
//!
//! | offset | field | |
//! |---|---|---|
//! | 0 | u64 features | none is defined |
//! | 8 | u16 version | 1; 0: never used |
//! | 10 | u16 desc_num | entries of the queue |
//! | 12 | u16 last_batch_head | the request completed last |
//! | 14 | u16 used_idx | the used index when nothing was being completed |
//! | 16 + 16·head | u8 inflight, 5 bytes 0, u16 next, u64 counter | one for each descriptor that heads a chain: taken and not yet used; the request completed before it; order in which they were taken |
//!
//! A request is done once the used index that covers it is out. If the process ends before, it is done again by the
//! next one; so a request must be one that can be.

use core::sync::atomic::{AtomicU16, AtomicU64, Ordering, compiler_fence};

use vmsg_mem::RamSlice;

use crate::QueueError;
use crate::config::check_size;

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER: usize = 16;
const ENTRY: usize = 16;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The version of the form described here.
const CURRENT: u16 = 1;

/// A record of a queue's requests in flight.
///
/// Holds no pointer: each call is given the memory, as the queue is. Whoever lends it can change it; what is read back
/// is only used after a restart, and is checked then.
#[derive(Debug)]
pub struct Inflight {
    size: u16,
    /// The counter of the next request.
    counter: u64,
    /// The request completed last.
    last: u16,
}

/// What a record says at the start.
#[derive(Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The used index that the driver has been shown.
    pub used: u16,
    /// How many requests are in flight: marked, and not done.
    pub in_flight: u16,
}

impl Inflight {
    /// Bytes of a record for a queue of `size` entries.
    pub const fn bytes_for(size: u16) -> usize {
        HEADER + ENTRY * size as usize
    }

    /// Begins a record for a queue that starts from the beginning: whatever is in the memory is overwritten.
    ///
    /// # Errors
    /// [`QueueError::BadSize`]; [`QueueError::BadRecord`] if the memory is too small or not aligned to 8 bytes.
    pub fn begin(record: RamSlice<'_>, size: u16) -> Result<Self, QueueError> {
        let record = Record::new(record, size)?;
        record.version().store(0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        for head in 0..size {
            record.set_in_flight(head, false);
            record.next(head).store(0, Ordering::Relaxed);
            record.counter(head).store(0, Ordering::Relaxed);
        }
        record.half(DESC_NUM).store(size, Ordering::Relaxed);
        record.half(LAST_BATCH_HEAD).store(0, Ordering::Relaxed);
        record.half(USED_IDX).store(0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        record.version().store(CURRENT, Ordering::Relaxed);
        Ok(Self {
            size,
            counter: 0,
            last: 0,
        })
    }

    /// Says that nobody keeps the record any more: it is [new](Self::is_new) again.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn forget(record: RamSlice<'_>, size: u16) -> Result<(), QueueError> {
        let record = Record::new(record, size)?;
        record.version().store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Whether no record was ever kept in this memory.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn is_new(record: RamSlice<'_>, size: u16) -> Result<bool, QueueError> {
        Ok(Record::new(record, size)?.version().load(Ordering::Relaxed) == 0)
    }

    /// Goes on with a record of somebody else, for a queue in whose device area the used index `used` stands.
    ///
    /// A record that was never used stands for a queue without requests in flight.
    ///
    /// # Errors
    /// As [`begin`](Self::begin); [`QueueError::BadRecord`] if it was kept for a queue of another size, in another
    /// form, or contradicts `used`.
    pub fn resume(
        record: RamSlice<'_>,
        size: u16,
        used: u16,
    ) -> Result<(Self, Recovered), QueueError> {
        let memory = record;
        let record = Record::new(record, size)?;
        match record.version().load(Ordering::Relaxed) {
            0 => {
                let this = Self::begin(memory, size)?;
                record.half(USED_IDX).store(used, Ordering::Relaxed);
                let recovered = Recovered { used, in_flight: 0 };
                return Ok((this, recovered));
            }
            CURRENT => {}
            _ => return Err(QueueError::BadRecord("of another version")),
        }
        if record.half(DESC_NUM).load(Ordering::Relaxed) != size {
            return Err(QueueError::BadRecord("of a queue of another size"));
        }
        // The used index went out and the marks of its requests were still to be taken away.
        let last = record.half(LAST_BATCH_HEAD).load(Ordering::Relaxed);
        let batch = used.wrapping_sub(record.half(USED_IDX).load(Ordering::Relaxed));
        if batch > size {
            return Err(QueueError::BadRecord(
                "of another used index than the queue's",
            ));
        }
        let mut head = last;
        for _ in 0..batch {
            if head >= size {
                return Err(QueueError::BadRecord("with a request outside the queue"));
            }
            record.set_in_flight(head, false);
            head = record.next(head).load(Ordering::Relaxed);
        }
        record.half(USED_IDX).store(used, Ordering::Relaxed);
        let marked = (0..size).filter(|&head| record.is_in_flight(head));
        let (mut in_flight, mut counter) = (0, 0);
        for head in marked {
            in_flight += 1;
            counter = counter.max(record.counter(head).load(Ordering::Relaxed).wrapping_add(1));
        }
        let this = Self {
            size,
            counter,
            last: if last < size { last } else { 0 },
        };
        Ok((this, Recovered { used, in_flight }))
    }

    /// Puts the heads of the requests in flight into `heads`, in the order in which they were taken; returns how many
    /// they are. `heads` has room for as many as [`resume`](Self::resume) has found.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`] if there is not enough room, or the memory is not what it was.
    pub fn heads(&self, record: RamSlice<'_>, heads: &mut [u16]) -> Result<usize, QueueError> {
        let record = Record::new(record, self.size)?;
        let mut count = 0;
        for head in (0..self.size).filter(|&head| record.is_in_flight(head)) {
            let Some(slot) = heads.get_mut(count) else {
                return Err(QueueError::BadRecord("that changes while it is read"));
            };
            *slot = head;
            count += 1;
        }
        // Somebody may change the counters under the sort, which then sorts in some order. That of the library must not
        // be used: it may panic where the order contradicts itself.
        heap_sort(&mut heads[..count], |head| {
            record.counter(head).load(Ordering::Relaxed)
        });
        Ok(count)
    }

    /// Marks a request as taken.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`] if the memory is not what it was.
    ///
    /// # Panics
    /// If `head` is outside the queue.
    pub fn take(&mut self, record: RamSlice<'_>, head: u16) -> Result<(), QueueError> {
        let record = Record::new(record, self.size)?;
        assert!(head < self.size, "a head of the queue");
        record.counter(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        compiler_fence(Ordering::SeqCst);
        record.set_in_flight(head, true);
        Ok(())
    }

    /// Takes the mark away from a request that was not begun and is given back.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`] if the memory is not what it was.
    ///
    /// # Panics
    /// If `head` is outside the queue.
    pub fn give_back(&mut self, record: RamSlice<'_>, head: u16) -> Result<(), QueueError> {
        let record = Record::new(record, self.size)?;
        assert!(head < self.size, "a head of the queue");
        record.set_in_flight(head, false);
        Ok(())
    }

    /// Notes that a request is about to be shown as used, before the used index that covers it goes out.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`] if the memory is not what it was.
    ///
    /// # Panics
    /// If `head` is outside the queue.
    pub fn complete(&mut self, record: RamSlice<'_>, head: u16) -> Result<(), QueueError> {
        let record = Record::new(record, self.size)?;
        assert!(head < self.size, "a head of the queue");
        record.next(head).store(self.last, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        record.half(LAST_BATCH_HEAD).store(head, Ordering::Relaxed);
        self.last = head;
        compiler_fence(Ordering::SeqCst);
        Ok(())
    }

    /// Takes the marks away from the requests of `batch`, all that were completed since the last call, after the used
    /// index `used` that covers them went out.
    ///
    /// # Errors
    /// [`QueueError::BadRecord`] if the memory is not what it was.
    ///
    /// # Panics
    /// If a head is outside the queue.
    pub fn published(
        &mut self,
        record: RamSlice<'_>,
        batch: &[u16],
        used: u16,
    ) -> Result<(), QueueError> {
        let record = Record::new(record, self.size)?;
        compiler_fence(Ordering::SeqCst);
        for &head in batch {
            assert!(head < self.size, "a head of the queue");
            record.set_in_flight(head, false);
        }
        compiler_fence(Ordering::SeqCst);
        record.half(USED_IDX).store(used, Ordering::Relaxed);
        Ok(())
    }
}

/// Sorts by keys that may be different each time they are asked for; then in some order.
fn heap_sort(items: &mut [u16], key: impl Fn(u16) -> u64) {
    let sift = |items: &mut [u16], mut root: usize| {
        loop {
            let mut largest = root;
            for child in [2 * root + 1, 2 * root + 2] {
                if child < items.len() && key(items[child]) > key(items[largest]) {
                    largest = child;
                }
            }
            if largest == root {
                return;
            }
            items.swap(root, largest);
            root = largest;
        }
    };
    for root in (0..items.len() / 2).rev() {
        sift(items, root);
    }
    for end in (1..items.len()).rev() {
        items.swap(0, end);
        sift(&mut items[..end], 0);
    }
}

/// The memory of a record, known to be large enough and aligned.
struct Record<'m>(RamSlice<'m>);

impl<'m> Record<'m> {
    fn new(memory: RamSlice<'m>, size: u16) -> Result<Self, QueueError> {
        check_size(size)?;
        let Some(memory) = memory.get(0, Inflight::bytes_for(size)) else {
            return Err(QueueError::BadRecord("that is too small for the queue"));
        };
        if memory.atomic_u64(0).is_none() {
            return Err(QueueError::BadRecord("that is not aligned to 8 bytes"));
        }
        Ok(Self(memory))
    }

    fn half(&self, offset: usize) -> &'m AtomicU16 {
        self.0.atomic_u16(offset).expect("inside, and aligned")
    }

    fn version(&self) -> &'m AtomicU16 {
        self.half(VERSION)
    }

    fn entry(head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn is_in_flight(&self, head: u16) -> bool {
        let mut mark = [0];
        self.0.read(Self::entry(head), &mut mark);
        mark != [0]
    }

    fn set_in_flight(&self, head: u16, on: bool) {
        self.0.write(Self::entry(head), &[u8::from(on)]);
    }

    fn next(&self, head: u16) -> &'m AtomicU16 {
        self.half(Self::entry(head) + NEXT)
    }

    fn counter(&self, head: u16) -> &'m AtomicU64 {
        self.0
            .atomic_u64(Self::entry(head) + COUNTER)
            .expect("inside, and aligned")
    }
}

#[cfg(test)]
#[path = "inflight_test.rs"]
mod tests;
