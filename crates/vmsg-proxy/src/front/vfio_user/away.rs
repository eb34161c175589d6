// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients for which there is nothing.

use crate::session::OpError;
use crate::shadow;
use thiserror::Error;
use vmsg_vfio_user::{DeviceInfo, DmaMap, DmaUnmap, Errno, IrqInfo, Region, SetIrqs};

/// Why a client is not served.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error(
        "the device was not seen until now, so it is not known what to show; start its device host (`vmsg serve`) first, \
`vmsg ls` shows what there is"
    )]
    Absent,
    #[error("the device is held by {0}, and a device has one driver at a time")]
    Held(String),
    #[error("the device cannot be looked at: {0}")]
    Other(OpError),
    #[error("{0}")]
    Copies(shadow::NewError),
}

impl Refusal {
    /// What the client's user reads.
    pub(super) fn errno(&self) -> Errno {
        match self {
            Refusal::Absent => Errno::NODEV,
            Refusal::Held(_) => Errno::BUSY,
            Refusal::Copies(shadow::NewError::TooSmall { .. }) => Errno::INVAL,
            Refusal::Other(_) | Refusal::Copies(_) => Errno::IO,
        }
    }
}

/// What is shown to clients for which there is nothing.
pub(super) struct Nobody(pub(super) Errno);

impl vmsg_vfio_user::Device for Nobody {
    fn greet(&mut self) -> Result<(), Errno> {
        Err(self.0)
    }
    // Nothing of this is asked of a device that does not greet.
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            regions: 0,
            irqs: 0,
            can_reset: false,
        }
    }
    fn region(&self, _: u32) -> Option<Region<'_>> {
        None
    }
    fn irq(&self, _: u32) -> IrqInfo {
        IrqInfo::NONE
    }
    fn read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(self.0)
    }
    fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(self.0)
    }
    fn set_irqs(&mut self, _: SetIrqs) -> Result<(), Errno> {
        Err(self.0)
    }
    fn map(&mut self, _: DmaMap) -> Result<(), Errno> {
        Err(self.0)
    }
    fn unmap(&mut self, _: DmaUnmap) -> Result<u64, Errno> {
        Err(self.0)
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Err(self.0)
    }
}
