// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's side of a queue.

use core::sync::atomic::{Ordering, fence};

use vmsg_mem::{BusAddr, RamSlice};

pub use parked::ParkedDriver;

use crate::config::DESCRIPTOR_LEN;
use crate::ring::{
    AvailRing, Descriptor, DescriptorTable, INDIRECT, NEXT, NO_NOTIFICATION, UsedRing, WRITE,
    passed_event,
};
use crate::{Layout, QueueConfig, QueueError, QueueFeatures};

#[path = "driver_parked.rs"]
mod parked;

/// Names a chain that the driver has added, until it comes back used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u16);

impl Token {
    /// A number below the size of the queue that no other chain of the queue
    /// has at the same time: an index for what the driver knows about its chains.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What adding the chain returned.
    pub token: Token,
    /// Bytes the device says it has written, from the beginning of the
    /// writable buffers on; never more than they are long. It is the device's
    /// word: the bytes may still be what they were.
    pub written: u32,
}

/// A buffer of a chain: where it is on the bus, and its length in bytes.
pub type Buffer = (BusAddr, u32);

/// What a driver keeps about one descriptor, where the device cannot change it.
#[derive(Clone, Copy, Debug, Default)]
pub struct DriverSlot {
    /// The descriptor after this one, in its chain or in the list of free ones.
    next: u16,
    /// Descriptors in the chain that begins here; 0 if none does.
    count: u16,
    /// Available index under which the chain was added.
    position: u16,
    /// Bytes that the device may write to the chain.
    writable: u32,
}

/// A queue as its driver sees it, in memory that the driver owns and lends to
/// the device. `S` holds one [`DriverSlot`] for each descriptor: a `Vec`, a
/// boxed slice, an array or a borrowed slice of them.
///
/// ```text
/// add … add → publish → kick the device?
/// disable_notifications
/// loop: pop_used …
/// enable_notifications → true: once more
/// ```
///
/// The memory is only loaded from and stored to: no atomic read-modify-write, no
/// exclusive instruction. So it may be memory that is not cacheable (arm64: Normal
/// Non-cacheable, as a BAR mapped write-combining), where such instructions may
/// fault. It must not be Device memory.
#[derive(Debug)]
pub struct DriverQueue<'m, S> {
    layout: Layout,
    features: QueueFeatures,
    base: BusAddr,
    table: DescriptorTable<'m>,
    avail: AvailRing<'m>,
    used: UsedRing<'m>,
    /// The indirect tables.
    indirect: RamSlice<'m>,
    slots: S,
    /// First free descriptor, if `free` is not 0.
    free_head: u16,
    free: u16,
    /// Index of the next entry of the available ring.
    next_avail: u16,
    /// What the device was last shown as the available index.
    published: u16,
    /// Index of the next used element to take.
    next_used: u16,
    /// What the device last showed as the used index.
    seen_used: u16,
    broken: bool,
}

impl<'m, S: AsRef<[DriverSlot]> + AsMut<[DriverSlot]>> DriverQueue<'m, S> {
    /// Lays an empty queue out at the beginning of `ram`, which the device
    /// knows at bus address `base`. The rings are cleared; the device must not
    /// use them yet.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadMemory`] if `ram` is shorter than
    /// [`Layout::total_len`], not aligned to [`Layout::ALIGN`] here or on the
    /// bus, or there are not as many slots as descriptors.
    pub fn new(
        layout: Layout,
        features: QueueFeatures,
        ram: RamSlice<'m>,
        base: BusAddr,
        mut slots: S,
    ) -> Result<Self, QueueError> {
        let size = layout.size();
        let bad = QueueError::BadMemory { size };
        let align = Layout::ALIGN as u64;
        if slots.as_ref().len() != usize::from(size)
            || base.0 % align != 0
            || ram.as_ptr().addr() % Layout::ALIGN != 0
            || base.checked_add(layout.total_len() as u64).is_none()
        {
            return Err(bad);
        }
        let Some((table, avail, used, indirect)) = areas(layout, features, ram) else {
            return Err(bad);
        };
        for (offset, len) in [
            (0, layout.desc_len()),
            (layout.driver_offset(), layout.driver_len()),
            (layout.device_offset(), layout.device_len()),
        ] {
            if let Some(part) = ram.get(offset, len) {
                part.fill(0);
            }
        }
        for (next, slot) in (1..=size).zip(slots.as_mut()) {
            *slot = DriverSlot {
                next: next % size,
                ..DriverSlot::default()
            };
        }
        Ok(Self {
            layout,
            features,
            base,
            table,
            avail,
            used,
            indirect,
            slots,
            free_head: 0,
            free: size,
            next_avail: 0,
            published: 0,
            next_used: 0,
            seen_used: 0,
            broken: false,
        })
    }

