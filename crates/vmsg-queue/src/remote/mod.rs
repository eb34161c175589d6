// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device's side of a queue in memory that can only be copied from and to.

mod memory;

pub use memory::Memory;
