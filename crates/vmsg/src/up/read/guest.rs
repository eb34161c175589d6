// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests.

use std::path::Path;
use std::time::Duration;

use vmsg_bus::BusSpec;
use vmsg_proxy::FrontKind;
use vmsg_proxy::front::qemu::{
    Arch, MemoryBackend, VFIO_USER_SINCE, has_vhost_user, vhost_user_since,
};

use super::super::description::{Bus, Device, Guest, Restart, StopBy, World};
use super::super::source::Mistakes;
use super::super::tables::{Table, Tables, nearest};
use super::device::find_bus;
use super::{after, check_part_name};
use crate::proxy::print::{memory_for, parse_size};

/// The oldest QEMU that is known to work.
const OLDEST: (u32, u32) = (7, 2);

const KEYS: [&str; 20] = [
    "machine",
    "qemu",
    "qemu-version",
    "memory",
    "cpus",
    "cpu",
    "accel",
    "kernel",
    "initrd",
    "append",
    "bus",
    "devices",
    "front",
    "isolate",
    "serial",
    "hotplug",
    "restart",
    "stop",
    "stop-timeout",
    "args",
];

/// Reads all guests.
pub(super) fn read_guests(
    tables: &Tables,
    buses: &[Bus],
    devices: &[Device],
    world: &World<'_>,
    mistakes: &mut Mistakes,
) -> Vec<Guest> {
    let mut guests: Vec<Guest> = Vec::new();
    // Which guest has which device.
    let mut taken: Vec<(String, String)> = Vec::new();
    let alone = tables.of("guest").count() == 1;
    for table in tables.of("guest") {
        check_part_name(tables, table, mistakes);
        table.check_keys(&KEYS, mistakes);
        let guest = read_guest(tables, table, buses, devices, alone, world, mistakes);
        let ids = guest.devices.iter().map(|at| devices[*at].id.clone());
        let mut ids: Vec<String> = ids.collect();
        // Those that have mistakes of their own.
        let named = table.strings("devices", true, &mut Mistakes::default());
        for (id, _) in named.unwrap_or_default() {
            if !ids.contains(&id) && tables.find("device", &id).is_some() {
                ids.push(id);
            }
        }
        let key = match table.entry("devices") {
            Some(_) => "devices",
            None => "bus",
        };
        for id in ids {
            match taken.iter().find(|(other, _)| *other == id) {
                Some((_, other)) => mistakes.error(
                    table.place(key),
                    format!("the guest `{other}` has the device `{id}` already"),
                ),
                None => taken.push((id, table.name.clone())),
            }
        }
        for bus in guest.devices.iter().map(|at| devices[*at].bus) {
            let shared = |other: &&Guest| other.devices.iter().any(|at| devices[*at].bus == bus);
            let is_shared = matches!(buses[bus].spec, BusSpec::Unix(_));
            if let (Some(other), false) = (guests.iter().find(shared), is_shared) {
                mistakes.error(
                    table.span.clone(),
                    format!(
                        "the bus `{}` has room for one driver, and that is the guest `{}`",
                        buses[bus].id, other.name
                    ),
                );
            }
        }
        guests.push(guest);
    }
    guests
}

