// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The message queue in shared memory: one producer, one consumer.
//!
//! | offset | word | written by |
//! |---|---|---|
//! | 0x00 | `head`: the slot the next message goes to | producer |
//! | 0x04 | 1: the producer waits for room ([`Layout::arm_flags`]) | producer sets, consumer takes |
//! | 0x40 | `tail`: the slot the next message is taken from | consumer |
//! | 0x44 | 1: the consumer sleeps ([`Layout::arm_flags`]) | consumer sets, producer takes |
//! | 0x80 | slots | producer |
//!
//! All words are little-endian. The indices run from 0 to `capacity` − 1 and
//! `head` = `tail` means empty, so that one slot always stays free. A message
//! begins with its slot; where it ends, its own header says.
//!
//! Each side keeps its own index to itself and only ever stores it; what the
//! memory says about it does not matter. The other side's index is loaded only
//! when the last known value does not allow to go on, and checked each time: a
//! bad one makes the queue [`Corrupt`] for good, and never leads outside the
//! slots.
//!
//! # Sleeping and waking
//!
//! With arm flags a doorbell is rung only when the other side sleeps. The
//! consumer's loop:
//!
//! 1. [`try_pop`](Consumer::try_pop) until there is nothing.
//! 2. [`release`](Consumer::release), even when nothing was popped; if it says so, ring the producer.
//! 3. [`arm`](Consumer::arm): if true, sleep until the doorbell rings. If false, go on with 1.
//!
//! And the producer's:
//!
//! 1. [`try_push`](Producer::try_push) until full or done.
//! 2. [`publish`](Producer::publish); if it says so, ring the consumer. During a long
//!    burst, [`publish_early`](Producer::publish_early) can be used beforehand.
//! 3. If it was full, [`arm_for_room`](Producer::arm_for_room): if true, sleep. If false, go on with 1.
//!
//! # Ordering
//!
//! Contents: the producer writes a slot and then stores `head` (release); the
//! consumer loads `head` (acquire) and then reads. Slots go back the same way
//! through `tail`. Sleep: who goes to sleep stores its flag, has a full fence,
//! and then loads the other side's index; the other side stores its index, has
//! a full fence, and then loads the flag (Dekker's pattern), so at least one of
//! them sees what the other did. These places carry `SYNC POINT` in the source.
//!
//! A full fence costs as much as many messages. So the side that is awake has
//! it late: the producer in [`publish`](Producer::publish), which ends a burst,
//! the consumer in [`arm`](Consumer::arm), without which it does not sleep.
//! Before that both look at the flag without a fence, and may overlook
//! somebody who goes to sleep at that very moment.

use crate::{Error, QueueMemory};

mod consumer;
pub use consumer::Consumer;

/// Size of a slot in bytes where the bus does not say otherwise.
pub const SLOT_SIZE: usize = 64;

const HEAD: usize = 0x00;
const ROOM_WANTED: usize = 0x04;
const TAIL: usize = 0x40;
const SLEEPING: usize = 0x44;
const SLOTS: usize = 0x80;

/// What both sides have to agree on beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Size of a slot in bytes, so of the longest message; a multiple of 8.
    pub slot_size: usize,
    /// Whether the words 0x04 and 0x44 say who sleeps. Without them the
    /// producer rings after every [`publish`](Producer::publish), and a
    /// producer that waits for room has to look again now and then.
    pub arm_flags: bool,
}

impl Layout {
    /// Slots of 64 bytes and no arm flags: what QEMU and the AMP queues have.
    pub const PLAIN: Self = Self {
        slot_size: SLOT_SIZE,
        arm_flags: false,
    };

    /// Slots of `slot_size` bytes with arm flags.
    pub const fn armed(slot_size: usize) -> Self {
        Self {
            slot_size,
            arm_flags: true,
        }
    }

    /// Bytes of memory for a queue of `capacity` slots, one of which stays
    /// free; `None` if that is more than can be addressed.
    pub const fn bytes_for(&self, capacity: u32) -> Option<usize> {
        match self.slot_size.checked_mul(capacity as usize) {
            Some(slots) => slots.checked_add(SLOTS),
            None => None,
        }
    }

    /// Number of slots in `bytes` of memory; one of them always stays free.
    ///
    /// # Errors
    ///
    /// [`Error::BadQueue`] if the slot size is not a positive multiple of 8, or the
    /// slots are fewer than two or too many to count in 32 bits.
    pub fn capacity(&self, bytes: usize) -> Result<u32, Error> {
        let bad = Error::BadQueue {
            bytes,
            slot_size: self.slot_size,
        };
        if self.slot_size == 0 || self.slot_size % 8 != 0 {
            return Err(bad);
        }
        match u32::try_from(bytes.saturating_sub(SLOTS) / self.slot_size) {
            Ok(capacity) if capacity >= 2 => Ok(capacity),
            _ => Err(bad),
        }
    }
}

