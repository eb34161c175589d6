// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Demo 2a: a stock guest reaches the network through a proxy and a device host, two processes joined by a bus.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use crate::dirs;
use crate::e2e::{linux_user, vfio_user};
use crate::guest::Guest;
use crate::http::{FILE_SIZE, Server};
use crate::kit::{self, Kit, NEW_QEMU};
use crate::machine::Machine;
use crate::proof;
use crate::qemu::{Backend, Board, Hardware, OWN_MAC, TEST_MAC};
use crate::scene::{Id, Scene};
use crate::secret;
use crate::vmsg::{NET, NET_SOCKET, RNG_SOCKET, Vmsg};

/// What the guest runs.
pub(crate) const SCRIPT: &str = include_str!("guest/demo.sh");
/// How often the guest pings.
pub(crate) const PINGS: u32 = 10;
/// Longest time for a step in the guest.
pub(crate) const STEP: Duration = Duration::from_secs(60);

/// Options of `demo 2a`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Machine type of the guest
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    /// The bus between device host and proxy
    #[arg(long, value_enum, default_value_t = Bus::Unix)]
    bus: Bus,
    /// How the proxy attaches to QEMU
    #[arg(long, value_enum, default_value_t = Front::VhostUser)]
    front: Front,
    /// The guest has an IOMMU, and the device host follows it; needs --front vfio-user
    #[arg(long)]
    iommu: bool,
    /// The device host sees nothing of the guest's memory: the proxy copies; needs --front vfio-user
    #[arg(long, conflicts_with = "reference")]
    isolate: bool,
    /// Keep logs and captures in this folder, new or empty [default: a new one under target/xtask]
    #[arg(long, value_name = "DIR")]
    keep_dir: Option<PathBuf>,
    /// Use QEMU's own devices instead of vmsg: the baseline, to find out on which side a fault lies
    #[arg(long, hide = true)]
    reference: bool,
    #[command(flatten)]
    kit: kit::Options,
}

/// What joins the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Bus {
    /// vmsg's own: memory and eventfds are lent
    Unix,
    /// That of QEMU's virtio-msg: queues in files, the guest's memory in a file that both know
    LinuxUser,
    /// The same with the 40-byte messages of the first demos; one device, so entropy is QEMU's own
    LinuxUserR1,
}

/// What QEMU has in its place of the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Front {
    /// QEMU's own virtio devices, their queues served elsewhere: virtio-pci on x86, virtio-mmio on arm64
    VhostUser,
    /// Whole PCI functions, with QEMU 11.1 from Debian 13's backports, unpacked in the cache
    VfioUser,
}

/// Runs the demo; prints `TEST PASSED` or `TEST FAILED` as last line and gives whether it passed.
pub(crate) fn run(options: &Options) -> bool {
    told(play(options))
}

/// Prints how it ended, as last line.
pub(crate) fn told(ended: Result<String>) -> bool {
    match ended {
        Ok(summary) => {
            println!("TEST PASSED: {summary}");
            true
        }
        Err(error) => {
            let text = format!("{error:#}");
            let (first, rest) = text.split_once('\n').unwrap_or((&text, ""));
            if !rest.is_empty() {
                println!("{rest}");
            }
            println!("TEST FAILED: {first}");
            false
        }
    }
}

impl Options {
    /// Looks for options that contradict each other.
    ///
    /// # Errors
    /// What was meant, in a sentence.
    pub(crate) fn check(&self) -> Result<()> {
        let whole = self.front == Front::VfioUser;
        ensure!(
            whole || !(self.iommu || self.isolate),
            "--iommu and --isolate need --front vfio-user"
        );
        ensure!(
            !whole || self.bus != Bus::LinuxUserR1,
            "the messages of the first demos carry too little for --front vfio-user: choose another --bus"
        );
        ensure!(
            self.bus == Bus::Unix || !(self.iommu || self.isolate),
            "--iommu and --isolate need --bus unix: on the others the device host has all of the guest's memory from the start"
        );
        Ok(())
    }
}

