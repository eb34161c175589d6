// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory and doorbells shared by virtual machines: QEMU's ivshmem, from both sides.
//!
//! A PCI function (1af4:1110) shows its guest a piece of memory that other guests, and processes of the host, have
//! mapped as well; with a server it also has doorbells: an interrupt vector of one peer is rung by another one.
//!
//! * On the host: the server that hands out memory and doorbells, and its client.
//! * In a guest: the PCI function, by VFIO or by sysfs.
//!
//! Sources: QEMU's `docs/specs/ivshmem-spec.rst`, `linux/vfio.h`.
#![deny(unsafe_code)] // but for the system calls of VFIO, in `pci::ioctl`

pub mod client;
mod device;
mod id;
mod memory;
mod news;
pub mod pci;
mod plain;
pub mod protocol;
pub mod server;

pub use client::Client;
pub use device::Device;
pub use id::PeerId;
pub use memory::Memory;
pub use news::{Event, RingError};
pub use plain::{Plain, PlainError};
