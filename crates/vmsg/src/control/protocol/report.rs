// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices, switches and ports as answers have them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A device, as `list` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    /// The name of its bus.
    pub(crate) bus: String,
    /// Its id.
    pub(crate) id: String,
    /// Its number on the bus.
    pub(crate) number: u16,
    /// What it is.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The thread that serves it.
    pub(crate) worker: usize,
    /// The bits that its driver has set, by name.
    pub(crate) status: String,
    /// The features that its driver has negotiated, by name.
    pub(crate) features: Vec<String>,
    /// Who drives it.
    pub(crate) holder: Option<Holder>,
    /// Its cable, if it has one.
    pub(crate) link: Option<Link>,
    /// What happened, by name.
    pub(crate) counters: BTreeMap<String, u64>,
    /// The same for each queue pair.
    pub(crate) pairs: Vec<BTreeMap<String, u64>>,
    /// What it is on, and how that is used, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) details: BTreeMap<String, String>,
    /// `idle`, `starting`, `running`, `needs reset`, `no daemon`, `waiting: WHY`, `failed: WHY`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) state: String,
}

/// Who drives a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// What the program calls itself.
    pub(crate) name: String,
    /// Its process.
    pub(crate) pid: Option<u32>,
}

/// A cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Link {
    /// The operator has it in.
    pub(crate) up: bool,
    /// It leads somewhere.
    pub(crate) carrier: bool,
}

/// A device that was added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Added {
    /// The name of its bus.
    pub(crate) bus: String,
    /// Its id.
    pub(crate) id: String,
    /// Its number on the bus.
    pub(crate) number: u16,
}

/// A switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Switch {
    /// Its name.
    pub(crate) id: String,
    /// The thread that serves all its ports.
    pub(crate) worker: usize,
    /// Where frames to unknown addresses go: `flood`, `drop` or an uplink.
    pub(crate) unknown: String,
    /// Seconds until an address is forgotten.
    pub(crate) age: u64,
    /// Most addresses it knows.
    pub(crate) table: usize,
    /// Addresses it knows.
    pub(crate) macs: usize,
    /// Its rules, as in `allow a > b`; of several for a pair the last one counts.
    pub(crate) rules: Vec<String>,
    /// Its ports.
    pub(crate) ports: Vec<Port>,
}

/// A port of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Port {
    /// Its name.
    pub(crate) id: String,
    /// It leads to a back end, not to a device.
    pub(crate) uplink: bool,
    /// It is connected.
    pub(crate) link: bool,
    /// A driver runs its device; an uplink has a carrier.
    pub(crate) running: bool,
    /// `plain`, `vlan 10`, or `trunk 10:20 native 1`.
    pub(crate) vlan: String,
    /// The only addresses it may have.
    pub(crate) pin: Vec<String>,
    /// Addresses that are always found here.
    pub(crate) mac: Vec<String>,
    /// Addresses learned.
    pub(crate) macs: usize,
    /// Most of them.
    pub(crate) macs_limit: usize,
    /// Most frames a second that are for many.
    pub(crate) storm: Option<u32>,
    /// Bits a second that it may send.
    pub(crate) rate_in: Option<u64>,
    /// Bits a second that are sent to it.
    pub(crate) rate_out: Option<u64>,
    /// Where it is recorded.
    pub(crate) capture: Option<PathBuf>,
    /// What it has sent, all of it.
    pub(crate) input: Traffic,
    /// What it has got.
    pub(crate) output: Traffic,
    /// Receivers of the frames it sent.
    pub(crate) copies: u64,
    /// Frames it sent that went nowhere, by reason.
    pub(crate) dropped_in: BTreeMap<String, u64>,
    /// Others' frames that it did not get, by reason.
    pub(crate) dropped_out: BTreeMap<String, u64>,
    /// Other counters.
    pub(crate) counters: BTreeMap<String, u64>,
}

/// What passed a port in one direction, by its destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Traffic {
    /// To one address.
    pub(crate) unicast: Count,
    /// To a group.
    pub(crate) multicast: Count,
    /// To everybody.
    pub(crate) broadcast: Count,
}

/// Frames, and their bytes from the addresses on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Count {
    /// Frames; a large segment is one.
    pub(crate) frames: u64,
    /// Bytes.
    pub(crate) bytes: u64,
}

impl Traffic {
    /// All together.
    pub(crate) fn total(&self) -> Count {
        let parts = [self.unicast, self.multicast, self.broadcast];
        let sum = |of: fn(&Count) -> u64| {
            parts
                .iter()
                .fold(0, |sum: u64, part| sum.saturating_add(of(part)))
        };
        Count {
            frames: sum(|count| count.frames),
            bytes: sum(|count| count.bytes),
        }
    }
}

/// An address that a switch knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MacEntry {
    /// The switch.
    pub(crate) switch: String,
    /// The address.
    pub(crate) mac: String,
    /// Its VLAN, 0: none; `null`: all of the port's.
    pub(crate) vlan: Option<u16>,
    /// Where it is.
    pub(crate) port: String,
    /// It was set, not learned.
    pub(crate) fixed: bool,
    /// Seconds since it was heard of.
    pub(crate) age: u64,
}

/// A process of `vmsg up`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Part {
    /// Its name.
    pub(crate) name: String,
    /// `program`, `serve`, `proxy` or `guest`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// `waiting`, `starting`, `ready`, `pausing`, `stopping`, `stopped`, `ended` or `failed`.
    pub(crate) state: String,
    /// Its process.
    pub(crate) pid: Option<i32>,
    /// How often it was started again.
    pub(crate) restarts: u64,
    /// Milliseconds since the process was started.
    pub(crate) uptime_ms: Option<u64>,
    /// The file with what it has said.
    pub(crate) log: PathBuf,
    /// How it has ended last.
    pub(crate) note: Option<String>,
}
