// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Fronts: what a session looks like to a VMM.

mod listener;
pub mod qemu;
mod stats;
mod thread;
pub mod vfio_user;
pub mod vhost_user;

pub use listener::BindError;
pub use stats::FrontStats;
