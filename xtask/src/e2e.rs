// SPDX-License-Identifier: Apache-2.0 OR MIT
//! End-to-end tests: stock kernels in stock QEMU, many checks in each boot, one test after another; in the short run two at once.

mod bare_metal;
mod console;
mod demo2b;
mod disk;
mod disk_daemon;
mod disk_errors;
mod disk_killed;
mod disk_two_drivers;
mod drives;
mod endure;
mod ivshmem;
mod ivshmem_server;
pub(crate) mod linux_user;
mod list;
mod nic;
mod share;
mod socket;
mod switch;
mod up;
pub(crate) mod vfio_user;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use self::endure::endure;
use self::list::{Short, TESTS, Test};
use crate::debian::Debian;
use crate::dirs;
use crate::disk::TOOLS;
use crate::guest::Guest;
use crate::http::{self, Server};
use crate::kit::{self, Kit};
use crate::machine::Machine;
use crate::qemu::{Backend, Board, Hardware, OWN_MAC, TEST_MAC};
use crate::report::{Report, SECOND_RUNS};
use crate::scene::{Id, Scene, Stream};
use crate::tftp;
use crate::tree;
use crate::vmsg::{NET_SOCKET, PROXY, RNG_SOCKET, Vmsg};

pub(crate) use self::nic::traffic_server;

/// Scripts of the guests.
const EXERCISES: &str = include_str!("guest/exercises.sh");
const CHECKS: &str = concat!(
    include_str!("guest/exercises.sh"),
    include_str!("guest/checks.sh")
);
const NEXT: &str = include_str!("guest/next.sh");

/// Longest time for all checks of a guest.
const ALL_CHECKS: Duration = Duration::from_secs(240);
/// Longest time for one step.
pub(crate) const STEP: Duration = Duration::from_secs(60);
/// Bytes of a file that is not kept when all went well.
const LARGE: u64 = 4 << 20;

/// Options of `e2e`.
#[derive(clap::Args, Debug, Clone, Default)]
pub(crate) struct Options {
    /// Only tests whose names contain this
    name: Option<String>,
    /// Only this machine type [default: both]
    #[arg(long, value_enum)]
    machine: Option<Machine>,
    /// More processors, more memory, more repetitions
    #[arg(long)]
    full: bool,
    /// Use QEMU's own devices instead of vmsg: shows that the expectations hold for an ordinary machine
    #[arg(long, hide = true)]
    reference: bool,
    /// As few repetitions as show something
    #[arg(long, hide = true, conflicts_with = "full")]
    short: bool,
    /// Test this program instead of building one
    #[arg(long, value_name = "FILE")]
    vmsg: Option<std::path::PathBuf>,
    #[command(flatten)]
    kit: kit::Options,
}

impl Options {
    /// The options of the gate.
    pub(crate) fn of_gate(full: bool, kit: kit::Options) -> Self {
        Self {
            full,
            short: !full,
            kit,
            ..Self::default()
        }
    }

    /// The machines the tests are played on.
    fn machines(&self) -> Vec<Machine> {
        self.machine.map_or(Machine::ALL.to_vec(), |m| vec![m])
    }

    /// The tests whose names fit.
    fn tests(&self) -> impl Iterator<Item = &'static Test> + use<'_> {
        TESTS.iter().filter(|t| {
            self.name
                .as_ref()
                .is_none_or(|n| t.name.contains(n.as_str()))
                && (t.reference || !self.reference)
        })
    }

    /// Whether a test is played on a machine, as far as it depends on how short the run is.
    fn plays(&self, test: &Test, machine: Machine) -> bool {
        let short = match test.short {
            Short::Both => true,
            Short::X86 => machine == Machine::X86,
            Short::Arm64 => machine == Machine::Arm64,
            Short::No => false,
        };
        short || self.full || self.name.is_some() || self.machine.is_some()
    }

