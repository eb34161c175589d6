// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses as the command line names them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ivshmem::PeerId;
use ivshmem::server::{Options, Port, Source};
use vmsg_bus::ivshmem::{Hold, MemoryMode, Place, Ram};
use vmsg_bus::linux_user::Revision;
use vmsg_bus::{BusSpec, IvshmemSpec, keyval};

use crate::Usage;
use crate::ivshmem::hold;

/// The memory of a server that `listen=` starts.
const LISTEN_SIZE: u64 = 1 << 20;

/// The least of it when `ram=bar` is in it, and nothing says how much.
const LISTEN_SIZE_WITH_RAM: u64 = 32 << 20;

/// Its vectors: as many as an `ivshmem-doorbell` has that is told nothing of it. QEMU ends if there are more.
const LISTEN_VECTORS: u16 = 1;

/// The device host's number there: guests whose drivers look for no other ring this one.
const HOST: PeerId = PeerId(0);

/// How long such a server stays without anybody.
const LINGER: Duration = Duration::from_secs(30);

/// A bus with the name by which devices and fronts refer to it.
#[derive(Clone, Debug)]
pub(crate) struct NamedBus {
    pub(crate) name: String,
    pub(crate) spec: BusSpec,
}

/// The socket where both sides of a bus meet.
pub(crate) fn socket(spec: &BusSpec) -> PathBuf {
    match spec {
        BusSpec::Unix(unix) => unix.path.clone(),
        BusSpec::LinuxUser(bus) => bus.socket_path(),
        BusSpec::Ivshmem(bus) => memory(bus),
        // Not without a bus that this function does not know.
        _ => PathBuf::from("bus"),
    }
}

/// Where the memory of a bus is found, as a path.
fn memory(bus: &IvshmemSpec) -> PathBuf {
    match bus.place() {
        Ok(Place::Socket(path) | Place::Listen(path) | Place::File(path)) => path,
        Ok(Place::Shm(name)) => Path::new("/dev/shm").join(name.trim_start_matches('/')),
        Ok(Place::Pci(address)) => Path::new("/run").join(format!("ivshmem-{address}")),
        Err(_) => PathBuf::from("ivshmem"),
    }
}

/// Where what is kept for a bus is kept: several may lie in one memory.
pub(crate) fn keep(spec: &BusSpec) -> PathBuf {
    let mut path = socket(spec).into_os_string();
    if let BusSpec::Ivshmem(bus) = spec {
        path.push(format!(".{:x}", bus.layout_offset()));
    }
    path.push(".keep");
    path.into()
}

/// Makes sure that a server runs at `listen=`, in a process of its own; returns the socket that is for the device host.
pub(crate) fn keep_server(wanted: &Hold) -> Result<PathBuf, String> {
    let vectors = wanted.vectors.unwrap_or(LISTEN_VECTORS);
    let mut own = wanted.path.clone().into_os_string();
    own.push(".host");
    let own = PathBuf::from(own);
    let ports = vec![
        Port::new(&wanted.path, vectors),
        Port::new(&own, vectors).with_id(HOST),
    ];
    let mut options = Options::new(ports, wanted.size.unwrap_or(LISTEN_SIZE));
    options.source = match (&wanted.shm, &wanted.file) {
        (Some(name), _) => Source::Shm(name.clone()),
        (None, Some(path)) => Source::File(path.clone()),
        (None, None) => Source::Memfd,
    };
    options.linger = Some(LINGER);
    hold::ensure(&options).map_err(|error| format!("{error:#}"))?;
    Ok(own)
}

/// Whether the bus carries the messages of February 2025, which say less.
pub(crate) fn is_r1(spec: &BusSpec) -> bool {
    matches!(spec, BusSpec::LinuxUser(bus) if bus.revision == Revision::R1)
}

/// Reads what stands behind one `--bus`.
pub(crate) fn parse(text: &str) -> Result<BusSpec, Usage> {
    parse_with_id(text).map(|(_, spec)| spec)
}

/// The same with its `id=`.
fn parse_with_id(text: &str) -> Result<(Option<String>, BusSpec), Usage> {
    let usage = |error: keyval::Error| Usage(format!("--bus {text}: {error}"));
    let (id, rest) = keyval::take(text, "id").map_err(usage)?;
    if let Some(id) = id.as_deref().filter(|id| id.is_empty() || id.contains('/')) {
        return Err(Usage(format!(
            "--bus {text}: id=`{id}` must be a name without a slash"
        )));
    }
    let spec = rest.parse().map_err(usage)?;
    if let BusSpec::LinuxUser(bus) = &spec {
        let (has, needs) = match (bus.mem_low_size, bus.mem_hole) {
            (0, 1..) => ("mem-hole=", "mem-low-size=, the bytes below the hole"),
            (1.., 0) => ("mem-low-size=", "mem-hole=, the bytes of the hole above"),
            _ => return Ok((id, spec)),
        };
        return Err(Usage(format!("--bus {text}: {has} needs {needs}")));
    }
    Ok((id, spec))
}

