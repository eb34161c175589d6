// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two machines joined by shared memory: demo 2b in each memory mode, who may die in it, and what the device side
//! can see.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{STEP, Stage};
use crate::demo2b::{self, Order};
use crate::inner::Inside;
use crate::machine::Machine;
use crate::outer::Process;
use crate::pair::{GATEWAY, Mode, Pair, Plan, Programs};
use crate::report::Report;
use crate::scene::Scene;
use crate::secret;

/// The guest of the tests in which somebody dies: pings until it is told to stop, and keeps a secret.
const PING: &str = include_str!("../guest/ping.sh");
/// Longest time until pings are answered again.
const BACK: Duration = Duration::from_secs(90);

/// Nothing of the guest is shared, the device side is there first.
pub(super) fn bounce(stage: &mut Stage, report: &mut Report) -> Result<()> {
    plain(stage, report, plan(Mode::Bounce), Order::DeviceFirst)
}

/// The guest lives in a NUMA node that both machines see; the driver side is there first.
pub(super) fn segment(stage: &mut Stage, report: &mut Report) -> Result<()> {
    plain(stage, report, plan(Mode::Segment), Order::DriverFirst)
}

/// The guest lives in the memory of a PCI device.
pub(super) fn segment_bar(stage: &mut Stage, report: &mut Report) -> Result<()> {
    if stage.kit.machine == Machine::Arm64 {
        println!(
            "skip  arm64/demo-2b-segment-bar: KVM executes nothing from a device's memory there"
        );
        return Ok(());
    }
    let plan = Plan {
        bar: true,
        ..plan(Mode::Segment)
    };
    plain(stage, report, plan, Order::Together)
}

/// All of machine A is shared.
pub(super) fn whole(stage: &mut Stage, report: &mut Report) -> Result<()> {
    plain(stage, report, plan(Mode::Whole), Order::Together)
}

/// QEMU's two pages.
pub(super) fn bounce_spsc(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let plan = Plan {
        layout: "spsc",
        ..plan(Mode::Bounce)
    };
    plain(stage, report, plan, Order::Together)
}

fn plan(mode: Mode) -> Plan {
    Plan {
        mode,
        bar: false,
        layout: "amp",
    }
}

fn pair(stage: &Stage, plan: Plan) -> Result<Pair> {
    let host = stage.vmsg()?;
    let programs = Programs::build(stage.kit.machine, None, Some(&host))?;
    Pair::new(stage.kit, plan, programs)
}

/// The demo as it is shown.
fn plain(stage: &mut Stage, report: &mut Report, plan: Plan, order: Order) -> Result<()> {
    let mut pair = pair(stage, plan)?;
    let settings = demo2b::settings(&stage.server);
    let inside = Inside::new(stage.kit, crate::demo::SCRIPT, &settings)?;
    let scene = &mut stage.scene;
    pair.start_server(scene)?;
    let (serve, proxy, mut inner) = demo2b::bring_up(scene, &mut pair, inside, order)?;
    demo2b::watch(scene, &mut inner, &stage.server, stage.kit.machine)?;
    let failures = inner.failures(scene);
    let name = format!("{}/demo-2b-{}", stage.kit.machine.name(), plan.mode.name());
    report.check(&name, failures.is_empty(), || failures.join("; "));
    pair.end(scene, &serve, &proxy)
}

