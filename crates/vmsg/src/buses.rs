// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buses as the command line names them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ivshmem::PeerId;
use ivshmem::server::{Options, Port, Source};
use vmsg_bus::ivshmem::{Hold, MemoryMode, Place, Ram};
use vmsg_bus::linux_user::Revision;
use vmsg_bus::{BusSpec, IvshmemSpec};

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
    let spec = text
        .parse()
        .map_err(|error| Usage(format!("--bus {text}: {error}")))?;
    if let BusSpec::LinuxUser(bus) = &spec {
        let (has, needs) = match (bus.mem_low_size, bus.mem_hole) {
            (0, 1..) => ("mem-hole=", "mem-low-size=, the bytes below the hole"),
            (1.., 0) => ("mem-low-size=", "mem-hole=, the bytes of the hole above"),
            _ => return Ok(spec),
        };
        return Err(Usage(format!("--bus {text}: {has} needs {needs}")));
    }
    Ok(spec)
}

/// Reads all `--bus`. A bus is called as its file, without what follows the
/// first dot: `b0` for `/run/vmsg/b0.sock`; one that has a name of its own, by that.
pub(crate) fn parse_all(texts: &[String]) -> Result<Vec<NamedBus>, Usage> {
    let mut buses: Vec<NamedBus> = Vec::new();
    for text in texts {
        let spec = parse(text)?;
        let name = match &spec {
            BusSpec::LinuxUser(bus) => bus.name.as_str().to_owned(),
            other => socket(other)
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
                BusSpec::LinuxUser(_) => "set another name=",
                BusSpec::Ivshmem(_) => "set another offset=",
                _ => "give the sockets different names",
            };
            // Several buses may lie in one memory.
            if let BusSpec::Ivshmem(bus) = &spec {
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
mod tests {
    use super::*;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_bus_is_called_as_its_socket() {
        let buses = parse_all(&texts(&["unix,path=/run/b0.sock", "unix,path=car.front"]))
            .expect("two buses");
        assert_eq!(find(&buses, None).expect("the first"), 0);
        assert_eq!(find(&buses, Some("car")).expect("the second"), 1);
        let named = parse_all(&texts(&["linux-user,socket=a.sock,name=q"])).expect("a bus");
        assert_eq!(find(&named, Some("q")).expect("by its name"), 0);
        let error = find(&buses, Some("x")).expect_err("unknown").to_string();
        assert!(error.contains("b0, car"), "{error}");
    }

    #[test]
    fn two_buses_need_two_names() {
        let error = |buses: &[&str]| match parse_all(&texts(buses)) {
            Err(Usage(error)) => error,
            Ok(buses) => panic!("{buses:?}"),
        };
        let unix = error(&["unix,path=a/b0.sock", "unix,path=c/b0.sock"]);
        assert!(unix.contains("different names"), "{unix}");
        assert!(!unix.contains("name="), "there is no such key: {unix}");
        assert!(error(&["linux-user", "linux-user,dir=a"]).contains("name="));
        assert!(parse_all(&texts(&["unix"])).is_err());
        assert!(parse_all(&texts(&["unix,path=/"])).is_err());
    }

    #[test]
    fn what_one_side_of_an_ivshmem_bus_cannot_do_is_said_at_once() {
        let error = |result: Result<(), Usage>| match result {
            Err(Usage(error)) => error,
            Ok(()) => panic!("that is no use to anybody"),
        };
        let guests = |text: &str| for_guests(text, &parse(text).expect("a bus"));
        assert!(error(guests("ivshmem,listen=a,memory=bounce,ram=bar")).contains("socket="));
        assert!(error(guests("ivshmem,socket=a")).contains("memory=bounce,ram=bar"));
        assert!(error(guests("ivshmem,socket=a,memory=segment")).contains("node="));
        assert!(guests("ivshmem,socket=a,memory=segment,node=1").is_ok());
        assert!(guests("ivshmem,socket=a,memory=whole").is_ok());
        let look = |text: &str| for_driver(text, &parse(text).expect("a bus"));
        assert!(error(look("ivshmem,listen=a")).contains("socket="));
        assert!(look("ivshmem,socket=a").is_ok() && look("unix,path=a").is_ok());

        let devices = |text: &str| {
            let texts = texts(&[text]);
            let mut buses = parse_all(&texts).expect("a bus");
            for_devices(&texts, &mut buses).map(|()| buses.remove(0).spec)
        };
        for mode in ["whole", "segment", "known"] {
            let text = format!("ivshmem,socket=a,memory={mode}");
            assert!(error(devices(&text).map(drop)).contains("ram="), "{mode}");
        }
        let size = |text: &str| match devices(text) {
            Ok(BusSpec::Ivshmem(bus)) => bus.size,
            _ => panic!("{text}"),
        };
        assert_eq!(size("ivshmem,listen=a"), None);
        let bounce = "ivshmem,listen=a,memory=bounce,ram=bar";
        assert_eq!(size(bounce), Some(32 << 20));
        assert_eq!(size(&format!("{bounce},size=4M")), Some(4 << 20));
        assert_eq!(size(&format!("{bounce},ram-size=64M")), Some(128 << 20));
    }

    #[test]
    fn a_hole_in_memory_has_a_place_and_a_size() {
        for half in ["mem-low-size=2G", "mem-hole=2G"] {
            let Err(Usage(error)) = parse(&format!("linux-user,{half}")) else {
                panic!("{half} alone says nothing");
            };
            assert!(error.contains("mem-hole=") && error.contains("mem-low-size="));
        }
        assert!(parse("linux-user,mem-low-size=2G,mem-hole=2G").is_ok());
    }
}
