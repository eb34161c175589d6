// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images in QEMU's qcow2 format.

mod config;

pub use config::{Qcow2Config, Qcow2OpenError};
