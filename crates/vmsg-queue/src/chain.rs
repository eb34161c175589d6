// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Batches of descriptor chains, and where they are collected.

use core::fmt;

use vmsg_mem::{Pieces, RamSlice};

/// Names a chain that was taken from a queue, to give it back to the same
/// queue. Says nothing about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChainHead {
    pub(crate) id: u16,
}

impl ChainHead {
    /// How the driver names the chain: for logs and for records of what is in flight.
    pub const fn id(self) -> u16 {
        self.id
    }
}

/// One chain of a batch, within the pieces of the batch: it begins where the
/// one before it ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChainSlot {
    pub(crate) head: ChainHead,
    /// First writable piece.
    pub(crate) split: u32,
    /// After the last piece.
    pub(crate) end: u32,
}

impl ChainSlot {
    pub(crate) const EMPTY: Self = Self {
        head: ChainHead { id: 0 },
        split: 0,
        end: 0,
    };
}

mod sealed {
    use super::{ChainSlot, RamSlice};

    /// What the queue fills.
    ///
    /// The pieces pretend to be `'static` while they lie in the storage. Only
    /// a [`Batch`](super::Batch), which knows how long they are mapped, shows
    /// them: so nobody outside this crate may see these fields.
    pub struct Parts<'s> {
        pub(crate) pieces: &'s mut [RamSlice<'static>],
        pub(crate) chains: &'s mut [ChainSlot],
    }

    pub trait HasParts {
        #[doc(hidden)]
        fn parts(&mut self) -> Parts<'_>;
    }
}
use sealed::{HasParts, Parts};

/// Room for a batch of chains: [`ChainStorage`] or [`ChainArray`].
pub trait Storage: HasParts {}

/// Room for a batch of chains, on the heap. Make one for each worker and use it again and again.
#[cfg(feature = "alloc")]
pub struct ChainStorage {
    pieces: alloc::boxed::Box<[RamSlice<'static>]>,
    chains: alloc::boxed::Box<[ChainSlot]>,
}

#[cfg(feature = "alloc")]
impl ChainStorage {
    /// Room for `pieces` pieces of memory, in as many chains at most.
    ///
    /// A descriptor is one piece, unless it crosses from one window into
    /// another. The longest chain that can be taken at all is `pieces` long.
    pub fn with_capacity(pieces: usize) -> Self {
        let pieces = pieces.min(MAX_PIECES);
        Self {
            pieces: alloc::vec![RamSlice::EMPTY; pieces].into(),
            chains: alloc::vec![ChainSlot::EMPTY; pieces].into(),
        }
    }
}

#[cfg(feature = "alloc")]
impl HasParts for ChainStorage {
    #[inline]
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            pieces: &mut self.pieces,
            chains: &mut self.chains,
        }
    }
}

#[cfg(feature = "alloc")]
impl Storage for ChainStorage {}

#[cfg(feature = "alloc")]
impl fmt::Debug for ChainStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChainStorage({})", self.pieces.len())
    }
}

/// Room for a batch of at most `CHAINS` chains in `PIECES` pieces, without an allocator.
pub struct ChainArray<const CHAINS: usize, const PIECES: usize> {
    pieces: [RamSlice<'static>; PIECES],
    chains: [ChainSlot; CHAINS],
}

impl<const CHAINS: usize, const PIECES: usize> ChainArray<CHAINS, PIECES> {
    /// Room for a batch.
    pub const fn new() -> Self {
        Self {
            pieces: [RamSlice::EMPTY; PIECES],
            chains: [ChainSlot::EMPTY; CHAINS],
        }
    }
}

impl<const CHAINS: usize, const PIECES: usize> Default for ChainArray<CHAINS, PIECES> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const CHAINS: usize, const PIECES: usize> HasParts for ChainArray<CHAINS, PIECES> {
    #[inline]
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            pieces: &mut self.pieces,
            chains: &mut self.chains,
        }
    }
}

impl<const CHAINS: usize, const PIECES: usize> Storage for ChainArray<CHAINS, PIECES> {}

impl<const CHAINS: usize, const PIECES: usize> fmt::Debug for ChainArray<CHAINS, PIECES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChainArray({CHAINS}, {PIECES})")
    }
}

/// More would not be counted in a [`ChainSlot`]; no queue needs as many.
const MAX_PIECES: usize = 1 << 24;

/// A number of pieces, as a [`ChainSlot`] has it.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "at most MAX_PIECES")]
pub(crate) fn as_count(pieces: usize) -> u32 {
    debug_assert!(pieces <= MAX_PIECES);
    pieces as u32
}

/// The pieces of a batch while it grows.
#[derive(Default)]
pub(crate) struct PieceList<'b> {
    slots: &'b mut [RamSlice<'b>],
    len: usize,
}

