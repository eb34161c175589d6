// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a running description is meant to be: as it was described, and what was changed since. A device host that is started
//! again is made the same.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::plan::{BusPlan, Machine, Plugged};
use crate::control::Request;

/// The device host and the guests as they are meant to be.
#[derive(Clone, Debug)]
pub(super) struct Desired {
    /// `vmsg serve`, without options.
    serve: Vec<String>,
    options: Vec<ServeOption>,
    /// What it is told when it runs, one after another.
    changes: Vec<Request>,
    pub(super) buses: Vec<BusPlan>,
    /// Guests by name.
    pub(super) guests: BTreeMap<String, GuestState>,
}

/// An option of `vmsg serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ServeOption {
    name: String,
    value: String,
}

/// A guest with what was added to it.
#[derive(Clone, Debug)]
pub(super) struct GuestState {
    pub(super) machine: Machine,
    /// The buses of its devices, by the description's names; the first is that of devices to come.
    pub(super) buses: Vec<String>,
    pub(super) plugged: Vec<Plugged>,
}

impl ServeOption {
    /// `id=` in its value.
    fn id(&self) -> Option<&str> {
        self.value
            .split(',')
            .find_map(|item| item.strip_prefix("id="))
    }
}

impl Desired {
    /// `argv` is that of `vmsg serve`: the program, the word, and options with a value each.
    pub(super) fn new(
        argv: &[String],
        buses: Vec<BusPlan>,
        guests: BTreeMap<String, GuestState>,
    ) -> Self {
        let (serve, options) = argv.split_at(argv.len().min(2));
        let options = options.chunks_exact(2).map(|pair| ServeOption {
            name: pair[0].clone(),
            value: pair[1].clone(),
        });
        Self {
            serve: serve.to_vec(),
            options: options.collect(),
            changes: Vec::new(),
            buses,
            guests,
        }
    }

    /// The command of the device host as it is to be started now; none if there is no such part.
    pub(super) fn serve_argv(&self) -> Option<Vec<String>> {
        let options = self
            .options
            .iter()
            .flat_map(|option| [option.name.clone(), option.value.clone()]);
        let argv: Vec<String> = self.serve.iter().cloned().chain(options).collect();
        (!argv.is_empty()).then_some(argv)
    }

    /// Whether the device host is told of a device called `id` when it starts.
    pub(super) fn has_device(&self, id: &str) -> bool {
        let mut options = self.options.iter();
        options.any(|option| option.name == "--device" && option.id() == Some(id))
    }

    pub(super) fn add(&mut self, name: &str, value: String) {
        self.options.push(ServeOption {
            name: name.to_owned(),
            value,
        });
    }

    pub(super) fn remove(&mut self, name: &str, id: &str) {
        self.options
            .retain(|option| option.name != name || option.id() != Some(id));
    }

    /// The device host has carried `request` out, and is to be the same when it was started again. True if it is to be started with
    /// other options.
    pub(super) fn changed(&mut self, request: &Request) -> bool {
        let added = |text: Result<String, _>| match text {
            Ok(text) => Some(text),
            Err(error) => {
                let error: vmsg_bus::keyval::Error = error;
                tracing::warn!(%error, "it will not be there again");
                None
            }
        };
        match request {
            Request::AddPort { spec } => {
                if let Some(text) = added(vmsg_bus::keyval::to_string(&spec.0)) {
                    self.add("--port", text);
                }
            }
            Request::AddUplink { spec } => {
                if let Some(text) = added(vmsg_bus::keyval::to_string(&spec.0)) {
                    self.add("--uplink", text);
                }
            }
            Request::RemovePort { port, .. } => self.remove("--port", port),
            Request::RemoveUplink { uplink, .. } => {
                self.remove("--uplink", uplink);
                self.forget(uplink);
            }
            _ => {
                if let Some(about) = about(request) {
                    self.changes
                        .retain(|other| self::about(other).as_ref() != Some(&about));
                    self.changes.push(request.clone());
                }
                return false;
            }
        }
        true
    }

    /// A device or port called `id` is gone, and with it what was changed about it.
    pub(super) fn forget(&mut self, id: &str) {
        self.changes.retain(|change| {
            let value = serde_json::to_value(change).unwrap_or_default();
            let of = ["device", "port"].map(|key| value.get(key).and_then(Value::as_str));
            !of.contains(&Some(id))
        });
    }

    /// What a device host that was started again is told.
    pub(super) fn changes(&self) -> Vec<Request> {
        self.changes.clone()
    }

    /// A number on this bus that nobody ever had.
    pub(super) fn next_number(&self, bus: &BusPlan) -> Option<u16> {
        match bus.numbers.last() {
            None => Some(0),
            Some(last) => last.checked_add(1),
        }
    }
}

/// What a change is about: of several changes about the same only the last one counts. `None`: it changes nothing that lasts.
fn about(request: &Request) -> Option<Value> {
    match request {
        Request::Link { device, bus, .. } => Some(json!(["link", device, bus])),
        Request::Rule { switch, rule, .. } | Request::RemoveRule { switch, rule } => {
            Some(json!(["rule", switch, rule]))
        }
        Request::Unknown { switch, .. } => Some(json!(["unknown", switch])),
        Request::Capture { port, switch, .. } => Some(json!(["capture", switch, port])),
        Request::Port(_) => {
            // Changes of other settings of the same port stay.
            let value = serde_json::to_value(request).ok()?;
            let keys: Vec<&String> = value.as_object()?.keys().collect();
            Some(json!([
                "port",
                value.get("switch"),
                value.get("port"),
                keys
            ]))
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "desired_test.rs"]
mod tests;