    /// What to tell the device about where the queue is.
    pub fn config(&self) -> QueueConfig {
        let at = |offset: usize| BusAddr(self.base.0 + offset as u64);
        QueueConfig {
            size: self.layout.size(),
            desc: at(0),
            driver: at(self.layout.driver_offset()),
            device: at(self.layout.device_offset()),
        }
    }

    /// Number of free descriptors. A direct chain takes one for each buffer,
    /// an indirect one takes one.
    pub const fn free_descriptors(&self) -> u16 {
        self.free
    }

    /// The token of the next chain that is added; `None` if no descriptor is free.
    pub const fn next_token(&self) -> Option<Token> {
        if self.free > 0 {
            Some(Token(self.free_head))
        } else {
            None
        }
    }

    /// Chains that were published and have not come back.
    pub const fn outstanding(&self) -> u16 {
        self.published.wrapping_sub(self.next_used)
    }

    /// True after a fault of the device.
    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    /// The available index that the device has been shown.
    pub const fn avail_index(&self) -> u16 {
        self.published
    }

    /// Index of the next used element that [`pop_used`](Self::pop_used) takes.
    pub const fn used_index(&self) -> u16 {
        self.next_used
    }

    /// Adds a chain of buffers, those that the device reads first; through an
    /// indirect table if it has more than one buffer and there is one that is
    /// long enough. The device sees it after [`publish`](Self::publish) and
    /// may use the buffers until [`pop_used`](Self::pop_used) returns the token.
    ///
    /// # Errors
    ///
    /// [`QueueError::Full`] for now; [`QueueError::BadChain`] for good;
    /// [`QueueError::Broken`].
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> Result<Token, QueueError> {
        let buffers = readable.len().saturating_add(writable.len());
        if self.features.indirect && (2..=self.indirect_entries()).contains(&buffers) {
            self.add_indirect(readable, writable)
        } else {
            self.add_direct(readable, writable)
        }
    }

