// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The operator's way into a running `vmsg serve`: a socket on which requests and answers are
//! lines of JSON.
//!
//! [`protocol`] has all requests in one place; what they do is in [`carry_out`](server::carry_out).
//! The server is a thread of its own, which waits for the device host; the host never waits for it.

mod client;
mod list;
mod protocol;
mod server;

pub(crate) use client::run;
pub(crate) use protocol::LinkState;
pub(crate) use server::Server;
