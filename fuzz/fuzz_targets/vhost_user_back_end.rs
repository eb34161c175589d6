// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user back end that says, and writes into its queues, anything.

#![no_main]

#[path = "../../crates/vmsg-net/tests/back_end/mod.rs"]
mod back_end;
#[path = "../../crates/vmsg-net/tests/back_end/story.rs"]
mod story;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| story::one(bytes));
