// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests, demos, end-to-end tests and benchmarks of vmsg.
fn main() {}
