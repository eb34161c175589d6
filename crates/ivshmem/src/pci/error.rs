// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a function cannot be reached, and what to do about it.

use std::io;
use std::path::PathBuf;

use super::{Address, Function};

/// An error of this module. Each says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No function of ivshmem.
    #[error(
        "there is no ivshmem function (PCI id 1af4:1110) in this machine; its VMM is to have -device ivshmem-doorbell \
         or -device ivshmem-plain"
    )]
    None,
    /// More than one, and no address.
    #[error("there are several ivshmem functions: {0}; name one")]
    Several(String),
    /// No function with this address.
    #[error("there is no ivshmem function at {0}; `vmsg ivshmem info` shows where some are")]
    NotThere(Address),
    /// No function with this PCI id at this address.
    #[error("there is no function with PCI id {vendor:04x}:{device:04x} at {address}")]
    NotOfKind {
        /// The address.
        address: Address,
        /// The vendor that it should have.
        vendor: u16,
        /// The device that it should be.
        device: u16,
    },
    /// Only root may do this.
    #[error("{}: permission denied: this needs root", .0.display())]
    NotRoot(PathBuf),
    /// The function has another driver, or none.
    #[error(
        "{address} is bound to {}; VFIO needs vfio-pci: `vmsg ivshmem bind {address}`",
        driver.as_deref().unwrap_or("no driver")
    )]
    NotBound {
        /// The function.
        address: Address,
        /// The driver that it has.
        driver: Option<String>,
    },
    /// The function's memory does not answer, and only its driver can change that.
    #[error(
        "the memory of {address} is switched off, and its driver {driver} has to switch it on; with vfio-pci use VFIO"
    )]
    Off {
        /// The function.
        address: Address,
        /// The driver that it is bound to.
        driver: String,
    },
    /// The kernel module is not there.
    #[error("the kernel module {0} is not loaded: `modprobe {0}`")]
    NoModule(&'static str),
    /// The function is in no IOMMU group.
    #[error(
        "{0} is in no IOMMU group, and vfio-pci does not take it: give the machine an IOMMU (QEMU on x86: -device \
         intel-iommu,intremap=on and the kernel option intel_iommu=on; on arm64: -machine virt,iommu=smmuv3), or, \
         where the kernel has it, load vfio with enable_unsafe_noiommu_mode=1; without VFIO there is sysfs, which \
         hears no doorbells"
    )]
    NoGroup(Address),
    /// vfio-pci was asked to take the function, and did not.
    #[error("vfio-pci did not take {0}; the kernel log says why (dmesg)")]
    NotTaken(Address),
    /// Somebody has the group open.
    #[error("another process uses IOMMU group {0} by VFIO")]
    Busy(u32),
    /// Another function of the group has a driver.
    #[error(
        "IOMMU group {group} has other functions with drivers of their own: {others}; unbind them or bind them to \
         vfio-pci too"
    )]
    NotViable {
        /// The group.
        group: u32,
        /// Addresses and drivers.
        others: String,
    },
    /// The IOMMU does not remap interrupts.
    #[error(
        "the IOMMU does not take group {0}: if it does not remap interrupts (QEMU: intremap=on), load vfio_iommu_type1 \
         with allow_unsafe_interrupts=1"
    )]
    Unsafe(u32),
    /// The kernel's VFIO is not the one that is known.
    #[error("this kernel's VFIO has {0}")]
    Unknown(&'static str),
    /// The function is not as an ivshmem function is.
    #[error("{address} has {what}")]
    Odd {
        /// The function.
        address: Address,
        /// What is odd.
        what: &'static str,
    },
    /// It could not be mapped.
    #[error("map {what} of {address}: {source}")]
    Map {
        /// The function.
        address: Address,
        /// Which of its resources.
        what: String,
        /// Why.
        source: vmsg_mem::Error,
    },
    /// Something else the system said.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The error of the system.
        source: io::Error,
    },
}

impl Error {
    pub(super) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let what = what.into();
        let source = source.into();
        Self::Io { what, source }
    }

    /// The error of opening or writing a file.
    pub(super) fn file(path: PathBuf, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            return Self::NotRoot(path);
        }
        let what = path.display().to_string();
        Self::Io { what, source }
    }

    pub(super) fn map(function: &Function, what: &str, source: vmsg_mem::Error) -> Self {
        Self::Map {
            address: function.address(),
            what: what.into(),
            source,
        }
    }
}
