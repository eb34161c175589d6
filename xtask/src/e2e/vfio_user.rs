// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whole PCI devices over vfio-user: a network and an entropy device in one guest of QEMU 11.1.

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::endure::{ENDURE, hold_back, withstand};
use super::{ALL_CHECKS, CHECKS, EXERCISES, NEXT, STEP, Stage};
use crate::guest::Guest;
use crate::http;
use crate::kit::Kit;
use crate::lspci::{self, Expected};
use crate::machine::Machine;
use crate::qemu::{Backend, Board, Hardware, TEST_MAC};
use crate::report::Report;
use crate::scene::{Id, Stream};
use crate::secret;
use crate::vmsg::{BUS, NET_SOCKET, RNG_SOCKET};

/// Parts of the guests' scripts.
const FIRST: &str = include_str!("../guest/first.sh");
const PCI: &str = include_str!("../guest/pci.sh");
const SECRET: &str = include_str!("../guest/secret.sh");
const REBOOT: &str = include_str!("../guest/reboot.sh");
const GONE: &str = include_str!("../guest/gone.sh");

/// Requests to the entropy device, and how often each driver is unbound and bound.
const REQUESTS: u32 = 20_000;
const REBINDS: u32 = 20;
/// The same in the short run.
const FEW_REQUESTS: u32 = 2_000;
const FEW_REBINDS: u32 = 4;
/// What stands in for all checks in a short run.
const FEW_CHECKS: &str = "check dhcp lease eth1\ncheck http fetch /tmp/file\n";

/// What is particular about a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    /// `isolate=on`: nothing of the guest's memory is lent.
    isolate: bool,
    /// There is an IOMMU.
    iommu: bool,
    /// No MSI-X in the guest.
    intx: bool,
    /// QEMU shares the guest's memory.
    shared: bool,
    /// The newest kernel.
    new_kernel: bool,
}

const PLAIN: Variant = Variant {
    isolate: false,
    iommu: false,
    intx: false,
    shared: true,
    new_kernel: false,
};

impl Variant {
    fn board(self, stage: &Stage) -> Board {
        let (net, rng) = match stage.vmsg {
            Some(_) => backends(),
            None => (Backend::Pci, Backend::Pci),
        };
        let mut board = Board::new(net, rng);
        board.iommu = self.iommu;
        board.ram_shared = self.shared;
        board.may_reboot = true;
        // Memory is not wiped when it is taken: what was there before would be seen.
        board.words.push("init_on_alloc=0");
        if self.intx {
            board.words.push("pci=nomsi");
        }
        if stage.full {
            board.cpus = 2;
        }
        board
    }

    fn settings(self, stage: &Stage) -> Result<Vec<(&'static str, String)>> {
        let mut settings = stage.settings(TEST_MAC)?.to_vec();
        settings.retain(|(name, _)| *name != "TRANSPORT");
        let yes = |is| if is { "yes" } else { "no" }.to_owned();
        settings.extend([
            ("TRANSPORT", "/pci".to_owned()),
            (
                "INTERRUPTS",
                if self.intx { "INTx" } else { "MSI" }.to_owned(),
            ),
            ("IOMMU", yes(self.iommu)),
            ("REQUESTS", repetitions(stage).0.to_string()),
            ("REBINDS", repetitions(stage).1.to_string()),
            ("ENTROPY", "read".to_owned()),
        ]);
        Ok(settings)
    }
}

/// QEMU, kernel and drivers of a guest with such devices.
pub(crate) fn kit(kit: &Kit, iommu: bool, new_kernel: bool) -> Result<Kit> {
    let mut kit = kit.with_new_qemu()?;
    if new_kernel || needs_new_kernel(kit.machine, iommu) {
        kit = kit.with_new_kernel()?;
    }
    Ok(match kit.machine {
        Machine::X86 => kit,
        // It must be there before what is behind it.
        Machine::Arm64 if iommu => kit.with_modules(&["virtio_iommu", "virtio_pci"]),
        Machine::Arm64 => kit.with_modules(&["virtio_pci"]),
    })
}

/// Whether Debian 12's own kernel is too old: 6.1 for arm64 has no driver for virtio-iommu.
pub(crate) fn needs_new_kernel(machine: Machine, iommu: bool) -> bool {
    iommu && machine == Machine::Arm64
}

