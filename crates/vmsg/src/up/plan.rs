// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a description to the processes that make it real.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use vmsg_bus::keyval;
use vmsg_proxy::FrontKind;

use super::description::{Bus, Description, Device, Guest, Program, Restart};
use super::read::front_socket;
use crate::buses;

pub(super) mod qemu;
mod shell;

pub(super) use qemu::{Machine, Plug, Plugged, Sockets};
pub(super) use shell::to_shell;

/// The name of the device host among the parts.
pub(super) const SERVE: &str = "serve";

/// All processes of a description.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) name: String,
    /// Where the processes run.
    pub(super) folder: PathBuf,
    pub(super) runtime: PathBuf,
    pub(super) control: PathBuf,
    /// In an order in which each stands behind those that it waits for.
    pub(super) parts: Vec<Part>,
    /// What devices that come later need to know.
    pub(super) buses: Vec<BusPlan>,
}

/// A bus as those have it who come to it.
#[derive(Clone, Debug)]
pub(super) struct BusPlan {
    pub(super) id: String,
    /// As `--bus` of `proxy` has it.
    pub(super) proxy_text: String,
    /// Several drivers may be there at a time.
    pub(super) is_shared: bool,
    /// Numbers of devices that were given to somebody, ever.
    pub(super) numbers: BTreeSet<u16>,
}

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The program and its arguments.
    pub(super) argv: Vec<String>,
    /// Parts that must be ready first.
    pub(super) after: Vec<String>,
    pub(super) ready: Ready,
    pub(super) restart: Restart,
}

/// What a part is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Program,
    Serve,
    Proxy,
    Guest(Box<Machine>),
}

impl Kind {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Serve => "serve",
            Self::Proxy => "proxy",
            Self::Guest(_) => "guest",
        }
    }
}

/// When a part is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// It runs.
    Started,
    /// It has printed as many lines that begin so.
    Lines(String, usize),
    /// It has printed a line with this in it.
    Text(String),
    /// It has come to the socket of QMP.
    Qmp,
}

/// Makes the plan; `program` is this program.
pub(super) fn plan(description: &Description, program: &str) -> Plan {
    let runtime = &description.host.runtime;
    let mut parts = Vec::new();
    let early = early_programs(description);
    let early_names: Vec<String> = early.iter().map(|program| program.name.clone()).collect();
    parts.extend(early.iter().map(|program| of_program(program)));
    if !description.buses.is_empty() {
        parts.push(serve(description, program, early_names.clone()));
    }
    for guest in &description.guests {
        let proxy = proxy(description, guest, program);
        let after = match &proxy {
            Some(proxy) => vec![proxy.name.clone()],
            None if description.buses.is_empty() => early_names.clone(),
            None => vec![SERVE.to_owned()],
        };
        parts.extend(proxy);
        let devices = guest
            .devices
            .iter()
            .map(|at| &description.devices[*at])
            .map(|device| (device.id.clone(), device.shape.clone()))
            .collect();
        let mut buses = Vec::new();
        for at in &guest.devices {
            let bus = description.devices[*at].bus;
            let id = &description.buses[bus].id;
            if !buses.contains(id) {
                buses.push(id.clone());
            }
        }
        let machine = Machine::new(guest, runtime, devices, buses);
        parts.push(Part {
            name: guest.name.clone(),
            argv: machine.argv(&[], Sockets::Connect),
            kind: Kind::Guest(Box::new(machine)),
            after,
            ready: Ready::Qmp,
            restart: guest.restart,
        });
    }
    let late = description.programs.iter();
    let late = late.filter(|program| !early_names.contains(&program.name));
    parts.extend(late.map(of_program));
    Plan {
        name: description.name.clone(),
        folder: description.folder.clone(),
        runtime: runtime.clone(),
        control: description.host.control.clone(),
        parts: in_order(parts),
        buses: (description.buses.iter().enumerate())
            .map(|(at, bus)| bus_plan(at, bus, &description.devices))
            .collect(),
    }
}

fn bus_plan(at: usize, bus: &Bus, devices: &[Device]) -> BusPlan {
    let on_it = devices.iter().filter(|device| device.bus == at);
    BusPlan {
        id: bus.id.clone(),
        proxy_text: bus.proxy_text.clone(),
        is_shared: matches!(bus.spec, vmsg_bus::BusSpec::Unix(_)),
        numbers: on_it.map(|device| device.num).collect(),
    }
}

