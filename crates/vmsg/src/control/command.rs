// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ctl`.

use std::io::Write;

use anyhow::bail;
use serde::Serialize;
use vmsg_bus::keyval;

use super::client::{self, Client};
use super::protocol::{Given, Request, Response, Switch};
use super::{show, table::Table};
use crate::Usage;
use crate::cli::{CtlAction, CtlArgs, PortAction, RuleAction};
use crate::out::Out;
use crate::spec::PortSetSpec;
use crate::trace::{clean, clean_json};

/// Makes one request of a running `vmsg serve` or `vmsg up`.
pub(crate) fn run(args: CtlArgs) -> anyhow::Result<()> {
    // What is wrong with the words is said before anybody is asked.
    let (request, json) = request(args.action)?;
    let mut client = Client::connect(&args.path)?;
    if matches!(
        &request,
        Request::AddDevice { .. }
            | Request::RemoveDevice { .. }
            | Request::AddUplink { .. }
            | Request::StartPart { .. }
            | Request::StopPart { .. }
            | Request::RestartPart { .. }
    ) {
        client.set_patience(SLOW)?;
    }
    let response = client.ask_and_wait(&request, || say_waiting(&request));
    let response = response.and_then(client::done)?;
    if let Request::Rule { switch, rule, .. } = &request
        && let Ok(Response::Switches(switches)) = client.ask(&Request::Switches {})
    {
        for name in nobodys(rule, switch.as_deref(), &switches) {
            tracing::warn!("the rule holds, and no port is called `{name}` so far");
        }
    }
    // A second answer that belongs to the first, for people.
    let ports = match (&request, json) {
        (Request::List {}, false) => client.ask(&Request::Switches {}).ok(),
        _ => None,
    };
    print(&response, ports.as_ref(), json)
}

/// Says for whom a request waits that is not answered at once, and for how long.
fn say_waiting(request: &Request) {
    if let Request::AddDevice { spec, .. } = request
        && let Some((whom, time)) = spec.0.waits_for()
    {
        let text = format!("waiting for {whom}, up to {} s", time.as_secs());
        // Nobody may be reading.
        let _ = writeln!(std::io::stderr(), "{}", clean(&text));
    }
}

/// Names in a rule that no port has: allowed, as the port may come, and more often a slip.
fn nobodys<'r>(rule: &'r str, switch: Option<&str>, switches: &[Switch]) -> Vec<&'r str> {
    let here = |found: &&Switch| switch.is_none_or(|id| id == found.id);
    let ports: Vec<&str> = switches
        .iter()
        .filter(here)
        .flat_map(|switch| &switch.ports)
        .map(|port| port.id.as_str())
        .collect();
    rule.split(['<', '>'])
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.contains('*') && !ports.contains(name))
        .collect()
}

/// How long what waits for guests and the host's system may take.
const SLOW: std::time::Duration = std::time::Duration::from_secs(120);

fn print(response: &Response, ports: Option<&Response>, json: bool) -> anyhow::Result<()> {
    let mut out = Out::lock();
    let mut tables: Vec<Table> = Vec::new();
    match response {
        Response::Done {} => {}
        Response::Devices(devices) if json => return print_json(&mut out, devices),
        Response::Switches(switches) if json => return print_json(&mut out, switches),
        Response::Macs(macs) if json => return print_json(&mut out, macs),
        Response::Parts(parts) if json => return print_json(&mut out, parts),
        Response::Parts(parts) => tables.push(show::parts(parts)),
        Response::Devices(devices) => {
            tables.push(show::devices(devices));
            if let Some(Response::Switches(switches)) = ports
                && !switches.is_empty()
            {
                tables.push(show::ports(switches));
            }
        }
        Response::Switches(switches) => {
            tables.push(show::switches(switches));
            tables.push(show::rules(switches));
            tables.push(show::ports(switches));
        }
        Response::Macs(macs) => tables.push(show::macs(macs)),
        Response::Consoles(consoles) if json => return print_json(&mut out, consoles),
        Response::Consoles(consoles) => tables.push(crate::console::table(consoles)),
        Response::Added(added) => {
            let text = format!("{}/{} number {}", added.bus, added.id, added.number);
            writeln!(out, "{}", clean(&text))?;
        }
        Response::Error(failure) => bail!("{}", clean(&failure.message)),
    }
    for (index, table) in tables.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        table.print(&mut out)?;
    }
    Ok(())
}

