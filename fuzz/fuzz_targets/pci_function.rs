// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any accesses of a driver, a VMM and a device to a PCI function.

#![no_main]

#[path = "../../crates/vmsg-proxy/tests/accesses/mod.rs"]
mod accesses;
#[path = "../../crates/vmsg-proxy/tests/scripted/mod.rs"]
mod scripted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| accesses::story(bytes));