/// Programs that wait for nothing but programs: the device host and the guests wait for them.
fn early_programs(description: &Description) -> Vec<&Program> {
    let mut early: Vec<&Program> = Vec::new();
    loop {
        let known = |name: &String| early.iter().any(|program| program.name == *name);
        let next = description
            .programs
            .iter()
            .find(|program| !known(&program.name) && program.after.iter().all(known));
        match next {
            Some(program) => early.push(program),
            None => return early,
        }
    }
}

/// Puts each part behind those that it waits for, and leaves the order otherwise.
fn in_order(mut left: Vec<Part>) -> Vec<Part> {
    let mut ordered: Vec<Part> = Vec::new();
    while !left.is_empty() {
        let is_there = |name: &String| ordered.iter().any(|part| part.name == *name);
        let next = left
            .iter()
            .position(|part| part.after.iter().all(is_there))
            // Circles were found before.
            .unwrap_or(0);
        ordered.push(left.remove(next));
    }
    ordered
}

fn of_program(program: &Program) -> Part {
    Part {
        name: program.name.clone(),
        kind: Kind::Program,
        argv: program.command.clone(),
        after: program.after.clone(),
        ready: match &program.ready {
            Some(text) => Ready::Text(text.clone()),
            None => Ready::Started,
        },
        restart: program.restart,
    }
}

/// Where `serve` is asked.
pub(super) fn serve_control(runtime: &Path) -> PathBuf {
    runtime.join("serve.sock")
}

fn serve(description: &Description, program: &str, after: Vec<String>) -> Part {
    let host = &description.host;
    let control = serve_control(&host.runtime);
    let mut argv = vec![
        program.to_owned(),
        "serve".to_owned(),
        "--control".to_owned(),
        control.to_string_lossy().into_owned(),
        "--workers".to_owned(),
        host.workers.to_string(),
    ];
    if let Some(keep) = host.keep {
        argv.extend(["--keep".to_owned(), keep.to_string()]);
    }
    let mut option = |name: &str, value: &str| argv.extend([name.to_owned(), value.to_owned()]);
    for bus in &description.buses {
        option("--bus", &bus.text);
    }
    for (name, value) in &description.fabric {
        option(name, value);
    }
    for device in &description.devices {
        option("--device", &device.text);
    }
    Part {
        name: SERVE.to_owned(),
        kind: Kind::Serve,
        argv,
        after,
        ready: Ready::Lines("ready bus=".to_owned(), description.buses.len()),
        restart: host.restart,
    }
}

/// The proxy of a guest, if it has devices.
fn proxy(description: &Description, guest: &Guest, program: &str) -> Option<Part> {
    let mut argv = vec![program.to_owned(), "proxy".to_owned()];
    let devices: Vec<&Device> = guest
        .devices
        .iter()
        .map(|at| &description.devices[*at])
        .collect();
    let used: BTreeSet<usize> = devices.iter().map(|device| device.bus).collect();
    for bus in &used {
        argv.extend([
            "--bus".to_owned(),
            description.buses[*bus].proxy_text.clone(),
        ]);
    }
    for device in &devices {
        let bus = &description.buses[device.bus];
        let socket = front_socket(&description.host.runtime, &guest.name, &device.id);
        let dev = if buses::is_r1(&bus.spec) {
            "0"
        } else {
            &device.id
        };
        let front = front(guest.front, &socket, dev, &bus.id, guest.isolate);
        argv.extend(["--front".to_owned(), front]);
    }
    (!devices.is_empty()).then(|| Part {
        name: proxy_name(&guest.name),
        kind: Kind::Proxy,
        argv,
        after: vec![SERVE.to_owned()],
        ready: Ready::Lines("ready front=".to_owned(), devices.len()),
        restart: Restart::OnFailure,
    })
}

/// What a guest's proxy is called among the parts.
pub(super) fn proxy_name(guest: &str) -> String {
    format!("{guest}.proxy")
}

/// A `--front`.
pub(super) fn front(
    kind: FrontKind,
    socket: &Path,
    device: &str,
    bus: &str,
    isolate: bool,
) -> String {
    let socket = socket.to_string_lossy();
    let socket = keyval::escape(&socket);
    let isolate = if isolate { ",isolate=on" } else { "" };
    format!(
        "{kind},socket={socket},dev={device},bus={}{isolate}",
        keyval::escape(bus)
    )
}

#[cfg(test)]
#[path = "plan_test.rs"]
mod tests;