    /// Gathers what the guests are made of, asking once for all of it.
    pub(crate) fn gather(&self) -> Result<Vec<Kit>> {
        let machines = self.machines();
        let mut wanted = self.kit.clone();
        // Elsewhere only the tests that want them fail.
        if Debian::here().is_some() {
            let any = |part: &str| {
                self.tests().any(|test| {
                    test.name.contains(part) && machines.iter().any(|&m| self.plays(test, m))
                })
            };
            let more = &mut wanted.more;
            if any("nic-") || any("socket-") || any("switch-") {
                more.trees.push(tree::net_tools);
                more.trees.push(|_| tree::host_net_tools());
            }
            if any("disk") || any("share-folder") {
                more.tools.extend(TOOLS);
                more.trees.push(tree::disk_root);
            }
            if any("disk-daemon") || any("disk-errors") {
                more.tools
                    .push(("qemu-storage-daemon", "qemu-system-common"));
            }
            if any("disk-whole") {
                more.trees.push(tree::whole_root);
            }
            if any("share-folder") {
                more.trees.push(|_| tree::virtiofsd());
            }
            if any("vfio-user") {
                more.trees.push(tree::pci_tools);
            }
            if any("demo-2b") || any("up-2b") {
                more.trees.push(tree::inner_qemu);
            }
            more.cross = any("demo-2b") || any("up-2b") || any("ivshmem-tools");
            more.new_qemu = any("vfio-user")
                || any("console")
                || any("nic-")
                || any("ivshmem-server")
                || any("ivshmem-tools");
            more.new_kernel = any("new-kernel") || any("vfio-user-iommu");
        }
        kit::gather(&machines, &wanted)
    }
}

/// What a test is given.
struct Stage<'a> {
    kit: &'a Kit,
    vmsg: Option<&'a Vmsg>,
    full: bool,
    short: bool,
    scene: Scene,
    server: Server,
    udp_port: u16,
    /// QEMU takes the link down now and then: while it has no back end.
    link_flaps: bool,
}

/// Runs the tests.
pub(crate) fn run(options: &Options, report: &mut Report) -> Result<()> {
    let tests: Vec<&'static Test> = options.tests().collect();
    if tests.is_empty() {
        let names: Vec<_> = TESTS.iter().map(|t| t.name).collect();
        bail!("no such test; there are {}", names.join(", "));
    }
    let kits = options.gather()?;
    let vmsg = if options.reference {
        None
    } else {
        Some(match &options.vmsg {
            Some(program) => Vmsg::built(program)?,
            None => Vmsg::build()?,
        })
    };
    let all: Vec<(&Kit, &Test)> = kits
        .iter()
        .flat_map(|kit| {
            let plays = tests.iter().filter(|t| options.plays(t, kit.machine));
            plays.map(move |test| (kit, *test))
        })
        .collect();
    // A guest keeps a processor busy at most times: two tests at once are through sooner than one after another.
    let lanes = match available_parallelism() {
        Ok(processors) if options.short => processors.get().min(2),
        _ => 1,
    };
    let next = AtomicUsize::new(0);
    let played = |kit: &Kit, test: &Test| {
        let mut report = Report::default();
        let begun = Instant::now();
        let name = format!("{}/{}", kit.machine.name(), test.name);
        let result = play(test, kit, vmsg.as_ref(), options, &mut report);
        report.result(
            &format!("{name} [{:.1} s]", begun.elapsed().as_secs_f64()),
            result,
        );
        report
    };
    let lane = || {
        let mut reports = Vec::new();
        while let Some((kit, test)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            reports.push((*kit, *test, played(kit, test)));
        }
        reports
    };
    let reports = thread::scope(|scope| {
        let threads: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        threads.into_iter().map(|t| t.join()).collect::<Vec<_>>()
    });
    let mut failed = Vec::new();
    for lane in reports {
        for (kit, test, of_test) in lane.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
            if of_test.all_well() {
                report.merge(of_test);
            } else {
                failed.push((kit, test, of_test));
            }
        }
    }
    // As with the tests in the gate: what failed beside another runs again, and is named.
    let again = options.short && failed.len() <= SECOND_RUNS;
    for (kit, test, first) in failed {
        let second = again.then(|| played(kit, test));
        match second {
            Some(second) if second.all_well() => {
                report.again(&format!("{}/{}", kit.machine.name(), test.name), &first);
                report.merge(second);
            }
            _ => report.merge(first),
        }
    }
    Ok(())
}

fn play(
    test: &Test,
    kit: &Kit,
    vmsg: Option<&Vmsg>,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let dir = dirs::run_folder(&format!("{}-{}", test.name, kit.machine.name()), None)?;
    println!(
        "      {}/{}: logs in {}",
        kit.machine.name(),
        test.name,
        dir.display()
    );
    let mut stage = Stage {
        kit,
        vmsg,
        full: options.full,
        short: options.short,
        scene: Scene::new(dir),
        server: Server::start(http::FILE_SIZE)?,
        udp_port: tftp::start()?,
        link_flaps: false,
    };
    (test.play)(&mut stage, report)?;
    let dir = stage.scene.dir().to_owned();
    // Who has it open has ended after this.
    drop(stage);
    forget_large_files(&dir)
}

