// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg proxy --print-qemu`: asks what the devices are, and ends.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use virtio_msg::{DevNum, QueueIndex};
use vmsg_bus::ivshmem::{MemoryMode, Ram};
use vmsg_bus::linux_user::LinuxUserSpec;
use vmsg_bus::{BusSpec, ConnectError, IvshmemSpec};
use vmsg_driver::Error;
use vmsg_proxy::front::qemu::{
    Arch, CONFIG_BYTES, Machine, MemoryBackend, VFIO_USER_SINCE, has_vhost_user, machine_args,
    to_shell, vfio_user_args, vhost_user_since,
};
use vmsg_proxy::session::{DeviceFacts, Target};
use vmsg_proxy::{BusRef, FrontKind, FrontSpec, print_qemu};

use crate::Usage;
use crate::cli::ProxyArgs;
use crate::look::{self, BusClient};
use crate::out::Out;

/// Queues that are asked about; a device may claim more.
const MAX_QUEUES: u32 = 256;

const GIB: u64 = 1 << 30;

/// q35 moves memory above 4 GiB from this size on; all but 2 GiB then.
const Q35_SPLITS: u64 = 2816 << 20;

/// Where QEMU's `virt` has its memory.
const VIRT_BASE: u64 = GIB;

/// Prints the QEMU arguments that fit the fronts.
pub(super) fn print(
    args: &ProxyArgs,
    buses: &[BusSpec],
    fronts: &[FrontSpec],
) -> anyhow::Result<()> {
    let arch = match args.machine.as_str() {
        "x86" => Arch::X86,
        "arm64" => Arch::Arm64,
        other => return Err(Usage(format!("--machine {other}: must be x86 or arm64")).into()),
    };
    let size = parse_size(&args.memory)?;
    let version = version_for(args.qemu_version.as_deref(), fronts)?;
    let mut backend = None;
    let mut asked = Vec::new();
    for front in fronts {
        let BusRef::Index(index) = front.bus else {
            continue;
        };
        let bus = &buses[index];
        if let Some(fitting) = memory_for(bus, arch, size)? {
            if backend.as_ref().is_some_and(|other| *other != fitting) {
                return Err(Usage(
                    "--print-qemu: a guest has one memory, and the buses want it to be several"
                        .into(),
                )
                .into());
            }
            backend = Some(fitting);
        }
        asked.push((front, bus));
    }
    let machine = Machine {
        arch,
        memory: args.memory.clone(),
        version,
        backend: backend.unwrap_or_default(),
    };
    let mut words = machine_args(&machine);
    for (front, bus) in asked {
        if front.kind == FrontKind::VfioUser {
            // QEMU asks the front what it is.
            words.extend(vfio_user_args(&front.socket, None));
            continue;
        }
        let (facts, config) =
            describe(bus, &front.dev.0).with_context(|| front.dev.0.to_string())?;
        check_type(facts.info.device_id, arch, version).with_context(|| front.dev.0.to_string())?;
        words.extend(print_qemu(front, &facts, &config, &machine));
    }
    // For a person to paste; a script's `$(…)` would take quotes and backslashes for parts of the arguments.
    let text = if std::io::stdout().is_terminal() {
        to_shell(&words)
    } else {
        let pairs: Vec<String> = words.chunks(2).map(|pair| pair.join(" ")).collect();
        pairs.join("\n")
    };
    writeln!(Out::lock(), "{text}")?;
    Ok(())
}

/// Refuses types that this QEMU has no vhost-user device for.
fn check_type(device_id: u32, arch: Arch, version: (u32, u32)) -> Result<(), Usage> {
    if has_vhost_user(device_id, arch, version) {
        return Ok(());
    }
    let (major, minor) = version;
    let kind = match virtio_msg::feature::device_name(device_id) {
        Some(kind) => format!("{kind} devices"),
        None => format!("devices of type {device_id}"),
    };
    let since = vhost_user_since(device_id, arch);
    Err(Usage(format!(
        "QEMU {major}.{minor} has nothing for {kind} over vhost-user: use a vfio-user front, which QEMU has since {}.{}, or --qemu-version {}.{}",
        VFIO_USER_SINCE.0, VFIO_USER_SINCE.1, since.0, since.1
    )))
}

