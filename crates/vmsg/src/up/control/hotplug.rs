// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that come and go while everything runs. Each step that fails takes back those before it.

use std::time::Duration;

use serde_json::{Value, json};
use vmsg_bus::keyval;
use vmsg_proxy::FrontKind;
use vmsg_proxy::front::qemu::{Arch, VFIO_USER_SINCE, has_vhost_user, vhost_user_since};

use super::super::description::Restart;
use super::super::host::Host;
use super::super::plan::qemu::qdev_id;
use super::super::plan::{self, BusPlan, Kind, Part, Plugged, Ready};
use super::super::qmp::{Qmp, QmpError};
use super::super::read::{complete_device, front_socket, shape_of};
use super::super::status::{Ask, State};
use super::{Desired, Operator, refused};
use crate::control::{Added, Failure, FailureKind, Given, Request, Response};
use crate::spec::DeviceSpec;

/// How long QEMU may take for a command.
const COMMAND: Duration = Duration::from_secs(15);

/// How long a guest may take to let a device go.
const LET_GO: Duration = Duration::from_secs(30);

/// Why a vfio-user device can neither come nor go.
const NO_VFIO_USER: &str = "its devices are vfio-user, and QEMU aborts when such a device is taken out of a running guest: front = \"vhost-user\" can do that";

impl Operator {
    fn tell_guest(&self, desired: &Desired, guest: &str) {
        if let Some(state) = desired.guests.get(guest) {
            let argv = state.machine.argv(&state.plugged, plan::Sockets::Connect);
            let _ = self.shared.ask(Ask::SetArgv(guest.to_owned(), argv));
        }
    }

    /// Adds a device to the device host and, if one is named, to a guest.
    pub(super) fn add_device(
        &self,
        spec: &DeviceSpec,
        guest: Option<&str>,
    ) -> Result<Added, Failure> {
        let mut desired = self.desired();
        let bus = choose_bus(&desired, spec, guest)?;
        let number = match spec.common().num {
            Some(number) if desired.buses[bus].numbers.contains(&number) => {
                return Err(refused(format!(
                    "number {number} was a device's on the bus `{}` already, and numbers are not used again",
                    desired.buses[bus].id
                )));
            }
            Some(number) => number,
            None => desired
                .next_number(&desired.buses[bus])
                .ok_or_else(|| refused("all numbers of the bus are spent"))?,
        };
        let mut spec = spec.clone();
        complete_device(&mut spec, &self.name, &desired.buses[bus].id, number).map_err(refused)?;
        let id = spec.common().id.unwrap_or_default().to_owned();
        if desired.host.has_device(&id) {
            return Err(refused(format!("there is a device `{id}` already")));
        }
        if matches!(spec, DeviceSpec::Console(_)) && self.shared.consoles.find(&id).is_some() {
            return Err(refused(format!(
                "`vmsg console` has a guest's serial line by the name `{id}`; call the device something else"
            )));
        }
        let text = keyval::to_string(&spec).map_err(refused)?;
        let mut next = desired.host.clone();
        next.add("--device", text);
        if !next.argv().is_none_or(|argv| Host::fits(&argv)) {
            return Err(refused(
                "the device host could not be started again so: its command line would be too long",
            ));
        }
        let plugged = match guest {
            Some(guest) => Some(self.may_plug(&desired, guest, &spec, &id, bus)?),
            None => None,
        };
        let added = match self.relay(&Request::AddDevice {
            spec: Given(spec),
            guest: None,
        }) {
            Response::Added(added) => added,
            Response::Error(failure) => return Err(failure),
            _ => return Err(refused("the device host answers something else")),
        };
        desired.buses[bus].numbers.insert(added.number);
        desired.host = next;
        self.tell_argv(&desired.host);
        if let (Some(guest), Some((plugged, qmp))) = (guest, plugged) {
            if let Err(failure) = self.plug_in(&desired, guest, &plugged, &qmp, bus) {
                desired.host.remove_device(&id);
                self.tell_argv(&desired.host);
                self.take_back(&id, &desired.buses[bus]);
                return Err(failure);
            }
            if let Some(state) = desired.guests.get_mut(guest) {
                state.plugged.push(plugged);
            }
            self.tell_guest(&desired, guest);
        }
        tracing::info!(device = id, guest, "added");
        Ok(added)
    }

