// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices.

use vmsg_bus::keyval;
use vmsg_device::net::Mac;

use super::super::description::{Bus, Device, HostTable, Shape};
use super::super::source::Mistakes;
use super::super::tables::{Entry, Table, Tables, nearest};
use super::fabric::{check_switch, check_worker};
use super::{added, check_name, own_entries, read_argument};
use crate::Usage;
use crate::buses;
use crate::spec::{BackendKeys, BlkSpec, DeviceSpec, NetBackend, NetSpec, Store};

/// Most devices of a bus: numbers have 16 bits.
const MAX_NUMBER: u16 = u16::MAX;

/// Reads all devices. Each gets a number on its bus and, if it is a network device, an address, so that both stay what
/// they are when others come and go.
pub(super) fn read_devices(
    tables: &Tables,
    name: &str,
    buses: &[Bus],
    host: &HostTable,
    mistakes: &mut Mistakes,
) -> Vec<Device> {
    // Whoever said which number it wants has it.
    let mut taken: Vec<(usize, u16, String)> = Vec::new();
    for table in tables.of("device") {
        let Some(bus) = bus_of(tables, table, buses, &mut Mistakes::default()) else {
            continue;
        };
        let Some(num) = table.text("num").and_then(|num| num.parse().ok()) else {
            continue;
        };
        match taken.iter().find(|(b, n, _)| (*b, *n) == (bus, num)) {
            Some((_, _, other)) => mistakes.error(
                table.place("num"),
                format!("`{other}` has the number {num} on this bus already"),
            ),
            None => taken.push((bus, num, table.name.clone())),
        }
    }
    let mut devices = Vec::new();
    let mut images: Vec<(&str, DeviceSpec)> = Vec::new();
    for table in tables.of("device") {
        check_name(table, mistakes);
        check_worker(table, host, mistakes);
        if is_number(&table.name) {
            let name = &table.name;
            mistakes.error(
                table.span.clone(),
                format!("a device called `{name}` would be taken for a number"),
            );
        }
        check_switch(tables, table, mistakes);
        check_console_name(tables, table, mistakes);
        let bus = bus_of(tables, table, buses, mistakes);
        let Some((kind, _)) = table.string("type", mistakes) else {
            if table.entry("type").is_none() {
                mistakes.error(
                    table.span.clone(),
                    format!("{} needs `type`, such as \"net\" or \"rng\"", table.title()),
                );
            }
            continue;
        };
        let mut entries = vec![added(table, "id", &table.name)];
        entries.extend(own_entries(table, mistakes));
        entries.retain(|entry| entry.key != "bus");
        let mut num = None;
        if let Some(bus) = bus {
            entries.push(added(table, "bus", &buses[bus].id));
            num = match taken
                .iter()
                .find(|(b, _, id)| *b == bus && *id == table.name)
            {
                Some((_, num, _)) => Some(*num),
                None => {
                    (0..MAX_NUMBER).find(|num| !taken.iter().any(|(b, n, _)| (*b, n) == (bus, num)))
                }
            };
            if let Some(num) = num.filter(|_| table.entry("num").is_none()) {
                entries.push(added(table, "num", &num.to_string()));
                taken.push((bus, num, table.name.clone()));
            }
            if buses::is_r1(&buses[bus].spec) && num != Some(0) {
                mistakes.error(
                    table.span.clone(),
                    format!(
                        "the bus `{}` speaks r1, which has one device, number 0",
                        buses[bus].id
                    ),
                );
            }
        }
        if kind == "net" && table.entry("mac").is_none() {
            entries.push(added(table, "mac", &derived(name, &table.name)));
        }
        let Some((spec, text)) = read_device(table, &kind, entries, mistakes) else {
            continue;
        };
        if let Some((other, _)) = images.iter().find(|(_, other)| are_one_image(other, &spec)) {
            mistakes.error(
                table.place("path"),
                format!("`{other}` has this image already; two can have it only if both are `ro`"),
            );
        }
        images.push((table.name.as_str(), spec.clone()));
        let (Some(bus), Some(num)) = (bus, num) else {
            continue;
        };
        devices.push(Device {
            id: table.name.clone(),
            text,
            bus,
            num,
            shape: shape_of(&spec, &table.name),
            spec,
            span: table.span.clone(),
        });
    }
    devices
}

