// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The AMP layout: memory that describes itself, with a message queue each way.
//!
//! | what | bytes | written by |
//! |---|---|---|
//! | [`Layout`] | 64 | device, its magic number last |
//! | queue head of the device | 8 | device |
//! | queue head of the driver | 8 | driver |
//! | elements of the device's queue: messages to the driver | number × size | device |
//! | elements of the driver's queue | number × size | driver |
//! | [`Notifications`] of each, perhaps | 16 or 24 for each word of bits | its owner |
//!
//! A queue head is two words of 32 bits, little-endian: magic number (low half) and [`Status`], then `tail`, the element
//! that its owner writes next in its own queue (low half), and `head`, the one that its owner reads next in the
//! other side's. As no word has two writers, plain loads and stores of 32 bits do.
//!
//! [`Queue`] is one end's view of both queues, [`Life`] how two ends come together and part.
//!
//! Source: Linux's `virtio_msg_amp_shmem.h`, the posting of 2026.

use crate::spsc::{Corrupt, PushError};
use crate::{Error, QueueMemory};

mod layout;
mod life;
mod notify;

pub use layout::{Layout, LayoutError};
pub use life::{End, Event, Life, Start, Store};
pub use notify::Notifications;

/// Which end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Writes the layout.
    Device,
    /// Reads it.
    Driver,
}

/// Stands in the low half of a queue head's first word once its owner is there.
pub const QUEUE_MAGIC: u16 = 0x514f;

/// Which bits of the high half are the status; others are flags that mean nothing here.
const STATUS_MASK: u16 = 0x1f;

/// What a side says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Beginning; its indices mean nothing.
    Init,
    /// Its indices are zero.
    Ready,
    /// Messages go.
    Run,
    /// It has ended: to be taken for a reset.
    Shutdown,
    /// It takes the other side for dead.
    PeerDead,
    /// No status that is known.
    Unknown,
}

impl Status {
    /// As it stands in memory.
    pub const fn bits(self) -> u16 {
        match self {
            Self::Init => 0,
            Self::Ready => 1,
            Self::Run => 2,
            Self::Shutdown => 3,
            Self::PeerDead => 4,
            Self::Unknown => STATUS_MASK,
        }
    }

    const fn of(bits: u16) -> Self {
        match bits & STATUS_MASK {
            0 => Self::Init,
            1 => Self::Ready,
            2 => Self::Run,
            3 => Self::Shutdown,
            4 => Self::PeerDead,
            _ => Self::Unknown,
        }
    }
}

/// What a queue head says, loaded word by word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Magic number and status.
    pub state: u32,
    /// `tail` and `head`.
    pub indices: u32,
}

impl Head {
    /// Loads the one at `offset`.
    pub fn load<M: QueueMemory>(memory: &M, offset: usize) -> Self {
        let state = memory.load_acquire(offset);
        Self {
            state,
            indices: memory.load_acquire(offset + 4),
        }
    }

    /// Its status; `None` without the magic number.
    pub const fn status(&self) -> Option<Status> {
        let [low, high] = halves(self.state);
        match low == QUEUE_MAGIC {
            true => Some(Status::of(high)),
            false => None,
        }
    }

    /// The element that its owner writes next.
    pub const fn tail(&self) -> u16 {
        halves(self.indices)[0]
    }

    /// The element that its owner reads next.
    pub const fn head(&self) -> u16 {
        halves(self.indices)[1]
    }
}

/// The first word of a queue head.
pub(crate) const fn state_word(status: Status) -> u32 {
    word(QUEUE_MAGIC, status.bits())
}

/// The second one.
pub(crate) const fn index_word(tail: u16, head: u16) -> u32 {
    word(tail, head)
}

const fn word(low: u16, high: u16) -> u32 {
    (high as u32) << 16 | low as u32
}

const fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_le_bytes();
    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
}

