// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch: between network devices of this process, in one copy.

mod config;
mod copy;
mod error;
mod report;
mod rules;
mod segment;
mod vlan;

pub use config::{
    BadRate, MAX_PORTS, MAX_RULES, MAX_TABLE, Mirror, PortChange, PortConfig, Rate, SwitchConfig,
    Unknown, Vlans,
};
pub use copy::{Delivered, TagChange, deliver};
pub use error::SwitchError;
pub use report::{Count, Drops, MacEntry, PortReport, Reason, SwitchReport, Traffic};
pub use rules::{BadRule, Pattern, Rule};
pub use vlan::{BadVlans, VlanSet};
