// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user daemon behind the bridge that says anything at any time.

#![no_main]

#[path = "../../crates/vmsg-device/tests/vhost_user_daemon/mod.rs"]
mod vhost_user_daemon;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vhost_user_daemon::one(bytes));
