// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any client, for the vfio-user server.

#![no_main]

#[path = "../../crates/vmsg-vfio-user/tests/exercise/mod.rs"]
mod exercise;
#[path = "../../crates/vmsg-vfio-user/tests/support/mod.rs"]
mod support;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| exercise::server(bytes));
