// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any function, taken by VFIO: what is known of its BARs is up to the caller.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::{Address, Error, Opened, Tree, ioctl};
use crate::memory::Memory;

/// A function of whatever kind that nobody else can take as long as this, or memory of it, lives.
#[derive(Debug)]
pub struct Taken {
    opened: Arc<Opened>,
    address: Address,
}

impl Taken {
    /// Takes the function at `address`, which must have this PCI vendor and device and be bound to vfio-pci, and has its memory answer.
    ///
    /// # Errors
    ///
    /// [`Error`], which says what to do.
    pub fn new(tree: &Tree, address: Address, id: (u16, u16)) -> Result<Self, Error> {
        let function = tree.function_of(address, [id.0, id.1])?;
        let opened = Arc::new(Opened::new(&function)?);
        Ok(Self { opened, address })
    }

    /// All of BAR `number`, 0 to 5.
    ///
    /// # Errors
    ///
    /// There is none, or it cannot be mapped, as one that shares its page with another BAR.
    pub fn bar(&self, number: u8) -> Result<Memory, Error> {
        let region = self.opened.region(ioctl::BAR0 + u32::from(number.min(5)))?;
        if region.size == 0 {
            return Err(Error::Odd {
                address: self.address,
                what: "not the BARs that it should have",
            });
        }
        let (file, keep) = (self.opened.device().as_fd(), Some(self.opened.clone()));
        Memory::of_pci(file, region.offset, region.size, false, keep).map_err(|source| Error::Map {
            address: self.address,
            what: format!("BAR{number} by VFIO"),
            source,
        })
    }

    /// An eventfd for each vector of MSI-X, as far as the machine has them to spare.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn interrupts(&self) -> Result<Vec<OwnedFd>, Error> {
        self.opened.interrupts()
    }
}
