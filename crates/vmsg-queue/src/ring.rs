// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The three areas of a split queue, as they lie in memory (virtio 1.3, section 2.7).

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vmsg_mem::{BusAddr, RamSlice};

use crate::cells::{cells, snapshot};
use crate::config::{DESCRIPTOR_SIZE, device_len, driver_len};

/// `VIRTQ_DESC_F_NEXT`: the chain goes on with descriptor `next`.
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes to the buffer and does not read it.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` in the available ring, `VIRTQ_USED_F_NO_NOTIFY`
/// in the used ring: do not notify me.
pub(crate) const NO_NOTIFICATION: u16 = 1;

/// A private copy of a descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) addr: BusAddr,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    fn to_words(self) -> (u64, u64) {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        (self.addr.0, rest)
    }
}

/// A private copy of a descriptor as it lies in memory: two words, in the order
/// of this machine.
#[derive(Clone, Copy)]
pub(crate) struct Words {
    pub(crate) addr: u64,
    /// Length, flags, next: from the low bits to the high ones.
    pub(crate) rest: u64,
}

impl Words {
    /// The bits of `rest` that are the length.
    pub(crate) const LEN: u64 = 0xffff_ffff;

    /// `flags` where they are in `rest`.
    pub(crate) const fn flags(flags: u16) -> u64 {
        (flags as u64) << 32
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "takes a word apart")]
    pub(crate) const fn len(self) -> u32 {
        self.rest as u32
    }

    #[inline(always)]
    pub(crate) const fn has(self, flag: u16) -> bool {
        self.rest & Self::flags(flag) != 0
    }

    #[inline(always)]
    pub(crate) const fn next(self) -> u16 {
        (self.rest >> 48) as u16
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "takes a word apart")]
    pub(crate) const fn take_apart(self) -> Descriptor {
        Descriptor {
            addr: BusAddr(self.addr),
            len: self.len(),
            flags: (self.rest >> 32) as u16,
            next: self.next(),
        }
    }
}

/// Descriptors in shared memory.
pub(crate) trait Table: Copy {
    /// Number of descriptors.
    fn len(self) -> u32;
    /// Reads a descriptor once; `None` outside the table.
    fn get(self, index: u16) -> Option<Descriptor>;
}

/// A table that is aligned: that of a queue, and most indirect ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DescriptorTable<'m>(&'m [[AtomicU64; 2]]);

impl<'m> DescriptorTable<'m> {
    /// `None` if `ram` is too short for `len` descriptors or not aligned to 8
    /// bytes in this process.
    #[inline(always)]
    pub(crate) fn new(ram: RamSlice<'m>, len: u32) -> Option<Self> {
        cells(ram, 0, usize::try_from(len).ok()?).map(Self)
    }

    /// Reads a descriptor once; `None` outside the table.
    #[inline(always)]
    pub(crate) fn words(self, index: u16) -> Option<Words> {
        let [addr, rest] = self.0.get(usize::from(index))?;
        Some(Words {
            addr: u64::from_le(addr.load(Ordering::Relaxed)),
            rest: u64::from_le(rest.load(Ordering::Relaxed)),
        })
    }

    /// Writes a descriptor; false outside the table.
    #[inline]
    pub(crate) fn set(self, index: u16, descriptor: Descriptor) -> bool {
        let Some([addr, rest]) = self.0.get(usize::from(index)) else {
            return false;
        };
        let words = descriptor.to_words();
        addr.store(words.0.to_le(), Ordering::Relaxed);
        rest.store(words.1.to_le(), Ordering::Relaxed);
        true
    }
}

impl Table for DescriptorTable<'_> {
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "made from a u32")]
    fn len(self) -> u32 {
        self.0.len() as u32
    }

    #[inline(always)]
    fn get(self, index: u16) -> Option<Descriptor> {
        self.words(index).map(Words::take_apart)
    }
}

/// An indirect table at an odd address.
#[derive(Clone, Copy)]
pub(crate) struct UnalignedTable<'m>(RamSlice<'m>);

impl<'m> UnalignedTable<'m> {
    /// `ram` must be a whole number of descriptors, at most `u32::MAX` bytes.
    pub(crate) fn new(ram: RamSlice<'m>) -> Self {
        Self(ram)
    }
}

impl Table for UnalignedTable<'_> {
    fn len(self) -> u32 {
        u32::try_from(self.0.len() / DESCRIPTOR_SIZE).unwrap_or(u32::MAX)
    }

    fn get(self, index: u16) -> Option<Descriptor> {
        let bytes = snapshot::<DESCRIPTOR_SIZE>(self.0, usize::from(index) * DESCRIPTOR_SIZE)?;
        let words = u128::from_le_bytes(bytes);
        #[allow(clippy::cast_possible_truncation, reason = "takes a word apart")]
        let (addr, rest) = (words as u64, (words >> 64) as u64);
        Some(Words { addr, rest }.take_apart())
    }
}

/// The available ring: written by the driver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvailRing<'m> {
    flags: &'m AtomicU16,
    index: &'m AtomicU16,
    heads: &'m [AtomicU16],
    used_event: Option<&'m AtomicU16>,
}

impl<'m> AvailRing<'m> {
    pub(crate) const fn len(size: u16, event_idx: bool) -> usize {
        driver_len(size, event_idx)
    }

    /// `None` if `ram` is too short or not aligned in this process.
    #[inline]
    pub(crate) fn new(ram: RamSlice<'m>, size: u16, event_idx: bool) -> Option<Self> {
        let words = cells(ram, 0, Self::len(size, event_idx) / 2)?;
        let ([flags, index], rest) = words.split_first_chunk()?;
        let (heads, rest) = rest.split_at_checked(usize::from(size))?;
        Some(Self {
            flags,
            index,
            heads,
            used_event: rest.first(),
        })
    }

    /// The index after the newest entry; what it covers is visible afterwards.
    #[inline]
    pub(crate) fn index(&self) -> u16 {
        // SYNC POINT: pairs with the driver's release of the index.
        u16::from_le(self.index.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn release_index(&self, index: u16) {
        // SYNC POINT: pairs with the device's acquire of the index.
        self.index.store(index.to_le(), Ordering::Release);
    }

    /// The entry at `index`, which is cut to the size of the ring.
    #[inline]
    pub(crate) fn head(&self, index: u16) -> u16 {
        let slot = usize::from(index) & (self.heads.len() - 1);
        u16::from_le(self.heads[slot].load(Ordering::Relaxed))
    }

    /// The entries from `index`, which is cut to the size of the ring, to the
    /// end of the ring; those that follow are at its beginning.
    #[inline]
    pub(crate) fn heads_from(&self, index: u16) -> &'m [AtomicU16] {
        &self.heads[usize::from(index) & (self.heads.len() - 1)..]
    }

    #[inline]
    pub(crate) fn set_head(&self, index: u16, head: u16) {
        let slot = usize::from(index) & (self.heads.len() - 1);
        self.heads[slot].store(head.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn flags(&self) -> u16 {
        u16::from_le(self.flags.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_flags(&self, flags: u16) {
        self.flags.store(flags.to_le(), Ordering::Relaxed);
    }

    /// The used index after which the driver wants to be notified; `None` without EVENT_IDX.
    #[inline]
    pub(crate) fn used_event(&self) -> Option<u16> {
        self.used_event
            .map(|event| u16::from_le(event.load(Ordering::Relaxed)))
    }

    /// Does nothing without EVENT_IDX.
    #[inline]
    pub(crate) fn set_used_event(&self, index: u16) {
        if let Some(event) = self.used_event {
            event.store(index.to_le(), Ordering::Relaxed);
        }
    }
}

/// The used ring: written by the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UsedRing<'m> {
    flags: &'m AtomicU16,
    index: &'m AtomicU16,
    elements: &'m [[AtomicU32; 2]],
    avail_event: Option<&'m AtomicU16>,
}

impl<'m> UsedRing<'m> {
    pub(crate) const fn len(size: u16, event_idx: bool) -> usize {
        device_len(size, event_idx)
    }

    /// `None` if `ram` is too short or not aligned in this process.
    #[inline]
    pub(crate) fn new(ram: RamSlice<'m>, size: u16, event_idx: bool) -> Option<Self> {
        let [flags, index] = cells(ram, 0, 2)? else {
            return None;
        };
        let elements = cells(ram, 4, usize::from(size))?;
        let avail_event = if event_idx {
            Some(cells(ram, device_len(size, false), 1)?.first()?)
        } else {
            None
        };
        Some(Self {
            flags,
            index,
            elements,
            avail_event,
        })
    }

    /// The index after the newest element; what it covers is visible afterwards.
    #[inline]
    pub(crate) fn index(&self) -> u16 {
        // SYNC POINT: pairs with the device's release of the index.
        u16::from_le(self.index.load(Ordering::Acquire))
    }

    #[inline]
    pub(crate) fn release_index(&self, index: u16) {
        // SYNC POINT: pairs with the driver's acquire of the index.
        self.index.store(index.to_le(), Ordering::Release);
    }

    /// The element at `index`, which is cut to the size of the ring: chain and length.
    #[inline]
    pub(crate) fn element(&self, index: u16) -> (u32, u32) {
        let [id, len] = &self.elements[usize::from(index) & (self.elements.len() - 1)];
        (
            u32::from_le(id.load(Ordering::Relaxed)),
            u32::from_le(len.load(Ordering::Relaxed)),
        )
    }

    #[inline]
    pub(crate) fn set_element(&self, index: u16, id: u16, len: u32) {
        let [first, second] = &self.elements[usize::from(index) & (self.elements.len() - 1)];
        first.store(u32::from(id).to_le(), Ordering::Relaxed);
        second.store(len.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn flags(&self) -> u16 {
        u16::from_le(self.flags.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_flags(&self, flags: u16) {
        self.flags.store(flags.to_le(), Ordering::Relaxed);
    }

    /// The available index after which the device wants to be notified; `None` without EVENT_IDX.
    #[inline]
    pub(crate) fn avail_event(&self) -> Option<u16> {
        self.avail_event
            .map(|event| u16::from_le(event.load(Ordering::Relaxed)))
    }

    /// Does nothing without EVENT_IDX.
    #[inline]
    pub(crate) fn set_avail_event(&self, index: u16) {
        if let Some(event) = self.avail_event {
            event.store(index.to_le(), Ordering::Relaxed);
        }
    }
}

/// True if moving an index from `old` to `new` went past `event`, the index
/// after which the peer wants to be notified (section 2.7.7.2, 2.7.10).
#[inline]
pub(crate) fn passed_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