fn play(options: &Options) -> Result<String> {
    let whole = options.front == Front::VfioUser;
    let mut wanted = options.kit.clone();
    wanted.new_qemu |= whole && wanted.qemu.is_none();
    wanted.new_kernel = whole && vfio_user::needs_new_kernel(options.machine, options.iommu);
    let mut kits = kit::gather(&[options.machine], &wanted)?;
    let mut kit = kits.pop().expect("one kit for one machine");
    if whole {
        if options.kit.qemu.is_some() {
            let (major, minor) = crate::qemu::version(&kit.qemu)?;
            ensure!(
                (major, minor) >= NEW_QEMU,
                "{} is version {major}.{minor}, and --front vfio-user is run with {}.{} or later: leave --qemu out, and it is fetched (on Debian)",
                kit.qemu,
                NEW_QEMU.0,
                NEW_QEMU.1
            );
        }
        kit = vfio_user::kit(&kit, options.iommu, false)?;
    }
    let vmsg = if options.reference {
        None
    } else {
        println!("building vmsg");
        Some(Vmsg::build()?)
    };
    let name = format!("demo-2a-{}", options.machine.name());
    let dir = dirs::run_folder(&name, options.keep_dir.as_deref())?;
    println!("logs: {}", dir.display());
    let mut scene = Scene::new(dir);
    act(&mut scene, &kit, vmsg.as_ref(), options)
}

/// Tells progress: the time since the start and what has happened.
pub(crate) fn tell(scene: &Scene, what: &str) {
    println!("[{:5.1} s] {what}", scene.now().as_secs_f64());
}

fn act(scene: &mut Scene, kit: &Kit, vmsg: Option<&Vmsg>, options: &Options) -> Result<String> {
    let kind = options.bus;
    let whole = options.front == Front::VfioUser;
    let server = Server::start(FILE_SIZE)?;
    let bus = match kind {
        Bus::Unix => crate::vmsg::BUS.to_owned(),
        Bus::LinuxUser => linux_user::bus(kit.machine, "1"),
        Bus::LinuxUserR1 => linux_user::bus(kit.machine, "r1"),
    };
    let rng = kind != Bus::LinuxUserR1;
    let sides = match vmsg {
        Some(vmsg) => {
            let count = if rng { 2 } else { 1 };
            let net = if whole {
                vfio_user::net_device()
            } else {
                NET.to_owned()
            };
            let serve = vmsg.serve_on(scene, "serve", &bus, &[&net, "rng"][..count])?;
            tell(
                scene,
                &format!("device host listens (process {})", scene.pid(serve)),
            );
            let fronts = if whole {
                vfio_user::fronts(options.isolate)
            } else {
                [linux_user::NET_FRONT, linux_user::RNG_FRONT].map(str::to_owned)
            };
            let fronts: Vec<&str> = fronts.iter().map(String::as_str).collect();
            let proxy = vmsg.proxy_on(scene, &bus, &fronts[..count])?;
            tell(
                scene,
                &format!(
                    "proxy listens (process {}), joined to it by {bus}",
                    scene.pid(proxy)
                ),
            );
            Some((serve, proxy))
        }
        None => None,
    };
    let mut board = match sides {
        Some(_) if whole => {
            let (net, rng) = vfio_user::backends();
            match kind {
                Bus::Unix => Board::new(net, rng),
                Bus::LinuxUser | Bus::LinuxUserR1 => linux_user::board(net, rng),
            }
        }
        None if whole => Board::new(Backend::Pci, Backend::Pci),
        Some(_) => {
            let net = Backend::VhostUser(NET_SOCKET.to_owned());
            let rng = if rng {
                Backend::VhostUser(RNG_SOCKET.to_owned())
            } else {
                Backend::Qemu
            };
            match kind {
                Bus::Unix => Board::new(net, rng),
                Bus::LinuxUser | Bus::LinuxUserR1 => linux_user::board(net, rng),
            }
        }
        None => Board::new(Backend::Qemu, Backend::Qemu),
    };
    board.iommu = options.iommu;
    let mut settings = settings(&server, PINGS).to_vec();
    let secret = secret::hex(&secret::random()?);
    settings.push(("SECRET", secret.clone()));
    let guest = Guest::start(
        scene,
        "guest",
        kit,
        Hardware::Board(&board),
        SCRIPT,
        &settings,
    )?;
    tell(scene, &format!("QEMU started: {}", kit.qemu));
    let kernel = guest.booted(scene)?;
    tell(scene, &format!("guest runs Linux {kernel}"));

    let transport = if whole {
        "virtio-pci"
    } else {
        kit.machine.transport_name()
    };
    proof::nic(scene, &mut &guest, transport, STEP)?;
    if options.iommu {
        let (group, _) = guest.mark(scene, "iommu", STEP)?;
        ensure!(
            group.contains("DMA"),
            "eth1 is not behind the IOMMU: {group}"
        );
        tell(scene, &format!("eth1 is behind an IOMMU: {group}"));
    }
    let address = proof::lease(scene, &mut &guest, STEP)?;
    let first_ping = proof::first_ping(scene, &mut &guest, "10.0.2.2", STEP)?;
    // While it goes on pinging.
    if let (true, Some((serve, _))) = (options.isolate, sides) {
        show_isolation(scene, &guest, serve, &secret)?;
    }
    let statistics = proof::ping_statistics(scene, &mut &guest, STEP)?;
    let (code, _) = guest.mark(scene, "pinged", STEP)?;
    ensure!(code == "0", "ping gave {code}");
    let mebibytes = proof::download(scene, &mut &guest, &server, "over HTTP", [STEP, STEP])?;
    proof::random(scene, &mut &guest, STEP)?;

    let failed: Vec<_> = guest
        .finish(scene, STEP)?
        .into_iter()
        .filter_map(|c| c.failure)
        .collect();
    if let Some(why) = failed.first() {
        bail!("{why}");
    }
    if let Some((serve, proxy)) = sides {
        stop(scene, proxy, serve)?;
        let capture = fs::read(scene.dir().join("net.pcap")).context("no capture net.pcap")?;
        ensure!(
            capture.len() > FILE_SIZE,
            "net.pcap is too short: {} bytes",
            capture.len()
        );
    }

    println!();
    for line in &statistics {
        println!("{line}");
    }
    println!(
        "first ping answered {:.1} s after the start",
        first_ping.as_secs_f64()
    );
    println!(
        "logs, commands{}: {}",
        if sides.is_some() { " and net.pcap" } else { "" },
        scene.dir().display()
    );
    let mut how = transport.to_owned();
    if whole && vmsg.is_some() {
        how.push_str(" by vfio-user");
    }
    if options.iommu {
        how.push_str(", behind an IOMMU");
    }
    if options.isolate {
        how.push_str(", isolated");
    }
    Ok(format!(
        "{} guest over {how}: eth1 has {address} by DHCP, {}, {mebibytes} MiB with the right checksum",
        kit.machine.name(),
        statistics[0]
    ))
}