    /// As [`add`](Self::add), never through an indirect table.
    ///
    /// # Errors
    ///
    /// As for [`add`](Self::add).
    pub fn add_direct(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Result<Token, QueueError> {
        let count = self.check_chain(readable, writable, usize::from(self.layout.size()))?;
        if count > self.free {
            return Err(QueueError::Full);
        }
        let head = self.free_head;
        let mut index = head;
        for (n, (buffer, write)) in (1..).zip(buffers(readable, writable)) {
            let next = self.slot(index).next;
            self.write(index, describe(buffer, write, (n < count).then_some(next)));
            index = next;
        }
        self.free_head = index;
        Ok(self.offer(head, count, writable))
    }

    /// As [`add`](Self::add), always through an indirect table.
    ///
    /// # Errors
    ///
    /// As for [`add`](Self::add); [`QueueError::BadChain`] also if indirect
    /// descriptors were not negotiated or the tables are too short.
    pub fn add_indirect(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Result<Token, QueueError> {
        let entries = if self.features.indirect {
            self.indirect_entries()
        } else {
            0
        };
        let count = self.check_chain(readable, writable, entries)?;
        if self.free == 0 {
            return Err(QueueError::Full);
        }
        let head = self.free_head;
        let len = self.layout.indirect_len();
        let offset = len * usize::from(head);
        let table = self
            .indirect
            .get(offset, len)
            .and_then(|ram| DescriptorTable::new(ram, self.layout.indirect_entries().into()))
            .expect("the tables were laid out");
        for (n, (buffer, write)) in (1..).zip(buffers(readable, writable)) {
            let fits = table.set(n - 1, describe(buffer, write, (n < count).then_some(n)));
            assert!(fits, "the number of buffers was checked");
        }
        let at = self.layout.indirect_offset() + offset;
        self.free_head = self.slot(head).next;
        self.write(
            head,
            Descriptor {
                addr: BusAddr(self.base.0 + at as u64),
                len: u32::from(count) * DESCRIPTOR_LEN,
                flags: INDIRECT,
                next: 0,
            },
        );
        Ok(self.offer(head, 1, writable))
    }

    /// Shows the device all added chains. True if it wants to be kicked.
    ///
    /// # Errors
    ///
    /// [`QueueError::Broken`].
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        self.check()?;
        if self.published == self.next_avail {
            return Ok(false);
        }
        self.avail.release_index(self.next_avail);
        let old = core::mem::replace(&mut self.published, self.next_avail);
        // SYNC POINT: the index must be out before the device's wish is read. The device states
        // its wish, then looks at the index again; one of us sees the other.
        fence(Ordering::SeqCst);
        Ok(match self.used.avail_event() {
            Some(event) => passed_event(event, self.next_avail, old),
            None => self.used.flags() & NO_NOTIFICATION == 0,
        })
    }

    /// Takes the next used chain, if there is one. Its buffers and descriptors
    /// are the driver's again.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadUsedIndex`], [`QueueError::BadUsedId`],
    /// [`QueueError::BadUsedLength`] are faults of the device and break the
    /// queue; [`QueueError::Broken`].
    pub fn pop_used(&mut self) -> Result<Option<Used>, QueueError> {
        self.check()?;
        if self.next_used == self.seen_used && !self.look()? {
            return Ok(None);
        }
        let (id, written) = self.used.element(self.next_used);
        let slots = self.slots.as_ref();
        let found = u16::try_from(id)
            .ok()
            .and_then(|head| Some((head, *slots.get(usize::from(head))?)))
            .filter(|(_, slot)| slot.count > 0 && self.was_published(slot.position));
        let Some((head, slot)) = found else {
            return Err(self.fail(QueueError::BadUsedId { id }));
        };
        if written > slot.writable {
            return Err(self.fail(QueueError::BadUsedLength {
                id,
                len: written,
                writable: slot.writable,
            }));
        }
        self.recycle(head, slot.count);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some(Used {
            token: Token(head),
            written,
        }))
    }

