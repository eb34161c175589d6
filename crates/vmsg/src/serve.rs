// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg serve`.

use std::io::Write;
use std::sync::Arc;

use anyhow::Context;
use serde::de::DeserializeOwned;
use vmsg_bus::{BusSpec, Listener, keyval, unix};
use vmsg_device::host::{Host, MAX_WINDOWS};
use vmsg_net::switch::SwitchConfig;

use crate::buses::{self, NamedBus};
use crate::cli::ServeArgs;
use crate::console::Registry;
use crate::control;
use crate::signals::{self, Interrupt};
use crate::spec::{Network, Place, Problem};
use crate::{Usage, descriptors};

mod describe;
mod disk;
mod fabric;
mod kept;
mod late;
mod make;
mod operator;

use disk::Disks;
use fabric::Fabric;
use kept::Keeping;
use late::{Awaited, Late, Numbers};
use make::Known;
use operator::{Names, Operator};

/// What drivers see as the name of this program.
const NAME: &str = "vmsg-serve";

/// Runs devices until a signal comes.
pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let mut buses = buses::parse_all(&args.buses)?;
    buses::for_devices(&args.buses, &mut buses)?;
    let Described {
        network,
        named,
        texts,
    } = describe(&args, &buses)?;
    descriptors::raise_limit();
    let interrupt = Interrupt::new()?;
    signals::outlive_file_limits()?;

    let mut host = Host::new(args.workers)?;
    for bus in &buses {
        let (listener, max_message) = listen(bus)?;
        host.add_bus(max_message, Some(listener))?;
    }
    // Asked for only when this process has the bus to itself: whoever held it before is gone.
    let mut keeping = keeping_for(&args, &buses, &network);
    let idle = keeping.is_idle();
    let known = Known {
        consoles: Registry::default(),
        control: args.control.clone(),
        disks: Disks::default(),
        awaited: Awaited::default(),
    };
    let built = build(&mut host, &buses, &network, &texts, &mut keeping, &known);
    let (fabric, late) = match built {
        Ok(built) => built,
        Err(error) => {
            // A keeper that holds something may be wanted by a `serve` that is started rightly.
            if idle {
                keeping.dismiss();
            }
            return Err(error);
        }
    };
    keeping.forget_rest();

    let awaited = known.awaited.clone();
    let operator = Arc::new(Operator::new(
        host.handle(),
        buses.clone(),
        fabric,
        network,
        named,
        keeping,
        known,
    ));
    late.start(&host.handle(), &awaited);
    let control = match &args.control {
        Some(path) => {
            let service: Arc<dyn control::Service> = Arc::<Operator>::clone(&operator);
            Some(control::Server::start(path, service)?)
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
    awaited.end();
    operator.dismiss_keeper();
    // Whoever waits for an answer of the host hears now that it is gone.
    drop(host);
    drop(control);
    Ok(())
}

/// Makes switches, uplinks and devices.
fn build(
    host: &mut Host,
    buses: &[NamedBus],
    network: &Network,
    texts: &Texts,
    keeping: &mut Keeping,
    known: &Known,
) -> anyhow::Result<(Fabric, Late)> {
    let fabric = Fabric::start(host, network)?;
    let mut late = Late::default();
    let mut numbers = Numbers::new(buses, &network.devices)?;
    for (index, uplink) in network.uplinks.iter().enumerate() {
        let id = uplink.id.as_deref().unwrap_or_default();
        let flows = keeping.take(id);
        fabric
            .add_uplink(uplink, network, flows)
            .with_context(|| texts.of(Place::Uplink(index)))?;
    }
    for (index, device) in network.devices.iter().enumerate() {
        let context = || texts.of(Place::Device(index));
        let common = device.common();
        let id = common.id.unwrap_or_default();
        let bus = buses::find(buses, common.bus)?;
        let (worker, port) = fabric.place(device, network).with_context(context)?;
        let flows = keeping.take(id);
        let num = numbers.take(bus, common.num);
        let made = match make::make(device, id, port, flows, known) {
            Ok(made) => made,
            Err(error) => {
                late.take_in(device, (bus, num, worker), error)
                    .with_context(context)?;
                host.expect_passthrough(bus, num);
                continue;
            }
        };
        host.add_device(bus, id, num, worker, made)
            .map_err(|error| Usage(format!("{}: {error}", context())))?;
    }
    Ok((fabric, late))
}

/// What the command line asks for.
struct Described {
    network: Network,
    named: Names,
    texts: Texts,
}

/// How the command line has it.
#[derive(Debug, Default)]
struct Texts {
    switches: Vec<String>,
    ports: Vec<String>,
    uplinks: Vec<String>,
    devices: Vec<String>,
}

impl Texts {
    /// The option and what is behind it.
    fn of(&self, place: Place) -> String {
        let (option, texts, index) = match place {
            Place::Switch(index) => ("switch", &self.switches, index),
            Place::Port(index) => ("port", &self.ports, index),
            Place::Uplink(index) => ("uplink", &self.uplinks, index),
            Place::Device(index) => ("device", &self.devices, index),
        };
        format!("--{option} {}", texts[index])
    }
}

fn read<T: DeserializeOwned>(option: &str, texts: &[String]) -> Result<Vec<T>, Usage> {
    let read = |text: &String| {
        keyval::from_str(text).map_err(|error| Usage(format!("--{option} {text}: {error}")))
    };
    texts.iter().map(read).collect()
}

/// Whether a device may be called so.
fn check_device_id(id: &str) -> Result<(), Usage> {
    if id.is_empty() || id.len() > 64 || id.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Usage(format!(
            "id=`{id}` must have 1 to 64 bytes and not be a number"
        )));
    }
    Ok(())
}

