// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared memory for virtio-msg.
//!
//! The other side of a bus can change every byte of shared memory at any
//! time, so nothing here ever forms a `&[u8]` or `&mut [u8]` into it. Ring
//! words go through atomics, payload through raw copies.
//!
//! * [`BusAddr`]: an address as the peer writes it in messages and descriptors.
//! * [`RamSlice`]: a bounded piece of ordinary shared memory, [`Pieces`] a
//!   run of them; [`DeviceRegion`]: a piece of device memory.
//! * [`Window`], [`AddressSpace`]: which bus addresses are backed by what.
//! * [`spsc`]: the message queue, over any [`QueueMemory`]; [`amp`]: two of them in memory that describes itself.
//!
//! With the feature `std` (the default), for Linux:
//!
//! * `Mapping`, `MappedSlice`: mapped files; `WindowTable`: windows with
//!   their mappings.
//! * `DeviceMapping`, `DeviceSlice`: mapped memory of devices.
//! * `fault`: survive files that are truncated while mapped.
//! * Methods of `Pieces` to read and write files and sockets; `Held`: pieces that outlive a call.
//! * `Doorbell`: an eventfd that can be rung without being blocked by others, or a
//!   register of a device.
//! * `WriteLease`: whether a file is in use by anybody else; `lock`: files of which there is one
//!   holder at a time; `ending`: processes that are about to give back what they hold.
//! * `byte_lock`, `block_device`: what else files and block devices are asked by system calls that take addresses.
//!
//! With the feature `uring`: `uring`, files read and written by the kernel in such memory.
#![cfg_attr(not(any(feature = "std", test)), no_std)]

mod addr;
pub mod amp;
#[cfg(feature = "std")]
mod backing;
#[cfg(feature = "std")]
pub mod block_device;
#[cfg(feature = "std")]
pub mod byte_lock;
#[cfg(feature = "std")]
mod device_mapping;
mod device_region;
#[cfg(feature = "std")]
mod doorbell;
#[cfg(feature = "std")]
pub mod ending;
mod error;
#[cfg(feature = "std")]
pub mod fault;
#[cfg(feature = "std")]
mod held;
#[cfg(feature = "std")]
mod lease;
#[cfg(feature = "std")]
pub mod lock;
#[cfg(feature = "std")]
mod mapping;
mod pieces;
#[cfg(feature = "std")]
mod pieces_io;
#[cfg(feature = "std")]
mod pool;
mod queue_memory;
mod ram;
pub mod spsc;
#[cfg(feature = "std")]
mod table;
#[cfg(feature = "uring")]
pub mod uring;
mod window;

pub use addr::BusAddr;
#[cfg(feature = "std")]
pub use backing::check_backing;
#[cfg(feature = "std")]
pub use device_mapping::{DeviceMapping, DeviceSlice};
pub use device_region::DeviceRegion;
#[cfg(feature = "std")]
pub use doorbell::{Doorbell, RingError};
pub use error::Error;
#[cfg(feature = "std")]
pub use held::Held;
#[cfg(feature = "std")]
pub use lease::{LeaseError, WriteLease};
#[cfg(feature = "std")]
pub use mapping::{MappedSlice, Mapping, check_seals};
pub use pieces::Pieces;
#[cfg(feature = "std")]
pub use pieces_io::discard;
pub use queue_memory::QueueMemory;
pub use ram::RamSlice;
#[cfg(all(feature = "std", debug_assertions))]
pub use ram::copied;
#[cfg(feature = "std")]
pub use table::{Place, TableEntry, WindowTable};
pub use window::{Access, AddressSpace, Window};
