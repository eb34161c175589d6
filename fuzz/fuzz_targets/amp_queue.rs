// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Words of any value at any moment, for the AMP layout, its queues and their life.

#![no_main]

#[path = "../../crates/vmsg-mem/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::amp(bytes));