fn read_guest(
    tables: &Tables,
    table: &Table,
    buses: &[Bus],
    devices: &[Device],
    alone: bool,
    world: &World<'_>,
    mistakes: &mut Mistakes,
) -> Guest {
    let machines = [("x86", Arch::X86), ("arm64", Arch::Arm64)];
    let machine = table
        .choice("machine", &machines, mistakes)
        .unwrap_or(Arch::X86);
    let qemu = match table.string("qemu", mistakes) {
        Some((qemu, _)) => qemu,
        None => match machine {
            Arch::X86 => "qemu-system-x86_64".to_owned(),
            Arch::Arm64 => "qemu-system-aarch64".to_owned(),
        },
    };
    let version = qemu_version(table, &qemu, world, mistakes);
    let memory = table
        .string("memory", mistakes)
        .map_or_else(|| "256M".to_owned(), |(memory, _)| memory);
    let memory_size = parse_size(&memory).unwrap_or_else(|_| {
        mistakes.error(
            table.place("memory"),
            format!("memory = \"{memory}\": write it as \"512M\" or \"2G\""),
        );
        0
    });
    let cpus = table.number("cpus", mistakes).unwrap_or(1);
    if !(1..=1024).contains(&cpus) {
        mistakes.error(table.place("cpus"), "`cpus` must be 1 to 1024");
    }
    let mut file = |key: &str| {
        let (path, span) = table.string(key, mistakes)?;
        if !path.is_empty() && !(world.exists)(Path::new(&path)) {
            mistakes.error(span, format!("there is no file {path}"));
        }
        Some(path)
    };
    let (kernel, initrd) = (file("kernel"), file("initrd"));
    let append = table.string("append", mistakes).map(|(append, _)| append);
    if table.entry("kernel").is_none() {
        for key in ["initrd", "append"] {
            if let Some(entry) = table.entry(key) {
                mistakes.error(entry.key_span.clone(), format!("`{key}` needs `kernel`"));
            }
        }
    }
    let fronts = [
        ("vhost-user", FrontKind::VhostUser),
        ("vfio-user", FrontKind::VfioUser),
    ];
    let front = table
        .choice("front", &fronts, mistakes)
        .unwrap_or(FrontKind::VhostUser);
    let devices_of = guest_devices(tables, table, buses, devices, alone, mistakes);
    let qemu_is = (machine, version);
    check_front(table, front, qemu_is, devices, &devices_of, mistakes);
    let backend = memory_of(
        table,
        machine,
        memory_size,
        buses,
        devices,
        &devices_of,
        mistakes,
    );
    let hotplug = table.number("hotplug", mistakes).unwrap_or(0);
    if hotplug > 31 {
        mistakes.error(table.place("hotplug"), "`hotplug` must be 0 to 31");
    }
    if hotplug > 0 && front == FrontKind::VfioUser {
        mistakes.error(
            table.place("hotplug"),
            "`hotplug` needs front = \"vhost-user\": QEMU aborts when a vfio-user device is taken out of a running guest",
        );
    }
    let stops = [("powerdown", StopBy::PowerDown), ("quit", StopBy::Quit)];
    Guest {
        name: table.name.clone(),
        machine,
        qemu,
        version,
        memory,
        backend,
        cpus,
        cpu: table.string("cpu", mistakes).map(|(cpu, _)| cpu),
        accel: match table.string("accel", mistakes) {
            Some((accel, _)) => Some(accel),
            None => Some(
                if world.kvm == Some(machine) {
                    "kvm"
                } else {
                    "tcg"
                }
                .to_owned(),
            ),
        },
        kernel,
        initrd,
        append,
        devices: devices_of,
        front,
        isolate: table.flag("isolate", mistakes).unwrap_or(false),
        serial: table.flag("serial", mistakes).unwrap_or(true),
        hotplug: u16::try_from(hotplug).unwrap_or(0),
        restart: table
            .choice("restart", &Restart::WORDS, mistakes)
            .unwrap_or(Restart::Never),
        stop: table
            .choice("stop", &stops, mistakes)
            .unwrap_or(StopBy::PowerDown),
        stop_timeout: Duration::from_secs(
            table
                .number("stop-timeout", mistakes)
                .unwrap_or(10)
                .min(3600),
        ),
        args: table
            .strings("args", false, mistakes)
            .unwrap_or_default()
            .into_iter()
            .map(|(word, _)| word)
            .collect(),
    }
}

/// What a guest's memory must be for all its buses.
fn memory_of(
    table: &Table,
    machine: Arch,
    size: u64,
    buses: &[Bus],
    devices: &[Device],
    of_guest: &[usize],
    mistakes: &mut Mistakes,
) -> MemoryBackend {
    let mut found: Option<MemoryBackend> = None;
    let mut seen = Vec::new();
    for bus in of_guest
        .iter()
        .filter_map(|at| devices.get(*at))
        .map(|device| device.bus)
    {
        if seen.contains(&bus) {
            continue;
        }
        seen.push(bus);
        match memory_for(&buses[bus].spec, machine, size) {
            Ok(None) => {}
            Ok(Some(backend)) => {
                if found.as_ref().is_some_and(|other| *other != backend) {
                    mistakes.error(
                        table.span.clone(),
                        "a guest has one memory, and its buses want it to be several",
                    );
                }
                found = Some(backend);
            }
            Err(error) => {
                let bus = &buses[bus];
                let why = after(&error.to_string(), &bus.spec.to_string());
                mistakes.error(bus.span.clone(), format!("[bus.{}]: {why}", bus.id));
            }
        }
    }
    found.unwrap_or_default()
}

