// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What r1 does not say and the owner of an adapter may.

use crate::types::DevNum;

/// How a [`DriverAdapter`](crate::r1::DriverAdapter) is to behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverOptions {
    /// Number of the one device at the other end, 0 by default. Any other number is a device that is not there.
    pub dev_num: DevNum,
    /// Bytes of configuration space; `None`: as [`config_size`] has it for the device id.
    pub config_size: Option<u32>,
    /// Whether the owner decides about IOMMU_TRANSLATE ([`poll_translate`](crate::r1::DriverAdapter::poll_translate)). If not, every page is where it
    /// is asked for: bus addresses are what the driver hands out, so that is what it means.
    pub ask_translate: bool,
}

impl Default for DriverOptions {
    fn default() -> DriverOptions {
        DriverOptions {
            dev_num: DevNum(0),
            config_size: None,
            ask_translate: false,
        }
    }
}

/// A page that the device wants to know the bus address of: answered with
/// [`answer_translate`](crate::r1::DriverAdapter::answer_translate). The device does nothing else meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translate {
    /// Address of the page. Not checked.
    pub va: u64,
    /// [`PROT_READ`](crate::r1::PROT_READ) and [`PROT_WRITE`](crate::r1::PROT_WRITE): what the device wants to do.
    pub prot: u8,
}

/// Bytes of configuration space that a device of this id can have (virtio 1.3 §5, as far as Linux's headers go). r1 does not tell the size, and where
/// the device has less it reads as ones (QEMU) or zeros. 256 for ids without an entry: no configuration that fits into a message is larger.
pub fn config_size(device_id: u32) -> u32 {
    match device_id {
        // Network: up to the hash types.
        1 => 24,
        // Block, up to the zoned characteristics.
        2 => 96,
        // Console.
        3 => 12,
        // Entropy, I2C: none.
        4 | 34 => 0,
        // Memory balloon.
        5 => 16,
        // SCSI host.
        8 => 36,
        // GPU.
        16 => 20,
        // Input: a selector and its answer.
        18 => 136,
        // Socket, GPIO.
        19 | 41 => 8,
        // Crypto.
        20 => 56,
        // IOMMU.
        23 => 40,
        // Memory.
        24 => 56,
        // Sound.
        25 => 16,
        // File system: tag, queues, notification buffer size.
        26 => 44,
        // Persistent memory.
        27 => 16,
        _ => 256,
    }
}
