// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of one queue.

use std::time::Instant;

/// Which half of which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) struct Address {
    area: Area,
    high: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Area {
    Descriptor,
    Driver,
    Device,
}

impl Address {
    pub(in crate::transport) const DESCRIPTOR_LOW: Address = Address::of(Area::Descriptor, false);
    pub(in crate::transport) const DESCRIPTOR_HIGH: Address = Address::of(Area::Descriptor, true);
    pub(in crate::transport) const DRIVER_LOW: Address = Address::of(Area::Driver, false);
    pub(in crate::transport) const DRIVER_HIGH: Address = Address::of(Area::Driver, true);
    pub(in crate::transport) const DEVICE_LOW: Address = Address::of(Area::Device, false);
    pub(in crate::transport) const DEVICE_HIGH: Address = Address::of(Area::Device, true);

    const fn of(area: Area, high: bool) -> Address {
        Address { area, high }
    }

    fn shift(self) -> u32 {
        if self.high { 32 } else { 0 }
    }
}

/// The largest size that a queue can have (virtio 1.3 §2.7 and §2.8).
const MAX_SIZE: u16 = 32768;

/// One queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queue {
    /// Of the device; 0: there is no such queue.
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) descriptor: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) enabled: bool,
    /// Since when stopping it has failed.
    pub(super) stop_due: Option<Instant>,
}

impl Queue {
    pub(super) fn new(max: u16) -> Queue {
        let max = max.min(MAX_SIZE);
        Queue {
            max,
            size: max,
            descriptor: 0,
            driver: 0,
            device: 0,
            enabled: false,
            stop_due: None,
        }
    }

    /// Whether what was written makes a queue (virtio 1.3 §2.7 and §2.8: sizes and alignments).
    pub(super) fn can_start(&self, packed: bool) -> bool {
        let size = (1..=self.max).contains(&self.size) && (packed || self.size.is_power_of_two());
        let (driver, device) = if packed { (4, 4) } else { (2, 4) };
        let placed = |at: u64, alignment: u64| at != 0 && at.is_multiple_of(alignment);
        size && placed(self.descriptor, 16)
            && placed(self.driver, driver)
            && placed(self.device, device)
    }

    fn area(&mut self, area: Area) -> &mut u64 {
        match area {
            Area::Descriptor => &mut self.descriptor,
            Area::Driver => &mut self.driver,
            Area::Device => &mut self.device,
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "one half is meant")]
    pub(super) fn half(mut self, address: Address) -> u32 {
        (*self.area(address.area) >> address.shift()) as u32
    }

    pub(super) fn set_half(&mut self, address: Address, value: u32) {
        let area = self.area(address.area);
        *area &= !(u64::from(u32::MAX) << address.shift());
        *area |= u64::from(value) << address.shift();
    }
}
