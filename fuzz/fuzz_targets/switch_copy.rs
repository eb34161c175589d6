// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of any kind with hints of any kind, through the switch into receivers of any kind.

#![no_main]

#[path = "../../crates/vmsg-net/tests/copying/mod.rs"]
mod copying;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| copying::one(bytes));
