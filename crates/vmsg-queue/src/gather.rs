// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From descriptors to pieces of memory.
//!
//! [`Gather::chain`] takes any chain and tells what is wrong with it.
//! [`Gather::run`] is the hot path: it takes chains that are plainly good and
//! lie in one window, and stops at the first of which it does not know. It
//! calls nothing, so that all of its state stays in registers.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, Ordering};

use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice, Window};

use crate::QueueError;
use crate::chain::{ChainHead, ChainSlot, PieceList, as_count};
use crate::config::DESCRIPTOR_LEN;
use crate::ring::{
    Descriptor, DescriptorTable, INDIRECT, NEXT, Table, UnalignedTable, WRITE, Words,
};

/// A chain may be this many bytes long (virtio 1.3, section 2.7.5.2).
pub(crate) const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// Why a chain was not collected; [`Gather::explain`] makes an error of it.
#[derive(Clone, Copy)]
pub(crate) enum Stop {
    /// The storage has no room for all of it.
    Full,
    BadHead,
    BadNext {
        next: u16,
        len: u32,
    },
    Loop,
    TooLarge,
    ReadableAfterWritable,
    ZeroLength {
        addr: BusAddr,
    },
    MisplacedIndirect,
    BadIndirectTable {
        addr: BusAddr,
        len: u32,
    },
    /// Not in the windows, or not in writable ones.
    Memory {
        addr: BusAddr,
        len: u32,
        access: Access,
    },
    /// An indirect table that is not in one piece of memory.
    TableMemory {
        addr: BusAddr,
        len: u32,
    },
}

/// A window as the hot path needs it.
#[derive(Clone, Copy)]
struct Near<'b> {
    base: u64,
    ram: RamSlice<'b>,
    writable: bool,
    /// Longest buffer that `plain` takes.
    most: u64,
}

impl<'b> Near<'b> {
    /// This many buffers of the longest kind are as much as a chain may have.
    const MOST_BUFFERS: usize = 1 << 10;
    const LONGEST: u64 = MAX_CHAIN_BYTES >> 10;

    fn new(window: Option<&Window<'b>>) -> Self {
        let ram = window.map_or(RamSlice::EMPTY, Window::ram);
        Self {
            base: window.map_or(0, |window| window.base().0),
            ram,
            most: Self::LONGEST.min(ram.len() as u64),
            writable: window.is_some_and(|window| window.access() == Access::ReadWrite),
        }
    }

    #[inline(always)]
    fn get(&self, addr: BusAddr, len: u32, write: bool) -> Option<RamSlice<'b>> {
        if write && !self.writable {
            return None;
        }
        // An address before the window becomes an offset past its end.
        let offset = usize::try_from(addr.0.wrapping_sub(self.base)).ok()?;
        self.ram.get(offset, usize::try_from(len).ok()?)
    }

    /// The buffer of a descriptor, if it is not empty, not very long, and
    /// wholly in the window, whether that is writable or not; and the
    /// descriptor is not an indirect one.
    #[inline(always)]
    fn buffer(&self, descriptor: Words) -> Option<RamSlice<'b>> {
        // With the flag this is more than any length, and an empty buffer is, less one, too.
        let len = descriptor.rest & (Words::LEN | Words::flags(INDIRECT));
        if len.wrapping_sub(1) >= self.most {
            return None;
        }
        // An address before the window becomes an offset past its end. The other subtraction
        // cannot wrap: `len` is at most `most`, which is at most the length of the window.
        let offset = descriptor.addr.wrapping_sub(self.base);
        if offset > self.ram.len() as u64 - len {
            return None;
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "at most the length of the window"
        )]
        let (offset, len) = (offset as usize, len as usize);
        // SAFETY: offset + len ≤ ram.len(), so this is a part of the window.
        Some(unsafe {
            let ptr = NonNull::new_unchecked(self.ram.as_ptr().add(offset));
            RamSlice::from_raw_parts(ptr, len)
        })
    }
}

