// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Virtio-msg devices for unmodified guests: session and fronts.
#![forbid(unsafe_code)]

pub mod link;
pub mod session;
