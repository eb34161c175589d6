// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device side of a bus: who may do what with which device.
//!
//! [`Core`] holds the devices' state machines, the connections and what they
//! have lent; it does no I/O. [`Host`] is the thread around it.

mod actions;
mod bare;
mod bus;
mod bus_messages;
mod common;
mod connection;
mod core;
mod entry;
mod handle;
mod lending;
mod log_limit;
mod operators;
mod pump;
mod removal;
mod runtime;
mod slots;
mod windows;

pub use self::connection::{ConnId, Peer};
pub use self::core::{AddError, Core, Counters, Order};
pub use self::handle::{Handle, HandleError, Report};
pub use self::log_limit::LogLimit;
pub use self::runtime::{Host, HostError, Stop};
pub use self::windows::{MAX_VIEWS, MAX_WINDOWS};

#[cfg(test)]
mod late_test;
#[cfg(test)]
mod stand;
