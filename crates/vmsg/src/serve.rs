// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve`.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Context;
use vmsg_bus::{BusSpec, Listener, keyval, unix};
use vmsg_device::host::{Host, MAX_WINDOWS};

use crate::buses::{self, NamedBus};
use crate::cli::ServeArgs;
use crate::console::Registry;
use crate::control;
use crate::keeper::Keeper;
use crate::signals::Interrupt;
use crate::spec::{DeviceSpec, NetBackend};
use crate::{Usage, descriptors};

mod make;

use make::{Consoles, KeptFlows};

/// What drivers see as the name of this program.
const NAME: &str = "vmsg-serve";

/// Runs devices until a signal comes.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let mut buses = buses::parse_all(&args.buses)?;
    buses::for_devices(&args.buses, &mut buses)?;
    let devices = named_devices(&args, &buses)?;
    descriptors::raise_limit();
    let interrupt = Interrupt::new()?;

    let mut host = Host::new(args.workers)?;
    for bus in &buses {
        let (listener, max_message) = listen(bus)?;
        host.add_bus(max_message, Some(listener))?;
    }
    // Asked for only when this process has the bus to itself: whoever held it before is gone.
    let mut keeper = keeper_for(&args, &buses, &devices);
    let idle = keeper.as_ref().is_some_and(|kept| kept.flows.is_empty());
    let consoles = Consoles {
        registry: Registry::default(),
        control: args.control.clone(),
    };
    if let Err(error) = add_devices(&mut host, &devices, keeper.as_mut(), &consoles) {
        // A keeper that holds something may be wanted by a `serve` that is started rightly.
        if let Some(kept) = keeper.filter(|_| idle) {
            kept.keeper.dismiss();
        }
        return Err(error);
    }

    if let Some(kept) = &mut keeper {
        kept.forget_rest();
    }

    // Ends when this function does.
    let _control = match &args.control {
        Some(path) => {
            let names = buses.iter().map(|bus| bus.name.clone()).collect();
            Some(control::Server::start(path, host.handle(), names)?)
        }
        None => None,
    };

    // A reader that has gone away is no reason not to serve guests.
    let mut out = std::io::stdout().lock();
    for bus in &buses {
        let _ = match &bus.spec {
            BusSpec::Unix(unix) => writeln!(out, "ready bus=unix,path={}", unix.path.display()),
            other => writeln!(out, "ready bus={other}"),
        };
    }
    let _ = out.flush();
    drop(out);

    let stop = host.stop_handle();
    let waiter = std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let result = interrupt.wait();
            stop.stop();
            result
        })?;
    host.run()?;
    waiter.join().expect("the signal thread does not panic")?;
    tracing::info!("ending");
    if let Some(kept) = keeper {
        kept.keeper.dismiss();
    }
    Ok(())
}

fn add_devices(
    host: &mut Host,
    devices: &[Named<'_>],
    mut keeper: Option<&mut KeptFlows>,
    consoles: &Consoles,
) -> anyhow::Result<()> {
    for device in devices {
        let made = make::make(&device.spec, &device.id, keeper.as_deref_mut(), consoles)
            .with_context(|| format!("--device {}", device.text))?;
        let common = device.spec.common();
        host.add_device(device.bus, &device.id, common.num, common.worker, made)
            .map_err(|error| Usage(format!("--device {}: {error}", device.text)))?;
    }
    Ok(())
}

/// A device with what it is called and where it goes.
struct Named<'a> {
    text: &'a str,
    spec: DeviceSpec,
    id: String,
    bus: usize,
}

fn named_devices<'a>(args: &'a ServeArgs, buses: &[NamedBus]) -> Result<Vec<Named<'a>>, Usage> {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    let mut devices = Vec::new();
    for text in &args.devices {
        let usage = |error: String| Usage(format!("--device {text}: {error}"));
        let spec: DeviceSpec = keyval::from_str(text).map_err(|error| usage(error.to_string()))?;
        let common = spec.common();
        let count = counts.entry(common.kind).or_default();
        let id = common
            .id
            .map_or_else(|| format!("{}{count}", common.kind), str::to_owned);
        *count += 1;
        if id.is_empty() || id.len() > 64 || id.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(usage(format!(
                "id=`{id}` must have 1 to 64 bytes and not be a number"
            )));
        }
        if let Some(worker) = common.worker.filter(|worker| *worker >= args.workers) {
            let last = args.workers - 1;
            return Err(usage(format!(
                "worker={worker}: with --workers {} the last one is {last}",
                args.workers
            )));
        }
        let bus = buses::find(buses, common.bus).map_err(|Usage(error)| usage(error))?;
        if buses::is_r1(&buses[bus].spec)
            && (common.num.is_some_and(|num| num != 0)
                || devices.iter().any(|other: &Named<'_>| other.bus == bus))
        {
            // The messages have a number; that no driver but those of tests uses another is no fault.
            tracing::warn!(
                device = text,
                "QEMU's drivers and vmsg's own find device number 0 only on a bus with r1"
            );
        }
        devices.push(Named {
            text,
            id,
            bus,
            spec,
        });
    }
    Ok(devices)
}

/// Listens on a bus; also returns its message size in bytes.
fn listen(bus: &NamedBus) -> anyhow::Result<(Listener, usize)> {
    let context = || format!("cannot serve {}", bus.spec);
    if let BusSpec::Unix(unix) = &bus.spec {
        let mut options = unix.listener_options(NAME);
        options.max_windows = u32::try_from(MAX_WINDOWS).expect("a few thousand");
        let max_message = options.capabilities.max_message_size;
        let listener = unix::Listener::bind(&unix.path, options).with_context(context)?;
        return Ok((listener.into(), max_message));
    }
    if let BusSpec::Ivshmem(spec) = &bus.spec {
        let listener = spec
            .listen(NAME, Some(&buses::keep_server))
            .with_context(context)?;
        let max_message = spec.message_size.map_or(64, |size| size.get() as usize);
        return Ok((Listener::Ivshmem(Box::new(listener)), max_message));
    }
    let listener = bus.spec.listen(NAME).with_context(context)?;
    Ok((listener, vmsg_bus::linux_user::MESSAGE_SIZE))
}

/// Finds or starts the keeper, if a device has something to keep.
fn keeper_for(args: &ServeArgs, buses: &[NamedBus], devices: &[Named<'_>]) -> Option<KeptFlows> {
    let wanted = devices.iter().any(
        |device| matches!(&device.spec, DeviceSpec::Net(net) if net.backend.unwrap_or_default() == NetBackend::User),
    );
    if !wanted || args.keep == 0 {
        return None;
    }
    match Keeper::find_or_start(&buses::keep(&buses.first()?.spec), args.keep) {
        Ok((keeper, flows)) => Some(KeptFlows { keeper, flows }),
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "connections will not survive this process"
            );
            None
        }
    }
}
