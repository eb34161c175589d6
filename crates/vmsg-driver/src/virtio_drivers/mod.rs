// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The [`virtio-drivers`](virtio_drivers) crate over virtio-msg.
//!
//! [`MsgTransport`] is its `Transport` over any channel, also without `std`. With `std`, `PoolHal` is its `Hal` over a `DmaPool`: buffers
//! of the program are copied into the pool and back, so the program's own memory is never lent.

#[cfg(feature = "std")]
mod hal;
mod transport;

#[cfg(feature = "std")]
pub use hal::{PoolHal, StaticPool};
pub use transport::MsgTransport;