/// Kinds of chains that [`Gather::run`] takes.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// One buffer.
    Single,
    /// Any number of buffers in the table of the queue.
    Direct,
    /// Any number of buffers in an indirect table.
    Table,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Single, Self::Direct, Self::Table];
}

/// Collects the chains of a batch.
pub(crate) struct Gather<'b> {
    space: AddressSpace<'b>,
    /// The window of the last buffer: the next one is mostly in it, too.
    near: Near<'b>,
    indirect: bool,
    pub(crate) list: PieceList<'b>,
}

/// What is known about the chain at hand.
struct Progress {
    bytes: u64,
    /// First writable piece, once there was one.
    split: Option<usize>,
}

impl<'b> Gather<'b> {
    pub(crate) fn new(space: AddressSpace<'b>, list: PieceList<'b>, indirect: bool) -> Self {
        Self {
            space,
            near: Near::new(space.windows().first()),
            indirect,
            list,
        }
    }

    /// Adds all buffers of the chain that begins at `head`; returns the number
    /// of the first writable piece, or of the one after the last.
    #[inline(never)]
    pub(crate) fn chain(&mut self, table: DescriptorTable<'b>, head: u16) -> Result<u32, Stop> {
        let mut chain = Progress {
            bytes: 0,
            split: None,
        };
        let first = table.get(head).ok_or(Stop::BadHead)?;
        if let Some(outer) = self.walk(&mut chain, table, first)? {
            self.indirect_table(&mut chain, outer)?;
        }
        Ok(as_count(chain.split.unwrap_or(self.list.len())))
    }

    /// Follows a chain through one table. Returns the indirect descriptor at which it leaves it.
    fn walk(
        &mut self,
        chain: &mut Progress,
        table: impl Table,
        first: Descriptor,
    ) -> Result<Option<Descriptor>, Stop> {
        let mut descriptor = first;
        let mut left = table.len();
        while descriptor.flags & INDIRECT == 0 {
            self.buffer(chain, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(None);
            }
            left -= 1;
            if left == 0 {
                return Err(Stop::Loop);
            }
            let next = descriptor.next;
            descriptor = match table.get(next) {
                Some(descriptor) => descriptor,
                None => {
                    let len = table.len();
                    return Err(Stop::BadNext { next, len });
                }
            };
        }
        Ok(Some(descriptor))
    }

    /// The end of a chain that is an indirect table. Its WRITE flag means nothing (2.7.5.3.2).
    fn indirect_table(&mut self, chain: &mut Progress, outer: Descriptor) -> Result<(), Stop> {
        let Descriptor { addr, len, .. } = outer;
        if !self.indirect || outer.flags & NEXT != 0 {
            return Err(Stop::MisplacedIndirect);
        }
        if len == 0 || len % DESCRIPTOR_LEN != 0 || len / DESCRIPTOR_LEN > 1 << 16 {
            return Err(Stop::BadIndirectTable { addr, len });
        }
        let ram = match self.near.get(addr, len, false) {
            Some(ram) => ram,
            None => find_table(self.space, addr, len)?,
        };
        // The table may begin anywhere: only the rings have to be aligned.
        let inner = match DescriptorTable::new(ram, len / DESCRIPTOR_LEN) {
            Some(table) => {
                let first = table.get(0).ok_or(Stop::BadHead)?;
                self.walk(chain, table, first)?
            }
            None => {
                let table = UnalignedTable::new(ram);
                let first = table.get(0).ok_or(Stop::BadHead)?;
                self.walk(chain, table, first)?
            }
        };
        match inner {
            None => Ok(()),
            Some(_) => Err(Stop::MisplacedIndirect),
        }
    }

    fn buffer(&mut self, chain: &mut Progress, descriptor: Descriptor) -> Result<(), Stop> {
        let Descriptor { addr, len, .. } = descriptor;
        if len == 0 {
            return Err(Stop::ZeroLength { addr });
        }
        let write = descriptor.flags & WRITE != 0;
        if write {
            chain.split.get_or_insert(self.list.len());
        } else if chain.split.is_some() {
            return Err(Stop::ReadableAfterWritable);
        }
        chain.bytes += u64::from(len);
        if chain.bytes > MAX_CHAIN_BYTES {
            return Err(Stop::TooLarge);
        }
        match self.near.get(addr, len, write) {
            Some(piece) if self.list.push(piece) => Ok(()),
            Some(_) => Err(Stop::Full),
            None => {
                self.near = look_up(self.space, &mut self.list, addr, len, write)?;
                Ok(())
            }
        }
    }

