// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The switches of a running `vmsg serve`.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow};
use vmsg_device::host::Host;
use vmsg_device::switch::Pump;
use vmsg_net::switch::{
    Control, Mirror, PortChange, PortReport, Rule, Switch, SwitchError, SwitchReport, Traffic,
    Unknown,
};
use vmsg_net::{Backend, Mac};

use super::kept::DeviceFlows;
use super::make;
use crate::control::{self, Failure, FailureKind, MacEntry, Port, Response};
use crate::spec::{DeviceSpec, Network, PortSpec, UplinkSpec, known};

/// What a device plugs into.
type Plug = Box<dyn Backend>;

/// All switches.
#[derive(Default)]
pub(super) struct Fabric(Vec<Running>);

/// A switch, and where it is.
struct Running {
    id: String,
    worker: usize,
    switch: Switch,
    control: Control,
    /// Held while rules are read and written back.
    rules: Mutex<()>,
}

type Answer = Result<Response, Failure>;

/// What a switch says, in the words of the control socket.
fn failed(error: &SwitchError) -> Failure {
    let kind = match error {
        SwitchError::NoSuchPort(_) => FailureKind::NotFound,
        SwitchError::NoAnswer => FailureKind::Unavailable,
        SwitchError::Setting { .. } => FailureKind::BadRequest,
        _ => FailureKind::Refused,
    };
    Failure::new(kind, error)
}

fn not_found(message: String) -> Failure {
    Failure::new(FailureKind::NotFound, message)
}

impl Fabric {
    /// Makes the switches and has workers look after them. Switches that do not say which have the one after that of the switch
    /// before.
    pub(super) fn start(host: &mut Host, network: &Network) -> anyhow::Result<Self> {
        let mut switches = Vec::new();
        for (index, spec) in network.switches.iter().enumerate() {
            let id = spec.id.clone().unwrap_or_default();
            let context = || format!("switch `{id}`");
            let worker = spec.worker.unwrap_or(index % network.workers.max(1));
            let switch = Switch::new(spec.config()?).with_context(context)?;
            let pump = Pump(switch.pump());
            host.add_resident(worker, Box::new(pump))
                .with_context(context)?;
            switches.push(Running {
                worker,
                control: switch.control(),
                rules: Mutex::default(),
                switch,
                id,
            });
        }
        Ok(Self(switches))
    }

    /// Opens an uplink; `flows`: what a process before has left to it.
    pub(super) fn add_uplink(
        &self,
        spec: &UplinkSpec,
        network: &Network,
        flows: Option<DeviceFlows>,
    ) -> anyhow::Result<()> {
        let id = spec.id.as_deref().unwrap_or_default();
        let name = spec.switch.as_deref().unwrap_or_default();
        let running = self
            .named(name)
            .map_err(|failure| anyhow!(failure.message))?;
        let config = port_spec(network, name, id).config(id, None)?;
        let backend = make::make_backend(&spec.backend_keys(), None, id, flows)?;
        running.switch.add_uplink(config, backend)?;
        Ok(())
    }

    /// Which worker is to serve a device, and what it plugs into, if that is a switch.
    pub(super) fn place(
        &self,
        spec: &DeviceSpec,
        network: &Network,
    ) -> anyhow::Result<(Option<usize>, Option<Plug>)> {
        let plug = match spec {
            DeviceSpec::Net(net) => net.switch.as_deref().map(|switch| (net, switch)),
            _ => None,
        };
        let Some((net, name)) = plug else {
            return Ok((spec.common().worker, None));
        };
        let id = net.id.as_deref().unwrap_or_default();
        let running = self
            .named(name)
            .map_err(|failure| anyhow!(failure.message))?;
        let mut config = port_spec(network, name, id).config(id, Some(own_mac(spec)?))?;
        if let Some(path) = &net.pcap {
            config.capture = Some(Mirror::new(path));
        }
        let port = running.switch.add_port(config)?;
        Ok((Some(running.worker), Some(Box::new(port))))
    }

    fn named(&self, name: &str) -> Result<&Running, Failure> {
        let found = self.0.iter().find(|running| running.id == name);
        found.ok_or_else(|| {
            let known = known(self.0.iter().map(|running| running.id.as_str()));
            not_found(format!("there is no switch `{name}`; {known}"))
        })
    }

