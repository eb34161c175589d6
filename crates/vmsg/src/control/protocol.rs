// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be asked over the control socket, and what is answered.
//!
//! A request is one line, an object with its name under `command`, such as
//! `{"command":"link","device":"net0","state":"down"}`. Each line has one line as its answer, in
//! order: an object with the one key `done`, `devices` or `error`. Keys that are not known are
//! refused, and the known ones named.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// All devices, with their counters.
    List {},
    /// Puts a network device's cable in, or takes it out.
    Link {
        /// The device's id.
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
pub(super) enum Response {
    /// It is done.
    Done {},
    /// The answer to `list`.
    Devices(Vec<Device>),
    /// It is not done.
    Error(Failure),
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    /// What kind of reason.
    pub(super) kind: FailureKind,
    /// The reason in words.
    pub(super) message: String,
}

/// Kinds of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FailureKind {
    /// The line is no request.
    BadRequest,
    /// There is no such device, or no such bus, or several.
    NotFound,
    /// The device does not do that, at least not now.
    Refused,
    /// The device host does not answer.
    Unavailable,
    /// There are as many clients as are admitted.
    Busy,
}

impl Response {
    pub(super) fn error(kind: FailureKind, message: impl ToString) -> Self {
        Self::Error(Failure {
            kind,
            message: message.to_string(),
        })
    }

    /// The line, with its end.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("keys are strings");
        line.push(b'\n');
        line
    }
}

/// A device, as `list` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Device {
    /// The name of its bus.
    pub(super) bus: String,
    /// Its id.
    pub(super) id: String,
    /// Its number on the bus.
    pub(super) number: u16,
    /// What it is.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// The thread that serves it.
    pub(super) worker: usize,
    /// The bits that its driver has set, by name.
    pub(super) status: String,
    /// The features that its driver has negotiated, by name.
    pub(super) features: Vec<String>,
    /// Who drives it.
    pub(super) holder: Option<Holder>,
    /// Its cable, if it has one.
    pub(super) link: Option<Link>,
    /// What happened, by name.
    pub(super) counters: BTreeMap<String, u64>,
    /// The same for each queue pair.
    pub(super) pairs: Vec<BTreeMap<String, u64>>,
}

/// Who drives a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Holder {
    /// What the program calls itself.
    pub(super) name: String,
    /// Its process.
    pub(super) pid: Option<u32>,
}

/// A cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Link {
    /// The operator has it in.
    pub(super) up: bool,
    /// It leads somewhere.
    pub(super) carrier: bool,
}

#[cfg(test)]
#[path = "protocol_test.rs"]
mod tests;
