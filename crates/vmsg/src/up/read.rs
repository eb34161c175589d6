// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From tables to a description: every key read, every reference followed, every mistake found.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use vmsg_bus::keyval;

use super::description::{Bus, Description, Device, HostTable, Program, Restart, World};
use super::source::{Mistakes, Span};
use super::tables::{Entry, Table, Tables};
use crate::buses;

mod device;
mod fabric;
mod guest;

pub(super) use device::{complete_device, shape_of};

/// The version of the descriptions that are understood.
const VERSION: &str = "1";

/// The longest path of a socket that a bus can be given.
const MAX_SOCKET: usize = vmsg_bus::unix::MAX_PATH;

/// The program that a command names this one by.
const OWN: &str = "vmsg";

/// Names of parts that are not given by a table.
const OWN_PARTS: [&str; 2] = ["serve", "up"];

/// Reads all tables. `file` is absolute. What comes back has no meaning if there are mistakes that are fatal.
pub(super) fn read(
    file: &Path,
    tables: &Tables,
    world: &World<'_>,
    mistakes: &mut Mistakes,
) -> Description {
    check_version(tables, mistakes);
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let (name, host) = read_host(tables, &stem, world, mistakes);
    let buses = read_buses(tables, &host.runtime, mistakes);
    let devices = device::read_devices(tables, &name, &buses, &host, mistakes);
    let fabric = fabric::read_fabric(tables, &host, &devices, mistakes);
    let guests = guest::read_guests(tables, &buses, &devices, world, mistakes);
    let programs = read_programs(tables, world, mistakes);
    if tables.all.iter().all(|table| table.kind == "host") {
        mistakes.error(
            None,
            "there is nothing in it: no [bus.X], [guest.X] or [program.X]",
        );
    }
    if !buses.is_empty() && devices.is_empty() && tables.of("device").next().is_none() {
        mistakes.error(
            buses[0].span.clone(),
            "there is a bus and no device on any; a device is [device.NAME] with type = \"net\"",
        );
    }
    check_sockets(&host, &buses, &devices, &guests, mistakes);
    Description {
        name,
        folder: file.parent().unwrap_or(Path::new("/")).to_owned(),
        host,
        buses,
        devices,
        fabric,
        guests,
        programs,
    }
}

fn check_version(tables: &Tables, mistakes: &mut Mistakes) {
    match &tables.version {
        None => mistakes.error(
            0..0,
            format!("the first line must be `version = {VERSION}`"),
        ),
        Some(entry) if entry.value == super::tables::Value::Number(VERSION.to_owned()) => {}
        Some(entry) => mistakes.error(
            entry.span.clone(),
            format!("this `vmsg` understands version = {VERSION} only"),
        ),
    }
}

/// Whether a name can be part of file names, and of QEMU's ids.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    (1..=32).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Finds names that cannot be.
fn check_name(table: &Table, mistakes: &mut Mistakes) {
    if !is_name(&table.name) {
        mistakes.error(
            table.span.clone(),
            format!(
                "the name `{}` of a {} must have 1 to 32 letters, digits, `-` or `_`, the first of them no sign",
                table.name, table.kind
            ),
        );
    }
}

fn read_host(
    tables: &Tables,
    stem: &str,
    world: &World<'_>,
    mistakes: &mut Mistakes,
) -> (String, HostTable) {
    let empty = Table {
        kind: "host".to_owned(),
        name: String::new(),
        span: 0..0,
        entries: Vec::new(),
    };
    let table = tables.of("host").next().unwrap_or(&empty);
    table.check_keys(
        &["name", "runtime", "control", "workers", "keep", "restart"],
        mistakes,
    );
    let named = table.string("name", mistakes);
    let name = named.as_ref().map_or(stem, |(name, _)| name).to_owned();
    if !is_name(&name) {
        let span = named.map(|(_, span)| span);
        mistakes.error(
            span.or(Some(0..0)),
            format!(
                "the description's name `{name}` must have 1 to 32 letters, digits, `-` or `_`, the first of them no sign; it is the file's, or `name` in [host]"
            ),
        );
    }
    let runtime = table.string("runtime", mistakes).map_or_else(
        || world.runtimes.join(&name),
        |(path, _)| PathBuf::from(path),
    );
    let control = table.string("control", mistakes).map_or_else(
        || runtime.join("control.sock"),
        |(path, _)| PathBuf::from(path),
    );
    let workers = table.number("workers", mistakes).unwrap_or(1);
    if !(1..=256).contains(&workers) {
        mistakes.error(table.place("workers"), "`workers` must be 1 to 256");
    }
    let host = HostTable {
        runtime,
        control,
        workers,
        keep: table.number("keep", mistakes),
        restart: table
            .choice("restart", &Restart::WORDS, mistakes)
            .unwrap_or(Restart::OnFailure),
    };
    (name, host)
}