/// What the device host says of a device, and the first bytes of its configuration.
fn describe(bus: &BusSpec, target: &Target) -> anyhow::Result<(DeviceFacts, Vec<u8>)> {
    let mut client = look::connect(bus, None).map_err(|error| match error.downcast_ref() {
        Some(ConnectError::Held { .. }) => {
            error.context("ask with --print-qemu before the proxy or another driver starts")
        }
        _ => error,
    })?;
    let number = match target {
        Target::Number(number) => *number,
        Target::Name(name) => find(&mut client, bus, name)?,
    };
    ask(&mut client, number).map_err(|error| match error {
        Error::NoDevice(_) => {
            anyhow::anyhow!("there is no such device; `vmsg ls --bus {bus}` shows which there are")
        }
        error => look::explain(error, bus),
    })
}

fn ask(client: &mut BusClient, number: DevNum) -> Result<(DeviceFacts, Vec<u8>), Error> {
    let info = client.device_info(number)?;
    let offered = client.device_features(number, &info)?;
    let mut queue_sizes = Vec::new();
    for index in 0..info.max_queues.min(MAX_QUEUES) {
        let size = client.queue(number, QueueIndex(index))?.max_size.0;
        queue_sizes.push(u16::try_from(size).unwrap_or(u16::MAX));
    }
    let mut config = vec![0; info.config_size.min(CONFIG_BYTES) as usize];
    if !config.is_empty() {
        client.read_config(number, 0, &mut config)?;
    }
    let facts = DeviceFacts {
        number,
        info,
        offered,
        queue_sizes,
    };
    Ok((facts, config))
}

/// The number of the device called `name`.
fn find(client: &mut BusClient, bus: &BusSpec, name: &str) -> anyhow::Result<DevNum> {
    let numbers = client
        .devices()
        .map_err(|error| look::explain(error, bus))?;
    let mut known = Vec::new();
    for number in numbers {
        match client.device_name(number) {
            Ok(other) if other == name => return Ok(number),
            Ok(other) => known.push(other),
            Err(Error::NoDevice(_)) => {}
            Err(error) => {
                // Who has no names does not answer at all.
                return Err(anyhow::Error::new(error).context(
                    "the device host does not tell the names of devices; give the number, as in dev=0",
                ));
            }
        }
    }
    bail!(
        "there is no such device on {bus}; known: {}",
        known.join(", ")
    )
}

/// What the memory of a guest with `size` bytes must be for its devices on `bus`; `None`: anything that is shared.
pub(crate) fn memory_for(
    bus: &BusSpec,
    arch: Arch,
    size: u64,
) -> Result<Option<MemoryBackend>, Usage> {
    match bus {
        BusSpec::LinuxUser(bus) => fitting_memory(bus, arch, size).map(Some),
        BusSpec::Ivshmem(bus) => fitting_common(bus, arch, size),
        _ => Ok(None),
    }
}

/// The file that a guest's memory must be on a bus that lends none.
fn fitting_memory(bus: &LinuxUserSpec, arch: Arch, size: u64) -> Result<MemoryBackend, Usage> {
    let known = Known {
        bus,
        ram: bus.ram.as_deref(),
        mem_offset: bus.mem_offset,
        mem_low_size: bus.mem_low_size,
        mem_hole: bus.mem_hole,
    };
    known.fitting(arch, size).map(MemoryBackend::File)
}

/// What a guest's memory must be so that the bus can tell where it is; `None`: anything that is shared.
fn fitting_common(
    bus: &IvshmemSpec,
    arch: Arch,
    size: u64,
) -> Result<Option<MemoryBackend>, Usage> {
    let ram = bus.ram.as_ref().and_then(Ram::path);
    let huge = MemoryBackend::Huge(bus.node);
    Ok(match bus.memory {
        None | Some(MemoryMode::Bounce) => None,
        Some(MemoryMode::Known) => {
            let shown = BusSpec::Ivshmem(Box::new(bus.clone()));
            let known = Known {
                bus: &shown,
                ram: ram.as_deref(),
                mem_offset: bus.mem_offset.unwrap_or(0),
                mem_low_size: bus.mem_low_size.unwrap_or(0),
                mem_hole: bus.mem_hole.unwrap_or(0),
            };
            Some(MemoryBackend::File(known.fitting(arch, size)?))
        }
        Some(MemoryMode::Whole) => Some(huge),
        Some(MemoryMode::Segment) if bus.node.is_some() || bus.window.is_some() => Some(huge),
        Some(MemoryMode::Segment) => {
            let usage = |error| Usage(format!("--print-qemu: {error}"));
            if arch == Arch::Arm64 {
                return Err(usage(
                    "on arm64 a guest cannot run in the memory of a PCI function: give node= or window=, or memory=bounce",
                ));
            }
            let file = vmsg_proxy::places::file_of_bus(bus).ok_or_else(|| {
                usage("memory=segment needs node=, window=, or ram= with a file that QEMU can open, such as ram=pci:ADDRESS")
            })?;
            Some(MemoryBackend::File(
                std::path::absolute(&file).unwrap_or(file),
            ))
        }
    })
}