    /// Asks the device not to notify about used chains. A hint: it may do so anyway.
    ///
    /// # Errors
    ///
    /// [`QueueError::Broken`].
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        self.check()?;
        if self.features.event_idx {
            // An index that was passed already: the device comes there again after 65,535 chains.
            self.avail.set_used_event(self.next_used.wrapping_sub(1));
        } else {
            self.avail.set_flags(NO_NOTIFICATION);
        }
        Ok(())
    }

    /// Asks the device to notify about the next used chain; with EVENT_IDX
    /// about that one only. True if there is one already, for which no
    /// notification may come: take used chains again.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadUsedIndex`], [`QueueError::Broken`].
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.check()?;
        if self.features.event_idx {
            self.avail.set_used_event(self.next_used);
        } else {
            self.avail.set_flags(0);
        }
        // SYNC POINT: the wish must be out before the index is read again; see `publish`.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Reads the used index; true if there is something to take.
    fn look(&mut self) -> Result<bool, QueueError> {
        let used = self.used.index();
        let new = used.wrapping_sub(self.next_used);
        let outstanding = self.outstanding();
        // It must not go back, either: what was seen was used for good.
        let seen = self.seen_used.wrapping_sub(self.next_used);
        if new > outstanding || new < seen {
            return Err(self.fail(QueueError::BadUsedIndex {
                used,
                next: self.next_used,
                outstanding,
            }));
        }
        self.seen_used = used;
        Ok(new > 0)
    }

    fn indirect_entries(&self) -> usize {
        usize::from(self.layout.indirect_entries())
    }

    /// Number of buffers, if a chain of them can be in this queue at all.
    fn check_chain(
        &self,
        readable: &[Buffer],
        writable: &[Buffer],
        most: usize,
    ) -> Result<u16, QueueError> {
        self.check()?;
        let count = readable.len().saturating_add(writable.len());
        let bytes = length(readable).saturating_add(length(writable));
        let empty = buffers(readable, writable).any(|((_, len), _)| len == 0);
        match u16::try_from(count) {
            Ok(n) if n > 0 && count <= most && !empty && bytes <= 1 << 32 => Ok(n),
            _ => Err(QueueError::BadChain {
                buffers: count,
                bytes,
            }),
        }
    }

    /// Puts a chain whose descriptors are written into the available ring.
    fn offer(&mut self, head: u16, count: u16, writable: &[Buffer]) -> Token {
        let position = self.next_avail;
        let slot = &mut self.slots.as_mut()[usize::from(head)];
        slot.count = count;
        slot.position = position;
        // A used element cannot tell about the last byte of 4 GiB.
        slot.writable = u32::try_from(length(writable)).unwrap_or(u32::MAX);
        self.free -= count;
        self.avail.set_head(position, head);
        self.next_avail = position.wrapping_add(1);
        Token(head)
    }

    /// Puts the descriptors of a chain back into the list of free ones.
    fn recycle(&mut self, head: u16, count: u16) {
        let slots = self.slots.as_mut();
        slots[usize::from(head)].count = 0;
        let mut last = head;
        for _ in 1..count {
            last = slots[usize::from(last)].next;
        }
        slots[usize::from(last)].next = self.free_head;
        self.free_head = head;
        self.free += count;
    }

    /// False for a chain that is still waiting to be published.
    fn was_published(&self, position: u16) -> bool {
        let waiting = self.next_avail.wrapping_sub(self.published);
        position.wrapping_sub(self.published) >= waiting
    }

    fn slot(&self, index: u16) -> &DriverSlot {
        &self.slots.as_ref()[usize::from(index)]
    }

    fn write(&self, index: u16, descriptor: Descriptor) {
        let inside = self.table.set(index, descriptor);
        assert!(inside, "free descriptors are in the table");
    }

    fn check(&self) -> Result<(), QueueError> {
        if self.broken {
            Err(QueueError::Broken)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn fail(&mut self, error: QueueError) -> QueueError {
        self.broken = true;
        error
    }
}

#[cfg(test)]
#[path = "driver_test.rs"]
mod tests;

type Areas<'m> = (
    DescriptorTable<'m>,
    AvailRing<'m>,
    UsedRing<'m>,
    RamSlice<'m>,
);

/// The three areas and the indirect tables; `None` if `ram` is too short or not aligned.
fn areas(layout: Layout, features: QueueFeatures, ram: RamSlice<'_>) -> Option<Areas<'_>> {
    let size = layout.size();
    let event_idx = features.event_idx;
    let desc = ram.get(0, layout.desc_len())?;
    let driver = ram.get(layout.driver_offset(), layout.driver_len())?;
    let device = ram.get(layout.device_offset(), layout.device_len())?;
    let tables = layout.indirect_len() * usize::from(size);
    Some((
        DescriptorTable::new(desc, size.into())?,
        AvailRing::new(driver, size, event_idx)?,
        UsedRing::new(device, size, event_idx)?,
        ram.get(layout.indirect_offset(), tables)?,
    ))
}

/// The buffers of a chain in order; true for those that the device writes.
fn buffers<'a>(
    readable: &'a [Buffer],
    writable: &'a [Buffer],
) -> impl Iterator<Item = (Buffer, bool)> + 'a {
    let readable = readable.iter().map(|&buffer| (buffer, false));
    readable.chain(writable.iter().map(|&buffer| (buffer, true)))
}

fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|&(_, len)| u64::from(len)).sum()
}

fn describe((addr, len): Buffer, write: bool, next: Option<u16>) -> Descriptor {
    let write = if write { WRITE } else { 0 };
    let more = if next.is_some() { NEXT } else { 0 };
    Descriptor {
        addr,
        len,
        flags: write | more,
        next: next.unwrap_or(0),
    }
}
