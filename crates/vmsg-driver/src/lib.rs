// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver side of virtio-msg as a library.
//!
//! * [`Client`]: the driver end of a bus. Requests, their answers, and the events in between, over any [`virtio_msg::Channel`].
//! * [`Wait`]: how to pass the time until an answer comes.
//! * [`Device`]: one device, brought up in the order in which Linux does it.
//! * With `std`: `BusClient`, a client that sleeps while it waits; `DmaPool`, memory that is lent to devices; `Queue`;
//!   `net::NetDriver`, `blk::BlkDriver` and `rng::RngDriver` for tests and measurements.
//! * With `queue`: `blk::Requests`, the requests of a disk's queue, and `amp::Amp`, a bus in a region of memory, both without operating system and
//!   allocator.
//! * With `virtio-drivers`: `virtio_drivers::MsgTransport`, for the drivers of that crate.
//!
//! The device side is not trusted: what it sends is checked, counted and dropped if it is wrong; a request that gets no proper
//! answer ends in an error. Without the feature `std` the crate needs neither an operating system nor an allocator; see
//! `examples/no_std_probe.rs`.
#![cfg_attr(not(any(feature = "std", test)), no_std)]
#![deny(unsafe_code)]

#[cfg(feature = "queue")]
pub mod amp;
pub mod blk;
mod client;
mod device;
#[cfg(feature = "std")]
mod dma;
mod error;
mod event;
#[cfg(feature = "std")]
pub mod net;
#[cfg(feature = "std")]
mod queue;
#[cfg(feature = "std")]
pub mod rng;
#[cfg(feature = "std")]
mod sleep;
#[cfg(feature = "virtio-drivers")]
pub mod virtio_drivers;
mod wait;

#[cfg(feature = "std")]
pub use client::BusClient;
pub use client::{Client, Counters, DEFAULT_TIMEOUT};
pub use device::{Device, Wanted};
#[cfg(feature = "std")]
pub use dma::{DmaBuffer, DmaPool, PAGE_SIZE};
pub use error::{Error, Fault};
pub use event::{Event, MAX_EVENTS};
#[cfg(feature = "std")]
pub use queue::{Queue, QueueOptions, Records};
#[cfg(feature = "std")]
pub use sleep::{DEFAULT_SPIN, Sleep};
pub use wait::{Interest, Spin, Wait};
