// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host as it is meant to be: as it was described, and what was changed since. All of that is in the command line that it is
//! started again with, so that no frame passes before a rule of the operator holds again.

use std::collections::BTreeMap;

use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmsg_bus::keyval;
use vmsg_net::Mac;
use vmsg_net::switch::{MAX_RULES, Rule};

use crate::control::{LinkState, Request};
use crate::spec::{DeviceSpec, NetSpec, Pin, PortSetSpec, PortSpec, SwitchSpec, UplinkSpec};

/// Bytes of an argument, without its end (Linux: `MAX_ARG_STRLEN`).
const LONGEST: usize = (128 << 10) - 1;

/// Bytes that all arguments and the environment may have at most, whatever the limit of the stack is (execve(2)).
const MOST: u64 = 6 << 20;

/// Bytes that are left for what else the kernel puts there.
const SPARE: usize = 64 << 10;

/// A port of a switch: the switch's name and its own.
type PortName = (String, String);

/// `vmsg serve` with its options, and what was changed about them.
#[derive(Clone, Debug, Default)]
pub(super) struct Host {
    /// The program and the word.
    words: Vec<String>,
    options: Vec<ServeOption>,
    /// The rules of a switch in their order, in place of those it was described with.
    rules: BTreeMap<String, Vec<Rule>>,
    /// Where a switch sends frames to unknown addresses.
    unknown: BTreeMap<String, String>,
    /// Ports that are to be different from what was described, with all that there is to say about them.
    ports: BTreeMap<PortName, PortSpec>,
    /// Cables of devices.
    links: BTreeMap<String, LinkState>,
}

/// An option of `vmsg serve`.
#[derive(Clone, Debug)]
struct ServeOption {
    name: String,
    value: String,
    what: What,
}

/// What an option describes.
#[derive(Clone, Debug)]
enum What {
    Switch(SwitchSpec),
    Port(PortSpec),
    Uplink(Box<UplinkSpec>),
    Device(Box<DeviceSpec>),
    /// Nothing that can change.
    Other,
}

impl ServeOption {
    fn new(name: &str, value: String) -> Self {
        fn read<T: DeserializeOwned>(value: &str, what: impl FnOnce(T) -> What) -> What {
            // What was described was read before, and what was added comes from a specification.
            keyval::from_str(value).map_or(What::Other, what)
        }
        let what = match name {
            "--switch" => read(&value, What::Switch),
            "--port" => read(&value, What::Port),
            "--uplink" => read(&value, |spec| What::Uplink(Box::new(spec))),
            "--device" => read(&value, |spec| What::Device(Box::new(spec))),
            _ => What::Other,
        };
        Self {
            name: name.to_owned(),
            value,
            what,
        }
    }

    fn id(&self) -> Option<&str> {
        match &self.what {
            What::Switch(spec) => spec.id.as_deref(),
            What::Port(spec) => spec.id.as_deref(),
            What::Uplink(spec) => spec.id.as_deref(),
            What::Device(spec) => spec.common().id,
            What::Other => None,
        }
    }
}

/// The text of a specification; `old` if it has none.
fn text(spec: &impl Serialize, old: &str) -> String {
    keyval::to_string(spec).unwrap_or_else(|error| {
        tracing::error!(%error, old, "what was changed will not be so again");
        old.to_owned()
    })
}

/// `a > b` with a sign before it, as `rule=` has it.
fn signed(rule: &Rule) -> String {
    let sign = if rule.allow { '+' } else { '-' };
    format!("{sign}{} > {}", rule.from, rule.to)
}

impl Host {
    /// `argv` is that of `vmsg serve`: the program, the word, and options with a value each.
    pub(super) fn new(argv: &[String]) -> Self {
        let (words, options) = argv.split_at(argv.len().min(2));
        let options = options.chunks_exact(2);
        Self {
            words: words.to_vec(),
            options: options
                .map(|pair| ServeOption::new(&pair[0], pair[1].clone()))
                .collect(),
            ..Self::default()
        }
    }