/// Both queues as one end has them: it sends through its own and receives through the other side's.
///
/// As in [`spsc`](crate::spsc), own indices are only ever stored, and the other side's are checked each time they are loaded.
/// There are no flags that say who sleeps: each [`Self::publish`] that publishes something is to be followed by a
/// ring, and who waits for room has to look again.
#[derive(Debug)]
pub struct Queue<M> {
    memory: M,
    /// Offsets: queue heads, then the elements of either queue.
    own: usize,
    theirs: usize,
    outgoing: usize,
    incoming: usize,
    elements: u16,
    size: u16,
    /// Next element to write, and what the other side can see of that.
    tail: u16,
    published: u16,
    /// Next element to read, and what the other side can see of that.
    head: u16,
    released: u16,
    /// The other side's indices as last loaded.
    their_tail: u16,
    their_head: u16,
    corrupt: Option<Corrupt>,
}

impl<M: QueueMemory> Queue<M> {
    /// In the memory that `layout` describes, which begins with it, from `start` on. The indices are stored.
    ///
    /// # Errors
    ///
    /// [`Error::BadQueue`]: the memory is smaller than the layout or misaligned; [`Error::CorruptQueue`]: `start` is out of range.
    pub fn new(memory: M, layout: &Layout, side: Side, start: Start) -> Result<Self, Error> {
        let bad = Error::BadQueue {
            bytes: memory.len(),
            slot_size: usize::from(layout.element_size()),
        };
        if !memory.is_aligned() || memory.len() < layout.len() {
            return Err(bad);
        }
        let elements = layout.elements();
        for index in [start.tail, start.head] {
            if index >= elements {
                return Err(Error::CorruptQueue {
                    index: index.into(),
                    capacity: elements.into(),
                });
            }
        }
        let other = match side {
            Side::Device => Side::Driver,
            Side::Driver => Side::Device,
        };
        let queue = Self {
            own: layout.head(side),
            theirs: layout.head(other),
            outgoing: layout.queue(side),
            incoming: layout.queue(other),
            elements,
            size: layout.element_size(),
            tail: start.tail,
            published: start.tail,
            head: start.head,
            released: start.head,
            their_tail: start.head,
            their_head: start.tail,
            corrupt: None,
            memory,
        };
        queue.store();
        Ok(queue)
    }

    /// Number of elements each way; one always stays free.
    pub const fn capacity(&self) -> u32 {
        self.elements as u32
    }

    /// Longest message in bytes.
    pub const fn element_size(&self) -> usize {
        self.size as usize
    }

    /// The memory.
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// Messages pushed since the last [`Self::publish`].
    pub const fn unpublished(&self) -> u32 {
        self.distance(self.published, self.tail) as u32
    }

    #[inline]
    const fn next(&self, index: u16) -> u16 {
        let next = index + 1;
        if next == self.elements { 0 } else { next }
    }

    #[inline]
    const fn distance(&self, from: u16, to: u16) -> u16 {
        if to >= from {
            to - from
        } else {
            self.elements - from + to
        }
    }

    #[inline]
    fn element(&self, queue: usize, index: u16) -> usize {
        debug_assert!(index < self.elements);
        queue + usize::from(index) * usize::from(self.size)
    }

    fn store(&self) {
        // SYNC POINT: release of written and of read elements, with the acquire in `load`.
        self.memory
            .store_release(self.own + 4, index_word(self.published, self.released));
    }

    /// Loads the other side's indices.
    #[cold]
    fn load(&mut self) -> Result<(), Corrupt> {
        if let Some(corrupt) = self.corrupt {
            return Err(corrupt);
        }
        // SYNC POINT: acquire of what was written, and of what was given back.
        let [tail, head] = halves(self.memory.load_acquire(self.theirs + 4));
        // Both only go forward: `tail` not past what this side still has to read, `head` not past what it was shown.
        let tail_is = tail < self.elements
            && self.distance(self.released, tail) >= self.distance(self.released, self.their_tail);
        let head_is = head < self.elements
            && self.distance(self.their_head, head)
                <= self.distance(self.their_head, self.published);
        if tail_is && head_is {
            self.their_tail = tail;
            self.their_head = head;
            return Ok(());
        }
        let corrupt = Corrupt {
            index: if tail_is { head } else { tail }.into(),
            capacity: self.elements.into(),
        };
        self.corrupt = Some(corrupt);
        Err(corrupt)
    }

