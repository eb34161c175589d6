// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any bytes, for the driver side.

#![no_main]

#[path = "../../crates/virtio-msg/tests/support/exercise/mod.rs"]
#[allow(dead_code, reason = "each target runs one of the stories")]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::driver(bytes));
