// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vhost-user front: a socket that stock VMMs (QEMU, cloud-hypervisor, crosvm) connect to.
//!
//! One front is one device, and serves one front end after another. When a front end goes, the device is reset, all windows are taken
//! back, and the next may come: another guest, or the same QEMU with `reconnect` on its socket.
//!
//! * The guest's memory becomes windows at guest physical addresses; ring addresses, which are those of the VMM's process, are
//!   translated by the memory table.
//! * Kick and call eventfds go straight to the device host. Nothing runs here for a kick or a call.
//! * vhost-user cannot tell the guest about a refusal of features or NEEDS_RESET. A refusal ends the connection; NEEDS_RESET is logged, and the
//!   rings' error eventfds are rung.
//! * Whatever comes over the socket, this process lives: what cannot be understood is counted, told once, and ends that
//!   connection only.

mod config;
mod copies;
mod guest;
mod inflight;
mod memory;
mod net;
mod news;
mod pause;
mod ring;
mod server;
mod socket;
mod stop;
mod wire;
mod write_cache;

pub use crate::front::{BindError, FrontStats};
pub use guest::GuestError;
pub use memory::MemoryError;
pub(crate) use net::{F_MQ, F_MTU};
pub use server::{VhostUserFront, VhostUserOptions};
pub use socket::ConnectionError;
pub use wire::WireError;
