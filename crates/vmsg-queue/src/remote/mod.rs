// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device's side of a queue in memory that can only be copied from and to.
//!
//! [`RemoteQueue`] does what [`DeviceQueue`](crate::DeviceQueue) does, for a [`Memory`] that need not be mapped here: parts of it
//! may lie behind messages, an access may fail for reasons that pass. Chains come as addresses and lengths; their
//! bytes are copied by whoever takes them.

mod memory;
mod queue;
mod storage;
mod table;

pub use memory::Memory;
pub use queue::{RemoteError, RemoteQueue};
pub use storage::{RemoteBatch, RemoteChain, RemoteStorage};
