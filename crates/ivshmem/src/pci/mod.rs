// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI function, in a guest.
//!
//! BAR0 has four registers of 32 bits: 0 interrupt mask and 4 interrupt status, which no `ivshmem-doorbell` uses, 8
//! IVPosition, the id of this end, and 12 the doorbell, to which the id of a peer times 65536 plus one of its vectors
//! is written. BAR1 has the table of MSI-X, BAR2 the memory. (QEMU's `docs/specs/ivshmem-spec.rst`.)

mod address;
mod bind;
mod error;
mod function;
mod ioctl;
mod registers;
mod taken;
mod vfio;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vmsg_mem::{DeviceMapping, Doorbell};

use crate::memory::Memory;
use crate::{PeerId, RingError};

pub use address::{Address, BadAddress};
pub use error::Error;
pub use function::{Function, Kind, Tree};
use registers::{IV_POSITION, Registers};
pub use taken::Taken;
pub(crate) use vfio::Opened;

/// The way to a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// By VFIO if the function is bound to vfio-pci, otherwise by sysfs.
    #[default]
    Auto,
    /// By VFIO: memory, and doorbells in both directions.
    Vfio,
    /// By sysfs: memory; others can be rung, but nobody is heard.
    Sysfs,
}

/// The doorbells of a function.
#[derive(Debug)]
pub(crate) struct Doors {
    id: Option<PeerId>,
    vectors: Vec<OwnedFd>,
    /// `None` for a function without doorbells.
    registers: Option<Registers>,
}

impl Doors {
    pub(crate) fn id(&self) -> Option<PeerId> {
        self.id
    }

    pub(crate) fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    pub(crate) fn vector_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.vectors.get(usize::from(vector)).map(AsFd::as_fd)
    }

    pub(crate) fn ring(&self, peer: PeerId, vector: u16) -> Result<(), RingError> {
        let registers = self.registers.as_ref().ok_or(RingError::NoDoorbells)?;
        Ok(registers.ring(peer, vector)?)
    }

    pub(crate) fn bell(&self, peer: PeerId, vector: u16) -> Option<Doorbell> {
        self.registers.as_ref()?.bell(peer, vector).ok()
    }
}

/// Reaches a function.
pub(crate) fn open(function: &Function, access: Access) -> Result<(Memory, Doors), Error> {
    let by_vfio = match access {
        Access::Auto => function.driver() == Some("vfio-pci"),
        Access::Vfio => true,
        Access::Sysfs => false,
    };
    if by_vfio {
        open_vfio(function)
    } else {
        open_sysfs(function)
    }
}

fn open_vfio(function: &Function) -> Result<(Memory, Doors), Error> {
    let opened = Arc::new(Opened::new(function)?);
    let memory = match map_sysfs(function, Some(opened.clone())) {
        // Better: VFIO would keep everybody else from mapping it by sysfs, as a VMM may want to.
        Ok(memory) => memory,
        Err(error) => {
            tracing::debug!(%error, function = %function.address(), "memory by VFIO");
            opened.map_memory(function)?
        }
    };
    let (registers, vectors) = match function.kind() {
        Kind::Plain => (None, Vec::new()),
        Kind::Doorbell => (Some(opened.registers()?), opened.interrupts()?),
    };
    Ok((memory, doors(registers, vectors)))
}

fn open_sysfs(function: &Function) -> Result<(Memory, Doors), Error> {
    function.enable()?;
    let memory = map_sysfs(function, None)?;
    let registers = match function.kind() {
        Kind::Plain => None,
        Kind::Doorbell => map_registers(function)
            // Such as where another process has them by VFIO.
            .inspect_err(|error| tracing::info!(%error, "memory only"))
            .ok(),
    };
    Ok((memory, doors(registers, Vec::new())))
}

/// Maps BAR0 by sysfs.
fn map_registers(function: &Function) -> Result<Registers, Error> {
    let file = function.open_resource("resource0")?;
    let offset = function.bar(0).start % page_size();
    let bar = DeviceMapping::of_fd(file.as_fd(), offset, registers::SIZE)
        .map_err(|source| Error::map(function, "resource0", source))?;
    Ok(Registers::mapped(file.into(), Arc::new(bar)))
}

fn doors(registers: Option<Registers>, vectors: Vec<OwnedFd>) -> Doors {
    let id = registers
        .as_ref()
        .and_then(|registers| registers.read(IV_POSITION))
        // QEMU reads as −1 before its server has told the id.
        .and_then(|id| u16::try_from(id).ok())
        .map(PeerId);
    Doors {
        id,
        vectors,
        registers,
    }
}

/// Maps BAR2 by sysfs.
///
/// On arm64 it is ordinary memory only as `resource2_wc`. On x86 write-combining would change the order in which
/// stores get to memory where a hypervisor heeds it; `resource2` never does.
fn map_sysfs(function: &Function, keep: Option<Arc<Opened>>) -> Result<Memory, Error> {
    let x86 = cfg!(any(target_arch = "x86_64", target_arch = "x86"));
    let names: &[(&str, bool)] = if x86 {
        &[("resource2", true)]
    } else {
        &[("resource2_wc", true), ("resource2", false)]
    };
    let mut first = None;
    for (name, ordinary) in names {
        let mapped = function.open_resource(name).and_then(|file: File| {
            let size = function.memory_size();
            Memory::of_pci(file.as_fd(), 0, size, *ordinary, keep.clone())
                .map_err(|source| Error::map(function, name, source))
        });
        match mapped {
            Ok(memory) => return Ok(memory),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.expect("there is at least one name"))
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
