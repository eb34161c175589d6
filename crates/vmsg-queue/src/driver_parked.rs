// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's queue while nobody looks at its memory.

use vmsg_mem::{BusAddr, RamSlice};

use super::{DriverQueue, DriverSlot, areas};
use crate::{Layout, QueueError, QueueFeatures};

/// What a driver knows about its queue, without the memory that it lies in: for owners who have that memory
/// themselves and borrow it for a while only.
#[derive(Debug)]
pub struct ParkedDriver<S> {
    layout: Layout,
    features: QueueFeatures,
    base: BusAddr,
    slots: S,
    free_head: u16,
    free: u16,
    next_avail: u16,
    published: u16,
    next_used: u16,
    seen_used: u16,
    broken: bool,
}

impl<S> DriverQueue<'_, S> {
    /// Lets go of the memory. The device may go on meanwhile.
    pub fn park(self) -> ParkedDriver<S> {
        ParkedDriver {
            layout: self.layout,
            features: self.features,
            base: self.base,
            slots: self.slots,
            free_head: self.free_head,
            free: self.free,
            next_avail: self.next_avail,
            published: self.published,
            next_used: self.next_used,
            seen_used: self.seen_used,
            broken: self.broken,
        }
    }
}

impl<S: AsRef<[DriverSlot]> + AsMut<[DriverSlot]>> ParkedDriver<S> {
    /// Goes on where the queue was parked, in the same memory.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadMemory`] if `ram` cannot be that memory: it is too short or not aligned.
    pub fn resume(self, ram: RamSlice<'_>) -> Result<DriverQueue<'_, S>, QueueError> {
        let bad = QueueError::BadMemory {
            size: self.layout.size(),
        };
        let (table, avail, used, indirect) = areas(self.layout, self.features, ram).ok_or(bad)?;
        Ok(DriverQueue {
            layout: self.layout,
            features: self.features,
            base: self.base,
            table,
            avail,
            used,
            indirect,
            slots: self.slots,
            free_head: self.free_head,
            free: self.free,
            next_avail: self.next_avail,
            published: self.published,
            next_used: self.next_used,
            seen_used: self.seen_used,
            broken: self.broken,
        })
    }
}