    /// Looks for what stands against a device in a guest; else says where it would be.
    fn may_plug(
        &self,
        desired: &Desired,
        guest: &str,
        spec: &DeviceSpec,
        id: &str,
        bus: usize,
    ) -> Result<(Plugged, Qmp), Failure> {
        let state = find_guest(desired, guest)?;
        let machine = &state.machine;
        if machine.front() == FrontKind::VfioUser {
            return Err(refused(format!("guest `{guest}`: {NO_VFIO_USER}")));
        }
        if !desired.buses[bus].is_shared {
            return Err(refused(format!(
                "the bus `{}` has room for one driver, and a device that comes later needs one of its own: a unix bus has it",
                desired.buses[bus].id
            )));
        }
        let shape = shape_of(spec, id);
        let (major, minor) = machine.version();
        // In a root port it is on PCI, whatever the machine.
        if !has_vhost_user(shape.device_id, Arch::X86, (major, minor)) {
            let (since, of) = vhost_user_since(shape.device_id, Arch::X86);
            return Err(refused(format!(
                "QEMU {major}.{minor} has no vhost-user device of this type; version {since}.{of} has. Behind vfio-user (QEMU {}.{}) it can be one that the guest is started with",
                VFIO_USER_SINCE.0, VFIO_USER_SINCE.1
            )));
        }
        let taken = |port: &u16| state.plugged.iter().any(|plugged| plugged.port == *port);
        let port = (0..machine.hotplug()).find(|port| !taken(port));
        let port = port.ok_or_else(|| {
            refused(match machine.hotplug() {
                0 => format!("guest `{guest}` has no root ports that wait for devices: hotplug = 4 in [guest.{guest}] makes them"),
                ports => format!("all {ports} root ports of guest `{guest}` that were to wait for devices are taken: `hotplug` in [guest.{guest}]"),
            })
        })?;
        let qmp = self
            .qmp(guest)?
            .ok_or_else(|| refused(format!("guest `{guest}` does not run")))?;
        let plugged = Plugged {
            id: id.to_owned(),
            shape,
            port,
        };
        Ok((plugged, qmp))
    }

    /// The way to a guest's QEMU; none if it does not run.
    fn qmp(&self, guest: &str) -> Result<Option<Qmp>, Failure> {
        let part = self
            .shared
            .part(guest)
            .ok_or_else(|| refused(format!("there is no guest `{guest}`")))?;
        match (part.state, part.qmp) {
            (State::Ready, Some(qmp)) => Ok(Some(qmp)),
            (state, _) if state.is_over() => Ok(None),
            (state, _) => Err(Failure::new(
                FailureKind::Unavailable,
                format!("guest `{guest}` is {}", state.name()),
            )),
        }
    }

    /// A proxy for the device, and the device in the guest.
    fn plug_in(
        &self,
        desired: &Desired,
        guest: &str,
        plugged: &Plugged,
        qmp: &Qmp,
        bus: usize,
    ) -> Result<(), Failure> {
        let state = find_guest(desired, guest)?;
        let name = proxy_name(guest, &plugged.id);
        self.shared
            .ask(Ask::Add(Box::new(self.proxy(
                guest,
                plugged,
                &desired.buses[bus],
                state.machine.isolate(),
            ))))
            .map_err(refused)?;
        let plugged_in = self
            .wait_ready(&name)
            .and_then(|()| plug(qmp, &state.machine.plug(plugged)).map_err(failure));
        if plugged_in.is_err() {
            self.drop_part(&name);
        }
        plugged_in
    }

