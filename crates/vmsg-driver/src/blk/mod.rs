// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver for block devices (virtio 1.3 §5.2): any number of requests under way, in several queues.
//!
//! * [`Config`]: what the device says about itself. Needs nothing.
//! * [`Requests`] (feature `queue`): the requests of one queue, without allocator and operating system.
//! * `BlkDriver` (feature `std`): a whole device over a bus of this workspace, also after its host was started anew.
//!
//! The device is not trusted: used ids and lengths are checked by the queue, a status that does not exist is a
//! [`Failure::BadStatus`], and what the configuration says is checked when it is read.

#[cfg(feature = "std")]
mod check;
mod config;
#[cfg(feature = "std")]
mod driver;
#[cfg(feature = "std")]
mod options;
#[cfg(feature = "queue")]
mod request;
#[cfg(feature = "queue")]
mod requests;

pub use config::{CONFIG_LEN, Config, SECTOR, WRITEBACK_OFFSET};
#[cfg(feature = "std")]
pub use driver::{BlkCounters, BlkDriver};
#[cfg(feature = "std")]
pub use options::BlkOptions;
#[cfg(feature = "queue")]
pub use request::{Completion, Failure, ID_LEN, Request, kind};
#[cfg(feature = "queue")]
pub use requests::{CELL, MAX_SEGMENTS, Pending, Requests};

/// Virtio id of a block device.
pub const DEVICE_ID: u32 = 2;

/// Feature bits of block devices (virtio 1.3 §5.2.3).
pub mod feature_bit {
    /// Segments have a largest size.
    pub const SIZE_MAX: u32 = 1;
    /// Requests have a largest number of segments.
    pub const SEG_MAX: u32 = 2;
    /// The device can only be read.
    pub const RO: u32 = 5;
    /// The device tells its block size.
    pub const BLK_SIZE: u32 = 6;
    /// There are flushes.
    pub const FLUSH: u32 = 9;
    /// The device tells what lengths and alignments are best.
    pub const TOPOLOGY: u32 = 10;
    /// The driver turns the write cache on and off.
    pub const CONFIG_WCE: u32 = 11;
    /// There may be more than one queue.
    pub const MQ: u32 = 12;
    /// There are discards.
    pub const DISCARD: u32 = 13;
    /// There are writes of zeroes.
    pub const WRITE_ZEROES: u32 = 14;
}
