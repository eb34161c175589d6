// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk's driver that writes anything anywhere, and takes memory and queues away at any time.

#![no_main]

#[path = "../../crates/vmsg-device/tests/blk_driver/mod.rs"]
mod blk_driver;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| blk_driver::one(bytes));
