// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The worst that a VMM, or a guest's driver, can do to a running `vmsg proxy --front vfio-user`.
//!
//! Each test attacks the fronts of one process, while an honest guest keeps using another front of it. Afterwards both the proxy and the device host have no more
//! descriptors, threads, memory and log lines than is decent, do not use the processor, and every device can be used by the next guest.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test program"
)]

mod accesses;
mod driver;
mod interrupts;
mod memory;
mod messages;
mod setup;
mod stage;
mod vmm;