/// While a guest pings: its secret is looked for on the device side, then each part is killed and comes back.
pub(super) fn deaths(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let machine = stage.kit.machine;
    let check = |report: &mut Report, name: &str, result: Result<()>| {
        report.result(&format!("{}/demo-2b-deaths/{name}", machine.name()), result);
    };
    let mut pair = pair(stage, plan(Mode::Bounce))?;
    let secret = secret::hex(&secret::random()?);
    let mut settings = demo2b::settings(&stage.server);
    settings.push(("SECRET", secret.clone()));
    let inside = Inside::new(stage.kit, PING, &settings)?;
    let scene = &mut stage.scene;
    let server = pair.start_server(scene)?;
    let (mut serve, mut proxy, mut inner) =
        demo2b::bring_up(scene, &mut pair, inside, Order::DeviceFirst)?;
    inner.mark(scene, "pinging", demo2b::INNER_BOOT)?;
    answered(scene, &mut inner, STEP)?;

    // Whatever B or anything in it could map: B's own memory and what it shares with A.
    let a = pair.a.as_ref().context("machine A is there")?.id;
    let b = pair.b.as_ref().context("machine B is there")?.id;
    let own = secret::search(scene.pid(a), secret.as_bytes())?;
    check(report, "secret-in-machine-a", {
        let there = !own.mapped.is_empty();
        there
            .then_some(())
            .context("the guest's secret is not even in its own machine")
    });
    let found = secret::search(scene.pid(b), secret.as_bytes())?;
    check(report, "secret-not-in-machine-b", {
        let none = found.mapped.is_empty() && found.open.is_empty();
        none.then_some(())
            .with_context(|| format!("machine B has the guest's secret: {found:?}"))
    });

    // The device host: the next one takes its place.
    pair.b()?.stop(scene, &serve, "KILL")?;
    serve = pair.serve(scene)?;
    check(
        report,
        "device-host-killed",
        answered(scene, &mut inner, BACK),
    );
    // The proxy: the inner QEMU connects again to the next one.
    pair.a()?.stop(scene, &proxy, "KILL")?;
    proxy = pair.proxy(scene)?;
    check(report, "proxy-killed", answered(scene, &mut inner, BACK));
    // The server: who has its doorbells goes on.
    scene.kill(server, Signal::KILL)?;
    pair.server = None;
    check(report, "server-killed", answered(scene, &mut inner, BACK));
    inner.mark(scene, "alive", STEP)?;
    pair.end(scene, &serve, &proxy)
}

/// Machine B is switched off under a guest that pings, and comes back; then A under the device host, and comes back.
pub(super) fn power(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let machine = stage.kit.machine;
    let check = |report: &mut Report, name: &str, result: Result<()>| {
        report.result(&format!("{}/demo-2b-power/{name}", machine.name()), result);
    };
    let mut pair = pair(stage, plan(Mode::Bounce))?;
    let settings = demo2b::settings(&stage.server);
    let inside = Inside::new(stage.kit, PING, &settings)?;
    let scene = &mut stage.scene;
    pair.start_server(scene)?;
    let (_, mut proxy, mut inner) =
        demo2b::bring_up(scene, &mut pair, inside.clone(), Order::Together)?;
    inner.mark(scene, "pinging", demo2b::INNER_BOOT)?;
    answered(scene, &mut inner, STEP)?;

    let b = pair.b.take().context("machine B is there")?;
    scene.kill(b.id, Signal::KILL)?;
    // The guest does not hang in its driver: it goes on counting.
    check(
        report,
        "guest-lives-without-b",
        inner.mark(scene, "alive", STEP).map(drop),
    );
    check(report, "proxy-says-so", {
        let gone = |line: &crate::scene::Line| line.text.contains("lost").then_some(());
        proxy.expect(scene, "that the device host is lost", STEP, gone)
    });
    pair.start_b(scene, "b-again")?;
    pair.ready_b(scene)?;
    let mut serve = pair.serve(scene)?;
    check(report, "b-comes-back", answered(scene, &mut inner, BACK));

    let a = pair.a.take().context("machine A is there")?;
    scene.kill(a.id, Signal::KILL)?;
    pair.start_a(scene, "a-again", inside)?;
    pair.ready_a(scene)?;
    proxy = pair.proxy(scene)?;
    inner = pair.inner(scene, true)?;
    inner.mark(scene, "pinging", demo2b::INNER_BOOT)?;
    check(report, "a-comes-back", answered(scene, &mut inner, BACK));
    ensure!(!serve.ended(scene), "the device host has ended");
    serve.look(scene);
    pair.end(scene, &serve, &proxy)
}

/// Waits for three answers to pings that were sent from now on: what came before is passed over.
fn answered(scene: &mut Scene, inner: &mut Process, within: Duration) -> Result<()> {
    inner.look(scene);
    let text = format!("bytes from {GATEWAY}");
    for _ in 0..3 {
        inner.expect(scene, "an answer to a ping", within, |line| {
            line.text.contains(&text).then_some(())
        })?;
    }
    Ok(())
}
