// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg proxy`.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use anyhow::Context;
use vmsg_bus::{BusSpec, keyval};
use vmsg_proxy::front::qemu::{Arch, Machine, machine_args, to_shell};
use vmsg_proxy::{BusRef, FrontSpec, Proxy, print_qemu};

use crate::buses::{self, NamedBus};
use crate::cli::ProxyArgs;
use crate::out::Out;
use crate::signals::Interrupt;
use crate::{Usage, descriptors};

/// Shows devices to guests until a signal comes.
pub(crate) fn run(args: ProxyArgs) -> anyhow::Result<()> {
    let named = buses::parse_all(&args.buses)?;
    let specs: Vec<BusSpec> = named.iter().map(|bus| bus.spec.clone()).collect();
    let mut fronts: Vec<FrontSpec> = args
        .fronts
        .iter()
        .map(|text| {
            keyval::from_str(text).map_err(|error| Usage(format!("--front {text}: {error}")))
        })
        .collect::<Result<_, _>>()?;
    for front in &mut fronts {
        front.bus = BusRef::Index(find(&named, &front.bus)?);
    }
    if args.print_qemu {
        return print(&args, &specs, &fronts);
    }
    descriptors::raise_limit();
    let interrupt = Interrupt::new()?;
    let _proxy = Proxy::start(&specs, &fronts, |front| {
        // A reader that has gone away is no reason not to serve guests.
        let mut out = std::io::stdout().lock();
        let _ = writeln!(
            out,
            "ready front=vhost-user,socket={}",
            front.socket.display()
        );
        let _ = out.flush();
    })?;
    interrupt.wait()?;
    tracing::info!("ending");
    Ok(())
}

/// The position of the bus that a front names.
fn find(buses: &[NamedBus], bus: &BusRef) -> Result<usize, Usage> {
    match bus {
        // It may be a name of digits.
        BusRef::Index(index) => match buses::find(buses, Some(&index.to_string())) {
            Ok(index) => Ok(index),
            Err(_) if *index < buses.len() => Ok(*index),
            Err(_) => Err(Usage(format!(
                "a front has bus={index}, but buses are counted from 0 and {} given",
                buses.len()
            ))),
        },
        BusRef::Name(name) => buses::find(buses, Some(name)),
    }
}

/// Prints the QEMU arguments that fit the fronts.
fn print(args: &ProxyArgs, buses: &[BusSpec], fronts: &[FrontSpec]) -> anyhow::Result<()> {
    let arch = match args.machine.as_str() {
        "x86" => Arch::X86,
        "arm64" => Arch::Arm64,
        other => return Err(Usage(format!("--machine {other}: must be x86 or arm64")).into()),
    };
    let machine = Machine {
        arch,
        memory: args.memory.clone(),
        version: parse_version(&args.qemu_version)?,
        memory_file: memory_file(buses),
    };
    let digits = args
        .memory
        .trim_end_matches(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't']);
    if args.memory.len() > digits.len() + 1 || digits.parse::<u64>().is_err() {
        return Err(Usage(format!("--memory {}: write it as 512M or 2G", args.memory)).into());
    }
    let mut lines = vec![to_shell(&machine_args(&machine))];
    for front in fronts {
        let BusRef::Index(index) = front.bus else {
            continue;
        };
        let bus = &buses[index];
        let link = vmsg_proxy::connect(bus, &front.dev, "vmsg print-qemu")?;
        let text = print_qemu(front, &link.handle(), &machine)
            .with_context(|| {
                format!(
                    "nothing is known of {} (is `vmsg serve` running, and does `vmsg ls --bus {bus}` show it?)",
                    front.dev.0
                )
            })?;
        lines.push(text);
    }
    // For a person to paste; a script's `$(…)` would take the backslashes for arguments.
    let terminal = std::io::stdout().is_terminal();
    let end = if terminal { " \\\n" } else { "\n" };
    writeln!(Out::lock(), "{}", lines.join(end).replace(" \\\n", end))?;
    Ok(())
}

/// The file that a guest's memory must be, for a bus that lends none.
fn memory_file(buses: &[BusSpec]) -> Option<PathBuf> {
    let ram = buses.iter().find_map(|bus| match bus {
        BusSpec::LinuxUser(bus) => bus.ram.clone(),
        _ => None,
    })?;
    // QEMU may be started in another folder.
    Some(std::path::absolute(&ram).unwrap_or(ram))
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
