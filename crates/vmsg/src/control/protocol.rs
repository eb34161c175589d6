// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be asked over the control socket, and what is answered.
//!
//! A request is one line, an object with its name under `command`, such as
//! `{"command":"link","device":"net0","state":"down"}`. Each line has one line as its answer, in
//! order: an object with one key, such as `done`, `devices` or `error`. Keys that are not known are
//! refused, and the known ones named.

mod report;
mod spec;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use report::{
    Added, Count, Device, Holder, Link, MacEntry, Part, Port, Switch, Traffic,
};
pub(crate) use spec::Given;

use crate::console::Console;
use crate::spec::{DeviceSpec, PortSetSpec, PortSpec, UplinkSpec};

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub(crate) enum Request {
    /// All devices, with their counters.
    List {},
    /// Puts a network device's cable in, or takes it out; or that of a port of a switch.
    Link {
        /// The device's id, or the port's.
        device: String,
        /// The name of its bus; may be left out if the id is on one bus only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bus: Option<String>,
        /// Where to.
        state: LinkState,
    },
    /// Has the guest announce its addresses to the network.
    Announce {
        /// The device's id.
        device: String,
        /// As for `link`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bus: Option<String>,
    },
    /// Has a disk look at once whether it was resized.
    Rescan {
        /// The device's id.
        device: String,
        /// As for `link`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bus: Option<String>,
    },
    /// All switches with their ports, rules and counters.
    Switches {},
    /// The addresses that a switch knows.
    Macs {
        /// The switch; all by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
    },
    /// Adds a rule, or two, in place of older ones for the same ports.
    Rule {
        /// The switch; may be left out if there is one only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
        /// `a > b` or `a <> b`.
        rule: String,
        /// Whether it lets frames pass.
        allow: bool,
    },
    /// Takes rules away.
    RemoveRule {
        /// As for `rule`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
        /// As it was written, both directions of `a <> b`.
        rule: String,
    },
    /// Says where frames to unknown addresses go.
    Unknown {
        /// As for `rule`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
        /// `flood`, `drop` or an uplink.
        unknown: String,
    },
    /// Changes a port.
    Port(Box<PortSetSpec>),
    /// Records the frames of a port to a file, or ends that.
    Capture {
        /// The port.
        port: String,
        /// As for [`PortSetSpec::switch`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
        /// Where to, seen from the server's directory; none: it ends.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<PathBuf>,
    },
    /// Forgets what was learned.
    Flush {
        /// The switch; may be left out if there is one only, or `port` says it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
        /// At this port only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<String>,
    },
    /// Puts a device on a bus.
    AddDevice {
        /// The device.
        spec: Given<DeviceSpec>,
        /// `vmsg up`: the guest that gets it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<String>,
    },
    /// Takes a device from its bus.
    RemoveDevice {
        /// The device's id.
        device: String,
        /// As for `link`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bus: Option<String>,
    },
    /// Says what the port of a device or uplink is like that will come.
    AddPort {
        /// The port.
        spec: Box<Given<PortSpec>>,
    },
    /// Forgets that.
    RemovePort {
        /// The port.
        port: String,
        /// As for [`PortSetSpec::switch`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
    },
    /// Gives a switch a way out.
    AddUplink {
        /// The uplink.
        spec: Box<Given<UplinkSpec>>,
    },
    /// Takes one away.
    RemoveUplink {
        /// The uplink.
        uplink: String,
        /// As for [`PortSetSpec::switch`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        switch: Option<String>,
    },
    /// `vmsg up`: all its processes.
    Parts {},
    /// `vmsg up`: starts a part that is over.
    StartPart {
        /// The part's name.
        part: String,
    },
    /// `vmsg up`: ends a part, until it is started again.
    StopPart {
        /// The part's name.
        part: String,
    },
    /// `vmsg up`: ends a part and starts it again.
    RestartPart {
        /// The part's name.
        part: String,
    },
    /// All consoles.
    Consoles {},
    /// Appends what a console's guest writes to a file, or ends that.
    ConsoleLog {
        /// The console's name.
        console: String,
        /// Where to, seen from the server's directory; none: it ends.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<PathBuf>,
    },
    /// Tells a console's guest how large the terminal is.
    ConsoleSize {
        /// The console's name.
        console: String,
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
}

/// Where a cable is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// In.
    #[default]
    Up,
    /// Out.
    Down,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// It is done.
    Done {},
    /// The answer to `list`.
    Devices(Vec<Device>),
    /// The answer to `switches`.
    Switches(Vec<Switch>),
    /// The answer to `macs`.
    Macs(Vec<MacEntry>),
    /// The answer to `add-device`.
    Added(Added),
    /// The answer to `parts`.
    Parts(Vec<Part>),
    /// The answer to `consoles`.
    Consoles(Vec<Console>),
    /// It is not done.
    Error(Failure),
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// What kind of reason.
    pub(crate) kind: FailureKind,
    /// The reason in words.
    pub(crate) message: String,
}

/// Kinds of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FailureKind {
    /// The line is no request.
    BadRequest,
    /// There is no such device, bus, switch or port, or several.
    NotFound,
    /// It cannot be, at least not now.
    Refused,
    /// The device host does not answer.
    Unavailable,
    /// There are as many clients as are admitted.
    Busy,
}

impl Response {
    pub(crate) fn error(kind: FailureKind, message: impl ToString) -> Self {
        Self::Error(Failure {
            kind,
            message: message.to_string(),
        })
    }

    /// The line, with its end.
    pub(crate) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("keys are strings");
        line.push(b'\n');
        line
    }
}

impl From<Failure> for Response {
    fn from(failure: Failure) -> Self {
        Self::Error(failure)
    }
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl ToString) -> Self {
        Self {
            kind,
            message: message.to_string(),
        }
    }
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
