// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks in qcow2 images, with QEMU's tools as witnesses.

#[path = "../held/mod.rs"]
mod held;

mod hostile;
mod images;
mod killed;
mod model;
mod tools;