    /// The switch called `name`, or the only one.
    fn find(&self, name: Option<&str>) -> Result<&Running, Failure> {
        match (name, self.0.as_slice()) {
            (Some(name), _) => self.named(name),
            (None, [only]) => Ok(only),
            (None, []) => Err(not_found("there is no switch".to_owned())),
            (None, _) => {
                let known = known(self.0.iter().map(|running| running.id.as_str()));
                Err(not_found(format!(
                    "there are several switches, say which; {known}"
                )))
            }
        }
    }

    /// The switch that has the port `port`: that called `name`, or the only one.
    fn of_port(&self, name: Option<&str>, port: &str) -> Result<&Running, Failure> {
        let has = |report: &SwitchReport| report.ports.iter().any(|other| other.name == port);
        let candidates: Vec<&Running> = match name {
            Some(name) => vec![self.named(name)?],
            None => self.0.iter().collect(),
        };
        let reports = candidates.iter().map(|running| running.control.report());
        let reports: Vec<SwitchReport> = reports.collect();
        let mut having = candidates
            .iter()
            .zip(&reports)
            .filter(|(_, report)| has(report));
        match (having.next(), having.next()) {
            (Some((running, _)), None) => Ok(running),
            (Some(_), Some(_)) => Err(not_found(format!(
                "there is a port `{port}` on more than one switch; write SWITCH/{port}, or give its switch"
            ))),
            (None, _) => {
                let ports = reports.iter().flat_map(|report| &report.ports);
                let known = known(ports.map(|port| port.name.as_str()));
                Err(not_found(format!("there is no port `{port}`; {known}")))
            }
        }
    }

    /// Whether some switch has a port called `port`.
    pub(super) fn has_port(&self, port: &str) -> bool {
        self.of_port(None, port).is_ok()
    }

    pub(super) fn set_link(&self, port: &str, up: bool) -> Answer {
        let change = PortChange {
            link: Some(up),
            ..PortChange::default()
        };
        self.change(None, port, |_| Ok(change))
    }

