// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Demo 2b: two machines joined by shared memory and doorbells alone; a stock guest in one reaches the network through
//! the other.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use crate::demo::{self, PINGS, SCRIPT, STEP, tell};
use crate::dirs;
use crate::http::{FILE_SIZE, Server};
use crate::inner::Inside;
use crate::kit;
use crate::machine::Machine;
use crate::pair::{self, GATEWAY, Mode, Pair, Plan, Programs};
use crate::proof::{self, Console};
use crate::scene::Scene;
use crate::shell::Process;
use crate::tree;

/// Longest time from the inner QEMU's start to the guest's first line.
pub(crate) const INNER_BOOT: Duration = Duration::from_secs(120);
/// Longest time for a download: it passes through four emulated processors' worth of software.
const DOWNLOAD: Duration = Duration::from_secs(120);

/// Options of `demo 2b`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Machine type of all three: the two machines and the guest in one of them
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    /// What the machines have in common beside the messages
    #[arg(long, value_enum, default_value_t = Mode::Bounce)]
    memory: Mode,
    /// With --memory segment, on x86: the guest lives in the memory of the PCI device itself
    #[arg(long)]
    bar: bool,
    /// Which side is there first [default: any]
    #[arg(long, value_enum)]
    order: Option<Order>,
    /// How the queues of messages lie in the memory
    #[arg(long, value_enum, default_value_t = Layout::Amp)]
    layout: Layout,
    /// Keep logs in this folder, new or empty [default: a new one under target/xtask]
    #[arg(long, value_name = "DIR")]
    keep_dir: Option<PathBuf>,
    /// Use this static program instead of building one; on the same processor also as the server
    #[arg(long, value_name = "FILE", hide = true)]
    vmsg: Option<PathBuf>,
    #[command(flatten)]
    kit: kit::Options,
}

/// Which machine comes up first, with its side of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Order {
    /// B, the device side
    DeviceFirst,
    /// A, the driver side
    DriverFirst,
    /// Both at once
    Together,
}

impl Order {
    const ALL: [Self; 3] = [Self::DeviceFirst, Self::DriverFirst, Self::Together];

    /// Any.
    fn any() -> Self {
        let nanos = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |d| d.subsec_nanos());
        Self::ALL[nanos as usize / 1000 % 3]
    }

    fn text(self) -> &'static str {
        match self {
            Self::DeviceFirst => "the device side first",
            Self::DriverFirst => "the driver side first",
            Self::Together => "both sides at once",
        }
    }
}

/// How the queues lie in the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Layout {
    /// The layout that describes itself
    Amp,
    /// QEMU's two pages
    Spsc,
}

/// Runs the demo; prints `TEST PASSED` or `TEST FAILED` as last line and gives whether it passed.
pub(crate) fn run(options: &Options) -> bool {
    demo::told(play(options))
}

impl Options {
    /// Looks for options that contradict each other.
    ///
    /// # Errors
    /// What was meant, in a sentence.
    pub(crate) fn check(&self) -> Result<()> {
        self.plan().check(self.machine)
    }

    fn plan(&self) -> Plan {
        Plan {
            mode: self.memory,
            bar: self.bar,
            layout: match self.layout {
                Layout::Amp => "amp",
                Layout::Spsc => "spsc",
            },
        }
    }
}

fn play(options: &Options) -> Result<String> {
    let plan = options.plan();
    pair::check_memory()?;
    let mut wanted = options.kit.clone();
    wanted.more.trees.push(tree::inner_qemu);
    wanted.more.cross = options.vmsg.is_none();
    let mut kits = kit::gather(&[options.machine], &wanted)?;
    let kit = kits.pop().expect("one kit for one machine");
    let programs = Programs::build(options.machine, options.vmsg.as_deref(), None)?;
    let mut pair = Pair::new(&kit, plan, programs)?;
    let name = format!("demo-2b-{}", options.machine.name());
    let dir = dirs::run_folder(&name, options.keep_dir.as_deref())?;
    println!("logs: {}", dir.display());
    let server = Server::start(FILE_SIZE)?;
    let inside = Inside::new(&kit, SCRIPT, &settings(&server))?;
    let mut scene = Scene::new(dir);
    let order = options.order.unwrap_or_else(Order::any);
    let id = pair.start_server(&mut scene)?;
    tell(
        &scene,
        &format!("ivshmem server listens (process {})", scene.pid(id)),
    );
    let (serve, proxy, mut inner) = bring_up(&mut scene, &mut pair, inside, order)?;
    let summary = watch(&mut scene, &mut inner, &server, options.machine)?;
    done(&mut scene, &mut inner)?;
    let failures = inner.failures(&scene);
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    pair.end(&mut scene, &serve, &proxy)?;
    tell(&scene, "proxy, device host, machines and server have ended");
    println!();
    println!("logs and commands: {}", scene.dir().display());
    let place = if options.bar { " in a BAR" } else { "" };
    Ok(format!(
        "{} guest in machine A, device in machine B, memory {}{place}, {}: {summary}",
        options.machine.name(),
        options.memory.name(),
        order.text(),
    ))
}

