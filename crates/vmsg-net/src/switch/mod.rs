// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch: between network devices of this process, in one copy.

mod copy;
mod segment;

pub use copy::{Delivered, TagChange, deliver};
