// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared memory for virtio-msg.
//!
//! The other side of a bus can change every byte of shared memory at any
//! time, so nothing here ever forms a `&[u8]` or `&mut [u8]` into it. Ring
//! words go through atomics, payload through raw copies.
//!
//! * [`BusAddr`]: an address as the peer writes it in messages and descriptors.
//! * [`RamSlice`]: a bounded piece of ordinary shared memory, [`Pieces`] a
//!   run of them.
//! * [`Window`], [`AddressSpace`]: which bus addresses are backed by what.
#![cfg_attr(not(feature = "std"), no_std)]

mod addr;
mod error;
mod pieces;
mod queue_memory;
mod ram;
pub mod spsc;
mod window;

pub use addr::BusAddr;
pub use error::Error;
pub use pieces::Pieces;
pub use queue_memory::QueueMemory;
pub use ram::RamSlice;
pub use window::{Access, AddressSpace, Window};