    /// The command of the device host as it is to be started again; none if there is no such part.
    pub(super) fn argv(&self) -> Option<Vec<String>> {
        if self.words.is_empty() {
            return None;
        }
        let mut ports = self.all_ports();
        let mut argv = self.words.clone();
        let mut put = |name: &str, value: String| argv.extend([name.to_owned(), value]);
        for option in &self.options {
            let value = match &option.what {
                What::Switch(spec) => self.switch_text(spec, &option.value),
                What::Port(spec) => match self.port_name(spec).and_then(|name| ports.remove(&name))
                {
                    Some(port) => text(&port, &option.value),
                    None => option.value.clone(),
                },
                What::Device(spec) => self.device_text(spec, &option.value),
                What::Uplink(_) | What::Other => option.value.clone(),
            };
            put(&option.name, value);
        }
        for port in ports.values() {
            put("--port", text(port, ""));
        }
        Some(argv)
    }

    /// Whether the device host could be started with `argv`: the system has limits.
    pub(super) fn fits(argv: &[String]) -> bool {
        let stack = getrlimit(Resource::Stack).current.unwrap_or(u64::MAX);
        let most = usize::try_from((stack / 4).min(MOST)).unwrap_or(usize::MAX);
        let pointer = size_of::<usize>() + 1;
        let variable = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
            key.len() + value.len() + pointer + 1
        };
        let environment: usize = std::env::vars_os().map(variable).sum();
        let arguments: usize = argv.iter().map(|text| text.len() + pointer).sum();
        argv.iter().all(|text| text.len() <= LONGEST) && environment + arguments + SPARE <= most
    }

    /// All ports about which something is said, as they are to be when the device host is started again. A capture goes on then.
    fn all_ports(&self) -> BTreeMap<PortName, PortSpec> {
        let described = self.options.iter().filter_map(|option| match &option.what {
            What::Port(spec) => Some((self.port_name(spec)?, spec.clone())),
            _ => None,
        });
        let mut ports: BTreeMap<PortName, PortSpec> = described.collect();
        for device in self.plugged() {
            // A device may say what its port records.
            if let (Some(switch), Some(id), Some(pcap)) = (&device.switch, &device.id, &device.pcap)
            {
                let name = (switch.clone(), id.clone());
                let port = ports.entry(name.clone()).or_default();
                complete(port, &name);
                port.capture.get_or_insert_with(|| pcap.clone());
            }
        }
        ports.extend(self.ports.clone());
        for port in ports.values_mut() {
            port.capture_append = port.capture.is_some();
        }
        ports
    }

    fn switch_text(&self, spec: &SwitchSpec, old: &str) -> String {
        let id = spec.id.as_deref().unwrap_or_default();
        let mut spec = spec.clone();
        if let Some(rules) = self.rules.get(id) {
            spec.allow = Vec::new();
            spec.deny = Vec::new();
            spec.rule = rules.iter().map(signed).collect();
        }
        if let Some(unknown) = self.unknown.get(id) {
            spec.unknown = Some(unknown.clone());
        }
        if let Some(uplink) = &spec.unknown
            && !matches!(uplink.as_str(), "flood" | "drop")
            && !self.has_uplink(id, uplink)
        {
            // That is what becomes of them while there is no such uplink.
            spec.unknown = Some("drop".to_owned());
        }
        text(&spec, old)
    }

    fn device_text(&self, spec: &DeviceSpec, old: &str) -> String {
        let DeviceSpec::Net(net) = spec else {
            return old.to_owned();
        };
        let mut net = net.clone();
        if net.switch.is_some() {
            // Its port has that.
            net.pcap = None;
        }
        if let Some(link) = net.id.as_ref().and_then(|id| self.links.get(id)) {
            net.link = *link;
        }
        text(&DeviceSpec::Net(net), old)
    }

    /// Devices that plug into a switch.
    fn plugged(&self) -> impl Iterator<Item = &NetSpec> {
        self.options.iter().filter_map(|option| match &option.what {
            What::Device(spec) => match &**spec {
                DeviceSpec::Net(net) if net.switch.is_some() => Some(net.as_ref()),
                _ => None,
            },
            _ => None,
        })
    }

    /// Ways out, with their switches.
    fn uplinks(&self) -> impl Iterator<Item = (&UplinkSpec, Option<&str>)> {
        self.options.iter().filter_map(|option| match &option.what {
            What::Uplink(spec) => Some((&**spec, spec.switch.as_deref().or(self.only_switch()))),
            _ => None,
        })
    }

    fn switches(&self) -> impl Iterator<Item = &SwitchSpec> {
        self.options.iter().filter_map(|option| match &option.what {
            What::Switch(spec) => Some(spec),
            _ => None,
        })
    }

    fn only_switch(&self) -> Option<&str> {
        let mut switches = self.switches();
        match (switches.next(), switches.next()) {
            (Some(only), None) => only.id.as_deref(),
            _ => None,
        }
    }

    fn has_uplink(&self, switch: &str, id: &str) -> bool {
        let is = |(uplink, on): (&UplinkSpec, Option<&str>)| {
            uplink.id.as_deref() == Some(id) && on == Some(switch)
        };
        self.uplinks().any(is)
    }

    /// The switches that have a port called `port`.
    fn switches_with(&self, port: &str) -> Vec<&str> {
        let devices = self.plugged().filter(|net| net.id.as_deref() == Some(port));
        let uplinks = self
            .uplinks()
            .filter(|(spec, _)| spec.id.as_deref() == Some(port));
        devices
            .filter_map(|net| net.switch.as_deref())
            .chain(uplinks.filter_map(|(_, switch)| switch))
            .collect()
    }

    /// Which port a `--port` is about.
    fn port_name(&self, spec: &PortSpec) -> Option<PortName> {
        let id = spec.id.clone()?;
        let switch = match &spec.switch {
            Some(switch) => switch.clone(),
            None => self.switches_with(&id).first().copied()?.to_owned(),
        };
        Some((switch, id))
    }

    /// Which port an operator means.
    fn find_port(&self, switch: Option<&str>, port: &str) -> Result<PortName, String> {
        let mut switches = self.switches_with(port);
        switches.retain(|name| switch.is_none_or(|switch| switch == *name));
        match switches.as_slice() {
            [only] => Ok(((*only).to_owned(), port.to_owned())),
            _ => Err(format!("`{port}` is not the name of one port")),
        }
    }

    fn find_switch(&self, switch: Option<&str>) -> Result<&SwitchSpec, String> {
        let name = switch.or(self.only_switch());
        let found = self
            .switches()
            .find(|spec| spec.id.as_deref() == name && name.is_some());
        found.ok_or_else(|| "it is not known which switch that is".to_owned())
    }

    /// Whether the device host is told of a device called `id` when it starts.
    pub(super) fn has_device(&self, id: &str) -> bool {
        let mut options = self.options.iter();
        options.any(|option| option.name == "--device" && option.id() == Some(id))
    }

    pub(super) fn add(&mut self, name: &str, value: String) {
        self.options.push(ServeOption::new(name, value));
    }

    /// A device is gone, and with it what was changed about it and its port.
    pub(super) fn remove_device(&mut self, id: &str) {
        if let Ok(port) = self.find_port(None, id) {
            self.ports.remove(&port);
        }
        self.links.remove(id);
        self.options
            .retain(|option| option.name != "--device" || option.id() != Some(id));
    }

    /// A name for an uplink that has none.
    pub(super) fn uplink_name(&self) -> String {
        let taken = |name: &str| !self.switches_with(name).is_empty();
        let mut names = (0_u32..).map(|number| format!("up{number}"));
        names
            .find(|name| !taken(name))
            .expect("there are more numbers than uplinks")
    }

    /// How it is to be once it has carried `request` out; `None`: as before.
    ///
    /// # Errors
    /// It is not known what the request means: the device host has words for that.
    pub(super) fn after(&self, request: &Request) -> Result<Option<Self>, String> {
        let mut next = self.clone();
        match request {
            Request::AddPort { spec } => {
                let text = keyval::to_string(&spec.0).map_err(|error| error.to_string())?;
                next.add("--port", text);
            }
            Request::RemovePort { port, switch } => {
                let name = |option: &ServeOption| match &option.what {
                    What::Port(spec) if spec.id.as_deref() == Some(port) => self.port_name(spec),
                    _ => None,
                };
                let is_meant = |name: &PortName| switch.as_ref().is_none_or(|on| *on == name.0);
                next.options
                    .retain(|option| !name(option).as_ref().is_some_and(is_meant));
            }
            Request::AddUplink { spec } => {
                let text = keyval::to_string(&spec.0).map_err(|error| error.to_string())?;
                next.add("--uplink", text);
            }
            Request::RemoveUplink { uplink, switch } => {
                let port = self.find_port(switch.as_deref(), uplink)?;
                next.ports.remove(&port);
                let (switch, _) = &port;
                next.options.retain(|option| match &option.what {
                    What::Uplink(spec) => {
                        let on = spec.switch.as_deref().or(self.only_switch());
                        option.id() != Some(uplink) || on != Some(switch)
                    }
                    _ => true,
                });
            }
            Request::Link { device, state, .. } => {
                if self.has_device(device) {
                    next.links.insert(device.clone(), *state);
                } else {
                    next.port(None, device)?.link = *state;
                }
            }
            Request::Port(set) => next.set_port(set)?,
            Request::Capture { port, switch, file } => {
                next.port(switch.as_deref(), port)?.capture.clone_from(file);
            }
            Request::Rule {
                switch,
                rule,
                allow,
            } => {
                let new = Rule::parse(*allow, rule).map_err(|error| error.to_string())?;
                let rules = next.rules(switch.as_deref())?;
                for rule in new {
                    take_out(rules, &rule);
                    rules.push(rule);
                }
                if rules.len() > MAX_RULES {
                    return Err(format!("{MAX_RULES} rules are possible"));
                }
            }
            Request::RemoveRule { switch, rule } => {
                let gone = Rule::parse(true, rule).map_err(|error| error.to_string())?;
                let rules = next.rules(switch.as_deref())?;
                gone.iter().for_each(|rule| take_out(rules, rule));
            }
            Request::Unknown { switch, unknown } => {
                let id = self.find_switch(switch.as_deref())?.id.clone();
                next.unknown.insert(id.unwrap_or_default(), unknown.clone());
            }
            _ => return Ok(None),
        }
        Ok(Some(next))
    }

    fn set_port(&mut self, set: &PortSetSpec) -> Result<(), String> {
        let (switch, id) = self.find_port(set.switch.as_deref(), &set.port)?;
        // What cannot be must not be in a command line for a moment; which address the device has does not matter here.
        set.change(Some(Mac([2, 0, 0, 0, 0, 0])))
            .map_err(|error| error.to_string())?;
        let port = self.port(Some(&switch), &id)?;
        port.set(set);
        let is_pinned = port.pin.contains(&Pin::On);
        if is_pinned && self.has_uplink(&switch, &id) {
            return Err("an uplink has no address of its own".to_owned());
        }
        Ok(())
    }

    /// The port of this name, to be changed.
    fn port(&mut self, switch: Option<&str>, port: &str) -> Result<&mut PortSpec, String> {
        let name = self.find_port(switch, port)?;
        let described = self.all_ports().remove(&name).unwrap_or_default();
        let port = self.ports.entry(name.clone()).or_insert(described);
        complete(port, &name);
        Ok(port)
    }

    /// The rules of this switch, to be changed.
    fn rules(&mut self, switch: Option<&str>) -> Result<&mut Vec<Rule>, String> {
        let spec = self.find_switch(switch)?;
        let id = spec.id.clone().unwrap_or_default();
        let described = spec.config().map_err(|error| error.to_string())?.rules;
        Ok(self.rules.entry(id).or_insert_with(|| {
            let mut rules = Vec::with_capacity(described.len());
            for rule in described {
                take_out(&mut rules, &rule);
                rules.push(rule);
            }
            rules
        }))
    }
}

/// Takes the rule for the same patterns out: a newer one takes its place, at the end.
fn take_out(rules: &mut Vec<Rule>, rule: &Rule) {
    rules.retain(|old| old.from != rule.from || old.to != rule.to);
}

fn complete(port: &mut PortSpec, (switch, id): &PortName) {
    port.switch = Some(switch.clone());
    port.id = Some(id.clone());
}

#[cfg(test)]
#[path = "host_test.rs"]
mod tests;
