// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The operator's way into a running `vmsg serve` or `vmsg up`: a socket on which requests and
//! answers are lines of JSON.
//!
//! [`protocol`] has all requests in one place; [`Server`] hands them to a [`Service`], which does
//! what they say. The server's threads wait for devices and switches; these never wait for them.

mod client;
mod command;
mod protocol;
mod server;
mod show;
mod table;

pub(crate) use client::Client;
pub(crate) use command::run;
pub(crate) use protocol::*;
pub(crate) use server::{Server, Service};
pub(crate) use show::{dropped, dropped_of, is_bridged, port_state, traffic};
pub(crate) use table::Table;
