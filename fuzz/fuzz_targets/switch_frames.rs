// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames of any kind through a switch with VLANs, rules, pinned ports and an uplink.

#![no_main]

#[path = "../../crates/vmsg-net/tests/switching/story.rs"]
mod story;
#[path = "../../crates/vmsg-net/tests/switching/mod.rs"]
mod switching;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| story::one(bytes));