/// The other side stored an index that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer's queue index is {index}, impossible with {capacity} slots")]
pub struct Corrupt {
    /// What was found.
    pub index: u32,
    /// Number of slots.
    pub capacity: u32,
}

impl From<Corrupt> for Error {
    fn from(corrupt: Corrupt) -> Self {
        Self::CorruptQueue {
            index: corrupt.index,
            capacity: corrupt.capacity,
        }
    }
}

/// Why a message was not pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// No slot is free now.
    #[error("the queue is full")]
    Full,
    /// The message is longer than a slot.
    #[error("the message is longer than a slot")]
    TooLong,
    /// The consumer broke the queue; nothing can be pushed any more.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// Zeroes indices and flags. For memory that held another queue before, while
/// nobody uses it.
pub fn clear<M: QueueMemory>(memory: &M) {
    for word in [HEAD, ROOM_WANTED, TAIL, SLEEPING] {
        memory.store_release(word, 0);
    }
}

/// The memory and its geometry: the same for both sides.
#[derive(Debug)]
struct Ring<M> {
    memory: M,
    slot_size: usize,
    capacity: u32,
    arm_flags: bool,
}

impl<M: QueueMemory> Ring<M> {
    fn new(memory: M, layout: Layout) -> Result<Self, Error> {
        let capacity = layout.capacity(memory.len())?;
        if !memory.is_aligned() {
            return Err(Error::BadQueue {
                bytes: memory.len(),
                slot_size: layout.slot_size,
            });
        }
        Ok(Self {
            memory,
            slot_size: layout.slot_size,
            capacity,
            arm_flags: layout.arm_flags,
        })
    }

    /// Where slot `index` (below `capacity`) begins.
    #[inline]
    fn slot(&self, index: u32) -> usize {
        debug_assert!(index < self.capacity);
        SLOTS + index as usize * self.slot_size
    }

    #[inline]
    fn next(&self, index: u32) -> u32 {
        let next = index + 1;
        if next == self.capacity { 0 } else { next }
    }

    /// How many steps lead from `from` to `to`, both below `capacity`.
    #[inline]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from {
            to - from
        } else {
            self.capacity - from + to
        }
    }

    fn check(&self, index: u32) -> Result<u32, Corrupt> {
        if index < self.capacity {
            Ok(index)
        } else {
            Err(Corrupt {
                index,
                capacity: self.capacity,
            })
        }
    }
}

/// The side that sends.
#[derive(Debug)]
pub struct Producer<M> {
    ring: Ring<M>,
    /// Next slot to fill.
    head: u32,
    /// What the consumer can see of `head`.
    published: u32,
    /// The consumer's index as last loaded; `tail` to `head` are in use.
    tail: u32,
    /// We set [`ROOM_WANTED`] and have not cleared it since.
    waiting: bool,
    /// Something was published of which a consumer that fell asleep may not know.
    early: bool,
    corrupt: Option<Corrupt>,
}

impl<M: QueueMemory> Producer<M> {
    /// Begins a queue in memory whose index words are zero, or were zero until
    /// the consumer began to use it.
    ///
    /// # Errors
    ///
    /// [`Error::BadQueue`]: the memory is too small, misaligned, or the slot size is wrong.
    pub fn new(memory: M, layout: Layout) -> Result<Self, Error> {
        let ring = Ring::new(memory, layout)?;
        ring.memory.store_release(HEAD, 0);
        Ok(Self::at(ring, 0, 0))
    }

    /// Goes on with a queue where another producer left it.
    ///
    /// # Errors
    ///
    /// As [`Self::new`], and [`Error::CorruptQueue`] if an index is out of range.
    pub fn resume(memory: M, layout: Layout) -> Result<Self, Error> {
        let ring = Ring::new(memory, layout)?;
        let head = ring.check(ring.memory.load_relaxed(HEAD))?;
        // SYNC POINT: slots that the consumer gave back before are ours to write.
        let tail = ring.check(ring.memory.load_acquire(TAIL))?;
        Ok(Self::at(ring, head, tail))
    }

    fn at(ring: Ring<M>, head: u32, tail: u32) -> Self {
        if ring.arm_flags {
            ring.memory.store_relaxed(ROOM_WANTED, 0);
        }
        Self {
            ring,
            head,
            published: head,
            tail,
            waiting: false,
            early: false,
            corrupt: None,
        }
    }

    /// Number of slots; one always stays free.
    pub const fn capacity(&self) -> u32 {
        self.ring.capacity
    }

