// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI function 10ee:9039, an AMP FIFO: two pages in its memory, registers that say what it is and that ring.
//!
//! BAR0 has the registers, BAR1 16 KiB for each FIFO with the driver's queue 4 KiB and the device's 8 KiB into it, BAR2 one MSI-X
//! vector for each FIFO. Source: the AMP trees of 2025 and 2026.

use std::fmt;

/// PCI vendor and device.
pub const PCI_ID: (u16, u16) = (0x10ee, 0x9039);

/// Bytes of BAR1 for each FIFO.
pub const BYTES: usize = 16 * 1024;

/// Where the driver's queue begins in those; the device's is behind it.
pub const QUEUES: usize = 4 * 1024;

/// Registers in BAR0.
const VERSION: usize = 0x00;
const FEATURES: usize = 0x04;
const NOTIFY: usize = 0x20;

/// The only version.
const KNOWN: u32 = 1;

/// 32-bit registers at byte offsets: a BAR, or what a test has in its place.
pub trait Registers: Send + Sync {
    /// Loads the register at `offset`; `None` if there is none.
    fn load(&self, offset: usize) -> Option<u32>;

    /// Stores into the register at `offset`; false if there is none.
    fn store(&self, offset: usize, value: u32) -> bool;
}

impl Registers for vmsg_mem::DeviceSlice {
    fn load(&self, offset: usize) -> Option<u32> {
        self.region().read_u32(offset)
    }

    fn store(&self, offset: usize, value: u32) -> bool {
        self.region().write_u32(offset, value)
    }
}

impl<R: Registers + ?Sized> Registers for Box<R> {
    fn load(&self, offset: usize) -> Option<u32> {
        (**self).load(offset)
    }

    fn store(&self, offset: usize, value: u32) -> bool {
        (**self).store(offset, value)
    }
}

/// Why a function is not an AMP FIFO that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FifoError {
    /// Another version than 1.
    #[error("the AMP FIFO has version {0}, known is 1")]
    Version(u32),
    /// There is no such register.
    #[error("the AMP FIFO has no register at {0:#x}")]
    NoRegister(usize),
}

/// The registers of an AMP FIFO.
pub struct Fifo<R> {
    registers: R,
    notify: usize,
    features: u32,
}

impl<R: Registers> Fifo<R> {
    /// FIFO `number` of the function with these registers.
    ///
    /// # Errors
    /// [`FifoError`].
    pub fn new(registers: R, number: u16) -> Result<Self, FifoError> {
        let load = |offset| registers.load(offset).ok_or(FifoError::NoRegister(offset));
        let version = load(VERSION)?;
        if version != KNOWN {
            return Err(FifoError::Version(version));
        }
        let features = load(FEATURES)?;
        let notify = NOTIFY + 4 * usize::from(number);
        load(notify)?;
        Ok(Self {
            registers,
            notify,
            features,
        })
    }

    /// What stands in FEATURES; no bit has a meaning yet.
    pub fn features(&self) -> u32 {
        self.features
    }

    /// Rings the other side.
    pub fn notify(&self) -> bool {
        self.registers.store(self.notify, 1)
    }
}

impl<R> fmt::Debug for Fifo<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("Fifo");
        all.field("notify", &self.notify)
            .field("features", &self.features);
        all.finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "fifo_test.rs"]
mod tests;

#[cfg(test)]
#[path = "fifo_conversation_test.rs"]
mod conversation;
