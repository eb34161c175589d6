// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two machines joined by shared memory: demo 2b in each memory mode, who may die in it, and what the device side
//! can see.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{ALL_CHECKS, STEP, Stage};
use crate::demo2b::{self, Order};
use crate::http;
use crate::inner::Inside;
use crate::machine::Machine;
use crate::pair::{B_MIB, GATEWAY, Mode, Pair, Plan, Programs, SHARED};
use crate::proof::Console;
use crate::report::Report;
use crate::scene::Scene;
use crate::secret::{self, Search};
use crate::shell::Process;

/// The guest of the tests in which somebody dies: pings until it is told to stop.
const PING: &str = include_str!("../guest/ping.sh");
/// What a guest does after the demo: its memory is full of a secret while it has traffic.
const SECRET: &str = include_str!("../guest/inner-secret.sh");
/// Bytes of the secret; all of the guest's memory repeats them, so that any 31 bytes of it have them.
const SECRET_LENGTH: usize = 16;
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

/// The demo as it is shown, and after it a guest full of a secret; the short run has that on x86 only.
fn plain(stage: &mut Stage, report: &mut Report, plan: Plan, order: Order) -> Result<()> {
    let mut pair = pair(stage, plan)?;
    let machine = stage.kit.machine;
    let variant = match (plan.bar, plan.layout) {
        (true, _) => "-bar",
        (_, "spsc") => "-spsc",
        _ => "",
    };
    let name = format!("{}/demo-2b-{}{variant}", machine.name(), plan.mode.name());
    let has_secret = !stage.short || machine == Machine::X86;
    let secret = secret::random()?;
    // Text, since it is sent over HTTP.
    let token = secret::hex(&secret::random()?[..SECRET_LENGTH]);
    let mut settings = demo2b::settings(&stage.server);
    settings.push(("SECRET", secret::hex(&secret[..SECRET_LENGTH])));
    settings.push(("TOKEN", token.clone()));
    settings.push(("SUM", stage.server.sha256().to_owned()));
    let script = match has_secret {
        true => format!("{}\n{SECRET}", crate::demo::SCRIPT),
        false => crate::demo::SCRIPT.to_owned(),
    };
    if has_secret {
        // Memory is not wiped when it is taken: what was there before would be seen.
        pair.inner_words = "init_on_alloc=0";
    }
    let inside = Inside::new(stage.kit, &script, &settings)?;
    pair.start_server(&mut stage.scene)?;
    let (serve, proxy, mut inner) = demo2b::bring_up(&mut stage.scene, &mut pair, inside, order)?;
    demo2b::watch(&mut stage.scene, &mut inner, &stage.server, machine)?;
    if has_secret {
        let hidden = Hidden {
            name: &name,
            lent: plan.mode != Mode::Bounce,
            secret: &secret[..SECRET_LENGTH],
            token: &token,
        };
        hidden.look(stage, report, &mut pair, &mut inner)?;
    }
    demo2b::done(&mut stage.scene, &mut inner)?;
    let failures = inner.failures(&stage.scene);
    report.check(&name, failures.is_empty(), || failures.join("; "));
    pair.end(&mut stage.scene, &serve, &proxy)
}

/// What must not be seen, or must be where memory is lent.
struct Hidden<'a> {
    name: &'a str,
    /// Machine B sees the guest's memory.
    lent: bool,
    /// Never sent.
    secret: &'a [u8],
    /// Sent.
    token: &'a str,
}

