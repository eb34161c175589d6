// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus between processes of one host: docs/bus-unix.md.
//!
//! The device host has a [`Listener`], a driver a [`Connector`]; [`Watch`] tells
//! a driver when it is worth trying (again).

pub(crate) mod address;
pub(crate) mod connector;
mod frame;
mod listener;
pub(crate) mod packet;
mod watch;

pub use address::{Address, BindError, MAX_PATH};
pub use connector::{ConnectError, Connecting, Connector};
pub use frame::RefuseReason;
pub use listener::{Listener, ListenerOptions, Rejected};
pub use watch::Watch;
