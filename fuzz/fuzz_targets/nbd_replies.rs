// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any server, for the NBD client.

#![no_main]

#[path = "../../crates/vmsg-block/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::server(bytes));
