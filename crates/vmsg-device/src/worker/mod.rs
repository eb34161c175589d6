// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Workers: who calls the devices.
//!
//! A worker owns many devices and all their queues, so nothing on the data
//! path waits for another worker. [`Core`] does the work and knows neither threads nor
//! epoll; [`Worker`](thread::Worker) is the thread around it.

mod command;
mod core;
mod entry;
mod fault;
mod linger;
mod others;
mod outbox;
mod passthrough;
mod ready;
mod seat;
pub mod thread;
mod waiting;

pub use self::command::{Command, Notice, Pending, QueueStart, Record, Reply, Resume, Slot};
pub use self::core::{Core, Fds};
pub use self::outbox::Outbox;

#[cfg(test)]
mod inflight_test;
