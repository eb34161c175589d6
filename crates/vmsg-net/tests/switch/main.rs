// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a switch does with frames, one thing at a time.

#[path = "../switching/mod.rs"]
mod switching;

mod captures;
mod forwarding;
mod limits;
mod net;
mod ports;
mod vlans;
