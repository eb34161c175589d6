// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device's side of a queue.

use core::sync::atomic::{Ordering, fence};

use vmsg_mem::{Access, AddressSpace, BusAddr, RamSlice};

use crate::chain::{Batch, ChainHead, ChainSlot, Need, PieceList, Storage, as_count};
use crate::config::{DESCRIPTOR_SIZE, check_size};
use crate::gather::{Gather, Kind, Stop};
use crate::position::Position;
use crate::ring::{AvailRing, DescriptorTable, NO_NOTIFICATION, UsedRing, passed_event};
use crate::{QueueConfig, QueueError, QueueFeatures};

/// Chains that are looked at before [`Need`] is asked again.
const STEP: usize = 16;

/// A queue as its device sees it.
///
/// Holds no pointer: each call is given the address space as it is at the
/// moment, so that windows can come and go between calls. Indices are private;
/// what the driver could change in the rings is never read back.
///
/// Each of the three areas must lie in one window. They are only loaded from and
/// stored to, as by [`DriverQueue`](crate::DriverQueue), so that they may be memory
/// that is not cacheable.
///
/// ```text
/// disable_notifications
/// loop: pop → for each chain: work, complete → publish → notify the driver?
/// enable_notifications → true: once more
/// ```
#[derive(Debug)]
pub struct DeviceQueue {
    position: Position,
}

impl DeviceQueue {
    /// A queue that starts from the beginning.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadSize`]; [`QueueError::Mem`] if an area is not aligned,
    /// not wholly in one window, or the device area is read-only.
    pub fn new(
        config: QueueConfig,
        features: QueueFeatures,
        space: AddressSpace<'_>,
    ) -> Result<Self, QueueError> {
        Self::resume(config, features, space, 0, 0)
    }

    /// A queue that somebody else served before: goes on with the available
    /// entry `avail` and the used element `used`. They differ by the number of
    /// chains that are still in flight and will be completed by their heads.
    ///
    /// A queue whose chains were used in order goes on at its used index
    /// ([`read_used_index`](Self::read_used_index)) with both. Notifications of
    /// either side may have been lost meanwhile: process the queue and notify
    /// the driver once afterwards.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and [`QueueError::BadResume`].
    pub fn resume(
        config: QueueConfig,
        features: QueueFeatures,
        space: AddressSpace<'_>,
        avail: u16,
        used: u16,
    ) -> Result<Self, QueueError> {
        let queue = Self {
            position: Position::new(config, features, avail, used)?,
        };
        queue.table(space)?;
        queue.avail(space)?;
        queue.used(space)?;
        Ok(queue)
    }

