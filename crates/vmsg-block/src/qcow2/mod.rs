// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images in QEMU's qcow2 format.

mod config;
mod disk;
mod header;
mod lost;
mod open;
mod repair;
mod work;

pub use config::{Qcow2Config, Qcow2OpenError};
pub use disk::Qcow2Disk;
pub use header::QCOW2_MAGIC;
