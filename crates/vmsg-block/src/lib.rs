// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a virtio block device reads from and writes to.
//!
//! A [`Disk`] takes requests whose data lies in somebody else's memory, never blocks, and tells later which are done. It knows
//! nothing of queues or of virtio.

#![forbid(unsafe_code)]

mod disk;
mod file;
mod in_use;
mod lock;
mod loops;
pub mod nbd;
mod null;
mod qcow2;

pub use disk::{Completion, Disk, Facts, Failure, Request, Submitted};
pub use file::{Engine, FileConfig, FileDisk, OpenError};
pub use in_use::Identity;
pub use lock::{Holder, Image, LockError, Purpose, open_image};
pub use nbd::{NbdAddress, NbdConfig, NbdDisk, NbdOpenError, NbdUri, NbdUriError, ProtocolError};
pub use null::NullDisk;
pub use qcow2::{QCOW2_MAGIC, Qcow2Config, Qcow2Disk, Qcow2OpenError};