    /// Takes the chains that begin at `heads` as long as they are good, of this
    /// kind, and in the window at hand. Fills `chains` and returns how many
    /// were taken; about the next one, nothing is known.
    ///
    /// One function for each kind, because then each has few enough things to
    /// keep in mind that most of them stay in registers.
    #[inline(always)]
    pub(crate) fn run(
        &mut self,
        kind: Kind,
        heads: &[AtomicU16],
        table: DescriptorTable<'b>,
        chains: &mut [ChainSlot],
    ) -> u16 {
        match kind {
            Kind::Single => self.singles(heads, table, chains),
            Kind::Direct => self.directs(heads, table, chains),
            Kind::Table if self.indirect => self.tables(heads, table, chains),
            Kind::Table => 0,
        }
    }

    #[inline(never)]
    fn singles(
        &mut self,
        heads: &[AtomicU16],
        table: DescriptorTable<'b>,
        chains: &mut [ChainSlot],
    ) -> u16 {
        let near = self.near;
        self.each(heads, table, chains, |first, room| {
            if first.has(NEXT) {
                return None;
            }
            *room.first_mut()? = near.buffer(first)?;
            Some((1, usize::from(first.has(WRITE))))
        })
    }

    #[inline(never)]
    fn directs(
        &mut self,
        heads: &[AtomicU16],
        table: DescriptorTable<'b>,
        chains: &mut [ChainSlot],
    ) -> u16 {
        let near = self.near;
        self.each(heads, table, chains, |first, room| {
            follow(&near, table, first, room)
        })
    }

    #[inline(never)]
    fn tables(
        &mut self,
        heads: &[AtomicU16],
        table: DescriptorTable<'b>,
        chains: &mut [ChainSlot],
    ) -> u16 {
        let near = self.near;
        self.each(heads, table, chains, |outer, room| {
            let (table, first) = near_table(&near, outer)?;
            follow(&near, table, first, room)
        })
    }

