// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any server, for the ivshmem client.

#![no_main]

#[path = "../../crates/ivshmem/tests/exercise/mod.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::client(bytes));
