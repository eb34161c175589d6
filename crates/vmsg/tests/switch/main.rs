// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host with a switch and many network devices at it, each driven by a driver of this process over a bus of its own connection.

mod churn;
mod control;
mod frames;
mod hotplug;
mod ports;
#[path = "../simulation/random.rs"]
mod random;
mod stand;
mod storms;