    /// Longest message in bytes.
    pub const fn slot_size(&self) -> usize {
        self.ring.slot_size
    }

    /// Messages pushed since the last [`Self::publish`].
    pub fn unpublished(&self) -> u32 {
        self.ring.distance(self.published, self.head)
    }

    /// Puts a message into the next slot. The consumer does not see it before
    /// [`Self::publish`]. Bytes of the slot behind the message stay as they are.
    ///
    /// # Errors
    ///
    /// [`PushError`]; nothing has changed then.
    #[inline]
    pub fn try_push(&mut self, message: &[u8]) -> Result<(), PushError> {
        if message.len() > self.ring.slot_size {
            return Err(PushError::TooLong);
        }
        let next = self.ring.next(self.head);
        if next == self.tail && !self.find_room()? {
            return Err(PushError::Full);
        }
        if self.waiting {
            self.stop_waiting();
        }
        self.ring.memory.write(self.ring.slot(self.head), message);
        self.head = next;
        Ok(())
    }

    /// Lets the consumer see everything pushed. True if it sleeps and now must
    /// be rung; without arm flags, true if there was something to publish.
    #[inline]
    #[must_use = "the consumer may have to be rung"]
    pub fn publish(&mut self) -> bool {
        if self.head != self.published {
            self.store_head();
        } else if !self.early {
            return false;
        }
        if !self.ring.arm_flags {
            return true;
        }
        self.early = false;
        // SYNC POINT: head before flag, with the fence in `Consumer::arm`: either we see the
        // flag or the consumer sees our head.
        self.ring.memory.fence();
        self.ring.memory.take(SLEEPING)
    }

    /// As [`Self::publish`], in the middle of a burst: a consumer that goes to
    /// sleep at this moment may be overlooked, until [`Self::publish`] is
    /// called at the end of the burst, even if nothing was pushed since.
    ///
    /// With arm flags this is much cheaper: a full fence waits until all the
    /// messages have left this CPU.
    #[inline]
    #[must_use = "the consumer may have to be rung"]
    pub fn publish_early(&mut self) -> bool {
        if self.head == self.published {
            return false;
        }
        self.store_head();
        if !self.ring.arm_flags {
            return true;
        }
        self.early = true;
        self.ring.memory.take(SLEEPING)
    }

    #[inline]
    fn store_head(&mut self) {
        // SYNC POINT: release of the slots, with the acquire in `Consumer::load_head`.
        self.ring.memory.store_release(HEAD, self.head);
        if self.ring.next(self.published) == self.head {
            // Somebody waits for a single message; of many, the first are on their way already.
            self.ring.memory.demote(self.ring.slot(self.published));
            self.ring.memory.demote(HEAD);
        }
        self.published = self.head;
    }

    /// Asks to be rung when there is room. True: the queue is full and the
    /// caller may sleep. False: there is room, or messages are not published
    /// yet (or only early), or the queue is corrupt, as the next
    /// [`Self::try_push`] will tell.
    ///
    /// Without arm flags nobody rings, and true only means that it is full.
    #[must_use = "false means that there is something to do"]
    pub fn arm_for_room(&mut self) -> bool {
        if self.head != self.published || self.early {
            return false;
        }
        if self.ring.arm_flags {
            self.ring.memory.store_relaxed(ROOM_WANTED, 1);
            self.waiting = true;
            // SYNC POINT: flag before tail, with the fence in `Consumer::arm`: either we see the
            // tail or the consumer sees our flag before it sleeps.
            self.ring.memory.fence();
        }
        if matches!(self.find_room(), Ok(false)) {
            return true;
        }
        self.stop_waiting();
        false
    }

    fn stop_waiting(&mut self) {
        if self.waiting {
            self.waiting = false;
            self.ring.memory.store_relaxed(ROOM_WANTED, 0);
        }
    }

    /// Loads the consumer's index; true if a slot is free.
    #[cold]
    fn find_room(&mut self) -> Result<bool, Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        let ring = &self.ring;
        // SYNC POINT: acquire of freed slots, with the release in `Consumer::store_tail`.
        let index = ring.memory.load_acquire(TAIL);
        let checked = ring.check(index).and_then(|tail| {
            // It can have advanced only over what it was shown.
            if ring.distance(self.tail, tail) <= ring.distance(self.tail, self.published) {
                Ok(tail)
            } else {
                Err(Corrupt {
                    index,
                    capacity: ring.capacity,
                })
            }
        });
        match checked {
            Ok(tail) => {
                self.tail = tail;
                Ok(self.ring.next(self.head) != tail)
            }
            Err(corrupt) => {
                self.corrupt = Some(corrupt);
                Err(corrupt)
            }
        }
    }
}

#[cfg(test)]
#[path = "spsc_test.rs"]
mod tests;