/// Reads the options, names what has no name, and looks for all that contradicts.
fn describe(args: &ServeArgs, buses: &[NamedBus]) -> Result<Described, Usage> {
    let texts = Texts {
        switches: args.switches.clone(),
        ports: args.ports.clone(),
        uplinks: args.uplinks.clone(),
        devices: args.devices.clone(),
    };
    let mut network = Network {
        switches: read("switch", &texts.switches)?,
        ports: read("port", &texts.ports)?,
        uplinks: read("uplink", &texts.uplinks)?,
        devices: read("device", &texts.devices)?,
        workers: args.workers,
    };
    let mut named = Names::default();
    for switch in &mut network.switches {
        let name = named.next("s");
        switch.id.get_or_insert(name);
    }
    let only = match network.switches.as_slice() {
        [only] => only.id.clone(),
        _ => None,
    };
    for uplink in &mut network.uplinks {
        let name = named.next("up");
        uplink.id.get_or_insert(name);
        uplink.switch = uplink.switch.take().or_else(|| only.clone());
    }
    let mut seats: Vec<usize> = Vec::new();
    for (index, device) in network.devices.iter_mut().enumerate() {
        let usage = |Usage(error)| Usage(format!("{}: {error}", texts.of(Place::Device(index))));
        let kind = device.common().kind;
        let name = named.next(kind);
        let bus = buses::find(buses, device.common().bus).map_err(usage)?;
        let common = device.common_mut();
        check_device_id(common.id.get_or_insert(name)).map_err(usage)?;
        *common.bus = Some(buses[bus].name.clone());
        let second = seats.contains(&bus);
        if buses::is_r1(&buses[bus].spec) && (common.num.is_some_and(|num| num != 0) || second) {
            // The messages have a number; that no driver but those of tests uses another is no fault.
            tracing::warn!(
                device = texts.devices[index],
                "QEMU's drivers and vmsg's own find device number 0 only on a bus with r1"
            );
        }
        seats.push(bus);
    }
    if let Some(problem) = network.problems().into_iter().next() {
        let Problem { place, message } = problem;
        return Err(Usage(format!("{}: {message}", texts.of(place))));
    }
    remark(&network, args.control.is_some());
    Ok(Described {
        network,
        named,
        texts,
    })
}

/// Says what can be meant so, and is not likely to be.
fn remark(network: &Network, is_controlled: bool) {
    for switch in &network.switches {
        let allows = |config: SwitchConfig| config.rules.iter().any(|rule| rule.allow);
        if !switch.config().is_ok_and(allows) {
            let switch = switch.id.as_deref().unwrap_or_default();
            tracing::warn!(
                switch,
                "no rule allows anything, so nobody reaches anybody; allow=* <> * lets all reach all"
            );
        }
    }
    for port in &network.ports {
        // With a control socket it may be that of a device to come.
        if !is_controlled && !network.is_plugged(port) {
            let port = port.id.as_deref().unwrap_or_default();
            tracing::warn!(
                port,
                "no device with switch= and no uplink has this id: the port is nobody's"
            );
        }
    }
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

/// The keeper's place, and the keeper if a device or uplink has something to keep.
fn keeping_for(args: &ServeArgs, buses: &[NamedBus], network: &Network) -> Keeping {
    let Some(bus) = buses.first() else {
        return Keeping::default();
    };
    let mut keeping = Keeping::new(buses::keep(&bus.spec), args.keep);
    if network.devices.iter().any(kept::is_kept) || network.uplinks.iter().any(kept::is_uplink_kept)
    {
        keeping.start();
    }
    keeping
}

/// What the control socket of a host without switches is served with.
#[cfg(test)]
pub(crate) fn service_of(
    handle: vmsg_device::host::Handle,
    buses: &[&str],
) -> Arc<dyn control::Service> {
    let named = |name: &&str| NamedBus {
        name: (*name).to_owned(),
        spec: BusSpec::Unix(vmsg_bus::UnixSpec::new(*name)),
    };
    let known = Known {
        consoles: Registry::default(),
        control: None,
        disks: Disks::default(),
        awaited: Awaited::default(),
    };
    let network = Network {
        workers: 1,
        ..Network::default()
    };
    let buses = buses.iter().map(named).collect();
    Arc::new(Operator::new(
        handle,
        buses,
        Fabric::default(),
        network,
        Names::default(),
        Keeping::default(),
        known,
    ))
}