/// Whether two disks are one file, by its name, that one of them would write: the later one would find it locked.
fn are_one_image(one: &DeviceSpec, other: &DeviceSpec) -> bool {
    let (DeviceSpec::Blk(one), DeviceSpec::Blk(other)) = (one, other) else {
        return false;
    };
    let is_file = |disk: &BlkSpec| !matches!(disk.store(), Ok(Store::Nbd(_)) | Err(_));
    one.path == other.path && is_file(one) && is_file(other) && !(one.ro && other.ro)
}

/// Finds a console that is called as a guest whose serial line is one, too.
fn check_console_name(tables: &Tables, table: &Table, mistakes: &mut Mistakes) {
    let name = &table.name;
    let has_serial = |guest: &Table| {
        let none = &mut Mistakes::default();
        guest.flag("serial", none).unwrap_or(true)
    };
    if table.text("type").as_deref() == Some("console")
        && tables.find("guest", name).is_some_and(has_serial)
    {
        mistakes.error(
            table.span.clone(),
            format!("`vmsg console` has the serial line of the guest `{name}` by this name; call the device something else"),
        );
    }
}

fn is_number(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit())
}

/// The address of a network device that is not told one: it depends on names alone.
fn derived(name: &str, id: &str) -> String {
    Mac::derived(&format!("{name}/{id}")).to_string()
}

fn read_device(
    table: &Table,
    kind: &str,
    entries: Vec<Entry>,
    mistakes: &mut Mistakes,
) -> Option<(DeviceSpec, String)> {
    let parse = |text: &str| {
        let spec: DeviceSpec = keyval::from_str(text).map_err(|error| error.to_string())?;
        check(&spec).map_err(|error| error.to_string())?;
        Ok(spec)
    };
    read_argument(table, kind, entries, mistakes, parse)
}

/// Gives a device of a running description called `name` what it is to have: its place, and an address as a description would.
///
/// # Errors
/// It cannot be.
pub(in super::super) fn complete_device(
    spec: &mut DeviceSpec,
    name: &str,
    bus: &str,
    number: u16,
) -> Result<(), Usage> {
    let common = spec.common_mut();
    *common.bus = Some(bus.to_owned());
    *common.num = Some(number);
    let Some(id) = common.id.clone() else {
        return Err(Usage("`id=…` is missing".to_owned()));
    };
    if !super::is_name(&id) || is_number(&id) {
        return Err(Usage(format!(
            "id=`{id}` must have 1 to 32 letters, digits, `-` or `_`, the first of them no sign"
        )));
    }
    if let DeviceSpec::Net(net) = spec
        && net.mac.is_none()
    {
        net.mac = Some(derived(name, &id));
    }
    check(spec)
}

/// The bus that a device is on: the first one if it says nothing.
fn bus_of(tables: &Tables, table: &Table, buses: &[Bus], mistakes: &mut Mistakes) -> Option<usize> {
    let Some(wanted) = table.text("bus") else {
        if tables.of("bus").next().is_none() {
            mistakes.error(
                table.span.clone(),
                format!(
                    "there is no bus that {} could be on; [bus.b0] alone makes one",
                    table.title()
                ),
            );
        }
        return if buses.is_empty() { None } else { Some(0) };
    };
    find_bus(tables, &wanted, table, "bus", buses, mistakes)
}

