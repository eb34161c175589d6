// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Switches, their ports and uplinks.

use super::super::description::{Device, HostTable};
use super::super::source::Mistakes;
use super::super::tables::{Table, Tables, Value, nearest};
use super::device::check_backend;
use super::{added, check_name, key_of, own_entries, read_argument};
use crate::spec::{Network, Place, PortSpec, SwitchSpec, UplinkSpec};

/// Reads them as arguments of `serve`: the option and its value.
pub(super) fn read_fabric(
    tables: &Tables,
    host: &HostTable,
    devices: &[Device],
    mistakes: &mut Mistakes,
) -> Vec<(&'static str, String)> {
    let mut arguments = Vec::new();
    let mut network = Network {
        workers: usize::try_from(host.workers).unwrap_or(usize::MAX),
        ..Network::default()
    };
    let mut places: Vec<(Place, &Table)> = Vec::new();
    for table in tables.of("switch") {
        check_name(table, mistakes);
        check_worker(table, host, mistakes);
        check_rules(tables, table, mistakes);
        if let Some((spec, text)) = read_one::<SwitchSpec>(table, mistakes, SwitchSpec::check) {
            places.push((Place::Switch(network.switches.len()), table));
            network.switches.push(spec);
            arguments.push(("--switch", text));
        }
    }
    for table in tables.of("port") {
        check_name(table, mistakes);
        check_port(tables, table, mistakes);
        if let Some((spec, text)) = read_one::<PortSpec>(table, mistakes, PortSpec::check) {
            places.push((Place::Port(network.ports.len()), table));
            network.ports.push(spec);
            arguments.push(("--port", text));
        }
    }
    for table in tables.of("uplink") {
        check_name(table, mistakes);
        if tables.find("device", &table.name).is_some() {
            mistakes.error(
                table.span.clone(),
                format!(
                    "a device has the name `{}` already, and both name a port of a switch",
                    table.name
                ),
            );
        }
        check_switch(tables, table, mistakes);
        let check = |uplink: &UplinkSpec| check_backend(&uplink.backend_keys(), None);
        if let Some((spec, text)) = read_one(table, mistakes, check) {
            places.push((Place::Uplink(network.uplinks.len()), table));
            network.uplinks.push(spec);
            arguments.push(("--uplink", text));
        }
    }
    for device in devices {
        if let Some(table) = tables.find("device", &device.id) {
            places.push((Place::Device(network.devices.len()), table));
            network.devices.push(device.spec.clone());
        }
    }
    for problem in network.problems() {
        let found = places.iter().find(|(place, _)| *place == problem.place);
        // What was told already is told in other words here.
        if let Some((_, table)) = found.filter(|(_, table)| !mistakes.are_fatal_in(&table.extent()))
        {
            mistakes.error(table.place(key_of(&problem.message)), problem.message);
        }
    }
    arguments
}

fn read_one<T: serde::de::DeserializeOwned>(
    table: &Table,
    mistakes: &mut Mistakes,
    check: impl Fn(&T) -> Result<(), crate::Usage>,
) -> Option<(T, String)> {
    let mut entries = vec![added(table, "id", &table.name)];
    entries.extend(own_entries(table, mistakes));
    let parse = |text: &str| {
        let spec: T = vmsg_bus::keyval::from_str(text).map_err(|error| error.to_string())?;
        check(&spec).map_err(|error| error.to_string())?;
        Ok(spec)
    };
    read_argument(table, "", entries, mistakes, parse)
}

/// Follows `switch =`.
pub(super) fn check_switch(tables: &Tables, table: &Table, mistakes: &mut Mistakes) {
    let Some(name) = table.text("switch") else {
        return;
    };
    if tables.find("switch", &name).is_none() {
        let known = || tables.of("switch").map(|switch| switch.name.as_str());
        let near = nearest(&name, known());
        let known: Vec<&str> = known().collect();
        let known = if known.is_empty() {
            "there are none".to_owned()
        } else {
            format!("known: `{}`", known.join("`, `"))
        };
        mistakes.error(
            table.place("switch"),
            format!("there is no switch `{name}`, {known}{near}"),
        );
    }
}

pub(super) fn check_worker(table: &Table, host: &HostTable, mistakes: &mut Mistakes) {
    let worker = table
        .text("worker")
        .and_then(|text| text.parse::<u64>().ok());
    if let Some(worker) = worker.filter(|worker| *worker >= host.workers) {
        mistakes.error(
            table.place("worker"),
            format!(
                "there is no worker {worker}: `workers` in [host] is {}, and they are counted from 0",
                host.workers
            ),
        );
    }
}

/// A port is that of a device or of an uplink.
fn check_port(tables: &Tables, table: &Table, mistakes: &mut Mistakes) {
    check_switch(tables, table, mistakes);
    let device = tables.find("device", &table.name);
    let Some(owner) = device.or_else(|| tables.find("uplink", &table.name)) else {
        let names = tables
            .all
            .iter()
            .filter(|table| matches!(table.kind.as_str(), "device" | "uplink"));
        let near = nearest(&table.name, names.map(|table| table.name.as_str()));
        mistakes.warning(
            table.span.clone(),
            format!(
                "there is no device and no uplink `{}` that this port could be of{near}",
                table.name
            ),
        );
        return;
    };
    match (owner.text("switch"), table.text("switch")) {
        (None, _) => mistakes.error(
            owner.span.clone(),
            format!(
                "`{}` has a [port.{}] and no `switch`",
                owner.name, owner.name
            ),
        ),
        (Some(one), Some(other)) if one != other => mistakes.error(
            table.place("switch"),
            format!("{} is on the switch `{one}`", owner.title()),
        ),
        _ => {}
    }
}

/// Looks for rules that do nothing.
fn check_rules(tables: &Tables, table: &Table, mistakes: &mut Mistakes) {
    let members = tables.all.iter().filter(|other| {
        matches!(other.kind.as_str(), "device" | "uplink")
            && other.text("switch").as_deref() == Some(&table.name)
    });
    let members: Vec<&str> = members.map(|table| table.name.as_str()).collect();
    if members.is_empty() {
        mistakes.warning(
            table.span.clone(),
            format!("nothing is on the switch `{}`", table.name),
        );
    } else if table.entry("allow").is_none() && table.entry("rule").is_none() {
        mistakes.warning(
            table.span.clone(),
            format!(
                "the switch `{}` has no `allow`, so nobody on it reaches anybody; allow = [\"* <> *\"] lets all reach all",
                table.name
            ),
        );
    }
    for key in ["allow", "deny", "rule"] {
        let Some(entry) = table.entry(key) else {
            continue;
        };
        let one = [(entry.value.clone(), entry.span.clone())];
        let rules = match &entry.value {
            Value::List(rules) => rules.as_slice(),
            _ => &one,
        };
        for (rule, span) in rules {
            let Value::Text(text) = rule else { continue };
            let text = match key {
                "rule" => text.trim_start_matches(['+', '-']),
                _ => text,
            };
            for side in text
                .split("<>")
                .flat_map(|part| part.split('>'))
                .map(str::trim)
            {
                if !side.is_empty() && !side.contains('*') && !members.contains(&side) {
                    let near = nearest(side, members.iter().copied());
                    mistakes.warning(
                        span.clone(),
                        format!(
                            "nothing called `{side}` is on the switch `{}`{near}",
                            table.name
                        ),
                    );
                }
            }
        }
    }
}