fn print_json<T: Serialize>(out: &mut Out, value: &T) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    for line in text.lines() {
        writeln!(out, "{}", clean_json(line))?;
    }
    Ok(())
}

/// The request, and whether its answer is wanted as JSON.
fn request(action: CtlAction) -> Result<(Request, bool), Usage> {
    let mut json = false;
    let request = match action {
        CtlAction::List(list) => {
            json = list.json;
            Request::List {}
        }
        CtlAction::Link(link) => {
            let (bus, device) = split(&link.device);
            Request::Link {
                device,
                bus,
                state: link.state,
            }
        }
        CtlAction::Announce(announce) => {
            let (bus, device) = split(&announce.device);
            Request::Announce { device, bus }
        }
        CtlAction::Rescan(rescan) => {
            let (bus, device) = split(&rescan.device);
            Request::Rescan { device, bus }
        }
        CtlAction::Switches(list) => {
            json = list.json;
            Request::Switches {}
        }
        CtlAction::Macs(macs) => {
            json = macs.json;
            Request::Macs {
                switch: macs.switch,
            }
        }
        CtlAction::Rule(args) => {
            let (rule, switch) = (args.rule, args.switch);
            match args.action {
                RuleAction::Remove => Request::RemoveRule { switch, rule },
                action => Request::Rule {
                    switch,
                    rule,
                    allow: action == RuleAction::Allow,
                },
            }
        }
        CtlAction::Unknown(args) => Request::Unknown {
            switch: args.switch,
            unknown: args.unknown,
        },
        CtlAction::Port(PortAction::Set(args)) => {
            let text = args.settings.join(",");
            let mut set: PortSetSpec =
                keyval::from_str(&text).map_err(|error| Usage(format!("port set: {error}")))?;
            if !set.port.is_empty() || set.switch.is_some() {
                return Err(Usage(
                    "port set: the port is named before its settings, as PORT or SWITCH/PORT"
                        .to_owned(),
                ));
            }
            (set.switch, set.port) = split(&args.port);
            Request::Port(Box::new(set))
        }
        CtlAction::Capture(args) => {
            let (switch, port) = split(&args.port);
            let file = (args.file.as_os_str() != "off").then_some(args.file);
            let file = file.map(std::path::absolute).transpose();
            Request::Capture {
                port,
                switch,
                file: file.map_err(|error| Usage(format!("capture: {error}")))?,
            }
        }
        CtlAction::Flush(args) => match args.port.as_deref().map(split) {
            Some((switch, port)) => Request::Flush {
                switch,
                port: Some(port),
            },
            None => Request::Flush {
                switch: args.switch,
                port: None,
            },
        },
        CtlAction::AddDevice(args) => Request::AddDevice {
            spec: given("add-device", &args.spec)?,
            guest: args.guest,
        },
        CtlAction::RemoveDevice(args) => {
            let (bus, device) = split(&args.device);
            Request::RemoveDevice { device, bus }
        }
        CtlAction::Parts(list) => {
            json = list.json;
            Request::Parts {}
        }
        CtlAction::StartPart(args) => Request::StartPart { part: args.part },
        CtlAction::StopPart(args) => Request::StopPart { part: args.part },
        CtlAction::RestartPart(args) => Request::RestartPart { part: args.part },
        CtlAction::Consoles(list) => {
            json = list.json;
            Request::Consoles {}
        }
        CtlAction::AddPort(args) => Request::AddPort {
            spec: Box::new(given("add-port", &args.spec)?),
        },
        CtlAction::RemovePort(args) => {
            let (switch, port) = split(&args.port);
            Request::RemovePort { port, switch }
        }
        CtlAction::AddUplink(args) => Request::AddUplink {
            spec: Box::new(given("add-uplink", &args.spec)?),
        },
        CtlAction::RemoveUplink(args) => {
            let (switch, uplink) = split(&args.port);
            Request::RemoveUplink { uplink, switch }
        }
    };
    Ok((request, json))
}

fn given<T: serde::de::DeserializeOwned>(command: &str, text: &str) -> Result<Given<T>, Usage> {
    keyval::from_str(text)
        .map(Given)
        .map_err(|error| Usage(format!("{command} {text}: {error}")))
}

/// `ID`, or `BUS/ID`; `PORT`, or `SWITCH/PORT`.
fn split(text: &str) -> (Option<String>, String) {
    match text.split_once('/') {
        Some((bus, device)) => (Some(bus.to_owned()), device.to_owned()),
        None => (None, text.to_owned()),
    }
}