/// Follows a reference to a bus.
pub(super) fn find_bus(
    tables: &Tables,
    wanted: &str,
    table: &Table,
    key: &str,
    buses: &[Bus],
    mistakes: &mut Mistakes,
) -> Option<usize> {
    let found = buses.iter().position(|bus| bus.id == wanted);
    // One that has mistakes of its own is there all the same.
    if found.is_none() && tables.find("bus", wanted).is_none() {
        let names = || tables.of("bus").map(|bus| bus.name.as_str());
        let near = nearest(wanted, names());
        let known: Vec<&str> = names().collect();
        let known = match known.as_slice() {
            [] => "there are none".to_owned(),
            known => format!("known: `{}`", known.join("`, `")),
        };
        mistakes.error(
            table.place(key),
            format!("there is no bus `{wanted}`, {known}{near}"),
        );
    }
    found
}

/// Looks for what a device cannot be.
fn check(spec: &DeviceSpec) -> Result<(), Usage> {
    let net = match spec {
        DeviceSpec::Net(net) => net,
        DeviceSpec::Rng(_) => return Ok(()),
        DeviceSpec::Console(console) => {
            return console.check(console.id.as_deref().unwrap_or("console0"));
        }
        DeviceSpec::Blk(blk) => return blk.check(),
        DeviceSpec::VhostUser(daemon) => return daemon.check(),
    };
    net.mac(net.id.as_deref().unwrap_or_default())?;
    net.line()?;
    if let Some(queues) = net.queues.filter(|queues| !(1..=256).contains(queues)) {
        return Err(Usage(format!("queues={queues}: 1 to 256 are possible")));
    }
    let keys = net.backend_keys();
    if net.switch.is_some() {
        // The rest is told with the network.
        return Ok(());
    }
    check_backend(&keys, net.queues)
}

/// Looks for what a back end cannot be.
pub(super) fn check_backend(keys: &BackendKeys, queues: Option<u16>) -> Result<(), Usage> {
    keys.check_keys()?;
    match keys.backend.unwrap_or_default() {
        NetBackend::User => keys.user_config().map(|_| ()),
        NetBackend::Tap => keys.tap_config(queues).map(|_| ()),
        NetBackend::Socket => keys.socket_config().map(|_| ()),
        NetBackend::VhostUser => keys.vhost_user_config().map(|_| ()),
        NetBackend::None => Ok(()),
    }
}

/// What a VMM has to know of a device.
pub(in super::super) fn shape_of(spec: &DeviceSpec, id: &str) -> Shape {
    match spec {
        DeviceSpec::Net(net) => {
            let pairs = pairs_of(net);
            Shape {
                mac: net.mac(id).ok(),
                pairs,
                mtu: net.mtu,
                ..Shape::new(1, usize::from(pairs) * 2 + 1, 24)
            }
        }
        DeviceSpec::Console(console) => Shape::new(3, console.queues(), 12),
        DeviceSpec::Rng(_) => Shape::new(4, 1, 0),
        DeviceSpec::Blk(blk) => Shape {
            queue_size: vmsg_device::device::QUEUE_SIZE,
            ..Shape::new(Shape::BLOCK, blk.queues(), 60)
        },
        DeviceSpec::VhostUser(daemon) => {
            let (device_id, queues, config) = daemon.shape().unwrap_or((0, 1, 0));
            Shape {
                tag: daemon.tag.clone(),
                mac: (device_id == 1).then(|| {
                    let said = daemon.mac.as_deref().and_then(|mac| mac.parse().ok());
                    said.unwrap_or_else(|| Mac::derived(id))
                }),
                queue_size: daemon.queue_size.unwrap_or(0),
                ..Shape::new(device_id, queues.into(), config)
            }
        }
    }
}

fn pairs_of(net: &NetSpec) -> u16 {
    let fds = net.fds.as_ref().map(|fds| fds.split(':').count());
    net.queues
        .or_else(|| fds.and_then(|count| u16::try_from(count).ok()))
        .unwrap_or(1)
        .clamp(1, 128)
}