    /// Changes a port; `change` is made when it is known which switch it is on.
    pub(super) fn change(
        &self,
        switch: Option<&str>,
        port: &str,
        change: impl FnOnce(&str) -> Result<PortChange, Failure>,
    ) -> Answer {
        let running = self.of_port(switch, port)?;
        let change = change(&running.id)?;
        let result = running.control.set_port(port, change);
        result.map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    pub(super) fn switches(&self) -> Vec<control::Switch> {
        self.0.iter().map(Running::describe).collect()
    }

    pub(super) fn macs(&self, switch: Option<&str>) -> Answer {
        let switches = match switch {
            Some(name) => vec![self.named(name)?],
            None => self.0.iter().collect(),
        };
        let mut all = Vec::new();
        for running in switches {
            let macs = running.control.macs().map_err(|error| failed(&error))?;
            all.extend(macs.into_iter().map(|entry| MacEntry {
                switch: running.id.clone(),
                mac: entry.mac.to_string(),
                vlan: entry.vlan,
                port: entry.port,
                fixed: entry.fixed,
                age: entry.age.as_secs(),
            }));
        }
        Ok(Response::Macs(all))
    }

    fn rules(allow: bool, text: &str) -> Result<Vec<Rule>, Failure> {
        Rule::parse(allow, text).map_err(|error| Failure::new(FailureKind::BadRequest, error))
    }

    pub(super) fn rule(&self, switch: Option<&str>, text: &str, allow: bool) -> Answer {
        let rules = Self::rules(allow, text)?;
        let running = self.find(switch)?;
        let _alone = running.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let result = running.control.add_rules(rules);
        result.map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    pub(super) fn remove_rule(&self, switch: Option<&str>, text: &str) -> Answer {
        let gone = Self::rules(true, text)?;
        let running = self.find(switch)?;
        let _alone = running.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let there = running.control.report().rules;
        let same = |rule: &Rule, other: &Rule| rule.from == other.from && rule.to == other.to;
        let stays = |rule: &&Rule| !gone.iter().any(|other| same(rule, other));
        let rest: Vec<Rule> = there.iter().filter(stays).cloned().collect();
        if rest.len() == there.len() {
            let known = known(there.iter().map(ToString::to_string));
            return Err(not_found(format!("there is no rule for `{text}`; {known}")));
        }
        let result = running.control.set_rules(rest);
        result.map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    pub(super) fn set_unknown(&self, switch: Option<&str>, unknown: &str) -> Answer {
        let running = self.find(switch)?;
        let unknown: Unknown = unknown.parse().unwrap_or_else(|never| match never {});
        if let Unknown::Uplink(name) = &unknown {
            let ports = running.control.report().ports;
            let mut uplinks = ports.iter().filter(|port| port.uplink);
            if uplinks.all(|port| port.name != *name) {
                let uplinks = ports.iter().filter(|port| port.uplink);
                let known = known(uplinks.map(|port| port.name.as_str()));
                return Err(not_found(format!(
                    "`{name}` is neither `flood` nor `drop` nor an uplink of switch `{}`; {known}",
                    running.id
                )));
            }
        }
        let result = running.control.set_unknown(unknown);
        result.map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    pub(super) fn capture(
        &self,
        switch: Option<&str>,
        port: &str,
        file: Option<&std::path::Path>,
    ) -> Answer {
        let running = self.of_port(switch, port)?;
        let result = running.control.capture(port, file.map(Mirror::new));
        result.map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    pub(super) fn flush(&self, switch: Option<&str>, port: Option<&str>) -> Answer {
        let running = match port {
            Some(port) => self.of_port(switch, port)?,
            None => self.find(switch)?,
        };
        running
            .control
            .flush(port)
            .map_err(|error| failed(&error))?;
        Ok(Response::Done {})
    }

    /// Takes an uplink away; returns its switch.
    pub(super) fn remove_uplink(
        &self,
        switch: Option<&str>,
        uplink: &str,
    ) -> Result<String, Failure> {
        let running = self.of_port(switch, uplink)?;
        let report = running.control.report();
        let is_uplink = |port: &PortReport| port.name == uplink && port.uplink;
        if !report.ports.iter().any(is_uplink) {
            let message =
                format!("`{uplink}` is the port of a device; remove-device takes both away");
            return Err(Failure::new(FailureKind::Refused, message));
        }
        let result = running.control.remove_port(uplink);
        result.map_err(|error| failed(&error))?;
        Ok(running.id.clone())
    }
}

/// What the port `id` of `switch` is to be like.
fn port_spec(network: &Network, switch: &str, id: &str) -> PortSpec {
    network.port(switch, id).cloned().unwrap_or_default()
}

/// The address that a network device has from the beginning.
pub(super) fn own_mac(spec: &DeviceSpec) -> anyhow::Result<Mac> {
    let DeviceSpec::Net(net) = spec else {
        return Err(anyhow!("only network devices have an address"));
    };
    Ok(Mac(net.mac(net.id.as_deref().unwrap_or_default())?.0))
}

impl Running {
    fn describe(&self) -> control::Switch {
        let report = self.control.report();
        control::Switch {
            id: self.id.clone(),
            worker: self.worker,
            unknown: report.unknown.to_string(),
            age: report.age.as_secs(),
            table: report.table,
            macs: report.macs,
            rules: report.rules.iter().map(ToString::to_string).collect(),
            ports: report.ports.into_iter().map(describe_port).collect(),
        }
    }
}

fn describe_port(port: PortReport) -> Port {
    let texts = |macs: &[Mac]| macs.iter().map(ToString::to_string).collect();
    let drops = |drops: &vmsg_net::switch::Drops| {
        let named = drops
            .iter()
            .map(|(reason, frames)| (reason.name().to_owned(), frames));
        named.collect::<BTreeMap<_, _>>()
    };
    let counters = [
        ("segmented", port.segmented),
        ("segments", port.segments),
        ("segments-lost", port.segments_lost),
        ("moves", port.moves),
        ("not-learned", port.not_learned),
        ("waits", port.waits),
    ];
    Port {
        pin: texts(&port.pin),
        mac: texts(&port.statics),
        dropped_in: drops(&port.dropped_in),
        dropped_out: drops(&port.dropped_out),
        input: traffic(&port.input),
        output: traffic(&port.output),
        id: port.name,
        uplink: port.uplink,
        link: port.link,
        running: port.running,
        vlan: port.vlan.to_string(),
        macs: port.macs,
        macs_limit: port.macs_limit,
        storm: port.storm,
        rate_in: port.rate_in.map(|rate| rate.bits()),
        rate_out: port.rate_out.map(|rate| rate.bits()),
        capture: port.capture.map(|mirror| mirror.path),
        copies: port.copies,
        counters: counters
            .map(|(name, count)| (name.to_owned(), count))
            .into(),
    }
}

fn traffic(traffic: &Traffic) -> control::Traffic {
    let count = |count: vmsg_net::switch::Count| control::Count {
        frames: count.frames,
        bytes: count.bytes,
    };
    control::Traffic {
        unicast: count(traffic.unicast),
        multicast: count(traffic.multicast),
        broadcast: count(traffic.broadcast),
    }
}