/// Memory that both ends know, at addresses that both know.
struct Known<'a> {
    bus: &'a dyn std::fmt::Display,
    ram: Option<&'a Path>,
    mem_offset: u64,
    mem_low_size: u64,
    mem_hole: u64,
}

impl Known<'_> {
    /// Its file, if the bus has it where a machine with `size` bytes has it.
    fn fitting(&self, arch: Arch, size: u64) -> Result<PathBuf, Usage> {
        let bus = self;
        let usage = |error: String| Usage(format!("--bus {}: {error}", self.bus));
        let Some(ram) = bus.ram else {
            return Err(usage(
                "QEMU needs ram=FILE, the file that is to be the guest's memory".into(),
            ));
        };
        let whole = bus.mem_hole == 0 || bus.mem_low_size >= size;
        let (fits, machine, keys) = match arch {
            Arch::X86 if size >= Q35_SPLITS => (
                bus.mem_offset == 0 && bus.mem_low_size == 2 * GIB && bus.mem_hole == 2 * GIB,
                "x86",
                "mem-offset=0,mem-low-size=2G,mem-hole=2G",
            ),
            Arch::X86 => (
                bus.mem_offset == 0 && whole,
                "x86",
                "mem-offset=0, without mem-hole=",
            ),
            Arch::Arm64 => (
                bus.mem_offset == VIRT_BASE && whole,
                "arm64",
                "mem-offset=0x40000000, without mem-hole=",
            ),
        };
        if !fits {
            return Err(usage(format!(
                "with --machine {machine} and {} MiB of memory this must be {keys}, in `serve` and `proxy` alike",
                size >> 20
            )));
        }
        // QEMU may be started in another folder.
        Ok(std::path::absolute(ram).unwrap_or_else(|_| ram.to_owned()))
    }
}

/// `512M` or `2G` in bytes. QEMU's options do not agree on what a number alone is.
pub(crate) fn parse_size(text: &str) -> Result<u64, Usage> {
    let shift = match text.bytes().last() {
        Some(b'K' | b'k') => 10,
        Some(b'M' | b'm') => 20,
        Some(b'G' | b'g') => 30,
        Some(b'T' | b't') => 40,
        _ => 0,
    };
    let digits = text.get(..text.len().saturating_sub(1)).unwrap_or_default();
    match digits.parse::<u64>() {
        Ok(number) if shift > 0 && number > 0 && number <= u64::MAX >> shift => Ok(number << shift),
        _ => Err(Usage(format!("--memory {text}: write it as 512M or 2G"))),
    }
}

/// QEMU's version: as it was said, otherwise the oldest that has what the fronts need.
fn version_for(said: Option<&str>, fronts: &[FrontSpec]) -> Result<(u32, u32), Usage> {
    let vfio_user = fronts
        .iter()
        .find(|front| front.kind == FrontKind::VfioUser);
    let Some(said) = said else {
        return Ok(vfio_user.map_or(Machine::default().version, |_| VFIO_USER_SINCE));
    };
    let version = parse_version(said)?;
    match vfio_user {
        Some(front) if version < VFIO_USER_SINCE => Err(Usage(format!(
            "--qemu-version {said}: front {} is vfio-user, which QEMU has since {}.{}",
            front.name(),
            VFIO_USER_SINCE.0,
            VFIO_USER_SINCE.1
        ))),
        _ => Ok(version),
    }
}

/// `7.2` or `11.1.3` as major and minor version.
fn parse_version(text: &str) -> Result<(u32, u32), Usage> {
    let mut numbers = text.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(Usage(format!(
            "--qemu-version {text}: write it as `qemu-system-x86_64 --version` does, such as 7.2"
        ))),
    }
}

#[cfg(test)]
#[path = "print_test.rs"]
mod tests;