/// Settings of the inner guest's script.
pub(crate) fn settings(server: &Server) -> Vec<(&'static str, String)> {
    let mut settings = demo::settings(server, PINGS).to_vec();
    settings.push(("GATEWAY", GATEWAY.to_owned()));
    settings
}

/// Starts both machines in this order, and all that runs in them: device host, proxy, inner guest. QEMU wants its back
/// ends when it starts (its entropy device cannot connect again), so the guest comes last.
pub(crate) fn bring_up(
    scene: &mut Scene,
    pair: &mut Pair,
    inside: Inside,
    order: Order,
) -> Result<(Process, Process, Process)> {
    let (serve, proxy) = match order {
        Order::DeviceFirst => {
            pair.start_b(scene, "b")?;
            let serve = b_runs(scene, pair)?;
            pair.start_a(scene, "a", inside)?;
            (serve, a_runs(scene, pair)?)
        }
        Order::DriverFirst => {
            pair.start_a(scene, "a", inside)?;
            let proxy = a_runs(scene, pair)?;
            pair.start_b(scene, "b")?;
            (b_runs(scene, pair)?, proxy)
        }
        Order::Together => {
            pair.start_a(scene, "a", inside)?;
            pair.start_b(scene, "b")?;
            let proxy = a_runs(scene, pair)?;
            (b_runs(scene, pair)?, proxy)
        }
    };
    let inner = pair.inner(scene, true)?;
    tell(scene, "inner QEMU started in A, with KVM");
    Ok((serve, proxy, inner))
}

fn a_runs(scene: &mut Scene, pair: &mut Pair) -> Result<Process> {
    let kernel = pair.ready_a(scene)?;
    tell(scene, &format!("machine A runs Linux {kernel}"));
    let proxy = pair.proxy(scene)?;
    tell(scene, &format!("proxy listens in A: {}", pair.buses().1));
    Ok(proxy)
}

fn b_runs(scene: &mut Scene, pair: &mut Pair) -> Result<Process> {
    let kernel = pair.ready_b(scene)?;
    tell(scene, &format!("machine B runs Linux {kernel}"));
    let serve = pair.serve(scene)?;
    tell(
        scene,
        &format!("device host listens in B: {}", pair.buses().0),
    );
    Ok(serve)
}

/// Waits for the inner guest's end.
pub(crate) fn done(scene: &mut Scene, inner: &mut Process) -> Result<()> {
    inner
        .mark(scene, "done", STEP)
        .context("the inner guest does not end")
        .map(drop)
}

/// Follows the inner guest's script; gives what it has shown.
pub(crate) fn watch(
    scene: &mut Scene,
    inner: &mut Process,
    server: &Server,
    machine: Machine,
) -> Result<String> {
    let (kernel, _) = inner.mark(scene, "booted", INNER_BOOT)?;
    tell(scene, &format!("inner guest runs Linux {kernel}"));
    proof::nic(scene, inner, machine.transport_name(), STEP)?;
    let address = proof::lease(scene, inner, STEP)?;
    proof::first_ping(scene, inner, GATEWAY, STEP)?;
    let [counts, times] = proof::ping_statistics(scene, inner, STEP)?;
    tell(scene, &times);
    let mebibytes = proof::download(scene, inner, server, "from this machine", [STEP, DOWNLOAD])?;
    proof::random(scene, inner, STEP)?;
    Ok(format!(
        "eth1 has {address} by DHCP, {counts}, {mebibytes} MiB with the right checksum"
    ))
}