/// Both devices over vfio-user.
pub(crate) fn backends() -> (Backend, Backend) {
    (
        Backend::VfioUser(NET_SOCKET.to_owned()),
        Backend::VfioUser(RNG_SOCKET.to_owned()),
    )
}

/// The network device: its address is its own affair here, not QEMU's.
pub(crate) fn net_device() -> String {
    format!("{},mac={TEST_MAC}", crate::vmsg::NET)
}

/// Fronts for both.
pub(crate) fn fronts(isolate: bool) -> [String; 2] {
    let isolate = if isolate { ",isolate=on" } else { "" };
    [
        format!("vfio-user,socket={NET_SOCKET},dev=net0{isolate}"),
        format!("vfio-user,socket={RNG_SOCKET},dev=1{isolate}"),
    ]
}

/// Requests to the entropy device, and how often each driver is unbound and bound.
fn repetitions(stage: &Stage) -> (u32, u32) {
    if stage.short {
        (FEW_REQUESTS, FEW_REBINDS)
    } else {
        (REQUESTS, REBINDS)
    }
}

/// Everything in one boot, and a boot after it: all checks, the functions by lspci, requests, drivers bound again,
/// the device host killed under traffic, a reboot.
pub(super) fn whole(stage: &mut Stage, report: &mut Report) -> Result<()> {
    play(stage, report, PLAIN)
}

