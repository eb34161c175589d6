// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any text as a description for `vmsg up`.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| vmsg::description_exercise::one(text));
