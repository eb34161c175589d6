// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg proxy`.

use std::io::Write;

use anyhow::Context;
use vmsg_bus::{BusSpec, keyval};
use vmsg_proxy::front::qemu::{Arch, Machine, machine_args, to_shell};
use vmsg_proxy::{FrontSpec, Proxy, print_qemu};

use crate::buses;
use crate::cli::ProxyArgs;
use crate::out::Out;
use crate::signals::Interrupt;
use crate::{Usage, descriptors};

/// Shows devices to guests until a signal comes.
pub(crate) fn run(args: ProxyArgs) -> anyhow::Result<()> {
    let named = buses::parse_all(&args.buses)?;
    let specs: Vec<BusSpec> = named
        .iter()
        .map(|bus| BusSpec::Unix(bus.unix.clone()))
        .collect();
    let fronts: Vec<FrontSpec> = args
        .fronts
        .iter()
        .map(|text| {
            keyval::from_str(text).map_err(|error| Usage(format!("--front {text}: {error}")))
        })
        .collect::<Result<_, _>>()?;
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

/// Prints the QEMU arguments that fit the fronts.
fn print(args: &ProxyArgs, buses: &[BusSpec], fronts: &[FrontSpec]) -> anyhow::Result<()> {
    let arch = match args.machine.as_str() {
        "x86" => Arch::X86,
        "arm64" => Arch::Arm64,
        other => return Err(Usage(format!("--machine {other}: x86 or arm64")).into()),
    };
    let machine = Machine {
        arch,
        memory: args.memory.clone(),
        ..Machine::default()
    };
    let mut lines = vec![to_shell(&machine_args(&machine))];
    for front in fronts {
        let bus = buses
            .get(front.bus)
            .ok_or_else(|| Usage(format!("there is no bus {}", front.bus)))?;
        let link = vmsg_proxy::connect(bus, &front.dev, "vmsg print-qemu")?;
        let text = print_qemu(front, &link.handle(), &machine)
            .with_context(|| format!("the device host does not say what {} is", front.dev.0))?;
        lines.push(text);
    }
    writeln!(Out::lock(), "{}", lines.join(" \\\n"))?;
    Ok(())
}
