// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio-msg devices for unmodified guests.
//!
//! * [`session`]: what one guest has negotiated with one device, replayed to a device host that comes back. No I/O.
//! * [`link`]: the thread that joins a session to its bus.
//! * [`transport`]: the registers of a virtio device, as virtio-mmio and as a PCI function, over whatever stands behind them.
//! * [`places`]: where a guest's memory lies in what a bus has in common.
//! * [`memory`]: a guest's memory, wherever it is; [`shadow`]: copies of its queues for device hosts that are to see nothing else.
//! * [`front`]: what a VMM sees: vhost-user, vfio-user.
//! * [`Proxy`]: several fronts, from plain configuration.
#![forbid(unsafe_code)]

// Tests of the inside use what tests of the outside do.
#[cfg(test)]
extern crate self as vmsg_proxy;

mod edges;
pub mod front;
pub mod link;
mod log_limit;
pub mod memory;
mod pace;
pub mod places;
mod proxy;
pub mod session;
pub mod shadow;
pub mod transport;

pub use proxy::{
    BusRef, DeviceRef, FrontKind, FrontSpec, Proxy, ProxyError, SpecError, print_qemu,
};
