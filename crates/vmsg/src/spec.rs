// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be described: devices, switches, their ports and ways out.
//!
//! One serde structure for each thing that can be configured, which `vmsg_bus::keyval` reads from the
//! command line, and [`typed`] from TOML tables and control messages; [`keyval::to_string`](vmsg_bus::keyval::to_string)
//! writes it as the command line has it.

mod backend;
mod blk;
mod bridge;
mod console;
mod net;
mod network;
mod parse;
mod port;
mod switch;
mod text;
mod typed;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use backend::SocketConfig;
pub use backend::{NetBackend, SocketMode};
pub(crate) use blk::Store;
pub use blk::{BlkSpec, DiskCache, DiskEngine, DiskFormat};
pub use bridge::{ResumeMode, VhostUserSpec};
pub use console::{ConsoleSpec, SizeOrder};
pub use net::{BackendKeys, Duplex, NetSpec, UplinkSpec};
pub(crate) use network::{Network, Place, Problem, known};
pub use port::{Pin, PortSetSpec, PortSpec};
pub use switch::SwitchSpec;
pub use text::Setting;
pub(crate) use typed::typed;

/// A device: `net,…`, `rng,…`, `console,…`, `blk,…` or `vhost-user,…`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceSpec {
    /// A network device.
    Net(Box<NetSpec>),
    /// An entropy device.
    Rng(RngSpec),
    /// A console.
    Console(Box<ConsoleSpec>),
    /// A disk.
    Blk(Box<BlkSpec>),
    /// The device of a vhost-user daemon.
    VhostUser(Box<VhostUserSpec>),
}

/// `rng,…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RngSpec {
    /// Name of the device; `rng0`, `rng1`, … by default.
    #[serde(skip_serializing_if = "is_default")]
    pub id: Option<String>,
    /// Its number on the bus; the lowest free one by default.
    #[serde(skip_serializing_if = "is_default")]
    pub num: Option<u16>,
    /// The bus it is on; the first by default.
    #[serde(skip_serializing_if = "is_default")]
    pub bus: Option<String>,
    /// Which worker serves it, counted from 0.
    #[serde(skip_serializing_if = "is_default")]
    pub worker: Option<usize>,
}

/// Whether a key is as if it was not given.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What every device has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common<'a> {
    pub(crate) kind: &'static str,
    pub(crate) id: Option<&'a str>,
    pub(crate) num: Option<u16>,
    pub(crate) bus: Option<&'a str>,
    pub(crate) worker: Option<usize>,
}

/// The same, to be changed.
#[derive(Debug)]
pub(crate) struct CommonMut<'a> {
    pub(crate) id: &'a mut Option<String>,
    pub(crate) num: &'a mut Option<u16>,
    pub(crate) bus: &'a mut Option<String>,
}

macro_rules! common {
    ($kind:literal, $spec:expr) => {
        Common {
            kind: $kind,
            id: $spec.id.as_deref(),
            num: $spec.num,
            bus: $spec.bus.as_deref(),
            worker: $spec.worker,
        }
    };
}

macro_rules! common_mut {
    ($spec:expr) => {
        CommonMut {
            id: &mut $spec.id,
            num: &mut $spec.num,
            bus: &mut $spec.bus,
        }
    };
}

impl DeviceSpec {
    pub(crate) fn common(&self) -> Common<'_> {
        match self {
            Self::Net(net) => common!("net", net),
            Self::Rng(rng) => common!("rng", rng),
            Self::Console(console) => common!("console", console),
            Self::Blk(blk) => common!("blk", blk),
            Self::VhostUser(daemon) => common!("vhost-user", daemon),
        }
    }

    /// For whom it waits when it is made, and how long at most; `None`: for nobody.
    pub(crate) fn waits_for(&self) -> Option<(String, Duration)> {
        match self {
            Self::Blk(blk) => blk.waits_for(),
            Self::VhostUser(daemon) => daemon.waits_for(),
            Self::Net(_) | Self::Rng(_) | Self::Console(_) => None,
        }
    }

    pub(crate) fn common_mut(&mut self) -> CommonMut<'_> {
        match self {
            Self::Net(net) => common_mut!(net),
            Self::Rng(rng) => common_mut!(rng),
            Self::Console(console) => common_mut!(console),
            Self::Blk(blk) => common_mut!(blk),
            Self::VhostUser(daemon) => common_mut!(daemon),
        }
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
