// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queues of a device machine, and which of them have something to tell.

use crate::message::{VqueueConfig, VqueueInfo};
use crate::types::{QueueIndex, QueueSize};

/// One virtqueue of a [`DeviceMachine`](super::DeviceMachine).
#[derive(Clone, Copy, Debug)]
pub struct QueueSlot {
    descriptor: u64,
    driver: u64,
    device: u64,
    max_size: u16,
    /// 0: not set up.
    size: u16,
    /// The last next-offset word of the driver.
    next: u32,
    avail: Mark,
    used: Mark,
}

impl QueueSlot {
    /// A queue of at most `max_size` entries. A `max_size` that no queue can have (0, above 32768) makes it absent.
    pub const fn new(max_size: u16) -> QueueSlot {
        let max_size = if max_size > 32768 { 0 } else { max_size };
        QueueSlot {
            descriptor: 0,
            driver: 0,
            device: 0,
            max_size,
            size: 0,
            next: 0,
            avail: Mark::NEW,
            used: Mark::NEW,
        }
    }

    fn config(&self, index: QueueIndex) -> Option<VqueueConfig> {
        (self.size != 0).then_some(VqueueConfig {
            index,
            size: QueueSize(self.size.into()),
            descriptor: self.descriptor,
            driver: self.driver,
            device: self.device,
        })
    }

    fn clear(&mut self) {
        *self = QueueSlot {
            avail: self.avail.off(),
            used: self.used.off(),
            ..QueueSlot::new(self.max_size)
        };
    }
}

/// A queue's place in one of the lists. A queue that is taken back stays in the list, not set, until it is its turn.
#[derive(Clone, Copy, Debug)]
struct Mark {
    set: bool,
    link: u16,
}

/// Not in the list.
const UNLISTED: u16 = u16::MAX - 1;
/// The last of the list.
const END: u16 = u16::MAX;
/// So many slots can be told apart.
const MAX_SLOTS: usize = UNLISTED as usize;

impl Mark {
    const NEW: Mark = Mark {
        set: false,
        link: UNLISTED,
    };

    fn off(self) -> Mark {
        Mark { set: false, ..self }
    }
}

/// A list through the slots: first in, first out, each queue at most once.
#[derive(Clone, Copy, Debug)]
struct List {
    head: u16,
    tail: u16,
    mark: fn(&mut QueueSlot) -> &mut Mark,
}

impl List {
    fn new(mark: fn(&mut QueueSlot) -> &mut Mark) -> List {
        List {
            head: END,
            tail: END,
            mark,
        }
    }

    fn push(&mut self, slots: &mut [QueueSlot], index: u16) {
        let Some(slot) = slots.get_mut(usize::from(index)) else {
            return;
        };
        let mark = (self.mark)(slot);
        mark.set = true;
        if mark.link != UNLISTED {
            return;
        }
        mark.link = END;
        match slots.get_mut(usize::from(self.tail)) {
            Some(last) if self.head != END => (self.mark)(last).link = index,
            _ => self.head = index,
        }
        self.tail = index;
    }

    fn pop(&mut self, slots: &mut [QueueSlot]) -> Option<u16> {
        while self.head != END {
            let index = self.head;
            let mark = (self.mark)(slots.get_mut(usize::from(index))?);
            let set = core::mem::take(&mut mark.set);
            self.head = mark.link;
            mark.link = UNLISTED;
            if set {
                return Some(index);
            }
        }
        self.tail = END;
        None
    }
}

/// The queues.
#[derive(Clone, Debug)]
pub(super) struct Queues<Q> {
    slots: Q,
    avail: List,
    used: List,
}

impl<Q: AsRef<[QueueSlot]> + AsMut<[QueueSlot]>> Queues<Q> {
    pub(super) fn new(slots: Q) -> Queues<Q> {
        let mut queues = Queues {
            slots,
            avail: List::new(|s| &mut s.avail),
            used: List::new(|s| &mut s.used),
        };
        queues
            .slots_mut()
            .iter_mut()
            .for_each(|s| *s = QueueSlot::new(s.max_size));
        queues
    }

    fn slots(&self) -> &[QueueSlot] {
        let slots = self.slots.as_ref();
        slots.get(..MAX_SLOTS).unwrap_or(slots)
    }

    fn slots_mut(&mut self) -> &mut [QueueSlot] {
        live(&mut self.slots)
    }

