// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks in files and on block devices, with each of those who read and write.

#[path = "../held/mod.rs"]
mod held;

mod devices;
mod ground;
mod life;
mod limits;
mod locks;
mod model;
mod names;
mod raw;
