// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM at a vhost-user front that says anything at any time.

#![no_main]

#[path = "../../crates/vmsg-proxy/tests/common/mod.rs"]
mod common;
#[path = "../../crates/vmsg-proxy/tests/vhost_front_end/mod.rs"]
mod vhost_front_end;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_front_end::one(bytes));