    fn slot(&self, index: QueueIndex) -> Option<&QueueSlot> {
        self.slots()
            .get(index.to_usize())
            .filter(|s| s.max_size != 0)
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.slots().len()).unwrap_or(u32::MAX)
    }

    /// How the queue was set up; `None` if it was not.
    pub(super) fn config(&self, index: QueueIndex) -> Option<VqueueConfig> {
        self.slot(index)?.config(index)
    }

    /// What GET_VQUEUE tells.
    pub(super) fn info(&self, index: QueueIndex) -> VqueueInfo {
        let absent = VqueueInfo {
            index,
            ..VqueueInfo::default()
        };
        let Some(slot) = self.slot(index) else {
            return absent;
        };
        VqueueInfo {
            index,
            max_size: QueueSize(slot.max_size.into()),
            size: QueueSize(slot.size.into()),
            descriptor: slot.descriptor,
            driver: slot.driver,
            device: slot.device,
        }
    }

    pub(super) fn exists(&self, index: QueueIndex) -> bool {
        self.slot(index).is_some()
    }

    /// Whether the queue can be set up so: there is such a queue, the size is possible, the areas are aligned and do not wrap around.
    pub(super) fn is_possible(&self, config: &VqueueConfig, packed: bool, tolerated: u16) -> bool {
        let Some(slot) = self.slot(config.index) else {
            return false;
        };
        if !config.size.is_valid(packed) || config.size.0 > slot.max_size.max(tolerated).into() {
            return false;
        }
        let entries = u64::from(config.size.0);
        // Alignments and sizes: virtio 1.3 §2.7 (split), §2.8.10.1 (packed).
        let (driver, device) = if packed {
            ((4, 4), (4, 4))
        } else {
            ((2, 6 + 2 * entries), (4, 6 + 8 * entries))
        };
        let fits = |address: u64, (align, len): (u64, u64)| {
            address % align == 0 && address.checked_add(len).is_some()
        };
        fits(config.descriptor, (16, 16 * entries))
            && fits(config.driver, driver)
            && fits(config.device, device)
    }

    /// Sets a queue up, as [`is_possible`](Self::is_possible) has allowed it.
    pub(super) fn set(&mut self, config: &VqueueConfig) {
        let size = config.size.to_u16().unwrap_or(0);
        if let Some(slot) = self.slots_mut().get_mut(config.index.to_usize()) {
            slot.clear();
            slot.size = size;
            slot.descriptor = config.descriptor;
            slot.driver = config.driver;
            slot.device = config.device;
        }
    }

    pub(super) fn reset(&mut self, index: QueueIndex) {
        if let Some(slot) = self.slots_mut().get_mut(index.to_usize()) {
            slot.clear();
        }
    }

    pub(super) fn reset_all(&mut self) {
        self.slots_mut().iter_mut().for_each(QueueSlot::clear);
    }

    /// Notes a kick; says whether the queue is set up.
    pub(super) fn mark_avail(&mut self, index: QueueIndex, next: u32) -> bool {
        let Queues { slots, avail, .. } = self;
        let slots = live(slots);
        match slots.get_mut(index.to_usize()) {
            Some(slot) if slot.size != 0 => slot.next = next,
            _ => return false,
        }
        if let Ok(index) = u16::try_from(index.0) {
            avail.push(slots, index);
        }
        true
    }

    /// Notes that the driver is to hear of used buffers; says whether the queue is set up.
    pub(super) fn mark_used(&mut self, index: QueueIndex) -> bool {
        let Queues { slots, used, .. } = self;
        let slots = live(slots);
        let (Some(slot), Ok(number)) = (slots.get(index.to_usize()), u16::try_from(index.0)) else {
            return false;
        };
        if slot.size == 0 {
            return false;
        }
        used.push(slots, number);
        true
    }

    pub(super) fn pop_avail(&mut self) -> Option<(QueueIndex, u32)> {
        let Queues { slots, avail, .. } = self;
        let slots = live(slots);
        let index = avail.pop(slots)?;
        let next = slots.get(usize::from(index))?.next;
        Some((QueueIndex(index.into()), next))
    }

    pub(super) fn pop_used(&mut self) -> Option<QueueIndex> {
        let Queues { slots, used, .. } = self;
        used.pop(live(slots)).map(|index| QueueIndex(index.into()))
    }
}

fn live<Q: AsMut<[QueueSlot]>>(slots: &mut Q) -> &mut [QueueSlot] {
    let slots = slots.as_mut();
    let len = slots.len().min(MAX_SLOTS);
    &mut slots[..len]
}