    /// The used index as it stands in the device area.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), as far as the device area is concerned.
    pub fn read_used_index(
        config: QueueConfig,
        space: AddressSpace<'_>,
    ) -> Result<u16, QueueError> {
        check_size(config.size)?;
        Ok(used_ring(&config, false, space)?.index())
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
    /// [`QueueError::Mem`], [`QueueError::BadAvailIndex`], [`QueueError::Broken`].
    pub fn available(&mut self, space: AddressSpace<'_>) -> Result<u16, QueueError> {
        self.position.check()?;
        let ready = self
            .avail(space)
            .and_then(|ring| self.position.check_avail_index(ring.index()));
        ready.map_err(|error| self.position.fail(error))
    }

    /// Takes up to `max` chains. Fewer if the driver has made fewer available,
    /// if `storage` is full, or if the next one is faulty: then the next call
    /// tells.
    ///
    /// Descriptors are read once, here. The memory of the chains stays
    /// readable and writable for the driver, of course.
    ///
    /// # Errors
    ///
    /// What is wrong with the queue or its first chain. All but
    /// [`QueueError::Broken`] are new faults of the driver and break the queue.
    #[inline]
    pub fn pop<'b>(
        &mut self,
        space: AddressSpace<'b>,
        storage: &'b mut impl Storage,
        max: usize,
    ) -> Result<Batch<'b>, QueueError> {
        self.pop_up_to(space, storage, max, None)
    }

    /// As [`pop`](Self::pop), but about as many chains as are needed to write `need` into their writable buffers, if there are as
    /// many: who gives most of a batch back has looked at it for nothing.
    ///
    /// # Errors
    ///
    /// As for [`pop`](Self::pop).
    #[inline]
    pub fn pop_for<'b>(
        &mut self,
        space: AddressSpace<'b>,
        storage: &'b mut impl Storage,
        max: usize,
        need: Need,
    ) -> Result<Batch<'b>, QueueError> {
        self.pop_up_to(space, storage, max, Some(need))
    }

    #[inline]
    fn pop_up_to<'b>(
        &mut self,
        space: AddressSpace<'b>,
        storage: &'b mut impl Storage,
        max: usize,
        need: Option<Need>,
    ) -> Result<Batch<'b>, QueueError> {
        self.position.check()?;
        let parts = storage.parts();
        match self.gather(space, PieceList::new(parts.pieces), parts.chains, max, need) {
            Ok(batch) => Ok(batch),
            Err(error) => Err(self.position.fail(error)),
        }
    }

    fn gather<'b>(
        &mut self,
        space: AddressSpace<'b>,
        list: PieceList<'b>,
        chains: &'b mut [ChainSlot],
        max: usize,
        need: Option<Need>,
    ) -> Result<Batch<'b>, QueueError> {
        self.position.rewindable = 0;
        let avail = self.avail(space)?;
        let ready = usize::from(self.position.check_avail_index(avail.index())?);
        let count = ready.min(max).min(chains.len());
        if count == 0 {
            return Ok(Batch::EMPTY);
        }
        let table = self.table(space)?;
        let mut gather = Gather::new(space, list, self.position.features.indirect);
        let mut taken: u16 = 0;
        let chains = &mut chains[..count];
        let mut until = need.map_or(count, |need| need.count.clamp(1, count));
        loop {
            let before = taken;
            for kind in Kind::ALL {
                let index = self.position.next_avail.wrapping_add(taken);
                let rest = &mut chains[usize::from(taken)..until];
                taken += gather.run(kind, avail.heads_from(index), table, rest);
                if usize::from(taken) == until {
                    break;
                }
            }
            if usize::from(taken) == until && until < count {
                let so_far = &chains[..until];
                if need.is_some_and(|need| need.is_met(so_far, gather.list.so_far())) {
                    break;
                }
                until = (until + STEP).min(count);
                continue;
            }
            let Some(slot) = chains.get_mut(usize::from(taken)) else {
                break;
            };
            if taken > before {
                continue;
            }
            let index = self.position.next_avail.wrapping_add(taken);
            // Rare in one way or another, or faulty.
            let head = avail.head(index);
            match resolve(&mut gather, table, head, slot) {
                Ok(()) => taken += 1,
                Err(_) if taken > 0 => break,
                Err(stop) => return Err(gather.explain(stop, head, self.position.config.size)),
            }
        }
        self.position.take(taken);
        let pieces = gather.list.finish();
        // SAFETY: each of these slots was just filled, with two lengths that the list of pieces had
        // one after the other. It only grew, but for chains that are not among these.
        Ok(unsafe { Batch::new(pieces, &chains[..usize::from(taken)]) })
    }

    /// Looks up chains that are in flight already, of the end of `heads` backwards, up to `max`. Faulty ones behind
    /// good ones are left for the next call.
    #[cfg(feature = "alloc")]
    pub(crate) fn pop_again<'b>(
        &mut self,
        space: AddressSpace<'b>,
        storage: &'b mut impl Storage,
        heads: &[u16],
        max: usize,
    ) -> Result<Batch<'b>, QueueError> {
        self.position.check()?;
        self.position.rewindable = 0;
        let parts = storage.parts();
        let list = PieceList::new(parts.pieces);
        let table = self
            .table(space)
            .map_err(|error| self.position.fail(error))?;
        let mut gather = Gather::new(space, list, self.position.features.indirect);
        let mut taken = 0;
        for (slot, &head) in parts.chains.iter_mut().zip(heads.iter().rev()).take(max) {
            match resolve(&mut gather, table, head, slot) {
                Ok(()) => taken += 1,
                Err(_) if taken > 0 => break,
                Err(stop) => {
                    let error = gather.explain(stop, head, self.position.config.size);
                    return Err(self.position.fail(error));
                }
            }
        }
        let pieces = gather.list.finish();
        // SAFETY: each of these slots was just filled, with two lengths that the list of pieces had
        // one after the other. It only grew, but for chains that are not among these.
        Ok(unsafe { Batch::new(pieces, &parts.chains[..taken]) })
    }

    /// Gives back the last `n` chains of the last [`pop`](Self::pop), which
    /// must not be completed; the next `pop` begins with the first of them.
    /// Does nothing to a broken queue, whose chains are lost.
    ///
    /// # Panics
    ///
    /// If the last `pop` returned fewer chains, or fewer are not completed.
    pub fn rewind(&mut self, n: usize) {
        self.position.rewind(n);
    }

    /// Marks a chain as used after `written` bytes were written to its
    /// writable buffers, from their beginning. In any order; the driver sees
    /// it after [`publish`](Self::publish).
    ///
    /// To complete many chains, [`completer`](Self::completer) is faster.
    ///
    /// # Errors
    ///
    /// [`QueueError::Mem`] if the device area is gone, [`QueueError::Broken`].
    #[inline]
    pub fn complete(
        &mut self,
        space: AddressSpace<'_>,
        head: ChainHead,
        written: u32,
    ) -> Result<(), QueueError> {
        self.completer(space)?.complete(head, written);
        Ok(())
    }

    /// Looks up the device area once for many chains to complete.
    ///
    /// # Errors
    ///
    /// As for [`complete`](Self::complete).
    #[inline]
    pub fn completer<'q>(
        &'q mut self,
        space: AddressSpace<'q>,
    ) -> Result<Completer<'q>, QueueError> {
        self.position.check()?;
        match self.used(space) {
            Ok(used) => Ok(Completer {
                used,
                next_used: self.position.next_used,
                queue: &mut self.position.next_used,
                next_avail: self.position.next_avail,
            }),
            Err(error) => Err(self.position.fail(error)),
        }
    }

    /// Shows the driver all completed chains. True if the driver wants to be
    /// notified of them.
    ///
    /// # Errors
    ///
    /// [`QueueError::Mem`] if an area is gone, [`QueueError::Broken`].
    #[inline]
    pub fn publish(&mut self, space: AddressSpace<'_>) -> Result<bool, QueueError> {
        self.position.check()?;
        if self.position.published == self.position.next_used {
            return Ok(false);
        }
        match (self.used(space), self.avail(space)) {
            (Ok(used), Ok(avail)) => {
                used.release_index(self.position.next_used);
                let old = core::mem::replace(&mut self.position.published, self.position.next_used);
                // SYNC POINT: the index must be out before the driver's wish is read. The driver
                // states its wish, then looks at the index again; one of us sees the other.
                fence(Ordering::SeqCst);
                Ok(is_wanted(avail, self.position.next_used, old))
            }
            (Err(error), _) | (_, Err(error)) => Err(self.position.fail(error)),
        }
    }

    /// Whether the driver wants to be notified of what is completed, as far as can be seen now: [`publish`](Self::publish) may say
    /// otherwise.
    ///
    /// # Errors
    ///
    /// [`QueueError::Mem`] if an area is gone, [`QueueError::Broken`].
    #[inline]
    pub fn wants_notification(&mut self, space: AddressSpace<'_>) -> Result<bool, QueueError> {
        self.position.check()?;
        match self.avail(space) {
            Ok(avail) => {
                let (new, old) = (self.position.next_used, self.position.published);
                Ok(new != old && is_wanted(avail, new, old))
            }
            Err(error) => Err(self.position.fail(error)),
        }
    }

    /// Asks the driver not to notify about available chains. A hint: it may do so anyway.
    ///
    /// # Errors
    ///
    /// [`QueueError::Mem`] if the device area is gone, [`QueueError::Broken`].
    pub fn disable_notifications(&mut self, space: AddressSpace<'_>) -> Result<(), QueueError> {
        self.position.check()?;
        // With EVENT_IDX the event stays where it is, in the past: the driver notifies once at
        // most, until its index has gone all the way around.
        if !self.position.features.event_idx {
            match self.used(space) {
                Ok(used) => used.set_flags(NO_NOTIFICATION),
                Err(error) => return Err(self.position.fail(error)),
            }
        }
        Ok(())
    }

    /// Asks the driver to notify about the next available chain. True if there
    /// is one already, for which no notification may come: process the queue
    /// again.
    ///
    /// # Errors
    ///
    /// [`QueueError::Mem`] if an area is gone, [`QueueError::BadAvailIndex`],
    /// [`QueueError::Broken`].
    pub fn enable_notifications(&mut self, space: AddressSpace<'_>) -> Result<bool, QueueError> {
        self.enable_notifications_beyond(space, 0)
    }

    /// Asks the driver to notify when more than `enough` chains are available,
    /// for a device that can do nothing with so few. True if there are more
    /// already.
    ///
    /// # Errors
    ///
    /// As for [`enable_notifications`](Self::enable_notifications).
    pub fn enable_notifications_beyond(
        &mut self,
        space: AddressSpace<'_>,
        enough: u16,
    ) -> Result<bool, QueueError> {
        self.position.check()?;
        let used = self
            .used(space)
            .map_err(|error| self.position.fail(error))?;
        if self.position.features.event_idx {
            used.set_avail_event(self.position.next_avail.wrapping_add(enough));
        } else {
            used.set_flags(0);
        }
        // SYNC POINT: the wish must be out before the index is read again; see `publish`.
        fence(Ordering::SeqCst);
        self.available(space).map(|ready| ready > enough)
    }

    #[inline]
    fn table<'b>(&self, space: AddressSpace<'b>) -> Result<DescriptorTable<'b>, QueueError> {
        let QueueConfig { size, desc, .. } = self.position.config;
        let area = Area::new(desc, DESCRIPTOR_SIZE * usize::from(size), 16, Access::Read);
        area.look_up(space, |ram| DescriptorTable::new(ram, size.into()))
    }

    #[inline]
    fn avail<'b>(&self, space: AddressSpace<'b>) -> Result<AvailRing<'b>, QueueError> {
        let QueueConfig { size, driver, .. } = self.position.config;
        let event_idx = self.position.features.event_idx;
        let area = Area::new(driver, AvailRing::len(size, event_idx), 2, Access::Read);
        area.look_up(space, |ram| AvailRing::new(ram, size, event_idx))
    }

    #[inline]
    fn used<'b>(&self, space: AddressSpace<'b>) -> Result<UsedRing<'b>, QueueError> {
        used_ring(
            &self.position.config,
            self.position.features.event_idx,
            space,
        )
    }
}