/// The key that the words of an error are about.
fn key_of(message: &str) -> &str {
    let rest = message.strip_prefix("unknown key ").unwrap_or(message);
    let rest = rest.strip_prefix('`').unwrap_or(rest);
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c)));
    &rest[..end.unwrap_or(rest.len())]
}

/// Reads a table by way of the command line: `first` and `entries` as an argument, and `parse` to read it. Finds all
/// mistakes in it: a key with a mistake is told of, left out, and the rest tried again.
fn read_argument<T>(
    table: &Table,
    first: &str,
    mut entries: Vec<Entry>,
    mistakes: &mut Mistakes,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Option<(T, String)> {
    let mut unreadable = Mistakes::default();
    let whole = table.argument(first, &entries, &mut unreadable);
    if unreadable.are_fatal() {
        // Told once, with the places.
        table.argument(first, &entries, mistakes);
        return None;
    }
    let mut left_out: BTreeSet<String> = BTreeSet::new();
    let mut text = whole;
    loop {
        let message = match parse(&text) {
            Ok(value) if left_out.is_empty() => return Some((value, text)),
            Ok(_) => return None,
            Err(message) => message,
        };
        if mistakes.are_too_many() {
            return None;
        }
        let key = key_of(&message).to_owned();
        let Some(at) = entries.iter().position(|entry| entry.key == key) else {
            // That a key is missing that was left out is no news.
            if !left_out.contains(&key) {
                let span = if message.starts_with("unknown name") {
                    table.place("type")
                } else {
                    table.span.clone()
                };
                mistakes.error(span, format!("{}: {message}", table.title()));
            }
            return None;
        };
        let entry = entries.remove(at);
        let span = if message.starts_with("unknown key") {
            entry.key_span
        } else {
            entry.span
        };
        mistakes.error(span, message);
        left_out.insert(key);
        text = table.argument(first, &entries, &mut Mistakes::default());
    }
}

/// The entries of a table without `type`; an `id` is refused, as the table's name is it.
fn own_entries(table: &Table, mistakes: &mut Mistakes) -> Vec<Entry> {
    let mut entries = Vec::new();
    for entry in &table.entries {
        match entry.key.as_str() {
            "type" => {}
            "id" => mistakes.error(
                entry.key_span.clone(),
                format!(
                    "there is no key `id`: the table's name, `{}`, is it",
                    table.name
                ),
            ),
            _ => entries.push(entry.clone()),
        }
    }
    entries
}

/// An entry that the description does not have.
fn added(table: &Table, key: &str, value: &str) -> Entry {
    Entry {
        key: key.to_owned(),
        key_span: table.span.clone(),
        value: super::tables::Value::Text(value.to_owned()),
        span: table.span.clone(),
    }
}

fn read_buses(tables: &Tables, runtime: &Path, mistakes: &mut Mistakes) -> Vec<Bus> {
    let mut all: Vec<Bus> = Vec::new();
    for table in tables.of("bus") {
        check_name(table, mistakes);
        let kind = match table.entry("type") {
            Some(_) => match table.string("type", mistakes) {
                Some((kind, _)) => kind,
                None => continue,
            },
            None => "unix".to_owned(),
        };
        let mut entries = own_entries(table, mistakes);
        if kind == "unix" && table.entry("path").is_none() {
            let path = runtime.join(format!("{}.sock", table.name));
            entries.push(added(table, "path", &path.to_string_lossy()));
        }
        if kind == "linux-user" {
            if table.entry("dir").is_none() {
                entries.push(added(table, "dir", &runtime.to_string_lossy()));
            }
            if table.entry("name").is_none() {
                entries.push(added(table, "name", &table.name));
            }
        }
        let parse =
            |text: &str| buses::parse(text).map_err(|error| after(&error.to_string(), text));
        let Some((spec, text)) = read_argument(table, &kind, entries, mistakes, parse) else {
            continue;
        };
        let twin = all.iter().find(|other| is_same_place(&other.spec, &spec));
        if let Some(twin) = twin {
            mistakes.error(
                table.place("path"),
                format!("the bus `{}` is at this place already", twin.id),
            );
            continue;
        }
        // It is called as its table, whatever its socket is called.
        let mut texts = [text];
        let mut proxy_text = proxy_text(&spec, &texts[0]);
        let own = buses::parse_all(&texts).map(|named| named[0].name == table.name);
        if !matches!(own, Ok(true)) {
            let id = format!(",id={}", table.name);
            texts[0].push_str(&id);
            proxy_text.push_str(&id);
        }
        let checked =
            buses::parse_all(&texts).and_then(|mut named| buses::for_devices(&texts, &mut named));
        let [text] = texts;
        if let Err(error) = checked {
            mistakes.error(table.span.clone(), after(&error.to_string(), &text));
            continue;
        }
        all.push(Bus {
            id: table.name.clone(),
            proxy_text,
            spec,
            text,
            span: table.span.clone(),
        });
    }
    all
}

/// Whether two buses would be one.
fn is_same_place(one: &vmsg_bus::BusSpec, other: &vmsg_bus::BusSpec) -> bool {
    match (one, other) {
        (vmsg_bus::BusSpec::Unix(one), vmsg_bus::BusSpec::Unix(other)) => one.path == other.path,
        _ => one == other,
    }
}

/// The message of an error without the argument that stands before it.
fn after(message: &str, argument: &str) -> String {
    let marker = format!("{argument}: ");
    match message.split_once(&marker) {
        Some((_, rest)) => rest.to_owned(),
        None => message.to_owned(),
    }
}

/// The bus as the driver's side has it.
fn proxy_text(spec: &vmsg_bus::BusSpec, text: &str) -> String {
    match spec {
        vmsg_bus::BusSpec::Unix(unix) => {
            format!("unix,path={}", keyval::escape(&unix.path.to_string_lossy()))
        }
        vmsg_bus::BusSpec::Ivshmem(bus) if bus.listen.is_some() => {
            let mut bus = bus.clone();
            bus.socket = bus.listen.take();
            bus.size = None;
            vmsg_bus::BusSpec::Ivshmem(bus).to_string()
        }
        _ => text.to_owned(),
    }
}

fn read_programs(tables: &Tables, world: &World<'_>, mistakes: &mut Mistakes) -> Vec<Program> {
    let parts: Vec<&str> = tables
        .all
        .iter()
        .filter(|table| matches!(table.kind.as_str(), "guest" | "program"))
        .map(|table| table.name.as_str())
        .chain(OWN_PARTS)
        .collect();
    let mut programs = Vec::new();
    for table in tables.of("program") {
        check_part_name(tables, table, mistakes);
        table.check_keys(&["command", "ready", "after", "restart"], mistakes);
        let mut command: Vec<String> = match table.strings("command", false, mistakes) {
            Some(words) => words.into_iter().map(|(word, _)| word).collect(),
            None => {
                if table.entry("command").is_none() {
                    mistakes.error(
                        table.span.clone(),
                        format!("{} needs `command`, a list of words", table.title()),
                    );
                }
                continue;
            }
        };
        if command.first().is_none_or(String::is_empty) {
            mistakes.error(table.place("command"), "`command` has no program");
        } else if command[0] == OWN {
            // This one, wherever it is.
            command[0] = world.program.clone();
        } else if !(world.runs)(&command[0]) {
            mistakes.error(
                table.place("command"),
                format!("there is no program `{}`", command[0]),
            );
        }
        let after = table.strings("after", true, mistakes).unwrap_or_default();
        for (other, span) in &after {
            if *other == table.name {
                mistakes.error(span.clone(), "a program cannot wait for itself");
            } else if !parts.contains(&other.as_str()) || other == "up" {
                let near = super::tables::nearest(other, parts.iter().copied());
                mistakes.error(
                    span.clone(),
                    format!("there is no part `{other}`: `serve`, a guest or a program{near}"),
                );
            }
        }
        programs.push(Program {
            name: table.name.clone(),
            command,
            ready: table.string("ready", mistakes).map(|(text, _)| text),
            after: after.into_iter().map(|(name, _)| name).collect(),
            restart: table
                .choice("restart", &Restart::WORDS, mistakes)
                .unwrap_or(Restart::OnFailure),
        });
    }
    check_circles(&programs, tables, mistakes);
    programs
}

/// Finds programs that wait for each other.
fn check_circles(programs: &[Program], tables: &Tables, mistakes: &mut Mistakes) {
    let by_name: BTreeMap<&str, &Program> = programs
        .iter()
        .map(|program| (program.name.as_str(), program))
        .collect();
    let find = |name: &str| by_name.get(name).copied();
    // That one waits for itself is told already.
    let is_other = |program: &&Program| !program.after.contains(&program.name);
    for program in programs.iter().filter(is_other) {
        if mistakes.are_too_many() {
            return;
        }
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        let mut next: Vec<&str> = program.after.iter().map(String::as_str).collect();
        while let Some(name) = next.pop() {
            if name == program.name {
                if let Some(table) = tables.find("program", &program.name) {
                    mistakes.error(
                        table.place("after"),
                        format!("`{name}` waits for something that waits for `{name}`"),
                    );
                }
                break;
            }
            if let Some(other) = find(name).filter(|_| seen.insert(name)) {
                next.extend(other.after.iter().map(String::as_str));
            }
        }
    }
}

/// Finds names that two parts would have.
fn check_part_name(tables: &Tables, table: &Table, mistakes: &mut Mistakes) {
    check_name(table, mistakes);
    if OWN_PARTS.contains(&table.name.as_str()) {
        mistakes.error(
            table.span.clone(),
            format!(
                "`{}` is the name of a part of every description",
                table.name
            ),
        );
    }
    let other = if table.kind == "guest" {
        "program"
    } else {
        "guest"
    };
    if table.kind == "program" && tables.find(other, &table.name).is_some() {
        mistakes.error(
            table.span.clone(),
            format!("a guest has the name `{}` already", table.name),
        );
    }
}

/// The front's socket of a device.
pub(super) fn front_socket(runtime: &Path, guest: &str, device: &str) -> PathBuf {
    runtime.join(format!("{guest}.{device}.sock"))
}

/// Finds sockets whose names would be too long.
fn check_sockets(
    host: &HostTable,
    buses: &[Bus],
    devices: &[Device],
    guests: &[super::description::Guest],
    mistakes: &mut Mistakes,
) {
    let mut check = |path: &Path, span: Option<Span>| {
        let length = path.as_os_str().len();
        if length > MAX_SOCKET {
            mistakes.error(
                span,
                format!(
                    "the socket {} would have a path of {length} bytes, and {MAX_SOCKET} are possible; set a shorter `runtime` in [host], or shorter names",
                    path.display()
                ),
            );
        }
    };
    check(&host.control, None);
    for bus in buses {
        if let vmsg_bus::BusSpec::Unix(unix) = &bus.spec {
            check(&unix.path, Some(bus.span.clone()));
        }
    }
    for guest in guests {
        for device in &guest.devices {
            if let Some(device) = devices.get(*device) {
                let path = front_socket(&host.runtime, &guest.name, &device.id);
                check(&path, Some(device.span.clone()));
            }
        }
    }
}

#[cfg(test)]
#[path = "read_test.rs"]
mod tests;
