// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NBD disks: with servers that people use, with one of our own that loses things, and with bad ones.

#[path = "../held/mod.rs"]
mod held;

mod forgetful;
mod gone;
mod greeting;
mod nonsense;
mod place;
mod real;
mod server;
