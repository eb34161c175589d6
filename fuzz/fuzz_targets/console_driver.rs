// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A console's driver that writes anything into its rings, and clients of all kinds.

#![no_main]

#[path = "../../crates/vmsg-device/tests/console_driver/mod.rs"]
mod console_driver;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| console_driver::one(bytes));
