// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device status field (virtio 1.3 §2.1).

use core::fmt;

bitflags::bitflags! {
    /// The device status (virtio 1.3 §2.1). Bits without a name are kept as they came.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct DeviceStatus: u32 {
        /// The driver side has seen the device.
        const ACKNOWLEDGE = 1;
        /// The driver side knows how to drive it.
        const DRIVER = 2;
        /// The driver is set up; the queues are live.
        const DRIVER_OK = 4;
        /// The features are settled.
        const FEATURES_OK = 8;
        /// The device is suspended (virtio 1.4).
        const SUSPEND = 16;
        /// The device has met an error from which only a reset helps. Set by the device only.
        const NEEDS_RESET = 64;
        /// The driver has given up.
        const FAILED = 128;
        const _ = !0;
    }
}

impl DeviceStatus {
    /// The status of a device that was reset: no bit set.
    pub const RESET: DeviceStatus = DeviceStatus::empty();

    /// Every bit that this revision gives a name.
    pub const NAMED: DeviceStatus = DeviceStatus::from_bits_retain(0xdf);
}

impl fmt::Display for DeviceStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}", self.bits())
    }
}