/// The same with the newest kernel.
pub(super) fn new_kernel(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        new_kernel: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// The same while nothing of the guest's memory is lent.
pub(super) fn isolate(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        isolate: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// The same with the newest kernel.
pub(super) fn isolate_new_kernel(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        isolate: true,
        new_kernel: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// Behind an IOMMU, whose mappings the device host follows.
pub(super) fn iommu(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        iommu: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// Behind an IOMMU, with the newest kernel.
pub(super) fn iommu_new_kernel(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        iommu: true,
        new_kernel: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// Behind an IOMMU while nothing is lent.
pub(super) fn iommu_isolate(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        iommu: true,
        isolate: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// The guest's memory is QEMU's own: it is read and written by messages.
pub(super) fn unshared(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        shared: false,
        ..PLAIN
    };
    play(stage, report, variant)
}

/// Without MSI-X.
pub(super) fn intx(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let variant = Variant {
        intx: true,
        ..PLAIN
    };
    play(stage, report, variant)
}

fn play(stage: &mut Stage, report: &mut Report, variant: Variant) -> Result<()> {
    let kit = kit(stage.kit, variant.iommu, variant.new_kernel)?.with_lspci()?;
    let mut serve = sides(stage, variant)?;
    let board = variant.board(stage);
    let secret = secret::random()?;
    // Text, since it is sent over HTTP.
    let token = secret::hex(&secret::random()?[..secret::LENGTH / 2]);
    let mut settings = variant.settings(stage)?;
    settings.push(("SECRET", secret::hex(&secret)));
    settings.push(("TOKEN", token.clone()));
    // One guest of the short run has all checks, the kills and the reboot.
    let all = !stage.short || variant == PLAIN;
    let mut parts = if all {
        vec![FIRST, CHECKS, PCI]
    } else {
        vec![FIRST, EXERCISES, FEW_CHECKS, PCI]
    };
    if serve.is_some() {
        parts.push(SECRET);
        if all {
            parts.extend(["mark enduring\nread -r answer\n", ENDURE]);
        }
    }
    if all {
        parts.push(REBOOT);
    }
    let guest = Guest::start(
        &mut stage.scene,
        "whole",
        &kit,
        Hardware::Board(&board),
        &parts.join("\n"),
        &settings,
    )?;
    let kernel = guest.booted(&mut stage.scene)?;
    println!("      kernel {kernel}, {}", kit.qemu);
    guest.mark(&mut stage.scene, "turn", STEP)?;
    guest.tell(&mut stage.scene, "first")?;

    let (_, begun) = guest.mark(&mut stage.scene, "requests", ALL_CHECKS)?;
    functions(stage, report, &guest, variant);
    let (_, ended) = guest.mark(&mut stage.scene, "requested", ALL_CHECKS)?;
    let (_, bound) = guest.mark(&mut stage.scene, "rebound", ALL_CHECKS)?;
    let (requests, rebinds) = repetitions(stage);
    println!(
        "      {requests} requests in {:.1?}, {rebinds} times unbound and bound in {:.1?}",
        ended - begun,
        bound - ended
    );
    if let Some(host) = serve {
        hidden(stage, report, &guest, host, variant, &secret, &token)?;
        if !all {
            return stage.finish(guest, report);
        }
        let vmsg = stage.vmsg()?;
        let kills = if stage.full { 10 } else { 3 };
        guest.mark(&mut stage.scene, "enduring", STEP)?;
        hold_back(stage, kills);
        guest.tell(&mut stage.scene, "go on")?;
        let outcome = withstand(stage, &guest, kills, |scene, n| {
            let old = serve.take().context("a device host")?;
            scene.kill(old, Signal::KILL)?;
            let devices = [&net_device(), "rng"];
            serve = Some(vmsg.serve_on(scene, &format!("serve-{n}"), BUS, &devices)?);
            Ok(())
        })?;
        outcome.tell(stage, report)?;
    }
    if !all {
        return stage.finish(guest, report);
    }
    guest.mark(&mut stage.scene, "rebooting", ALL_CHECKS)?;
    guest.booted(&mut stage.scene)?;
    guest.mark(&mut stage.scene, "turn", STEP)?;
    guest.tell(&mut stage.scene, "second")?;
    stage.finish(guest, report)
}

/// Device host and proxy with both devices; gives the device host.
fn sides(stage: &mut Stage, variant: Variant) -> Result<Option<Id>> {
    let Some(vmsg) = stage.vmsg.cloned() else {
        return Ok(None);
    };
    let devices = [&net_device(), "rng"];
    let serve = vmsg.serve_on(&mut stage.scene, "serve", BUS, &devices)?;
    let fronts = fronts(variant.isolate);
    vmsg.proxy_on(&mut stage.scene, BUS, &[&fronts[0], &fronts[1]])?;
    Ok(Some(serve))
}

/// What lspci in the guest says about both functions.
fn functions(stage: &Stage, report: &mut Report, guest: &Guest, variant: Variant) {
    let wanted = [
        ("net", "0200", "1af4:1041", 2),
        ("rng", "00ff", "1af4:1044", 1),
    ];
    for (name, class, ids, queues) in wanted {
        let begin = format!("LSPCI {name} ");
        let text: String = stage
            .scene
            .lines(guest.id, Stream::Out)
            .iter()
            .filter_map(|line| Some(format!("{}\n", line.text.strip_prefix(&begin)?)))
            .collect();
        let expected = Expected {
            class,
            ids,
            queues,
            config: name == "net",
            msix: !variant.intx,
        };
        let problems = lspci::problems(&text, &expected);
        report.check(
            &format!("{}/{}/lspci-{name}", stage.kit.machine.name(), guest.name()),
            problems.is_empty(),
            || format!("{}:\n{text}", problems.join("; ")),
        );
    }
}

/// A secret in the guest's memory is where it may be, and nowhere else: before, in the middle of and after traffic.
fn hidden(
    stage: &mut Stage,
    report: &mut Report,
    guest: &Guest,
    host: Id,
    variant: Variant,
    secret: &[u8],
    token: &str,
) -> Result<()> {
    let lent = !variant.isolate && variant.shared;
    let machine = stage.kit.machine.name();
    let pid = stage.scene.pid(host);
    let mut look = |when: &str| -> Result<()> {
        let found = secret::search(pid, secret)?;
        let seen = !found.mapped.is_empty() || !found.open.is_empty();
        // With an IOMMU it depends on what lies beside what is mapped.
        if lent && variant.iommu {
            println!(
                "      secret {when} {}",
                if seen { "in reach" } else { "not in reach" }
            );
        } else {
            let name = if lent { "seen" } else { "hidden" };
            report.check(
                &format!("{machine}/{}/secret-{name}-{when}", guest.name()),
                seen == lent,
                || format!("{found:?}"),
            );
        }
        if when == "after" {
            let sent = secret::search(pid, token.as_bytes())?;
            println!(
                "      searched {} mappings and {} files, {} MiB",
                sent.mappings,
                sent.files,
                sent.bytes >> 20
            );
            // What was sent went through the device host, which may have it anywhere in its own memory; but buffers
            // that are shared have been wiped. Memory that is lent, in turn, has it somewhere.
            let shared = |place: &&String| place.contains("memfd:");
            let places: Vec<_> = sent
                .mapped
                .iter()
                .chain(&sent.open)
                .filter(shared)
                .collect();
            let name = if lent {
                "sent-bytes-seen"
            } else {
                "sent-bytes-wiped"
            };
            report.check(
                &format!("{machine}/{}/{name}", guest.name()),
                places.is_empty() != lent,
                || format!("{places:?} of {sent:?}"),
            );
        }
        Ok(())
    };
    guest.mark(&mut stage.scene, "planted", ALL_CHECKS)?;
    look("before")?;
    stage.server.open_to(http::FILE_SIZE / 2);
    guest.tell(&mut stage.scene, "go on")?;
    guest.mark(&mut stage.scene, "fetching", STEP)?;
    look("during")?;
    stage.server.open_to(http::FILE_SIZE);
    guest.tell(&mut stage.scene, "go on")?;
    guest.mark(&mut stage.scene, "sent", ALL_CHECKS)?;
    look("after")?;
    guest.tell(&mut stage.scene, "go on")
}

/// The device host is killed and stays away: QEMU lives, and the guest does not hang. Then there is another one.
pub(super) fn gone(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let (guest, serve) = without_device_host(stage, Signal::KILL)?;
    stage.scene.wait_end(serve, STEP)?;
    let vmsg = stage.vmsg()?;
    let devices = [&net_device(), "rng"];
    vmsg.serve_on(&mut stage.scene, "serve-again", BUS, &devices)?;
    stage.finish(guest, report)
}

/// The device host stands still for a while: it keeps its connection and answers nothing.
pub(super) fn stuck(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let (guest, serve) = without_device_host(stage, Signal::STOP)?;
    stage.scene.signal(serve, Signal::CONT)?;
    stage.finish(guest, report)
}

/// A guest that has done all it can without its device host, to which `signal` was sent.
fn without_device_host(stage: &mut Stage, signal: Signal) -> Result<(Guest, Id)> {
    let kit = kit(stage.kit, false, false)?.with_lspci()?;
    let serve = sides(stage, PLAIN)?.context("this test needs vmsg")?;
    let board = PLAIN.board(stage);
    let settings = PLAIN.settings(stage)?;
    let guest = Guest::start(
        &mut stage.scene,
        "without",
        &kit,
        Hardware::Board(&board),
        GONE,
        &settings,
    )?;
    guest.mark(&mut stage.scene, "ready", ALL_CHECKS)?;
    stage.scene.may_end(serve);
    stage.scene.signal(serve, signal)?;
    guest.tell(&mut stage.scene, "it is gone")?;
    guest.mark(&mut stage.scene, "without", ALL_CHECKS)?;
    for line in stage.scene.lines(guest.id, Stream::Out) {
        if let Some((_, figures)) = line.text.split_once("MARK took ") {
            println!("      {figures}");
        }
    }
    Ok((guest, serve))
}

/// What `vmsg proxy --print-qemu` prints boots a guest with both devices.
pub(super) fn printed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = kit(stage.kit, false, false)?;
    sides(stage, PLAIN)?.context("this test needs vmsg")?;
    let fronts = fronts(false);
    let options = [
        ("--bus", BUS),
        ("--front", fronts[0].as_str()),
        ("--front", fronts[1].as_str()),
    ];
    let dir = stage.scene.dir();
    let arguments = stage
        .vmsg()?
        .printed_arguments(dir, kit.machine, &options)?;
    let settings = PLAIN.settings(stage)?;
    let hardware = Hardware::Arguments(&arguments);
    let guest = Guest::start(&mut stage.scene, "printed", &kit, hardware, NEXT, &settings)?;
    guest.booted(&mut stage.scene)?;
    stage.see_off(guest, report)
}

/// Guests follow one another on the same sockets, one of them after QEMU was killed.
pub(super) fn next_guest(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = kit(stage.kit, false, false)?.with_lspci()?;
    sides(stage, PLAIN)?;
    let board = PLAIN.board(stage);
    let settings = PLAIN.settings(stage)?;
    for (name, pulled) in [("first", false), ("pulled", true), ("last", false)] {
        let hardware = Hardware::Board(&board);
        let guest = Guest::start(&mut stage.scene, name, &kit, hardware, NEXT, &settings)?;
        guest.booted(&mut stage.scene)?;
        if pulled {
            guest.mark(&mut stage.scene, "waiting", ALL_CHECKS)?;
            stage.scene.kill(guest.id, Signal::KILL)?;
        } else {
            stage.see_off(guest, report)?;
        }
    }
    Ok(())
}
