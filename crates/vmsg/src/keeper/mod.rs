// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network connections that outlive a killed device host.
//!
//! The guest's TCP connections end in sockets of `vmsg serve`. If that process
//! is killed, so are they, unless somebody else holds them as well: the
//! keeper, a process that `serve` starts and that does nothing but hold
//! descriptors and the few bytes that describe each connection. The next
//! `serve` on the same bus takes them over. A `serve` that ends in an orderly
//! way dismisses its keeper.

mod client;
mod line;
mod protocol;
mod server;

pub(crate) use client::{Keeper, Kept};
pub(crate) use server::run;