/// The devices that a guest has: those it names, those on its buses, or all there are if it is the only one.
fn guest_devices(
    tables: &Tables,
    table: &Table,
    buses: &[Bus],
    devices: &[Device],
    alone: bool,
    mistakes: &mut Mistakes,
) -> Vec<usize> {
    let named = table.strings("devices", true, mistakes);
    let on = table.strings("bus", true, mistakes);
    if table.entry("devices").is_some() && table.entry("bus").is_some() {
        mistakes.error(
            table.place("devices"),
            "`devices` and `bus` cannot both be: the one names devices, the other means all that are on it",
        );
    }
    if let Some(named) = named {
        let mut found = Vec::new();
        for (id, span) in named {
            match devices.iter().position(|device| device.id == id) {
                Some(at) if found.contains(&at) => {
                    mistakes.error(span, format!("`{id}` is named twice"));
                }
                Some(at) => found.push(at),
                None if tables.find("device", &id).is_some() => {}
                None => {
                    let names = tables.of("device").map(|device| device.name.as_str());
                    let near = nearest(&id, names);
                    mistakes.error(span, format!("there is no device `{id}`{near}"));
                }
            }
        }
        return found;
    }
    if let Some(on) = on {
        let mut found = Vec::new();
        for (bus, _) in on {
            let bus = find_bus(tables, &bus, table, "bus", buses, mistakes);
            let of_bus = |device: &&(usize, &Device)| Some(device.1.bus) == bus;
            let all = devices.iter().enumerate();
            found.extend(
                all.collect::<Vec<_>>()
                    .iter()
                    .filter(of_bus)
                    .map(|(at, _)| *at),
            );
        }
        return found;
    }
    if table.entry("devices").is_some() || table.entry("bus").is_some() {
        return Vec::new();
    }
    if !alone && !devices.is_empty() {
        mistakes.error(
            table.span.clone(),
            format!(
                "{} does not say which devices it has: `bus` or `devices`",
                table.title()
            ),
        );
        return Vec::new();
    }
    (0..devices.len()).collect()
}

/// The version that is said, or that QEMU says.
fn qemu_version(
    table: &Table,
    qemu: &str,
    world: &World<'_>,
    mistakes: &mut Mistakes,
) -> (u32, u32) {
    let (version, span) = match table.string("qemu-version", mistakes) {
        Some((text, span)) => {
            let mut numbers = text.split('.').map(str::parse);
            match (numbers.next(), numbers.next()) {
                (Some(Ok(major)), Some(Ok(minor))) => ((major, minor), span),
                _ => {
                    mistakes.error(span, "write `qemu-version` as \"7.2\"");
                    return OLDEST;
                }
            }
        }
        None => match (world.qemu_version)(qemu) {
            Ok(version) => (version, table.place("qemu")),
            Err(error) => {
                mistakes.error(table.place("qemu"), error);
                return OLDEST;
            }
        },
    };
    if version < OLDEST {
        let ((major, minor), (oldest, of)) = (version, OLDEST);
        mistakes.error(
            span,
            format!("{qemu} is version {major}.{minor}, and {oldest}.{of} is the oldest that is known to work"),
        );
    }
    version
}

/// Looks for what a QEMU of this version does not have.
fn check_front(
    table: &Table,
    front: FrontKind,
    (machine, version): (Arch, (u32, u32)),
    devices: &[Device],
    of_guest: &[usize],
    mistakes: &mut Mistakes,
) {
    let (major, minor) = version;
    if front == FrontKind::VfioUser {
        if version < VFIO_USER_SINCE {
            let (since, of) = VFIO_USER_SINCE;
            mistakes.error(
                table.place("front"),
                format!(
                    "QEMU has vfio-user since version {since}.{of}, and this is {major}.{minor}"
                ),
            );
        }
        return;
    }
    for device in of_guest.iter().filter_map(|at| devices.get(*at)) {
        let device_id = device.shape.device_id;
        if !has_vhost_user(device_id, machine, version) {
            let (since, of) = vhost_user_since(device_id, machine);
            mistakes.error(
                table.place("front"),
                format!(
                    "QEMU {major}.{minor} cannot have `{}` behind vhost-user; version {since}.{of} can, or front = \"vfio-user\" since {}.{}",
                    device.id, VFIO_USER_SINCE.0, VFIO_USER_SINCE.1
                ),
            );
        }
    }
}
