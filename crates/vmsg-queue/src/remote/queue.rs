// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queue itself.

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use vmsg_mem::BusAddr;

use super::table::{Place, Run};
use super::{Memory, RemoteBatch, RemoteStorage};
use crate::chain::{ChainSlot, as_count};
use crate::config::{DESCRIPTOR_LEN, device_len, driver_len};
use crate::gather::MAX_CHAIN_BYTES;
use crate::position::Position;
use crate::ring::{Descriptor, INDIRECT, NEXT, NO_NOTIFICATION, WRITE, passed_event};
use crate::{Buffer, ChainHead, QueueConfig, QueueError, QueueFeatures};

/// Length of a used element.
const ELEMENT: u64 = 8;

/// What can go wrong with a queue in memory that is elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError<E> {
    /// The driver did what no driver may do, or did so before: the queue is broken.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The memory could not be reached. Nothing has changed: what failed can be done again.
    #[error("the memory of a queue: {0}")]
    Memory(E),
}

/// A queue as its device sees it, in memory that it can copy from and to.
///
/// It makes the same checks as [`DeviceQueue`](crate::DeviceQueue), and what the driver could change in the rings is never read
/// back. It does not see whether buffers are memory at all: that shows when they are copied.
///
/// ```text
/// disable_notifications
/// loop: pop → for each chain: work, complete → publish → notify the driver?
/// enable_notifications → true: once more
/// ```
#[derive(Debug)]
pub struct RemoteQueue {
    position: Position,
    /// Used elements from `published` to `next_used`, as they will lie in the ring.
    elements: Vec<u8>,
}

impl RemoteQueue {
    /// A queue that starts from the beginning. The memory is not looked at.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadSize`]; [`QueueError::Mem`] if an area is not aligned or wraps around.
    pub fn new(config: QueueConfig, features: QueueFeatures) -> Result<Self, QueueError> {
        Self::resume(config, features, 0, 0)
    }

