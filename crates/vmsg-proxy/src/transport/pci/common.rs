// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the registers lie in the common configuration structure (virtio 1.3 §4.1.4.3).

use super::super::core::{Address, Register};
use super::super::registers::{Slot, slot};

/// A register of the structure.
#[derive(Clone, Copy, Debug)]
pub(super) enum Common {
    Core(Register),
    ConfigVector,
    QueueVector,
    NotifyOffset,
    /// `queue_notif_config_data`: what a driver would write to notify, if NOTIF_CONFIG_DATA were offered.
    NotifyData,
}

/// Bytes of the structure, with the two fields about administration queues at its end, which read 0.
pub(super) const SIZE: u32 = 0x40;

pub(super) const REGISTERS: [Slot<Common>; 21] = [
    slot(0x00, 4, Common::Core(Register::DeviceFeatureSelect)),
    slot(0x04, 4, Common::Core(Register::DeviceFeature)),
    slot(0x08, 4, Common::Core(Register::DriverFeatureSelect)),
    slot(0x0c, 4, Common::Core(Register::DriverFeature)),
    slot(0x10, 2, Common::ConfigVector),
    slot(0x12, 2, Common::Core(Register::QueueCount)),
    slot(0x14, 1, Common::Core(Register::Status)),
    slot(0x15, 1, Common::Core(Register::Generation)),
    slot(0x16, 2, Common::Core(Register::QueueSelect)),
    slot(0x18, 2, Common::Core(Register::QueueSize)),
    slot(0x1a, 2, Common::QueueVector),
    slot(0x1c, 2, Common::Core(Register::QueueEnable)),
    slot(0x1e, 2, Common::NotifyOffset),
    slot(
        0x20,
        4,
        Common::Core(Register::Address(Address::DESCRIPTOR_LOW)),
    ),
    slot(
        0x24,
        4,
        Common::Core(Register::Address(Address::DESCRIPTOR_HIGH)),
    ),
    slot(
        0x28,
        4,
        Common::Core(Register::Address(Address::DRIVER_LOW)),
    ),
    slot(
        0x2c,
        4,
        Common::Core(Register::Address(Address::DRIVER_HIGH)),
    ),
    slot(
        0x30,
        4,
        Common::Core(Register::Address(Address::DEVICE_LOW)),
    ),
    slot(
        0x34,
        4,
        Common::Core(Register::Address(Address::DEVICE_HIGH)),
    ),
    slot(0x38, 2, Common::NotifyData),
    slot(0x3a, 2, Common::Core(Register::QueueReset)),
];
