// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host: devices, the workers that call them, and the side of a
//! bus on which they are found.
//!
//! Control (messages, state machines, who holds which device) runs in one
//! thread, the devices' queues in workers; the two only exchange
//! [`Command`](worker::Command)s and [`Reply`](worker::Reply)s, so that a
//! guest that floods its queues cannot delay anybody's configuration.
#![forbid(unsafe_code)]

pub mod blk;
pub mod bridge;
pub mod console;
pub mod device;
pub mod host;
pub mod net;
pub mod rng;
#[cfg(test)]
mod stand;
pub mod switch;
pub mod worker;
