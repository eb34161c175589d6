// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The side of the message queue that receives.

use super::{Corrupt, HEAD, Layout, ROOM_WANTED, Ring, SLEEPING, SLOT_SIZE, TAIL};
use crate::{Error, QueueMemory};

/// The side that receives.
#[derive(Debug)]
pub struct Consumer<M> {
    ring: Ring<M>,
    /// Next slot to take.
    tail: u32,
    /// What the producer can see of `tail`.
    released: u32,
    /// The producer's index as last loaded; `tail` to `head` are messages.
    head: u32,
    /// We set [`SLEEPING`] and have not cleared it since.
    armed: bool,
    /// With arm flags, slots go back when so many are free: storing `tail` for every
    /// message would pull its cache line back and forth, which costs more than the message.
    batch: u32,
    /// The last time that there was something, it was one message.
    lone: bool,
    /// Slots were given back, and the producer may have asked for them at the same time.
    look_again: bool,
    corrupt: Option<Corrupt>,
}

impl<M: QueueMemory> Consumer<M> {
    /// Begins with the first message of a queue in memory whose index words are
    /// zero, or were zero until the producer began to use it.
    ///
    /// # Errors
    ///
    /// [`Error::BadQueue`]: the memory is too small, misaligned, or the slot size is wrong.
    pub fn new(memory: M, layout: Layout) -> Result<Self, Error> {
        let ring = Ring::new(memory, layout)?;
        ring.memory.store_release(TAIL, 0);
        Ok(Self::at(ring, 0))
    }

    /// Goes on with a queue where another consumer left it. With arm flags it
    /// may see messages again that the other had taken but not released.
    ///
    /// # Errors
    ///
    /// As [`Self::new`], and [`Error::CorruptQueue`] if an index is out of range.
    pub fn resume(memory: M, layout: Layout) -> Result<Self, Error> {
        let ring = Ring::new(memory, layout)?;
        let tail = ring.check(ring.memory.load_relaxed(TAIL))?;
        ring.check(ring.memory.load_relaxed(HEAD))?;
        Ok(Self::at(ring, tail))
    }