    fn proxy(&self, guest: &str, plugged: &Plugged, bus: &BusPlan, isolate: bool) -> Part {
        let socket = front_socket(&self.runtime, guest, &plugged.id);
        let front = plan::front(FrontKind::VhostUser, &socket, &plugged.id, &bus.id, isolate);
        let argv = [
            &self.program,
            "proxy",
            "--bus",
            &bus.proxy_text,
            "--front",
            &front,
        ];
        Part {
            name: proxy_name(guest, &plugged.id),
            kind: Kind::Proxy,
            argv: argv.map(str::to_owned).to_vec(),
            after: vec![plan::SERVE.to_owned()],
            ready: Ready::Lines("ready front=".to_owned(), 1),
            restart: Restart::Always,
        }
    }

    /// Ends a part that was added, and forgets it.
    fn drop_part(&self, name: &str) {
        if self.stop_part(name).is_err() {
            let _ = self.shared.ask(Ask::Kill(name.to_owned()));
            let over = |part: &super::PartStatus| part.state.is_over().then_some(());
            self.shared.wait_part(name, COMMAND, over);
        }
        if let Err(error) = self.shared.ask(Ask::Remove(name.to_owned())) {
            tracing::warn!(part = name, error, "is still there");
        }
    }

    /// Takes a device from the device host again that could not be made of use.
    fn take_back(&self, id: &str, bus: &BusPlan) {
        let request = Request::RemoveDevice {
            device: id.to_owned(),
            bus: Some(bus.id.clone()),
        };
        if let Response::Error(failure) = self.relay(&request) {
            tracing::warn!(device = id, why = failure.message, "is still there");
        }
    }

    /// Takes a device from the guest that has it, and from the device host.
    pub(super) fn remove_device(&self, device: &str, bus: Option<&str>) -> Result<(), Failure> {
        let mut desired = self.desired();
        let holder = desired.guests.iter().find_map(|(guest, state)| {
            let plugged = state.plugged.iter().find(|plugged| plugged.id == device)?;
            Some((guest.clone(), plugged.clone()))
        });
        if let Some((guest, _)) = desired
            .guests
            .iter()
            .find(|(_, state)| state.machine.devices().any(|id| id == device))
        {
            return Err(refused(format!(
                "guest `{guest}` was started with `{device}`; what can be taken out is what was added later"
            )));
        }
        if let Some((guest, plugged)) = &holder {
            if let Some(qmp) = self.qmp(guest)? {
                let state = find_guest(&desired, guest)?;
                unplug(&qmp, &state.machine.plug(plugged), device)?;
            }
            self.drop_part(&proxy_name(guest, device));
            if let Some(state) = desired.guests.get_mut(guest) {
                state.plugged.retain(|plugged| plugged.id != device);
            }
            self.tell_guest(&desired, guest);
        }
        let request = Request::RemoveDevice {
            device: device.to_owned(),
            bus: bus.map(str::to_owned),
        };
        match self.relay(&request) {
            Response::Error(failure) => return Err(failure),
            _ => desired.host.remove_device(device),
        }
        self.tell_argv(&desired.host);
        tracing::info!(device, guest = holder.map(|(guest, _)| guest), "removed");
        Ok(())
    }
}

/// What the proxy of a device that was added is called among the parts.
fn proxy_name(guest: &str, device: &str) -> String {
    format!("{guest}.{device}")
}

fn find_guest<'d>(desired: &'d Desired, guest: &str) -> Result<&'d super::GuestState, Failure> {
    desired.guests.get(guest).ok_or_else(|| {
        let known: Vec<&str> = desired.guests.keys().map(String::as_str).collect();
        let message = format!(
            "there is no guest `{guest}`; known: `{}`",
            known.join("`, `")
        );
        Failure::new(FailureKind::NotFound, message)
    })
}

