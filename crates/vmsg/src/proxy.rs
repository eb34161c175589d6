// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg proxy`.

pub(crate) mod print;

use std::io::Write;

use virtio_msg::DevNum;
use vmsg_bus::{BusSpec, keyval};
use vmsg_proxy::session::Target;
use vmsg_proxy::{BusRef, FrontSpec, Proxy};

use crate::buses::{self, NamedBus};
use crate::cli::ProxyArgs;
use crate::signals::Interrupt;
use crate::{Usage, descriptors};

/// Shows devices to guests until a signal comes.
pub(crate) fn run(args: ProxyArgs) -> anyhow::Result<()> {
    let named = buses::parse_all(&args.buses)?;
    for (text, bus) in args.buses.iter().zip(&named) {
        buses::for_guests(text, &bus.spec)?;
    }
    let specs: Vec<BusSpec> = named.iter().map(|bus| bus.spec.clone()).collect();
    let mut fronts: Vec<FrontSpec> = args
        .fronts
        .iter()
        .map(|text| {
            keyval::from_str(text).map_err(|error| Usage(format!("--front {text}: {error}")))
        })
        .collect::<Result<_, _>>()?;
    let mut taken: Vec<(usize, Target)> = Vec::new();
    for (front, text) in fronts.iter_mut().zip(&args.fronts) {
        front
            .check()
            .map_err(|error| Usage(format!("--front {text}: {error}")))?;
        let bus = find(&named, &front.bus)?;
        front.bus = BusRef::Index(bus);
        let device = front.dev.0.clone();
        if buses::is_r1(&specs[bus]) && device != Target::Number(DevNum(0)) {
            return Err(Usage(format!(
                "--front {text}: r1 has one device, number 0: dev=0"
            ))
            .into());
        }
        let seat = (bus, device);
        if taken.contains(&seat) {
            return Err(Usage(format!(
                "--front {text}: another front has this device already"
            ))
            .into());
        }
        taken.push(seat);
    }
    if args.print_qemu {
        return print::print(&args, &specs, &fronts);
    }
    descriptors::raise_limit();
    let interrupt = Interrupt::new()?;
    let _proxy = Proxy::start(&specs, &fronts, |front| {
        // A reader that has gone away is no reason not to serve guests.
        let mut out = std::io::stdout().lock();
        let _ = writeln!(
            out,
            "ready front={},socket={}",
            front.kind,
            front.socket.display()
        );
        let _ = out.flush();
    })
    .map_err(|error| {
        if error.is_usage() {
            anyhow::Error::from(Usage(error.to_string()))
        } else {
            error.into()
        }
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
