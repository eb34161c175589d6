// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From descriptors to pieces of memory.

use vmsg_mem::{Access, AddressSpace, RamSlice, Window};

use crate::QueueError;
use crate::chain::PieceList;
use crate::config::DESCRIPTOR_SIZE;
use crate::ring::{Descriptor, DescriptorTable, INDIRECT, IndirectTable, NEXT, WRITE};

/// A chain may be this many bytes long (virtio 1.3, section 2.7.5.2).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// Why a chain was not collected.
pub(crate) enum Stop {
    /// The storage has no room for all of it.
    Full,
    /// The driver made a chain that cannot be.
    Fault(QueueError),
}

#[cold]
fn fault(error: QueueError) -> Stop {
    Stop::Fault(error)
}

/// Collects the chains of a batch.
pub(crate) struct Gather<'b> {
    space: AddressSpace<'b>,
    /// The window of the last buffer: the next one is mostly in it, too.
    near: Option<Window<'b>>,
    indirect: bool,
    pub(crate) list: PieceList<'b>,
}

/// What is known about the chain at hand.
struct Progress {
    head: u16,
    bytes: u64,
    /// First writable piece, once there was one.
    split: Option<u32>,
}

impl<'b> Gather<'b> {
    pub(crate) fn new(space: AddressSpace<'b>, list: PieceList<'b>, indirect: bool) -> Self {
        Self {
            space,
            near: space.windows().first().copied(),
            indirect,
            list,
        }
    }

    /// Adds all buffers of the chain that begins at `head`; returns the number
    /// of the first writable piece, or of the one after the last.
    #[inline]
    pub(crate) fn chain(&mut self, table: DescriptorTable<'b>, head: u16) -> Result<u32, Stop> {
        let mut chain = Progress {
            head,
            bytes: 0,
            split: None,
        };
        let Some(mut descriptor) = table.get(head) else {
            let size = u16::try_from(table.len()).unwrap_or(u16::MAX);
            return Err(fault(QueueError::BadHead { head, size }));
        };
        let mut left = table.len();
        loop {
            if descriptor.flags & INDIRECT != 0 {
                self.indirect_table(&mut chain, descriptor)?;
                break;
            }
            self.buffer(&mut chain, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                break;
            }
            left -= 1;
            if left == 0 {
                return Err(fault(QueueError::Loop { head }));
            }
            let next = descriptor.next;
            descriptor = table.get(next).ok_or_else(|| {
                let len = table.len();
                fault(QueueError::BadNext { next, len })
            })?;
        }
        Ok(chain.split.unwrap_or(self.list.len()))
    }

    /// The end of a chain that is an indirect table. Its WRITE flag means nothing (2.7.5.3.2).
    #[inline(never)]
    fn indirect_table(&mut self, chain: &mut Progress, outer: Descriptor) -> Result<(), Stop> {
        let head = chain.head;
        if !self.indirect || outer.flags & NEXT != 0 {
            return Err(fault(QueueError::MisplacedIndirect { head }));
        }
        let Descriptor { addr, len, .. } = outer;
        let bytes = usize::try_from(len).unwrap_or(usize::MAX);
        // The table may begin anywhere: only the rings have to be aligned.
        if bytes == 0
            || bytes % DESCRIPTOR_SIZE != 0
            || bytes / DESCRIPTOR_SIZE > usize::from(u16::MAX) + 1
        {
            return Err(fault(QueueError::BadIndirectTable { head, addr, len }));
        }
        let ram = self
            .space
            .slice(addr, bytes, Access::Read)
            .map_err(|error| fault(error.into()))?;
        let table = IndirectTable::new(ram);
        let mut next = 0;
        for _ in 0..table.len() {
            let descriptor = table.get(next).ok_or_else(|| {
                let len = table.len();
                fault(QueueError::BadNext { next, len })
            })?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(fault(QueueError::MisplacedIndirect { head }));
            }
            self.buffer(chain, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            next = descriptor.next;
        }
        Err(fault(QueueError::Loop { head }))
    }

    #[inline]
    fn buffer(&mut self, chain: &mut Progress, descriptor: Descriptor) -> Result<(), Stop> {
        let Descriptor { addr, len, .. } = descriptor;
        let head = chain.head;
        if len == 0 {
            return Err(fault(QueueError::ZeroLength { head, addr }));
        }
        let write = descriptor.flags & WRITE != 0;
        if write {
            chain.split.get_or_insert(self.list.len());
        } else if chain.split.is_some() {
            return Err(fault(QueueError::ReadableAfterWritable { head }));
        }
        chain.bytes += u64::from(len);
        if chain.bytes > MAX_CHAIN_BYTES {
            return Err(fault(QueueError::ChainTooLarge { head }));
        }
        match self.in_near_window(descriptor, write) {
            Some(piece) => self.list.push(piece).then_some(()).ok_or(Stop::Full),
            None => self.look_up(descriptor, write),
        }
    }

    #[inline]
    fn in_near_window(&self, descriptor: Descriptor, write: bool) -> Option<RamSlice<'b>> {
        let window = self.near.as_ref()?;
        if write && window.access() != Access::ReadWrite {
            return None;
        }
        let offset = descriptor.addr.0.checked_sub(window.base().0)?;
        let len = usize::try_from(descriptor.len).ok()?;
        window.ram().get(usize::try_from(offset).ok()?, len)
    }

    /// The buffer may be in another window, in several, or nowhere.
    #[inline(never)]
    fn look_up(&mut self, descriptor: Descriptor, write: bool) -> Result<(), Stop> {
        let Descriptor { addr, len, .. } = descriptor;
        let access = if write {
            Access::ReadWrite
        } else {
            Access::Read
        };
        let windows = self.space.windows();
        let after = windows.partition_point(|window| window.base() <= addr);
        if let Some(window) = after.checked_sub(1).and_then(|index| windows.get(index)) {
            self.near = Some(*window);
        }
        let mut fitted = true;
        let list = &mut self.list;
        self.space
            .pieces(
                addr,
                usize::try_from(len).unwrap_or(usize::MAX),
                access,
                |piece| {
                    fitted = list.push(piece);
                    fitted
                },
            )
            .map_err(|error| fault(error.into()))?;
        fitted.then_some(()).ok_or(Stop::Full)
    }
}