impl<'b> PieceList<'b> {
    #[inline]
    pub(crate) fn new(slots: &'b mut [RamSlice<'static>]) -> Self {
        let room = slots.len().min(MAX_PIECES);
        // SAFETY: 'static is the fiction of the storage (see `Parts`): nobody reads its slots but
        // through a list or the batch that comes of it, which has the true lifetime again and holds
        // on to the storage; and each list shows only what was put into itself.
        let slots = unsafe {
            core::mem::transmute::<&'b mut [RamSlice<'static>], &'b mut [RamSlice<'b>]>(slots)
        };
        Self {
            slots: &mut slots[..room],
            len: 0,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds a piece; false if there is no room.
    #[must_use]
    pub(crate) fn push(&mut self, piece: RamSlice<'b>) -> bool {
        let Some(slot) = self.room().first_mut() else {
            return false;
        };
        *slot = piece;
        self.extend(1);
        true
    }

    /// The slots that are not in use. What is put there counts once the list
    /// is [extended](Self::extend) over it.
    #[inline(always)]
    pub(crate) fn room(&mut self) -> &mut [RamSlice<'b>] {
        self.slots.get_mut(self.len..).unwrap_or_default()
    }

    /// Counts the first `count` slots of the [room](Self::room), into which pieces were put.
    #[inline(always)]
    pub(crate) fn extend(&mut self, count: usize) {
        debug_assert!(count <= self.slots.len() - self.len);
        self.len += count;
    }

    /// Forgets all pieces from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// What has been pushed until now.
    pub(crate) fn so_far(&self) -> &[RamSlice<'b>] {
        &self.slots[..self.len]
    }

    /// What was pushed.
    pub(crate) fn finish(self) -> &'b [RamSlice<'b>] {
        &self.slots[..self.len]
    }
}

/// Frames, or whatever else is written, each into as many whole chains as it takes: how much somebody is about to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// How many.
    pub count: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// Bytes of the longest.
    pub longest: usize,
}

impl Need {
    /// True if these chains are enough, or more than that.
    pub(crate) fn is_met(&self, chains: &[ChainSlot], pieces: &[RamSlice<'_>]) -> bool {
        let (mut total, mut least, mut most) = (0usize, usize::MAX, 0);
        for chain in chains {
            let part = pieces.get(chain.split as usize..chain.end as usize);
            let part = part.unwrap_or_default().iter();
            let room = part.fold(0usize, |sum, piece| sum.saturating_add(piece.len()));
            total = total.saturating_add(room);
            least = least.min(room);
            most = most.max(room);
        }
        // Each into one chain; or into several, of which the last is not full.
        (chains.len() >= self.count && least >= self.longest)
            || total >= self.bytes.saturating_add(self.count.saturating_mul(most))
    }
}

/// Chains taken from a queue together, in the order in which the driver made
/// them available. Holds on to the storage and to the memory, not to the queue.
#[derive(Clone, Copy)]
pub struct Batch<'b> {
    pieces: &'b [RamSlice<'b>],
    /// Each begins in `pieces` where the one before it ends: 0 ≤ split ≤ end ≤ pieces.len().
    chains: &'b [ChainSlot],
}

impl<'b> Batch<'b> {
    /// No chains.
    pub const EMPTY: Batch<'static> = Batch {
        pieces: &[],
        chains: &[],
    };

    /// # Safety
    ///
    /// From 0 on, `split` and `end` of one chain after another must not go
    /// down, nor go beyond `pieces`.
    #[inline]
    pub(crate) unsafe fn new(pieces: &'b [RamSlice<'b>], chains: &'b [ChainSlot]) -> Self {
        Self { pieces, chains }
    }

    /// Number of chains.
    #[inline]
    pub const fn len(&self) -> usize {
        self.chains.len()
    }

    /// True if the driver had made no chain available.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// The chain at `index`, counted from 0.
    #[inline]
    pub fn get(&self, index: usize) -> Option<Chain<'b>> {
        let slot = self.chains.get(index)?;
        let before = index
            .checked_sub(1)
            .and_then(|index| self.chains.get(index));
        Some(self.chain(before.map_or(0, |slot| slot.end), slot))
    }

    /// The chains in order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Chain<'b>> + use<'b> {
        let batch = *self;
        let mut start = 0;
        self.chains.iter().map(move |slot| {
            let chain = batch.chain(start, slot);
            start = slot.end;
            chain
        })
    }

    /// `start` is where the chain before `slot` ends.
    #[inline]
    fn chain(&self, start: u32, slot: &ChainSlot) -> Chain<'b> {
        let (start, split, end) = (start as usize, slot.split as usize, slot.end as usize);
        debug_assert!(start <= split && split <= end && end <= self.pieces.len());
        // SAFETY: the batch was promised that start ≤ split ≤ end ≤ pieces.len().
        let (readable, writable) = unsafe {
            (
                self.pieces.get_unchecked(start..split),
                self.pieces.get_unchecked(split..end),
            )
        };
        Chain {
            head: slot.head,
            readable,
            writable,
        }
    }
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// One descriptor chain, checked and translated.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'b> {
    head: ChainHead,
    readable: &'b [RamSlice<'b>],
    writable: &'b [RamSlice<'b>],
}

impl<'b> Chain<'b> {
    /// What to give back with [`DeviceQueue::complete`](crate::DeviceQueue::complete).
    #[inline]
    pub const fn head(&self) -> ChainHead {
        self.head
    }

    /// The memory of the device-readable buffers, as it is to be given to
    /// vectored I/O. No piece is empty.
    #[inline]
    pub const fn readable_slices(&self) -> &'b [RamSlice<'b>] {
        self.readable
    }

    /// The memory of the device-writable buffers. No piece is empty.
    #[inline]
    pub const fn writable_slices(&self) -> &'b [RamSlice<'b>] {
        self.writable
    }

    /// The device-readable buffers, one after another. May be empty.
    #[inline]
    pub fn readable(&self) -> Pieces<'b> {
        Pieces::new(self.readable)
    }

    /// The device-writable buffers, one after another. May be empty.
    #[inline]
    pub fn writable(&self) -> Pieces<'b> {
        Pieces::new(self.writable)
    }
}