impl Hidden<'_> {
    /// The device side is searched — all of machine B, and the ivshmem server with the memory of both — before, in the
    /// middle of and after traffic of a guest that is full of the secret.
    fn look(
        &self,
        stage: &mut Stage,
        report: &mut Report,
        pair: &mut Pair,
        inner: &mut Process,
    ) -> Result<()> {
        let begun = stage.scene.now();
        stage.server.open_to(0);
        let (size, _) = inner.mark(&mut stage.scene, "planted", ALL_CHECKS)?;
        let planted = stage.scene.now();
        self.search(stage, report, pair, "before")?;
        let looked = stage.scene.now();
        stage.server.open_to(http::FILE_SIZE / 2);
        let scene = &mut stage.scene;
        pair.a()?.tell(scene, inner, "go on")?;
        inner.mark(scene, "fetching", STEP)?;
        self.search(stage, report, pair, "during")?;
        stage.server.open_to(http::FILE_SIZE);
        pair.a()?.tell(&mut stage.scene, inner, "go on")?;
        inner.mark(&mut stage.scene, "sent", ALL_CHECKS)?;
        let searched = self.search(stage, report, pair, "after")?;
        self.wiped(stage, report, pair)?;
        println!(
            "      {size} of secret, planted in {:.1?}; searched {} mappings and {} files, {} MiB, in {:.1?}; all this took {:.1?}",
            planted - begun,
            searched.mappings,
            searched.files,
            searched.bytes >> 20,
            looked - planted,
            stage.scene.now() - begun,
        );
        pair.a()?.tell(&mut stage.scene, inner, "go on")
    }

    fn search(
        &self,
        stage: &Stage,
        report: &mut Report,
        pair: &Pair,
        when: &str,
    ) -> Result<Search> {
        let found = device_side(&stage.scene, pair, self.secret)?;
        let seen = !found.mapped.is_empty() || !found.open.is_empty();
        let name = if self.lent { "seen" } else { "hidden" };
        report.check(
            &format!("{}/secret-{name}-{when}", self.name),
            seen == self.lent,
            || format!("{found:?}"),
        );
        if !self.lent && when == "after" {
            let a = pair.a.as_ref().context("machine A is there")?.id;
            let own = secret::search(stage.scene.pid(a), self.secret)?;
            report.check(
                &format!("{}/secret-seen-in-machine-a", self.name),
                !own.mapped.is_empty(),
                || format!("{own:?}"),
            );
        }
        Ok(found)
    }

    /// What was sent is what machine B was to have, and it may be anywhere in its own memory; but no more in what it
    /// shares with A, where nothing of the guest is to be.
    fn wiped(&self, stage: &Stage, report: &mut Report, pair: &Pair) -> Result<()> {
        let sent = device_side(&stage.scene, pair, self.token.as_bytes())?;
        let places = || sent.mapped.iter().chain(&sent.open);
        let in_shared: Vec<_> = places().filter(|p| p.contains(SHARED)).collect();
        if !self.lent {
            report.check(
                &format!("{}/sent-bytes-wiped", self.name),
                in_shared.is_empty(),
                || format!("{in_shared:?}"),
            );
        }
        report.check(
            &format!("{}/sent-bytes-came", self.name),
            places().next().is_some(),
            || format!("what was sent is nowhere in machine B: {sent:?}"),
        );
        Ok(())
    }
}

/// Searches all that the device side has: machine B, whose memory is its QEMU's, with what is mapped into it, and the
/// server, which has the memory that both machines map.
fn device_side(scene: &Scene, pair: &Pair, bytes: &[u8]) -> Result<Search> {
    let b = pair.b.as_ref().context("machine B is there")?.id;
    let server = pair.server.context("the server is there")?;
    let mut found = secret::search(scene.pid(b), bytes)?;
    ensure!(
        found.bytes > u64::from(B_MIB) << 20,
        "not all of machine B can be read: {found:?}"
    );
    let more = secret::search(scene.pid(server), bytes)?;
    found.mappings += more.mappings;
    found.files += more.files;
    found.bytes += more.bytes;
    found.mapped.extend(more.mapped);
    found.open.extend(more.open);
    Ok(found)
}

/// Who may die: nothing of the guest is shared.
pub(super) fn deaths(stage: &mut Stage, report: &mut Report) -> Result<()> {
    die(stage, report, plan(Mode::Bounce))
}

/// Who may die: the guest lives in a NUMA node that both machines see.
pub(super) fn deaths_segment(stage: &mut Stage, report: &mut Report) -> Result<()> {
    die(stage, report, plan(Mode::Segment))
}

/// While a guest pings, each part is killed and comes back.
fn die(stage: &mut Stage, report: &mut Report, plan: Plan) -> Result<()> {
    let name = format!(
        "{}/demo-2b-deaths/{}",
        stage.kit.machine.name(),
        plan.mode.name()
    );
    let check = |report: &mut Report, what: &str, result: Result<()>| {
        report.result(&format!("{name}/{what}"), result);
    };
    let mut pair = pair(stage, plan)?;
    let settings = demo2b::settings(&stage.server);
    let inside = Inside::new(stage.kit, PING, &settings)?;
    let scene = &mut stage.scene;
    let server = pair.start_server(scene)?;
    let (mut serve, mut proxy, mut inner) =
        demo2b::bring_up(scene, &mut pair, inside, Order::DeviceFirst)?;
    inner.mark(scene, "pinging", demo2b::INNER_BOOT)?;
    answered(scene, &mut inner, STEP)?;

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

/// Who is switched off: nothing of the guest is shared.
pub(super) fn power(stage: &mut Stage, report: &mut Report) -> Result<()> {
    switch(stage, report, plan(Mode::Bounce))
}

/// Who is switched off: the guest lives in a NUMA node that both machines see.
pub(super) fn power_segment(stage: &mut Stage, report: &mut Report) -> Result<()> {
    switch(stage, report, plan(Mode::Segment))
}

/// Machine B is switched off under a guest that pings, and comes back; then A under the device host, and comes back.
fn switch(stage: &mut Stage, report: &mut Report, plan: Plan) -> Result<()> {
    let name = format!(
        "{}/demo-2b-power/{}",
        stage.kit.machine.name(),
        plan.mode.name()
    );
    let check = |report: &mut Report, what: &str, result: Result<()>| {
        report.result(&format!("{name}/{what}"), result);
    };
    let mut pair = pair(stage, plan)?;
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