    /// Puts a message into the next element, seen by the other side after [`Self::publish`]. Bytes of the element
    /// behind the message stay as they are.
    ///
    /// # Errors
    ///
    /// [`PushError`]; nothing has changed then.
    #[inline]
    pub fn try_push(&mut self, message: &[u8]) -> Result<(), PushError> {
        if message.len() > self.element_size() {
            return Err(PushError::TooLong);
        }
        let next = self.next(self.tail);
        if next == self.their_head {
            self.load()?;
            if next == self.their_head {
                return Err(PushError::Full);
            }
        }
        self.memory
            .write(self.element(self.outgoing, self.tail), message);
        self.tail = next;
        Ok(())
    }

    /// Lets the other side see everything pushed; true if it must be rung, for there was something.
    #[inline]
    #[must_use = "the other side has to be rung"]
    pub fn publish(&mut self) -> bool {
        if self.tail == self.published {
            return false;
        }
        self.published = self.tail;
        self.released = self.head;
        self.store();
        true
    }

    /// True if no element is free now. Nobody rings when that changes.
    ///
    /// False also when messages are not published yet, or the queue is corrupt, as the next [`Self::try_push`] tells.
    pub fn is_full(&mut self) -> bool {
        self.tail == self.published
            && self.load().is_ok()
            && self.next(self.tail) == self.their_head
    }

    /// Copies the next message into `into`, as [`Consumer::try_pop_sized`](crate::spsc::Consumer::try_pop_sized) does.
    ///
    /// # Errors
    ///
    /// [`Corrupt`], also on every later call, once all messages before it have been popped. An element that begins with eight
    /// zero bytes is an error, too: nobody has written it since the other side began.
    #[inline]
    pub fn try_pop_sized(
        &mut self,
        into: &mut [u8],
        len_of: impl FnOnce(&[u8; 8]) -> usize,
    ) -> Result<Option<usize>, Corrupt> {
        if self.head == self.their_tail {
            self.load()?;
            if self.head == self.their_tail {
                return Ok(None);
            }
        }
        let most = into.len().min(self.element_size());
        let into = &mut into[..most];
        let element = self.element(self.incoming, self.head);
        let (first, rest) = into.split_at_mut(most.min(64));
        self.memory.read(element, first);
        if first.iter().take(8).all(|byte| *byte == 0) && !first.is_empty() {
            // No message begins so. Linux's driver zeroes its elements when it begins: it does so anew, and this side has not noticed.
            let corrupt = Corrupt {
                index: self.head.into(),
                capacity: self.elements.into(),
            };
            self.corrupt = Some(corrupt);
            return Err(corrupt);
        }
        let len = match first.first_chunk() {
            Some(header) => len_of(header).min(most),
            None => most,
        };
        if let Some(behind) = len.checked_sub(64).filter(|&behind| behind > 0) {
            self.memory.read(element + 64, &mut rest[..behind]);
        }
        self.head = self.next(self.head);
        Ok(Some(len))
    }

    /// Gives the elements of popped messages back.
    #[inline]
    pub fn release(&mut self) {
        if self.head != self.released {
            self.released = self.head;
            self.store();
        }
    }

    /// True if there is no message. False: pop again; there is one, or the queue is corrupt.
    pub fn is_empty(&mut self) -> bool {
        if self.head == self.their_tail && self.load().is_err() {
            return false;
        }
        self.head == self.their_tail
    }
}

#[cfg(test)]
#[path = "amp_test.rs"]
mod tests;