#[cfg(all(test, feature = "alloc"))]
#[path = "device_test.rs"]
mod tests;

/// Puts the chain at `head` into `slot`. A faulty one leaves no pieces behind.
fn resolve<'b>(
    gather: &mut Gather<'b>,
    table: DescriptorTable<'b>,
    head: u16,
    slot: &mut ChainSlot,
) -> Result<(), Stop> {
    let start = gather.list.len();
    match gather.chain(table, head) {
        Ok(split) => {
            *slot = ChainSlot {
                head: ChainHead { id: head },
                split,
                end: as_count(gather.list.len()),
            };
            Ok(())
        }
        Err(stop) => {
            gather.list.truncate(start);
            Err(stop)
        }
    }
}

/// Whether the driver wants to be notified when the used index goes from `old` to `new`.
#[inline]
fn is_wanted(avail: AvailRing<'_>, new: u16, old: u16) -> bool {
    match avail.used_event() {
        Some(event) => passed_event(event, new, old),
        None => avail.flags() & NO_NOTIFICATION == 0,
    }
}

#[inline]
fn used_ring<'b>(
    config: &QueueConfig,
    event_idx: bool,
    space: AddressSpace<'b>,
) -> Result<UsedRing<'b>, QueueError> {
    let QueueConfig { size, device, .. } = *config;
    let area = Area::new(device, UsedRing::len(size, event_idx), 4, Access::ReadWrite);
    area.look_up(space, |ram| UsedRing::new(ram, size, event_idx))
}