/// The bus that the device names; else one that the guest's devices are on; else the first one.
fn choose_bus(desired: &Desired, spec: &DeviceSpec, guest: Option<&str>) -> Result<usize, Failure> {
    let of_guest = match guest {
        Some(guest) => find_guest(desired, guest)?
            .buses
            .first()
            .map(String::as_str),
        None => None,
    };
    let wanted = spec.common().bus.or(of_guest);
    let found = match wanted {
        None => (!desired.buses.is_empty()).then_some(0),
        Some(wanted) => desired.buses.iter().position(|bus| bus.id == wanted),
    };
    found.ok_or_else(|| {
        let known: Vec<&str> = desired.buses.iter().map(|bus| bus.id.as_str()).collect();
        let message = format!(
            "there is no bus `{}`; known: `{}`",
            wanted.unwrap_or_default(),
            known.join("`, `")
        );
        Failure::new(FailureKind::NotFound, message)
    })
}

fn failure(error: QmpError) -> Failure {
    let kind = match error {
        QmpError::Refused { .. } => FailureKind::Refused,
        QmpError::Late(_) | QmpError::Gone => FailureKind::Unavailable,
    };
    Failure::new(kind, error)
}

/// Has QEMU plug a device in.
fn plug(qmp: &Qmp, plug: &plan::Plug) -> Result<(), QmpError> {
    qmp.execute("chardev-add", plug.chardev.clone(), COMMAND)?;
    let rest = || {
        if let Some(netdev) = &plug.netdev {
            qmp.execute("netdev_add", netdev.clone(), COMMAND)?;
        }
        qmp.execute("device_add", plug.device.clone(), COMMAND)
    };
    match rest() {
        Ok(_) => Ok(()),
        Err(error) => {
            // As much of it as is there.
            let _ = remove_backend(qmp, plug);
            Err(error)
        }
    }
}

fn id_of(value: &Value) -> Value {
    json!({ "id": value.get("id") })
}

fn remove_backend(qmp: &Qmp, plug: &plan::Plug) -> Result<(), QmpError> {
    let netdev = match &plug.netdev {
        Some(netdev) => qmp
            .execute("netdev_del", id_of(netdev), COMMAND)
            .map(|_| ()),
        None => Ok(()),
    };
    match qmp.execute("chardev-remove", id_of(&plug.chardev), COMMAND) {
        // It went with the netdev.
        Err(QmpError::Refused {
            ref description, ..
        }) if description.contains("not found") => {}
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    netdev
}

/// Has QEMU take a device out, and waits until the guest has let it go.
fn unplug(qmp: &Qmp, plug: &plan::Plug, device: &str) -> Result<(), Failure> {
    let since = qmp.events();
    let asked = qmp.execute("device_del", id_of(&plug.device), COMMAND);
    let is_gone = match asked {
        Ok(_) => false,
        // An earlier attempt that has come to its end since.
        Err(QmpError::Refused {
            ref description, ..
        }) if description.contains("not found") => true,
        // An earlier attempt that is still under way.
        Err(QmpError::Refused {
            ref description, ..
        }) if description.contains("in the process") => false,
        Err(error) => return Err(failure(error)),
    };
    if !is_gone {
        let wanted = qdev_id(device);
        let heard = qmp.event(since, LET_GO, |event, data| {
            let is_ours = data.get("device").and_then(Value::as_str) == Some(&wanted);
            match event {
                "DEVICE_DELETED" if is_ours => Some(true),
                "DEVICE_UNPLUG_GUEST_ERROR" if is_ours => Some(false),
                _ => None,
            }
        });
        match heard {
            Ok(true) => {}
            Ok(false) => return Err(refused(format!("the guest does not let `{device}` go"))),
            Err(QmpError::Late(_)) => {
                return Err(Failure::new(
                    FailureKind::Unavailable,
                    format!(
                        "the guest has not let `{device}` go in {} s; it has the device still, and may be asked again",
                        LET_GO.as_secs()
                    ),
                ));
            }
            Err(error) => return Err(failure(error)),
        }
    }
    if let Err(error) = remove_backend(qmp, plug) {
        // The guest has no device any more, whatever QEMU keeps of it.
        tracing::warn!(device, %error, "QEMU keeps something of a device that is gone");
    }
    Ok(())
}
