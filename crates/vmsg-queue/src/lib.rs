// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtqueues over windows of shared memory, device and driver side.
//!
//! * [`DeviceQueue`]: what a device does with a queue. Chains are taken in
//!   batches into a [`ChainStorage`] (or, without an allocator, a
//!   [`ChainArray`]) as runs of memory, used elements given back in any order
//!   and released together.
//! * [`DriverQueue`]: what a driver does with a queue, in memory that it owns.
//! * [`Inflight`] and [`RecordedQueue`]: for devices whose requests overtake
//!   each other, the record by which the next process goes on.
//! * `remote` (feature `alloc`): a device's side of a queue in memory that is reached by copies alone.
//! * [`QueueConfig`], [`QueueFeatures`], [`Layout`]: where the three areas of
//!   a queue are, what was negotiated, how large they must be.
//!
//! Split virtqueues (virtio 1.3, section 2.7) with indirect descriptors and
//! EVENT_IDX. The other side of a queue is not trusted: descriptors, ring
//! entries and indices are read exactly once, checked, and used from the
//! private copy only. A fault of the peer is a [`QueueError`] for which
//! [`QueueError::is_peer_fault`] holds, and it breaks the queue: from then on
//! every operation returns [`QueueError::Broken`] until the queue is made anew.
#![cfg_attr(not(test), no_std)]

#[cfg(feature = "alloc")]
extern crate alloc;

mod cells;
mod chain;
mod config;
mod device;
mod driver;
mod error;
mod gather;
mod inflight;
mod position;
#[cfg(feature = "alloc")]
mod recorded;
#[cfg(feature = "alloc")]
pub mod remote;
mod ring;

#[cfg(feature = "alloc")]
pub use chain::ChainStorage;
pub use chain::{Batch, Chain, ChainArray, ChainHead, Need, Storage};
pub use config::{Layout, QueueConfig, QueueFeatures};
pub use device::{Completer, DeviceQueue};
pub use driver::{Buffer, DriverQueue, DriverSlot, ParkedDriver, Token, Used};
pub use error::QueueError;
pub use inflight::{Inflight, Recovered};
#[cfg(feature = "alloc")]
pub use recorded::RecordedQueue;
