// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of any bytes, for the user-mode network stack.

#![no_main]

#[path = "../../crates/vmsg-net/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::stack(bytes));
