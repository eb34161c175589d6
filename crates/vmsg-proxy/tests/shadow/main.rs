// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shadow queues between a guest's driver and a device that sees nothing but the segment.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod device;
mod guest;
mod hostile_device;
mod hostile_guest;
mod hostile_property;
mod real_host;
mod renewal;
mod room;
mod secret;
mod stop;
mod traffic;
