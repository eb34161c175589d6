// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two ends of the bus `ivshmem` and somebody who writes any word at any moment.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmsg_bus::ivshmem::exercise::story(bytes));
