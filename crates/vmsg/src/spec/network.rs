// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What specifications say about each other: switches, their ports, and who plugs into them.

use std::collections::HashMap;

use super::{DeviceSpec, NetBackend, NetSpec, Pin, PortSpec, SwitchSpec, UplinkSpec};
use crate::Usage;

/// Specifications that belong together. Switches, ports, uplinks and devices have their ids.
#[derive(Clone, Debug, Default)]
pub(crate) struct Network {
    pub(crate) switches: Vec<SwitchSpec>,
    pub(crate) ports: Vec<PortSpec>,
    pub(crate) uplinks: Vec<UplinkSpec>,
    pub(crate) devices: Vec<DeviceSpec>,
    /// How many workers there are.
    pub(crate) workers: usize,
}

/// Which specification, by its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Switch(usize),
    Port(usize),
    Uplink(usize),
    Device(usize),
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) place: Place,
    pub(crate) message: String,
}

/// Whether a switch, port or uplink may be called so: it stands in rules, and in `unknown=`.
fn check_name(name: &str) -> Result<(), Usage> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:@+".contains(&byte);
    if matches!(name, "flood" | "drop" | "off" | "on") {
        return Err(Usage(format!("id={name}: this word means something else")));
    }
    if !(1..=64).contains(&name.len()) || !name.bytes().all(plain) {
        return Err(Usage(format!(
            "id=`{name}` must have 1 to 64 letters, digits, or signs of `-_.:@+`, as it stands in rules"
        )));
    }
    Ok(())
}

/// Names as a list of what is known.
pub(crate) fn known(names: impl Iterator<Item = impl std::fmt::Display>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    if names.is_empty() {
        "there is none".to_owned()
    } else {
        format!("known: {}", names.join(", "))
    }
}

impl Network {
    /// The position of the switch called `name`.
    pub(crate) fn switch(&self, name: &str) -> Result<usize, Usage> {
        let mut switches = self.switches.iter();
        switches
            .position(|switch| switch.id.as_deref() == Some(name))
            .ok_or_else(|| {
                let names = self.switches.iter().filter_map(|s| s.id.as_deref());
                Usage(format!("there is no switch `{name}`; {}", known(names)))
            })
    }

    /// The specification of the port called `id` of the switch called `switch`.
    pub(crate) fn port(&self, switch: &str, id: &str) -> Option<&PortSpec> {
        self.ports.iter().find(|port| {
            port.id.as_deref() == Some(id)
                && port.switch.as_deref().is_none_or(|name| name == switch)
        })
    }

    /// Whether a device or uplink is at this port.
    pub(crate) fn is_plugged(&self, port: &PortSpec) -> bool {
        let said = |switch: &Option<String>| port.switch.is_none() || *switch == port.switch;
        let mut uplinks = self.uplinks.iter();
        let mut devices = self.devices.iter();
        uplinks.any(|uplink| uplink.id == port.id && said(&uplink.switch))
            || devices.any(|device| {
                matches!(device, DeviceSpec::Net(net)
                    if net.id == port.id && net.switch.is_some() && said(&net.switch))
            })
    }