/// One of the areas of a queue, which are looked up in each call.
struct Area {
    addr: BusAddr,
    len: usize,
    align: usize,
    access: Access,
}

impl Area {
    #[inline(always)]
    const fn new(addr: BusAddr, len: usize, align: usize, access: Access) -> Self {
        Self {
            addr,
            len,
            align,
            access,
        }
    }

    /// What `make` makes of the memory; it finds out whether that is aligned in this process.
    #[inline(always)]
    fn look_up<'b, T>(
        self,
        space: AddressSpace<'b>,
        make: impl FnOnce(RamSlice<'b>) -> Option<T>,
    ) -> Result<T, QueueError> {
        if self.addr.0 % self.align as u64 == 0 {
            if let Some(ring) = space.get(self.addr, self.len, self.access).and_then(make) {
                return Ok(ring);
            }
        }
        let Self {
            addr,
            len,
            align,
            access,
        } = self;
        Err(explain(space, addr, len, align, access))
    }
}

/// Why an area is not as it must be.
#[cold]
#[inline(never)]
fn explain(
    space: AddressSpace<'_>,
    addr: BusAddr,
    len: usize,
    align: usize,
    access: Access,
) -> QueueError {
    if addr.0 % align as u64 == 0 {
        if let Err(error) = space.slice(addr, len, access) {
            return error.into();
        }
    }
    vmsg_mem::Error::Misaligned { addr, align }.into()
}

/// Completes chains of a queue whose device area was looked up. Made by
/// [`DeviceQueue::completer`].
pub struct Completer<'q> {
    used: UsedRing<'q>,
    /// The index of the queue. Only written here: a value read back after each store to the ring
    /// would cost more than all the rest.
    queue: &'q mut u16,
    next_used: u16,
    next_avail: u16,
}

impl Completer<'_> {
    /// As [`DeviceQueue::complete`].
    ///
    /// # Panics
    ///
    /// If no chain is in flight.
    #[inline]
    pub fn complete(&mut self, head: ChainHead, written: u32) {
        assert!(
            self.next_used != self.next_avail,
            "more chains completed than taken"
        );
        self.used.set_element(self.next_used, head.id, written);
        self.next_used = self.next_used.wrapping_add(1);
        *self.queue = self.next_used;
    }
}