    fn at(ring: Ring<M>, tail: u32) -> Self {
        if ring.arm_flags {
            ring.memory.store_relaxed(SLEEPING, 0);
        }
        let batch = if ring.arm_flags {
            (ring.capacity / 8).max(1)
        } else {
            1
        };
        Self {
            ring,
            tail,
            released: tail,
            head: tail,
            armed: false,
            batch,
            lone: true,
            look_again: false,
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

    /// Copies the next message into `into`: the first bytes of its slot, as
    /// many as fit. False if there is no message.
    ///
    /// # Errors
    ///
    /// [`Corrupt`], also on every later call, once all messages before it have been popped.
    #[inline]
    pub fn try_pop(&mut self, into: &mut [u8]) -> Result<bool, Corrupt> {
        Ok(self.try_pop_sized(into, |_| usize::MAX)?.is_some())
    }

    /// As [`Self::try_pop`], but copies no more than the message is long:
    /// `len_of` is given the first 8 bytes of the copy and says how many bytes
    /// the whole is. Returns how many were copied: no more than `len_of` says,
    /// than fit, and than a slot has. Bytes of `into` behind those may change, too.
    ///
    /// Each byte is copied once: what `len_of` sees is what `into` holds.
    ///
    /// # Errors
    ///
    /// As [`Self::try_pop`].
    #[inline]
    pub fn try_pop_sized(
        &mut self,
        into: &mut [u8],
        len_of: impl FnOnce(&[u8; 8]) -> usize,
    ) -> Result<Option<usize>, Corrupt> {
        if self.tail == self.head && !self.load_head()? {
            return Ok(None);
        }
        if self.armed {
            self.disarm();
        }
        let most = into.len().min(self.ring.slot_size);
        let into = &mut into[..most];
        let slot = self.ring.slot(self.tail);
        // The first cache line as a whole, which needs no call.
        let (first, rest) = into.split_at_mut(most.min(SLOT_SIZE));
        self.ring.memory.read(slot, first);
        let len = match first.first_chunk() {
            Some(header) => len_of(header).min(most),
            None => most,
        };
        if let Some(behind) = len.checked_sub(SLOT_SIZE).filter(|&behind| behind > 0) {
            self.ring.memory.read(slot + SLOT_SIZE, &mut rest[..behind]);
        }
        self.tail = self.ring.next(self.tail);
        Ok(Some(len))
    }

    /// Gives the slots of popped messages back. True if the producer waits for
    /// room and now must be rung; never true without arm flags.
    ///
    /// With arm flags slots go back in batches of an eighth of the queue, when
    /// the producer asks for room, and in [`Self::arm`].
    #[inline]
    #[must_use = "the producer may have to be rung"]
    pub fn release(&mut self) -> bool {
        // Without a fence a producer that goes to sleep at the moment when slots are given back may
        // be overlooked here. It is seen by the next call, or by `arm`, which has a fence. A fence
        // here would wait each time until the producer's CPU has given up the line of `tail`.
        if self.ring.distance(self.released, self.tail) >= self.batch {
            self.store_tail();
            self.look_again = self.ring.arm_flags;
            return self.ring.arm_flags && self.ring.memory.take(ROOM_WANTED);
        }
        if self.look_again || self.ring.arm_flags && self.tail == self.head {
            self.look_again = false;
            if self.ring.memory.load_relaxed(ROOM_WANTED) != 0 {
                self.store_tail();
                return self.ring.memory.take(ROOM_WANTED);
            }
        }
        false
    }

    /// Asks to be rung for the next message. True: there is none, and the
    /// caller may sleep. False: call [`Self::try_pop`] and [`Self::release`]
    /// again, for there is a message, a producer to be rung, or a corrupt index.
    ///
    /// Without arm flags the producer always rings, and true only means empty.
    #[must_use = "false means that there is something to do"]
    pub fn arm(&mut self) -> bool {
        if self.tail != self.head {
            return false;
        }
        self.store_tail();
        if self.ring.arm_flags {
            self.ring.memory.store_relaxed(SLEEPING, 1);
            self.armed = true;
            // SYNC POINT: flag before head, with the fence in `Producer::publish`; and tail, also
            // as `release` stored it, before the producer's flag, with the fence in
            // `Producer::arm_for_room`.
            self.ring.memory.fence();
        }
        let idle = matches!(self.load_head(), Ok(false));
        if idle && !(self.ring.arm_flags && self.ring.memory.load_relaxed(ROOM_WANTED) != 0) {
            return true;
        }
        self.disarm();
        false
    }

    /// Takes back what [`Self::arm`] asked for, when something else ended the
    /// sleep. Popping a message does this too.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.ring.memory.store_relaxed(SLEEPING, 0);
        }
    }

    fn store_tail(&mut self) {
        if self.tail != self.released {
            // SYNC POINT: release of the freed slots, with the acquire in `Producer::find_room`.
            self.ring.memory.store_release(TAIL, self.tail);
            self.released = self.tail;
        }
    }

    /// Loads the producer's index; true if there is a message.
    #[inline]
    fn load_head(&mut self) -> Result<bool, Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        // The slot comes from the producer's cache as the index does: fetch both at once.
        // But if the producer sends batches, it is probably writing that slot just now.
        if self.lone {
            self.ring.memory.prefetch(self.ring.slot(self.tail));
        }
        // SYNC POINT: acquire of the slots, with the release in `Producer::publish`.
        match self.ring.check(self.ring.memory.load_acquire(HEAD)) {
            // The producer sees `released` at most, so it cannot go beyond the slot before.
            Ok(head)
                if self.ring.distance(self.tail, head)
                    < self.ring.capacity - self.ring.distance(self.released, self.tail) =>
            {
                self.head = head;
                if self.tail == head {
                    return Ok(false);
                }
                self.lone = self.ring.next(self.tail) == head;
                Ok(true)
            }
            Ok(index) => Err(self.break_with(Corrupt {
                index,
                capacity: self.ring.capacity,
            })),
            Err(corrupt) => Err(self.break_with(corrupt)),
        }
    }

    #[cold]
    fn break_with(&mut self, corrupt: Corrupt) -> Corrupt {
        self.corrupt = Some(corrupt);
        corrupt
    }
}
