// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses that carry virtio-msg: loopback, unix.
#![forbid(unsafe_code)]

pub mod keyval;
