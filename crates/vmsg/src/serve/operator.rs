// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a running `vmsg serve` does for its operator.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmsg_device::bridge::Settings;
use vmsg_device::device::Operation;
use vmsg_device::host::{Handle, HandleError, LogLimit};
use vmsg_net::Mac;

use super::describe::{describe, describe_absent};
use super::fabric::{self, Fabric};
use super::kept::{self, Keeping};
use super::late;
use super::make::{self, Known};
use crate::Usage;
use crate::buses::{self, NamedBus};
use crate::control::{Added, Device, Failure, FailureKind, LinkState, Request, Response, Service};
use crate::spec::{DeviceSpec, Network, Place, PortSetSpec, PortSpec, UplinkSpec, known};
use crate::{console, out};

/// A host and its switches, as the control socket reaches them.
pub(super) struct Operator {
    handle: Handle,
    buses: Vec<NamedBus>,
    fabric: Fabric,
    state: Mutex<State>,
    keeping: Mutex<Keeping>,
    known: Known,
    began: Instant,
    log: Mutex<LogLimit>,
}

/// What changes while devices and uplinks come and go.
struct State {
    /// What there is, and what is just being made.
    network: Network,
    /// How many devices of each kind there were, for their names.
    named: Names,
}

/// Names for what has none: `net0`, `net1`, … never one twice.
#[derive(Debug, Default)]
pub(super) struct Names(std::collections::HashMap<&'static str, usize>);

impl Names {
    /// The next one for a `kind`.
    pub(super) fn next(&mut self, kind: &'static str) -> String {
        let count = self.0.entry(kind).or_default();
        *count += 1;
        format!("{kind}{}", *count - 1)
    }
}

type Answer = Result<Response, Failure>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is held there is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(message: impl ToString) -> Failure {
    Failure::new(FailureKind::Refused, message)
}

impl Operator {
    pub(super) fn new(
        handle: Handle,
        buses: Vec<NamedBus>,
        fabric: Fabric,
        network: Network,
        named: Names,
        keeping: Keeping,
        known: Known,
    ) -> Self {
        Self {
            handle,
            buses,
            fabric,
            state: Mutex::new(State { network, named }),
            keeping: Mutex::new(keeping),
            known,
            began: Instant::now(),
            log: Mutex::default(),
        }
    }

    /// What is kept for the next `serve` is not needed any more.
    pub(super) fn dismiss_keeper(&self) {
        lock(&self.keeping).dismiss();
    }

    /// Whether what an operator did is logged: not thousands of times.
    fn is_logged(&self) -> bool {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        lock(&self.log).admit(virtio_msg::Instant(now))
    }

    fn done(&self, what: std::fmt::Arguments<'_>) -> Answer {
        if self.is_logged() {
            tracing::info!("done for the operator: {what}");
        }
        Ok(Response::Done {})
    }

    fn bus(&self, name: Option<&str>) -> Result<Option<usize>, Failure> {
        let Some(name) = name else { return Ok(None) };
        let index = self.buses.iter().position(|bus| bus.name == name);
        index.map(Some).ok_or_else(|| {
            let known = known(self.buses.iter().map(|bus| bus.name.as_str()));
            let message = format!("there is no bus `{name}`; {known}");
            Failure::new(FailureKind::NotFound, message)
        })
    }

    /// The host's words; where a device is not there, with those that are.
    fn failed(&self, error: &HandleError) -> Failure {
        let kind = match error {
            HandleError::NoDevice(_) | HandleError::Ambiguous(_) => FailureKind::NotFound,
            HandleError::Refused { .. } | HandleError::Add(_) => FailureKind::Refused,
            _ => FailureKind::Unavailable,
        };
        let mut message = error.to_string();
        match error {
            HandleError::NoDevice(_) => {
                let state = lock(&self.state);
                let ids = state.network.devices.iter();
                let known = known(ids.filter_map(|device| device.common().id));
                message.push_str(&format!("; {known}"));
            }
            HandleError::Ambiguous(device) => {
                message.push_str(&format!("; write BUS/{device}, or give its bus"));
            }
            _ => {}
        }
        Failure::new(kind, message)
    }

    fn list(&self) -> Answer {
        // Before the others: one that comes meanwhile is there twice rather than not at all.
        let absent = self.known.awaited.absent();
        let reports = self.handle.list().map_err(|error| self.failed(&error))?;
        let describe = |report| describe(report, &self.buses);
        let mut devices: Vec<Device> = reports.into_iter().map(describe).collect();
        for absent in absent {
            let absent = describe_absent(absent, &self.buses);
            let is_it = |device: &Device| device.bus == absent.bus && device.id == absent.id;
            if !devices.iter().any(is_it) {
                devices.push(absent);
            }
        }
        let place = |device: &Device| {
            let mut buses = self.buses.iter();
            (buses.position(|bus| bus.name == device.bus), device.number)
        };
        devices.sort_by_key(place);
        Ok(Response::Devices(devices))
    }

    fn operate(&self, device: &str, bus: Option<&str>, operation: Operation) -> Answer {
        let index = self.bus(bus)?;
        match self.handle.operate(index, device, operation) {
            Ok(()) => self.done(format_args!("{operation:?} of `{device}`")),
            // Uplinks have ports and no devices.
            Err(HandleError::NoDevice(_)) if bus.is_none() && self.fabric.has_port(device) => {
                match operation {
                    Operation::SetLink(up) => self.fabric.set_link(device, up),
                    _ => Err(refused(format!("`{device}` is no device"))),
                }
            }
            Err(error @ HandleError::NoDevice(_)) => {
                Err(match self.known.awaited.state(index, device) {
                    Some(state) => refused(format!("`{device}` is not there: {state}")),
                    None => self.failed(&error),
                })
            }
            Err(error) => Err(self.failed(&error)),
        }
    }

    fn add_device(&self, mut spec: DeviceSpec) -> Answer {
        let bad = |message: String| Failure::new(FailureKind::BadRequest, message);
        let bus = buses::find(&self.buses, spec.common().bus).map_err(|Usage(why)| bad(why))?;
        let id = {
            let mut state = lock(&self.state);
            let kind = spec.common().kind;
            let id = match spec.common().id {
                Some(id) => id.to_owned(),
                None => loop {
                    let id = state.named.next(kind);
                    let mut devices = state.network.devices.iter();
                    if devices.all(|device| device.common().id != Some(&id)) {
                        break id;
                    }
                },
            };
            super::check_device_id(&id).map_err(|Usage(why)| bad(why))?;
            let common = spec.common_mut();
            *common.id = Some(id.clone());
            *common.bus = Some(self.buses[bus].name.clone());
            if let Some(other) = state.network.devices.iter().find(|other| {
                other.common().id == Some(&id)
                    && other.common().bus == Some(self.buses[bus].name.as_str())
            }) {
                let kind = other.common().kind;
                return Err(refused(format!(
                    "there is a {kind} device `{id}` on bus `{}` already",
                    self.buses[bus].name
                )));
            }
            state.reserve(spec.clone()).map_err(bad)?;
            id
        };
        let result = self.make_and_add(&spec, &id, bus);
        if result.is_err() {
            lock(&self.state).forget_device(&id, &self.buses[bus].name);
        }
        let number = result?;
        tracing::info!(device = id, number, bus = self.buses[bus].name, "added");
        Ok(Response::Added(Added {
            bus: self.buses[bus].name.clone(),
            id,
            number,
        }))
    }

    /// Opens what the device needs, however long that takes, and puts it on its bus.
    fn make_and_add(&self, spec: &DeviceSpec, id: &str, bus: usize) -> Result<u16, Failure> {
        let network = lock(&self.state).network.clone();
        let place = self.fabric.place(spec, &network);
        let (worker, port) = place.map_err(|error| refused(out::chain(&error)))?;
        let flows = lock(&self.keeping).take_late(id, kept::is_kept(spec));
        let device = match spec {
            // One that connects to us by itself tries each second or so.
            DeviceSpec::VhostUser(daemon) => late::connect_within(daemon, id, Settings::PATIENCE),
            spec => make::make(spec, id, port, flows, &self.known),
        };
        let device = device.map_err(|error| refused(out::chain(&error)))?;
        let num = spec.common().num;
        let added = self.handle.add_device(bus, id, num, worker, device);
        added.map(|num| num.0).map_err(|error| self.failed(&error))
    }

    fn remove_device(&self, device: &str, bus: Option<&str>) -> Answer {
        let index = self.bus(bus)?;
        let name = match index {
            Some(index) => Some(self.buses[index].name.clone()),
            None => lock(&self.state)
                .only_bus(device)
                .map_err(|error| self.failed(&error))?,
        };
        let on = |name: &String| self.buses.iter().position(|bus| bus.name == *name);
        if let (Some(name), Some(on)) = (&name, name.as_ref().and_then(on))
            && self.known.awaited.give_up(on, device)
        {
            lock(&self.state).forget_device(device, name);
            return self.done(format_args!("`{device}` is not waited for any more"));
        }
        let removed = self.handle.remove_device(index, device);
        if let (Err(HandleError::Timeout), Some(name)) = (&removed, &name) {
            // It goes as soon as it can, and nobody asks again.
            lock(&self.state).forget_device(device, name);
            let message = format!(
                "`{device}` is not gone yet, and goes as soon as it can: something that was under way has not ended"
            );
            return Err(Failure::new(FailureKind::Unavailable, message));
        }
        removed.map_err(|error| self.failed(&error))?;
        if let Some(name) = name {
            lock(&self.state).forget_device(device, &name);
            if !self.known.disks.wait(&name, device) {
                let message = format!(
                    "`{device}` is removed, but its disk is still being closed, and its image is locked until it is"
                );
                return Err(Failure::new(FailureKind::Unavailable, message));
            }
        }
        self.done(format_args!("`{device}` removed"))
    }
}

impl State {
    /// Takes a device in that is to be made; its words if that cannot be.
    fn reserve(&mut self, spec: DeviceSpec) -> Result<(), String> {
        self.network.devices.push(spec);
        let place = Place::Device(self.network.devices.len() - 1);
        self.check(place).inspect_err(|_| {
            self.network.devices.pop();
        })
    }

    /// What is wrong at `place`.
    fn check(&self, place: Place) -> Result<(), String> {
        let problems = self.network.problems();
        let found = problems.into_iter().find(|problem| problem.place == place);
        found.map_or(Ok(()), |problem| Err(problem.message))
    }

    fn forget_device(&mut self, id: &str, bus: &str) {
        let devices = &mut self.network.devices;
        devices.retain(|device| {
            let common = device.common();
            common.id != Some(id) || common.bus != Some(bus)
        });
    }

    /// The bus of the device called `id`, if there is one.
    ///
    /// # Errors
    /// [`HandleError::Ambiguous`]: there are several.
    fn only_bus(&self, id: &str) -> Result<Option<String>, HandleError> {
        let devices = self.network.devices.iter().map(DeviceSpec::common);
        let mut buses = devices.filter(|common| common.id == Some(id));
        match (buses.next(), buses.next()) {
            (_, Some(_)) => Err(HandleError::Ambiguous(id.to_owned())),
            (found, None) => Ok(found.and_then(|common| common.bus.map(str::to_owned))),
        }
    }

    /// The address of the device at the port `port` of `switch`.
    fn own_mac(&self, switch: &str, port: &str) -> Option<Mac> {
        let at_port = |device: &&DeviceSpec| {
            matches!(device, DeviceSpec::Net(net)
                if net.switch.as_deref() == Some(switch) && net.id.as_deref() == Some(port))
        };
        let device = self.network.devices.iter().find(at_port)?;
        fabric::own_mac(device).ok()
    }
}

/// Ports and ways out.
impl Operator {
    fn set_port(&self, set: &PortSetSpec) -> Answer {
        let change = |switch: &str| {
            let own = lock(&self.state).own_mac(switch, &set.port);
            let change = set.change(own);
            change.map_err(|Usage(why)| Failure::new(FailureKind::BadRequest, why))
        };
        self.fabric
            .change(set.switch.as_deref(), &set.port, change)?;
        self.done(format_args!("port `{}` changed", set.port))
    }

    fn add_port(&self, spec: PortSpec) -> Answer {
        let bad = |message: String| Failure::new(FailureKind::BadRequest, message);
        let id = spec.id.clone().unwrap_or_default();
        let mut state = lock(&self.state);
        state.network.ports.push(spec);
        let place = Place::Port(state.network.ports.len() - 1);
        let mut result = state.check(place).map_err(bad);
        let described = state.network.ports.last();
        if result.is_ok() && described.is_some_and(|port| state.network.is_plugged(port)) {
            result = Err(refused(format!(
                "port `{id}` is in use already; `port set` changes it"
            )));
        }
        if result.is_err() {
            state.network.ports.pop();
        }
        drop(state);
        result?;
        self.done(format_args!("port `{id}` described"))
    }

    fn remove_port(&self, port: &str, switch: Option<&str>) -> Answer {
        let mut state = lock(&self.state);
        let named = |spec: &PortSpec| {
            spec.id.as_deref() == Some(port)
                && (switch.is_none() || spec.switch.is_none() || spec.switch.as_deref() == switch)
        };
        let ports = &state.network.ports;
        let Some(index) = ports.iter().position(named) else {
            let message = if self.fabric.has_port(port) {
                format!("port `{port}` is all as by default, and goes with its device or uplink")
            } else {
                let known = known(ports.iter().filter_map(|spec| spec.id.as_deref()));
                format!("no port `{port}` is described; {known}")
            };
            return Err(Failure::new(FailureKind::NotFound, message));
        };
        if state.network.is_plugged(&state.network.ports[index]) {
            return Err(refused(format!(
                "port `{port}` is in use; remove its device or uplink first"
            )));
        }
        state.network.ports.remove(index);
        drop(state);
        self.done(format_args!("port `{port}` forgotten"))
    }

    fn add_uplink(&self, mut spec: UplinkSpec) -> Answer {
        let (id, network) = {
            let mut state = lock(&self.state);
            let id = match spec.id.take() {
                Some(id) => id,
                None => state.named.next("up"),
            };
            spec.id = Some(id.clone());
            if let ([only], None) = (state.network.switches.as_slice(), &spec.switch) {
                spec.switch.clone_from(&only.id);
            }
            if state.is_device_port(&id, spec.switch.as_deref()) {
                return Err(refused(format!(
                    "port `{id}` is that of a device already; give the uplink another id"
                )));
            }
            state.network.uplinks.push(spec.clone());
            let place = Place::Uplink(state.network.uplinks.len() - 1);
            if let Err(why) = state.check(place) {
                state.network.uplinks.pop();
                return Err(Failure::new(FailureKind::BadRequest, why));
            }
            (id, state.network.clone())
        };
        let flows = lock(&self.keeping).take_late(&id, kept::is_uplink_kept(&spec));
        if let Err(error) = self.fabric.add_uplink(&spec, &network, flows) {
            lock(&self.state).forget_uplink(&id, spec.switch.as_deref());
            return Err(refused(out::chain(&error)));
        }
        self.done(format_args!("uplink `{id}` added"))
    }

    fn remove_uplink(&self, uplink: &str, switch: Option<&str>) -> Answer {
        let switch = self.fabric.remove_uplink(switch, uplink)?;
        lock(&self.state).forget_uplink(uplink, Some(&switch));
        self.done(format_args!("uplink `{uplink}` removed"))
    }
}

impl State {
    fn forget_uplink(&mut self, id: &str, switch: Option<&str>) {
        let uplinks = &mut self.network.uplinks;
        uplinks.retain(|uplink| {
            uplink.id.as_deref() != Some(id) || uplink.switch.as_deref() != switch
        });
    }

    /// Whether the port `id` of `switch` is a device's.
    fn is_device_port(&self, id: &str, switch: Option<&str>) -> bool {
        self.network.devices.iter().any(|device| {
            matches!(device, DeviceSpec::Net(net)
                if net.id.as_deref() == Some(id) && net.switch.is_some() && net.switch.as_deref() == switch)
        })
    }
}

impl Service for Operator {
    fn carry_out(&self, request: Request) -> Response {
        self.answer(request).unwrap_or_else(Response::from)
    }
}

impl Operator {
    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::List {} => self.list(),
            Request::Link { device, bus, state } => {
                let operation = Operation::SetLink(state == LinkState::Up);
                self.operate(&device, bus.as_deref(), operation)
            }
            Request::Announce { device, bus } => {
                self.operate(&device, bus.as_deref(), Operation::Announce)
            }
            Request::Rescan { device, bus } => {
                self.operate(&device, bus.as_deref(), Operation::Rescan)
            }
            Request::Switches {} => Ok(Response::Switches(self.fabric.switches())),
            Request::Macs { switch } => self.fabric.macs(switch.as_deref()),
            Request::Rule {
                switch,
                rule,
                allow,
            } => {
                self.fabric.rule(switch.as_deref(), &rule, allow)?;
                let what = if allow { "allow" } else { "deny" };
                self.done(format_args!("{what} {rule}"))
            }
            Request::RemoveRule { switch, rule } => {
                self.fabric.remove_rule(switch.as_deref(), &rule)?;
                self.done(format_args!("rule {rule} removed"))
            }
            Request::Unknown { switch, unknown } => {
                self.fabric.set_unknown(switch.as_deref(), &unknown)?;
                self.done(format_args!("unknown={unknown}"))
            }
            Request::Port(set) => self.set_port(&set),
            Request::Capture { port, switch, file } => {
                self.fabric
                    .capture(switch.as_deref(), &port, file.as_deref())?;
                self.done(format_args!("capture of port `{port}`: {file:?}"))
            }
            Request::Flush { switch, port } => {
                self.fabric.flush(switch.as_deref(), port.as_deref())?;
                self.done(format_args!("what was learned is forgotten"))
            }
            Request::AddDevice { guest: Some(_), .. } => {
                Err(refused("only `vmsg up` has guests; leave the guest out"))
            }
            Request::AddDevice { spec, guest: None } => self.add_device(spec.0),
            Request::RemoveDevice { device, bus } => self.remove_device(&device, bus.as_deref()),
            Request::AddPort { spec } => self.add_port(spec.0),
            Request::RemovePort { port, switch } => self.remove_port(&port, switch.as_deref()),
            Request::AddUplink { spec } => self.add_uplink(spec.0),
            Request::RemoveUplink { uplink, switch } => {
                self.remove_uplink(&uplink, switch.as_deref())
            }
            Request::Parts {}
            | Request::StartPart { .. }
            | Request::StopPart { .. }
            | Request::RestartPart { .. } => Err(refused("only `vmsg up` has parts")),
            Request::Consoles {} => Ok(console::control::list(&self.known.consoles)),
            Request::ConsoleLog { console, file } => {
                let registry = &self.known.consoles;
                Ok(console::control::log(registry, &console, file.as_deref()))
            }
            Request::ConsoleSize {
                console,
                cols,
                rows,
            } => {
                let registry = &self.known.consoles;
                Ok(console::control::size(registry, &console, cols, rows))
            }
        }
    }
}

#[cfg(test)]
#[path = "operator_test.rs"]
mod tests;