    /// A queue that somebody else served before, as [`DeviceQueue::resume`](crate::DeviceQueue::resume).
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`QueueError::BadResume`].
    pub fn resume(
        config: QueueConfig,
        features: QueueFeatures,
        avail: u16,
        used: u16,
    ) -> Result<Self, QueueError> {
        let position = Position::new(config, features, avail, used)?;
        let size = config.size;
        let areas = [
            (config.desc, 16 * usize::from(size), 16),
            (config.driver, driver_len(size, features.event_idx), 2),
            (config.device, device_len(size, features.event_idx), 4),
        ];
        for (addr, len, align) in areas {
            if addr.0 % align as u64 != 0 {
                return Err(vmsg_mem::Error::Misaligned { addr, align }.into());
            }
            if addr.checked_add(len as u64).is_none() {
                return Err(vmsg_mem::Error::Unmapped { addr, len }.into());
            }
        }
        Ok(Self {
            position,
            elements: Vec::new(),
        })
    }

    /// Where the queue is.
    pub const fn config(&self) -> QueueConfig {
        self.position.config
    }

    /// What was negotiated.
    pub const fn features(&self) -> QueueFeatures {
        self.position.features
    }

    /// Index of the next entry that [`pop`](Self::pop) takes from the available ring.
    pub const fn avail_index(&self) -> u16 {
        self.position.next_avail
    }

    /// The used index that the driver has been shown.
    pub const fn used_index(&self) -> u16 {
        self.position.published
    }

    /// Chains that were taken and are not yet shown to the driver as used.
    pub const fn in_flight(&self) -> u16 {
        self.position.in_flight()
    }

    /// True after a fault of the driver.
    pub const fn is_broken(&self) -> bool {
        self.position.broken
    }

    /// Number of chains that the driver has made available and that were not yet taken.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadAvailIndex`], [`QueueError::Broken`], and those of the memory.
    pub fn available<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
    ) -> Result<u16, RemoteError<M::Error>> {
        self.position.check()?;
        let index = memory
            .load_u16(self.driver(2))
            .map_err(RemoteError::Memory)?;
        let ready = self.position.check_avail_index(index);
        ready.map_err(|fault| self.fail(fault))
    }

    /// Takes up to `max` chains. Fewer if the driver has made fewer available, if `storage` is full, or if the next one is
    /// faulty or out of reach: then the next call tells.
    ///
    /// # Errors
    ///
    /// What is wrong with the queue or its first chain; all but [`QueueError::Broken`] are new faults of the driver and
    /// break the queue. Those of the memory, after which nothing was taken.
    pub fn pop<'b, M: Memory + ?Sized>(
        &mut self,
        memory: &M,
        storage: &'b mut RemoteStorage,
        max: usize,
    ) -> Result<RemoteBatch<'b>, RemoteError<M::Error>> {
        self.position.rewindable = 0;
        let ready = usize::from(self.available(memory)?);
        let RemoteStorage {
            buffers,
            chains,
            heads,
            direct,
            indirect,
        } = storage;
        let count = ready.min(max).min(chains.len());
        if count == 0 {
            return Ok(RemoteBatch::EMPTY);
        }
        let heads = &mut heads[..2 * count];
        self.read_heads(memory, heads)
            .map_err(RemoteError::Memory)?;
        let list = heads
            .chunks_exact(2)
            .map(|head| u16::from_le_bytes([head[0], head[1]]));
        let room = Room {
            buffers,
            chains,
            direct,
            indirect,
        };
        let batch = self.collect(memory, room, list)?;
        self.position
            .take(u16::try_from(batch.len()).expect("no more than were ready"));
        Ok(batch)
    }

    /// Looks up to `max` chains up that are in flight already, as somebody has noted who served the queue before: those that begin at the end of
    /// `heads`, backwards. They count as taken ([`resume`](Self::resume)), and cannot be given back. Fewer as with [`pop`](Self::pop).
    ///
    /// # Errors
    ///
    /// As for [`pop`](Self::pop).
    pub fn pop_again<'b, M: Memory + ?Sized>(
        &mut self,
        memory: &M,
        storage: &'b mut RemoteStorage,
        heads: &[u16],
        max: usize,
    ) -> Result<RemoteBatch<'b>, RemoteError<M::Error>> {
        self.position.check()?;
        self.position.rewindable = 0;
        let RemoteStorage {
            buffers,
            chains,
            direct,
            indirect,
            ..
        } = storage;
        let room = Room {
            buffers,
            chains,
            direct,
            indirect,
        };
        self.collect(memory, room, heads.iter().rev().copied().take(max))
    }

    /// Collects the chains that begin at `heads`, as far as there is room.
    fn collect<'b, M: Memory + ?Sized>(
        &mut self,
        memory: &M,
        room: Room<'b>,
        heads: impl Iterator<Item = u16>,
    ) -> Result<RemoteBatch<'b>, RemoteError<M::Error>> {
        let Room {
            buffers,
            chains,
            direct,
            indirect,
        } = room;
        direct.forget();
        let table = Place {
            addr: self.position.config.desc,
            len: self.position.config.size.into(),
        };
        let mut walk = Walk {
            memory,
            indirect_allowed: self.position.features.indirect,
            size: self.position.config.size,
            direct,
            indirect,
            buffers,
            len: 0,
        };
        let mut taken = 0;
        for (slot, head) in chains.iter_mut().zip(heads) {
            match walk.chain(table, head) {
                Ok(split) => {
                    *slot = ChainSlot {
                        head: ChainHead { id: head },
                        split,
                        end: as_count(walk.len),
                    };
                    taken += 1;
                }
                Err(_) if taken > 0 => break,
                Err(Stop::Memory(error)) => return Err(RemoteError::Memory(error)),
                Err(Stop::Fault(fault)) => return Err(self.fail(fault)),
            }
        }
        let last = chains[..taken].last().map_or(0, |slot| slot.end as usize);
        Ok(RemoteBatch {
            buffers: &buffers[..last],
            chains: &chains[..taken],
        })
    }

    /// Fills `heads` with entries of the available ring, from the next one on, around its end.
    fn read_heads<M: Memory + ?Sized>(&self, memory: &M, heads: &mut [u8]) -> Result<(), M::Error> {
        let slot = self.position.next_avail & (self.position.config.size - 1);
        let until_end = 2 * usize::from(self.position.config.size - slot);
        let (first, rest) = heads.split_at_mut(until_end.min(heads.len()));
        memory.read(self.driver(4 + 2 * u64::from(slot)), first)?;
        if rest.is_empty() {
            return Ok(());
        }
        memory.read(self.driver(4), rest)
    }

    /// Gives back the last `n` chains of the last [`pop`](Self::pop), which must not be completed; the next `pop` begins with the
    /// first of them. Does nothing to a broken queue, whose chains are lost.
    ///
    /// # Panics
    ///
    /// If the last `pop` returned fewer chains, or fewer are not completed.
    pub fn rewind(&mut self, n: usize) {
        self.position.rewind(n);
    }

    /// Marks a chain as used after `written` bytes were written to its writable buffers, from their beginning. In any
    /// order; the driver sees it after [`publish`](Self::publish), and until then the memory is not touched.
    ///
    /// # Panics
    ///
    /// If no chain is in flight.
    pub fn complete(&mut self, head: ChainHead, written: u32) {
        assert!(
            self.position.next_used != self.position.next_avail,
            "more chains completed than taken"
        );
        let id = u32::from(head.id).to_le_bytes();
        self.elements.extend_from_slice(&id);
        self.elements.extend_from_slice(&written.to_le_bytes());
        self.position.next_used = self.position.next_used.wrapping_add(1);
    }

    /// Shows the driver all completed chains. True if the driver wants to be notified of them.
    ///
    /// # Errors
    ///
    /// Those of the memory: then it is not known whether the driver saw the chains, and it can be done again.
    /// [`QueueError::Broken`].
    pub fn publish<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
    ) -> Result<bool, RemoteError<M::Error>> {
        self.position.check()?;
        if self.position.published == self.position.next_used {
            return Ok(false);
        }
        let wanted = self.show(memory).map_err(RemoteError::Memory)?;
        self.position.published = self.position.next_used;
        self.elements.clear();
        Ok(wanted)
    }

    fn show<M: Memory + ?Sized>(&self, memory: &M) -> Result<bool, M::Error> {
        let size = self.position.config.size;
        let slot = self.position.published & (size - 1);
        let until_end = 8 * usize::from(size - slot);
        let (first, rest) = self.elements.split_at(until_end.min(self.elements.len()));
        memory.write(self.device(4 + ELEMENT * u64::from(slot)), first)?;
        if !rest.is_empty() {
            memory.write(self.device(4), rest)?;
        }
        memory.store_u16(self.device(2), self.position.next_used)?;
        // SYNC POINT: the index must be out before the driver's wish is read. The driver states its wish, then looks at
        // the index again; one of us sees the other.
        fence(Ordering::SeqCst);
        if self.position.features.event_idx {
            let event = memory.load_u16(self.driver(4 + 2 * u64::from(size)))?;
            Ok(passed_event(
                event,
                self.position.next_used,
                self.position.published,
            ))
        } else {
            Ok(memory.load_u16(self.driver(0))? & NO_NOTIFICATION == 0)
        }
    }

    /// Asks the driver not to notify about available chains. A hint: it may do so anyway.
    ///
    /// # Errors
    ///
    /// Those of the memory; [`QueueError::Broken`].
    pub fn disable_notifications<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
    ) -> Result<(), RemoteError<M::Error>> {
        self.position.check()?;
        if self.position.features.event_idx {
            // The event stays where it is, in the past.
            return Ok(());
        }
        memory
            .store_u16(self.device(0), NO_NOTIFICATION)
            .map_err(RemoteError::Memory)
    }

    /// Asks the driver to notify about the next available chain. True if there is one already, for which no notification
    /// may come: process the queue again.
    ///
    /// # Errors
    ///
    /// As for [`available`](Self::available).
    pub fn enable_notifications<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
    ) -> Result<bool, RemoteError<M::Error>> {
        self.position.check()?;
        let asked = if self.position.features.event_idx {
            let at = self.device(4 + ELEMENT * u64::from(self.position.config.size));
            memory.store_u16(at, self.position.next_avail)
        } else {
            memory.store_u16(self.device(0), 0)
        };
        asked.map_err(RemoteError::Memory)?;
        // SYNC POINT: the wish must be out before the index is read again; see `show`.
        fence(Ordering::SeqCst);
        self.available(memory).map(|ready| ready > 0)
    }

    /// `offset` bytes into the driver area, which does not wrap around.
    fn driver(&self, offset: u64) -> BusAddr {
        BusAddr(self.position.config.driver.0 + offset)
    }

    /// `offset` bytes into the device area, which does not wrap around.
    fn device(&self, offset: u64) -> BusAddr {
        BusAddr(self.position.config.device.0 + offset)
    }

    #[cold]
    fn fail<E>(&mut self, error: QueueError) -> RemoteError<E> {
        RemoteError::Queue(self.position.fail(error))
    }
}