    /// Everything that is wrong.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut look = |place, result: Result<(), Usage>| {
            if let Err(Usage(message)) = result {
                problems.push(Problem { place, message });
            }
        };
        for (index, switch) in self.switches.iter().enumerate() {
            look(Place::Switch(index), self.check_switch(index, switch));
        }
        // Who is at which port.
        let mut taken: HashMap<(&str, &str), &str> = HashMap::new();
        for (index, uplink) in self.uplinks.iter().enumerate() {
            look(Place::Uplink(index), self.check_uplink(uplink, &mut taken));
        }
        for (index, device) in self.devices.iter().enumerate() {
            let place = Place::Device(index);
            look(place, self.check_worker(device.common().worker));
            match device {
                DeviceSpec::Net(net) => look(place, self.check_net(net, &mut taken)),
                DeviceSpec::Console(console) => {
                    look(
                        place,
                        console.check(console.id.as_deref().unwrap_or("console0")),
                    );
                }
                DeviceSpec::Blk(blk) => look(place, blk.check()),
                DeviceSpec::VhostUser(daemon) => look(place, daemon.check()),
                DeviceSpec::Rng(_) => {}
            }
        }
        for (index, port) in self.ports.iter().enumerate() {
            look(Place::Port(index), self.check_port(index, port));
        }
        problems
    }

    fn check_worker(&self, worker: Option<usize>) -> Result<(), Usage> {
        match worker {
            Some(worker) if worker >= self.workers => Err(Usage(format!(
                "worker={worker}: with --workers {} the last one is {}",
                self.workers,
                self.workers.saturating_sub(1)
            ))),
            _ => Ok(()),
        }
    }

    fn check_switch(&self, index: usize, switch: &SwitchSpec) -> Result<(), Usage> {
        let id = switch.id.as_deref().unwrap_or_default();
        check_name(id)?;
        if self.switches[..index]
            .iter()
            .any(|other| other.id == switch.id)
        {
            return Err(Usage(format!("there is a switch `{id}` already")));
        }
        self.check_worker(switch.worker)?;
        switch.check()?;
        match switch.unknown.as_deref() {
            None | Some("flood" | "drop") => Ok(()),
            Some(port) => {
                let here = |uplink: &&UplinkSpec| uplink.switch == switch.id;
                let mut uplinks = self.uplinks.iter().filter(here);
                if uplinks.any(|uplink| uplink.id.as_deref() == Some(port)) {
                    return Ok(());
                }
                let uplinks = self.uplinks.iter().filter(here);
                let names = uplinks.filter_map(|uplink| uplink.id.as_deref());
                Err(Usage(format!(
                    "unknown={port}: that is `flood`, `drop` or an uplink of this switch; {}",
                    known(names)
                )))
            }
        }
    }

    fn check_uplink<'a>(
        &'a self,
        uplink: &'a UplinkSpec,
        taken: &mut HashMap<(&'a str, &'a str), &'static str>,
    ) -> Result<(), Usage> {
        let id = uplink.id.as_deref().unwrap_or_default();
        check_name(id)?;
        let Some(switch) = uplink.switch.as_deref() else {
            let names = self.switches.iter().filter_map(|s| s.id.as_deref());
            return Err(Usage(format!(
                "switch= is missing, the switch whose way out it is; {}",
                known(names)
            )));
        };
        self.switch(switch)?;
        if let Some(other) = taken.insert((switch, id), "uplink") {
            return Err(Usage(format!(
                "switch `{switch}` has a port `{id}` already, of the {other} of this name"
            )));
        }
        let keys = uplink.backend_keys();
        match keys.backend {
            None => {
                return Err(Usage(
                    "backend= is missing: `tap`, `socket`, `vhost-user` or `user`".to_owned(),
                ));
            }
            Some(NetBackend::None) => {
                return Err(Usage(
                    "backend=none leads nowhere; it is `tap`, `socket`, `vhost-user` or `user`"
                        .to_owned(),
                ));
            }
            Some(_) => {}
        }
        keys.check(None)
    }

    fn check_net<'a>(
        &'a self,
        net: &'a NetSpec,
        taken: &mut HashMap<(&'a str, &'a str), &'static str>,
    ) -> Result<(), Usage> {
        let id = net.id.as_deref().unwrap_or_default();
        net.mac(id)?;
        net.line()?;
        let Some(name) = net.switch.as_deref() else {
            return net.backend_keys().check(net.queues);
        };
        check_name(id)?;
        let switch = self.switch(name)?;
        if let Some(backend) = net.backend {
            return Err(Usage(format!(
                "switch= and backend={} contradict each other: a device plugs into one thing",
                backend.name()
            )));
        }
        net.backend_keys().check_plugless()?;
        if let (Some(own), Some(common)) = (net.worker, self.switches[switch].worker)
            && own != common
        {
            return Err(Usage(format!(
                "worker={own}: all ports of switch `{name}` are served by its worker, {common}; leave worker= out"
            )));
        }
        if let (Some(own), None) = (net.worker, self.switches[switch].worker) {
            return Err(Usage(format!(
                "worker={own}: all ports of a switch are served by its worker; write worker={own} behind --switch id={name}"
            )));
        }
        if net.pcap.is_some()
            && self
                .port(name, id)
                .is_some_and(|port| port.capture.is_some())
        {
            return Err(Usage(
                "pcap= here and capture= of its port are the same; leave one out".to_owned(),
            ));
        }
        match taken.insert((name, id), "device") {
            None => Ok(()),
            Some(other) => Err(Usage(format!(
                "switch `{name}` has a port `{id}` already, of the {other} of this name; give them different ids"
            ))),
        }
    }

    fn check_port(&self, index: usize, port: &PortSpec) -> Result<(), Usage> {
        let Some(id) = port.id.as_deref() else {
            return Err(Usage(
                "id= is missing: the name of the device or uplink whose port it is".to_owned(),
            ));
        };
        check_name(id)?;
        port.check()?;
        if let Some(switch) = &port.switch {
            self.switch(switch)?;
        }
        let same = |other: &PortSpec| {
            let meet = other.switch.is_none() || port.switch.is_none();
            other.id == port.id && (meet || other.switch == port.switch)
        };
        if self.ports[..index].iter().any(same) {
            return Err(Usage(format!("there is a port `{id}` already")));
        }
        let said = |switch: &Option<String>| port.switch.is_none() || *switch == port.switch;
        let of_uplink = self
            .uplinks
            .iter()
            .any(|uplink| uplink.id == port.id && said(&uplink.switch));
        if of_uplink && port.pin.contains(&Pin::On) {
            return Err(Usage(
                "pin=on is for devices: an uplink has no address of its own; write pin=MAC"
                    .to_owned(),
            ));
        }
        let of_device = self.devices.iter().any(|device| {
            matches!(device, DeviceSpec::Net(net)
                if net.id == port.id && net.switch.is_some() && said(&net.switch))
        });
        if !of_uplink && !of_device && port.switch.is_none() {
            return Err(Usage(format!(
                "switch= is missing: nothing called `{id}` plugs into a switch yet"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "network_test.rs"]
mod tests;
