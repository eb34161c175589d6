// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A console.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmsg_device::console::{self, HubConfig, MAX_PORTS, Settings, is_plain_name};

use super::{is_default, text};
use crate::Usage;

/// `console,…`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct ConsoleSpec {
    /// Name of the device, and of its console; `console0`, `console1`, … by default.
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
    /// A Unix socket for those who watch it; the control socket's path with `.ID.console` behind it by default, if there is
    /// a control socket. Further ports have theirs at this path with `.PORT` behind it.
    #[serde(skip_serializing_if = "is_default")]
    pub path: Option<PathBuf>,
    /// A symbolic link to a pseudoterminal that is the console.
    #[serde(skip_serializing_if = "is_default")]
    pub pty: Option<PathBuf>,
    /// A file that its output is appended to.
    #[serde(skip_serializing_if = "is_default")]
    pub log: Option<PathBuf>,
    /// Names of further ports, which the guest has as /dev/virtio-ports/NAME.
    #[serde(deserialize_with = "text::many", skip_serializing_if = "is_default")]
    pub port: Vec<String>,
    /// Offer several ports; on by default if there are any but the console.
    #[serde(skip_serializing_if = "is_default")]
    pub multiport: Option<bool>,
    /// With several ports: how the guest's kernel reads sizes; `cols-first` by default.
    #[serde(skip_serializing_if = "is_default")]
    pub size_order: Option<SizeOrder>,
}

/// In which order a guest with several ports is told columns and rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeOrder {
    /// As the standard has it.
    ColsFirst,
    /// As Linux has read it before 6.15.
    RowsFirst,
}

impl ConsoleSpec {
    /// Looks for what cannot be.
    pub(crate) fn check(&self, id: &str) -> Result<(), Usage> {
        if !is_plain_name(id) {
            return Err(Usage(format!(
                "id={id}: a console's name has 1 to 64 letters, digits, `.`, `_` and `-`"
            )));
        }
        for (index, port) in self.port.iter().enumerate() {
            if !is_plain_name(port) {
                return Err(Usage(format!(
                    "port={port}: 1 to 64 letters, digits, `.`, `_` and `-` are possible"
                )));
            }
            if self.port[..index].contains(port) {
                return Err(Usage(format!("port={port} is there twice")));
            }
        }
        if self.port.len() >= MAX_PORTS {
            return Err(Usage(format!(
                "port=: at most {} are possible",
                MAX_PORTS - 1
            )));
        }
        if self.multiport == Some(false) && !self.port.is_empty() {
            return Err(Usage(
                "multiport=off cannot be with port=, which is for several ports".to_owned(),
            ));
        }
        if self.size_order.is_some() && !self.has_multiport() {
            return Err(Usage(
                "size-order= needs port= or multiport=on: a console alone has its size where all kernels agree"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn has_multiport(&self) -> bool {
        self.multiport.unwrap_or(!self.port.is_empty())
    }

    /// Queues that the device has.
    pub(crate) fn queues(&self) -> usize {
        if self.has_multiport() {
            2 * (self.port.len() + 2)
        } else {
            2
        }
    }

    /// The device's settings.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            ports: self.port.clone(),
            multiport: self.has_multiport(),
            size_order: match self.size_order {
                Some(SizeOrder::RowsFirst) => console::SizeOrder::RowsFirst,
                Some(SizeOrder::ColsFirst) | None => console::SizeOrder::ColsFirst,
            },
        }
    }

    /// Where its ports can be reached: the console of the device `id`, then the others. `control` is the control socket of this
    /// program.
    pub(crate) fn hubs(&self, id: &str, control: Option<&Path>) -> Vec<HubConfig> {
        let socket = |port: Option<&str>| match (&self.path, control, port) {
            (Some(path), _, None) => Some(path.clone()),
            (Some(path), _, Some(port)) => {
                let mut path = path.as_os_str().to_owned();
                path.push(format!(".{port}"));
                Some(path.into())
            }
            (None, Some(control), None) => Some(console::default_socket(control, id)),
            (None, Some(control), Some(port)) => {
                Some(console::default_socket(control, &format!("{id}.{port}")))
            }
            (None, None, _) => None,
        };
        let first = HubConfig {
            name: id.to_owned(),
            socket: socket(None),
            pty: self.pty.clone(),
            log: self.log.clone(),
        };
        let others = self.port.iter().map(|port| HubConfig {
            name: format!("{id}:{port}"),
            socket: socket(Some(port)),
            ..HubConfig::default()
        });
        std::iter::once(first).chain(others).collect()
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;