/// Reads all `--bus`. A bus is called as its file, without what follows the
/// first dot: `b0` for `/run/vmsg/b0.sock`; one that has a name of its own, by that; any that has an `id=`, by that.
pub(crate) fn parse_all(texts: &[String]) -> Result<Vec<NamedBus>, Usage> {
    let mut buses: Vec<NamedBus> = Vec::new();
    for text in texts {
        let (id, spec) = parse_with_id(text)?;
        let given = id.is_some();
        let name = match (&spec, id) {
            (_, Some(id)) => id,
            (BusSpec::LinuxUser(bus), None) => bus.name.as_str().to_owned(),
            (other, None) => socket(other)
                .file_name()
                .and_then(|file| {
                    let file = file.to_string_lossy();
                    let name = file.split('.').find(|part| !part.is_empty());
                    name.map(str::to_owned)
                })
                .ok_or_else(|| Usage(format!("--bus {text}: the path names no file")))?,
        };
        if buses.iter().any(|other| other.name == name) {
            let remedy = match &spec {
                _ if given => "set another id=",
                BusSpec::LinuxUser(_) => "set another name=",
                BusSpec::Ivshmem(_) => "set another offset=",
                _ => "give the sockets different names, or one of the buses an id=",
            };
            // Several buses may lie in one memory.
            if let (BusSpec::Ivshmem(bus), false) = (&spec, given) {
                let longer = format!("{name}-{:x}", bus.layout_offset());
                if !buses.iter().any(|other| other.name == longer) {
                    buses.push(NamedBus { name: longer, spec });
                    continue;
                }
            }
            return Err(Usage(format!(
                "--bus {text}: there is a bus `{name}` already; {remedy}"
            )));
        }
        buses.push(NamedBus { name, spec });
    }
    Ok(buses)
}

/// Looks for what a device host cannot do with a bus, and sets what it has to know of a server that it starts.
pub(crate) fn for_devices(texts: &[String], buses: &mut [NamedBus]) -> Result<(), Usage> {
    for (text, bus) in texts.iter().zip(buses) {
        let BusSpec::Ivshmem(spec) = &mut bus.spec else {
            continue;
        };
        match (spec.memory, &spec.ram) {
            (None, _) => tracing::warn!(
                bus = bus.name,
                "there is no memory=, so devices have no way to a driver's memory: drivers can look at them (`vmsg ls`) and not use them"
            ),
            (Some(mode), None) => {
                return Err(Usage(format!(
                    "--bus {text}: memory={mode} needs ram= here, that memory of the driver's as this machine has it"
                )));
            }
            (Some(_), Some(Ram::Bar)) if spec.listen.is_some() && spec.size.is_none() => {
                let ram = spec.ram_size.unwrap_or(LISTEN_SIZE_WITH_RAM / 2);
                let end = spec.common_offset().saturating_add(ram);
                spec.size = end.max(LISTEN_SIZE_WITH_RAM).checked_next_power_of_two();
            }
            _ => {}
        }
    }
    Ok(())
}

/// Looks for what the driver's side cannot do with a bus.
pub(crate) fn for_driver(text: &str, spec: &BusSpec) -> Result<(), Usage> {
    match spec {
        BusSpec::Ivshmem(bus) if bus.listen.is_some() => Err(Usage(format!(
            "--bus {text}: listen= is for `vmsg serve`, which starts a server there; here it is socket="
        ))),
        _ => Ok(()),
    }
}

/// Looks for what a proxy cannot do with a bus.
pub(crate) fn for_guests(text: &str, spec: &BusSpec) -> Result<(), Usage> {
    for_driver(text, spec)?;
    let BusSpec::Ivshmem(bus) = spec else {
        return Ok(());
    };
    let nowhere = bus.ram.is_none() && bus.node.is_none() && bus.window.is_none();
    let missing = match bus.memory {
        None => {
            "it is not said how a device reaches the guest's memory; memory=bounce,ram=bar, on both sides, shares nothing of it"
        }
        Some(MemoryMode::Segment) if nowhere => {
            "memory=segment needs node=, window= or ram=, where the guest's memory is"
        }
        Some(_) => return Ok(()),
    };
    Err(Usage(format!("--bus {text}: {missing}")))
}

/// The position of the bus called `name`; the first one if none is named.
pub(crate) fn find(buses: &[NamedBus], name: Option<&str>) -> Result<usize, Usage> {
    let Some(name) = name else { return Ok(0) };
    buses
        .iter()
        .position(|bus| bus.name == name)
        .ok_or_else(|| {
            let known: Vec<&str> = buses.iter().map(|bus| bus.name.as_str()).collect();
            Usage(format!(
                "there is no bus `{name}`; known: {}",
                known.join(", ")
            ))
        })
}

#[cfg(test)]
#[path = "buses_test.rs"]
mod tests;