    /// `take` is given the first descriptor of each chain, and room for its
    /// pieces; it says how many pieces it put there and how many of them are writable.
    #[inline(always)]
    fn each(
        &mut self,
        heads: &[AtomicU16],
        table: DescriptorTable<'b>,
        chains: &mut [ChainSlot],
        take: impl Fn(Words, &mut [RamSlice<'b>]) -> Option<(usize, usize)>,
    ) -> u16 {
        let most_writable = if self.near.writable { usize::MAX } else { 0 };
        let mut list = core::mem::take(&mut self.list);
        let mut taken = 0;
        for (slot, head) in chains.iter_mut().zip(heads) {
            let head = u16::from_le(head.load(Ordering::Relaxed));
            let Some(first) = table.words(head) else {
                break;
            };
            let Some((count, writable)) = take(first, list.room()) else {
                break;
            };
            if writable > most_writable {
                break;
            }
            list.extend(count);
            *slot = ChainSlot {
                head: ChainHead { id: head },
                split: as_count(list.len() - writable),
                end: as_count(list.len()),
            };
            taken += 1;
        }
        self.list = list;
        taken
    }

    /// What was wrong with the chain that begins at `head`.
    #[cold]
    pub(crate) fn explain(&self, stop: Stop, head: u16, size: u16) -> QueueError {
        match stop {
            Stop::Full => QueueError::ChainTooLong {
                head,
                capacity: self.list.capacity(),
            },
            Stop::BadHead => QueueError::BadHead { head, size },
            Stop::BadNext { next, len } => QueueError::BadNext { next, len },
            Stop::Loop => QueueError::Loop { head },
            Stop::TooLarge => QueueError::ChainTooLarge { head },
            Stop::ReadableAfterWritable => QueueError::ReadableAfterWritable { head },
            Stop::ZeroLength { addr } => QueueError::ZeroLength { head, addr },
            Stop::MisplacedIndirect => QueueError::MisplacedIndirect { head },
            Stop::BadIndirectTable { addr, len } => {
                QueueError::BadIndirectTable { head, addr, len }
            }
            Stop::Memory { addr, len, access } => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                match self.space.pieces(addr, len, access, |_| true) {
                    Err(error) => error.into(),
                    Ok(()) => vmsg_mem::Error::Unmapped { addr, len }.into(),
                }
            }
            Stop::TableMemory { addr, len } => {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                match self.space.slice(addr, len, Access::Read) {
                    Err(error) => error.into(),
                    Ok(_) => vmsg_mem::Error::Unmapped { addr, len }.into(),
                }
            }
        }
    }
}

/// Puts the buffers of a chain into `room`, if it is plainly good and in one
/// table: how many there are, and how many of them are writable.
#[inline(always)]
fn follow<'b>(
    near: &Near<'b>,
    table: DescriptorTable<'b>,
    first: Words,
    room: &mut [RamSlice<'b>],
) -> Option<(usize, usize)> {
    // No more than the table has, and not so many that they could exceed 2^32 bytes.
    let most = (table.len() as usize).min(Near::MOST_BUFFERS);
    let most = most.min(room.len());
    let room = &mut room[..most];
    let (mut descriptor, mut count) = (first, 0);
    while !descriptor.has(WRITE) {
        *room.get_mut(count)? = near.buffer(descriptor)?;
        count += 1;
        if !descriptor.has(NEXT) {
            return Some((count, 0));
        }
        descriptor = table.words(descriptor.next())?;
    }
    let readable = count;
    loop {
        *room.get_mut(count)? = near.buffer(descriptor)?;
        count += 1;
        if !descriptor.has(NEXT) {
            return Some((count, count - readable));
        }
        descriptor = table.words(descriptor.next())?;
        if !descriptor.has(WRITE) {
            return None;
        }
    }
}

/// The indirect table that a chain is, and its first descriptor, if it is plainly good.
#[inline(always)]
fn near_table<'b>(near: &Near<'b>, outer: Words) -> Option<(DescriptorTable<'b>, Words)> {
    let Descriptor {
        addr, len, flags, ..
    } = outer.take_apart();
    if flags & (INDIRECT | NEXT) != INDIRECT
        || len % DESCRIPTOR_LEN != 0
        || len / DESCRIPTOR_LEN > 1 << 16
    {
        return None;
    }
    let ram = near.get(addr, len, false)?;
    let table = DescriptorTable::new(ram, len / DESCRIPTOR_LEN)?;
    Some((table, table.words(0)?))
}

fn find_table(space: AddressSpace<'_>, addr: BusAddr, len: u32) -> Result<RamSlice<'_>, Stop> {
    let stop = Stop::TableMemory { addr, len };
    let bytes = usize::try_from(len).map_err(|_| stop)?;
    space.slice(addr, bytes, Access::Read).map_err(|_| stop)
}

/// The buffer may be in another window, in several, or nowhere. Returns the
/// window in which it begins.
fn look_up<'b>(
    space: AddressSpace<'b>,
    list: &mut PieceList<'b>,
    addr: BusAddr,
    len: u32,
    write: bool,
) -> Result<Near<'b>, Stop> {
    let access = if write {
        Access::ReadWrite
    } else {
        Access::Read
    };
    let stop = Stop::Memory { addr, len, access };
    let bytes = usize::try_from(len).map_err(|_| stop)?;
    let mut fitted = true;
    space
        .pieces(addr, bytes, access, |piece| {
            fitted = list.push(piece);
            fitted
        })
        .map_err(|_| stop)?;
    if !fitted {
        return Err(Stop::Full);
    }
    let windows = space.windows();
    let after = windows.partition_point(|window| window.base() <= addr);
    Ok(Near::new(
        after.checked_sub(1).and_then(|index| windows.get(index)),
    ))
}

#[cfg(test)]
#[path = "gather_test.rs"]
mod tests;