/// Settings of the demo's script.
pub(crate) fn settings(server: &Server, pings: u32) -> [(&'static str, String); 4] {
    [
        ("OWN_MAC", OWN_MAC.to_owned()),
        ("TEST_MAC", TEST_MAC.to_owned()),
        ("PORT", server.port().to_string()),
        ("PINGS", pings.to_string()),
    ]
}

/// Looks for what only the guest knows in the memory of both processes that serve it, and in the files that they have open.
fn show_isolation(scene: &Scene, guest: &Guest, serve: Id, secret: &str) -> Result<()> {
    let own = secret::search(scene.pid(guest.id), secret.as_bytes())?;
    ensure!(
        !own.mapped.is_empty(),
        "the guest's secret is not in its own memory: {own:?}"
    );
    let found = secret::search(scene.pid(serve), secret.as_bytes())?;
    ensure!(
        found.mapped.is_empty() && found.open.is_empty(),
        "the device host has the guest's secret: {found:?}"
    );
    tell(
        scene,
        &format!(
            "a secret of the guest is in QEMU's memory and nowhere in the device host: {} mappings and {} open files searched",
            found.mappings, found.files
        ),
    );
    Ok(())
}

/// Ends both sides as a user would, with SIGTERM.
fn stop(scene: &mut Scene, proxy: Id, serve: Id) -> Result<()> {
    scene
        .kill(proxy, Signal::TERM)
        .context("the proxy does not end on SIGTERM")?;
    scene
        .kill(serve, Signal::TERM)
        .context("the device host does not end on SIGTERM")
}