/// Removes captures and memories of guests from the folder of a run that went well.
fn forget_large_files(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let data = entry.metadata()?;
        if data.is_file() && data.len() > LARGE {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl Stage<'_> {
    fn vmsg(&self) -> Result<Vmsg> {
        self.vmsg.cloned().context("this test needs vmsg")
    }

    /// Both sides, if vmsg is tested: device host and proxy.
    fn sides(&mut self) -> Result<Option<(Id, Id)>> {
        let Some(vmsg) = self.vmsg else {
            return Ok(None);
        };
        Ok(Some((
            vmsg.serve(&mut self.scene, "serve")?,
            vmsg.proxy(&mut self.scene, "proxy")?,
        )))
    }

    fn board(&self) -> Board {
        let mut board = match self.vmsg {
            Some(_) => Board::new(
                Backend::VhostUser(NET_SOCKET.to_owned()),
                Backend::VhostUser(RNG_SOCKET.to_owned()),
            ),
            None => Board::new(Backend::Qemu, Backend::Qemu),
        };
        if self.full {
            board.cpus = 2;
            board.ram_mib = 1024;
        }
        board
    }

    /// Starts a guest and waits until it runs.
    fn guest(&mut self, name: &str, board: &Board, script: &str) -> Result<Guest> {
        let guest = self.launch(name, board, script)?;
        guest.booted(&mut self.scene)?;
        Ok(guest)
    }

    fn launch(&mut self, name: &str, board: &Board, script: &str) -> Result<Guest> {
        let settings = self.settings(TEST_MAC)?;
        Guest::start(
            &mut self.scene,
            name,
            self.kit,
            Hardware::Board(board),
            script,
            &settings,
        )
    }

    /// The variables of the guests' scripts; `mac` is the address of the network device under test.
    fn settings(&self, mac: &str) -> Result<[(&'static str, String); 8]> {
        let transport = match self.kit.machine {
            Machine::X86 => "/pci",
            Machine::Arm64 => "virtio_mmio",
        };
        Ok([
            ("OWN_MAC", OWN_MAC.to_owned()),
            ("TEST_MAC", mac.to_owned()),
            ("TRANSPORT", transport.to_owned()),
            ("PORT", self.server.port().to_string()),
            ("SUM", self.server.sha256().to_owned()),
            ("UDP_PORT", self.udp_port.to_string()),
            ("UDP_SUM", http::sum_of(tftp::content().as_slice())?),
            (
                "LINK",
                if self.link_flaps { "flaps" } else { "stays" }.to_owned(),
            ),
        ])
    }

    /// Lets a guest that runs `NEXT` go on to its end, and reports its checks.
    fn see_off(&mut self, guest: Guest, report: &mut Report) -> Result<()> {
        guest.mark(&mut self.scene, "waiting", ALL_CHECKS)?;
        guest.tell(&mut self.scene, "go on")?;
        self.finish(guest, report)
    }

    /// Waits for the guest's end and reports its checks.
    fn finish(&mut self, guest: Guest, report: &mut Report) -> Result<()> {
        let name = guest.name().to_owned();
        let checks = guest.finish(&mut self.scene, ALL_CHECKS)?;
        ensure!(!checks.is_empty(), "the guest {name} has checked nothing");
        for check in checks {
            report.add(check);
        }
        Ok(())
    }
}

/// A boot with many checks; and the two commands that look at the bus, before and while a guest uses it.
fn checks(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let sides = stage.sides()?;
    if sides.is_some() {
        look(stage, report, "before")?;
    }
    let board = stage.board();
    let guest = stage.guest("checks", &board, CHECKS)?;
    if sides.is_some() {
        look(stage, report, "while-used")?;
    }
    stage.finish(guest, report)?;
    if let Some((serve, proxy)) = sides {
        stage
            .scene
            .kill(proxy, Signal::TERM)
            .context("the proxy does not end on SIGTERM")?;
        stage
            .scene
            .kill(serve, Signal::TERM)
            .context("the device host does not end on SIGTERM")?;
    }
    Ok(())
}

/// `vmsg ls` and `vmsg ping`.
fn look(stage: &Stage, report: &mut Report, when: &str) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine.name();
    let mut run = |name: &str,
                   command: &str,
                   arguments: &[&str],
                   holds: &dyn Fn(&str) -> bool|
     -> Result<()> {
        let output = vmsg.look(stage.scene.dir(), command, arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = || {
            format!(
                "{}: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
        };
        report.check(
            &format!("{machine}/{name}-{when}"),
            output.status.success() && holds(&text),
            said,
        );
        Ok(())
    };
    run("ls", "ls", &[], &|text| {
        text.contains("net0") && text.contains("rng")
    })?;
    run("ls-json", "ls", &["--json"], &|text| {
        serde_json::from_str::<serde_json::Value>(text).is_ok() && text.contains("net0")
    })?;
    run("ping", "ping", &["-c", "5"], &|text| {
        text.contains("min/avg/p99/max")
    })
}

/// Guests follow one another on the same proxy: after one that powered off, and after one that was pulled out.
fn next_guest(stage: &mut Stage, report: &mut Report) -> Result<()> {
    stage.sides()?;
    let board = stage.board();
    for name in ["first", "second"] {
        let guest = stage.guest(name, &board, NEXT)?;
        stage.see_off(guest, report)?;
    }
    let pulled = stage.guest("pulled", &board, NEXT)?;
    pulled.mark(&mut stage.scene, "waiting", ALL_CHECKS)?;
    stage.scene.kill(pulled.id, Signal::KILL)?;
    let guest = stage.guest("last", &board, NEXT)?;
    stage.see_off(guest, report)
}

/// The device host is killed again and again while the guest pings and downloads.
fn device_host_killed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let kills = if stage.full { 50 } else { 10 };
    let (mut serve, _) = stage.sides()?.context("this test needs vmsg")?;
    let board = stage.board();
    endure(stage, report, &board, kills, |scene, n| {
        scene.kill(serve, Signal::KILL)?;
        serve = vmsg.serve(scene, &format!("serve-{n}"))?;
        Ok(())
    })
}

/// The proxy is killed while the guest pings and downloads; QEMU connects again to the next one.
fn proxy_killed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let kills = if stage.full { 10 } else { 3 };
    let (_, mut proxy) = stage.sides()?.context("this test needs vmsg")?;
    // QEMU connects a network device again, but not an entropy device: with reconnect= on its chardev it aborts at
    // start (seen in 7.2.22).
    stage.link_flaps = true;
    let board = Board {
        rng: Backend::Qemu,
        ..stage.board()
    };
    endure(stage, report, &board, kills, |scene, n| {
        scene.kill(proxy, Signal::KILL)?;
        proxy = vmsg.proxy(scene, &format!("proxy-{n}"))?;
        Ok(())
    })
}

/// The proxy is started before the device host.
fn proxy_first(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    vmsg.proxy(&mut stage.scene, "proxy")?;
    vmsg.serve(&mut stage.scene, "serve")?;
    let board = stage.board();
    let guest = stage.guest("after", &board, NEXT)?;
    stage.see_off(guest, report)
}

/// What `vmsg proxy --print-qemu` prints boots a guest with both devices.
fn printed_arguments(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    stage.sides()?;
    let arguments = vmsg.printed_arguments(stage.scene.dir(), stage.kit.machine, &PROXY)?;
    let mac = arguments
        .iter()
        .find_map(|a| Some(a.split_once("mac=")?.1.split(',').next()?.to_owned()));
    let settings = stage.settings(&mac.context("no address of a network device is printed")?)?;
    let hardware = Hardware::Arguments(&arguments);
    let guest = Guest::start(
        &mut stage.scene,
        "printed",
        stage.kit,
        hardware,
        NEXT,
        &settings,
    )?;
    guest.booted(&mut stage.scene)?;
    stage.see_off(guest, report)
}

/// RAM that QEMU does not share: the proxy sees it and names the remedy.
fn memory_not_shared(stage: &mut Stage, _: &mut Report) -> Result<()> {
    let (_, proxy) = stage.sides()?.context("this test needs vmsg")?;
    let board = Board {
        ram_shared: false,
        reconnect: false,
        ..stage.board()
    };
    let guest = stage.launch("unshared", &board, NEXT)?;
    stage.scene.may_end(guest.id);
    stage.scene.expect(
        (proxy, Stream::Err),
        "the proxy's advice to use share=on",
        ALL_CHECKS,
        |line| line.text.contains("share=on").then_some(()),
    )
}