/// Where chains are collected.
struct Room<'b> {
    buffers: &'b mut [Buffer],
    chains: &'b mut [ChainSlot],
    direct: &'b mut Run,
    indirect: &'b mut Run,
}

/// Why a chain was not collected.
enum Stop<E> {
    Memory(E),
    Fault(QueueError),
}

impl<E> From<QueueError> for Stop<E> {
    fn from(fault: QueueError) -> Self {
        Self::Fault(fault)
    }
}

/// Collects the chains of a batch.
struct Walk<'w, M: ?Sized> {
    memory: &'w M,
    indirect_allowed: bool,
    size: u16,
    direct: &'w mut Run,
    indirect: &'w mut Run,
    buffers: &'w mut [Buffer],
    /// Buffers in use.
    len: usize,
}

/// What is known about the chain at hand.
struct Progress {
    head: u16,
    bytes: u64,
    /// First writable buffer, once there was one.
    split: Option<usize>,
}

impl<M: Memory + ?Sized> Walk<'_, M> {
    /// Adds all buffers of the chain that begins at `head`; returns the number of the first writable one, or of the one after the
    /// last. A faulty chain leaves nothing behind.
    fn chain(&mut self, table: Place, head: u16) -> Result<u32, Stop<M::Error>> {
        let start = self.len;
        let collected = self.collect(table, head);
        if collected.is_err() {
            self.len = start;
        }
        collected
    }

    fn collect(&mut self, table: Place, head: u16) -> Result<u32, Stop<M::Error>> {
        let mut chain = Progress {
            head,
            bytes: 0,
            split: None,
        };
        if u32::from(head) >= table.len {
            let size = self.size;
            return Err(QueueError::BadHead { head, size }.into());
        }
        if let Some(outer) = self.walk(&mut chain, table, head, false)? {
            // Its WRITE flag means nothing (2.7.5.3.2).
            let Descriptor { addr, len, .. } = outer;
            if !self.indirect_allowed || outer.flags & NEXT != 0 {
                return Err(QueueError::MisplacedIndirect { head }.into());
            }
            if len == 0 || len % DESCRIPTOR_LEN != 0 || len / DESCRIPTOR_LEN > 1 << 16 {
                return Err(QueueError::BadIndirectTable { head, addr, len }.into());
            }
            if addr.checked_add(u64::from(len)).is_none() {
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let error = vmsg_mem::Error::Unmapped { addr, len };
                return Err(QueueError::Mem(error).into());
            }
            self.indirect.forget();
            let len = len / DESCRIPTOR_LEN;
            if self
                .walk(&mut chain, Place { addr, len }, 0, true)?
                .is_some()
            {
                return Err(QueueError::MisplacedIndirect { head }.into());
            }
        }
        Ok(as_count(chain.split.unwrap_or(self.len)))
    }

    /// Follows a chain through one table. Returns the indirect descriptor at which it leaves it.
    fn walk(
        &mut self,
        chain: &mut Progress,
        table: Place,
        first: u16,
        inner: bool,
    ) -> Result<Option<Descriptor>, Stop<M::Error>> {
        let mut index = first;
        let mut left = table.len;
        loop {
            let run = if inner {
                &mut *self.indirect
            } else {
                &mut *self.direct
            };
            let found = run.get(self.memory, table, index).map_err(Stop::Memory)?;
            let Some(descriptor) = found else {
                let len = table.len;
                return Err(QueueError::BadNext { next: index, len }.into());
            };
            if descriptor.flags & INDIRECT != 0 {
                return Ok(Some(descriptor));
            }
            self.buffer(chain, descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(None);
            }
            left -= 1;
            if left == 0 {
                return Err(QueueError::Loop { head: chain.head }.into());
            }
            index = descriptor.next;
        }
    }

    fn buffer(&mut self, chain: &mut Progress, descriptor: Descriptor) -> Result<(), QueueError> {
        let Descriptor { addr, len, .. } = descriptor;
        let head = chain.head;
        if len == 0 {
            return Err(QueueError::ZeroLength { head, addr });
        }
        if descriptor.flags & WRITE != 0 {
            chain.split.get_or_insert(self.len);
        } else if chain.split.is_some() {
            return Err(QueueError::ReadableAfterWritable { head });
        }
        chain.bytes += u64::from(len);
        if chain.bytes > MAX_CHAIN_BYTES {
            return Err(QueueError::ChainTooLarge { head });
        }
        let capacity = self.buffers.len();
        let Some(slot) = self.buffers.get_mut(self.len) else {
            return Err(QueueError::ChainTooLong { head, capacity });
        };
        *slot = (addr, len);
        self.len += 1;
        Ok(())
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;
