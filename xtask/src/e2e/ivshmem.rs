// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ivshmem` in a machine and on the host, joined by our server and stock ivshmem devices: memory, doorbells and
//! files in both directions, by VFIO and by sysfs; and what memory of a device on arm64 does not bear.

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

use super::{STEP, Stage};
use crate::cross;
use crate::http;
use crate::machine::Machine;
use crate::outer::{self, MESSAGES, WINDOW};
use crate::proof::Console;
use crate::report::Report;
use crate::scene::{Id, Scene, Stream};
use crate::shell::Shell;
use crate::vmsg::Vmsg;

/// The server's socket, and the file that is the memory of the device without doorbells.
const SOCKET: &str = "ivshmem.sock";
const PLAIN: &str = "plain.mem";
/// Bytes of the files that are copied: more than the memory, and no multiple of anything.
const FILE: usize = 3_000_001;
/// Exit status of a shell's command that SIGBUS has ended.
const SIGBUS: &str = "135";

/// Both sides.
struct Link<'s, 'k> {
    stage: &'s mut Stage<'k>,
    vmsg: Vmsg,
    machine: Shell,
    /// How many processes the host has started.
    started: usize,
}

impl Link<'_, '_> {
    fn scene(&mut self) -> &mut Scene {
        &mut self.stage.scene
    }

    /// Runs `vmsg ivshmem` on the host, to its end.
    fn try_host(&mut self, words: &[&str]) -> Result<Output> {
        let mut command = self.host_command(words);
        command.current_dir(self.stage.scene.dir());
        command.output().context("cannot run vmsg")
    }

    /// The same; it must succeed. What it printed.
    fn host(&mut self, words: &[&str]) -> Result<String> {
        let output = self.try_host(words)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "on the host, vmsg ivshmem {}: {} {text}{}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text.trim_end().to_owned())
    }

    fn host_command(&self, words: &[&str]) -> Command {
        let words = std::iter::once("ivshmem").chain(words.iter().copied());
        self.vmsg.words(words)
    }

    /// Starts it on the host, and waits for the line by which it says that it is ready.
    fn host_begin(&mut self, words: &[&str], ready: &str) -> Result<(Id, String)> {
        let command = self.host_command(words);
        self.started += 1;
        let name = format!("host-{}", self.started);
        let scene = self.scene();
        let id = scene.start(&name, &command)?;
        scene.may_end(id);
        let line = scene.expect((id, Stream::Out), ready, STEP, |line| {
            line.text.starts_with(ready).then(|| line.text.clone())
        })?;
        Ok((id, line))
    }

    /// Waits for the end of what was started on the host, which must be a good one. What it printed.
    fn host_end(&mut self, id: Id) -> Result<String> {
        let status = self.scene().wait_end(id, STEP)?;
        let lines = self.scene().lines(id, Stream::Out).iter();
        let text: Vec<String> = lines.map(|line| line.text.clone()).collect();
        ensure!(status.success(), "{status}: {}", text.join("\n"));
        Ok(text.join("\n"))
    }

    /// Runs `vmsg ivshmem` in the machine.
    fn guest(&mut self, words: &str) -> Result<String> {
        self.shell(&format!("vmsg ivshmem {words}"))
    }

    /// Runs a command in the machine.
    fn shell(&mut self, command: &str) -> Result<String> {
        let lines = self.machine.run(&mut self.stage.scene, command)?;
        Ok(lines.join("\n"))
    }

    /// A file of random bytes on the host, and its checksum.
    fn file(&mut self, name: &str) -> Result<String> {
        let mut bytes = vec![0; FILE];
        let mut random = fs::File::open("/dev/urandom")?;
        std::io::Read::read_exact(&mut random, &mut bytes)?;
        fs::write(self.stage.scene.dir().join(name), &bytes)?;
        Ok(http::sum_of(bytes.as_slice())?)
    }
}

/// The number behind `name=` in a line.
fn field(line: &str, name: &str) -> Result<String> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .map(str::to_owned)
        .with_context(|| format!("no {name}= in {line:?}"))
}

/// Fails unless `text` has `part`.
fn has(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "no {part:?} in {text:?}");
    Ok(())
}

/// All of it.
pub(super) fn tools(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let architecture = stage.kit.machine;
    // An older one does not emulate the fault that memory of a device raises on arm64.
    let kit = match architecture {
        Machine::X86 => stage.kit.clone(),
        Machine::Arm64 => stage.kit.with_new_qemu()?,
    };
    let program = cross::vmsg(architecture)?;
    let misaligned = cross::example(architecture, "vmsg-mem", "misaligned")?;
    let server = vmsg.words([
        "ivshmem",
        "server",
        "--socket",
        SOCKET,
        "--size",
        "1M",
        "--vectors",
        "2",
    ]);
    let id = stage.scene.start("server", &server)?;
    stage
        .scene
        .expect((id, Stream::Out), "'ready'", STEP, |line| {
            line.text.starts_with("ready ").then_some(())
        })?;
    let options = outer::Options {
        server: Some(SOCKET.to_owned()),
        window: Some((PLAIN, 1)),
        programs: vec![("misaligned", misaligned)],
        ..outer::Options::default()
    };
    let machine = outer::start(&mut stage.scene, "machine", &kit, &program, &options)?;
    let mut link = Link {
        stage,
        vmsg,
        machine,
        started: 0,
    };
    link.machine.booted(&mut link.stage.scene)?;
    let mut part = |name: &str, play: &dyn Fn(&mut Link<'_, '_>) -> Result<()>| {
        let result = play(&mut link);
        let holds = result.is_ok();
        report.result(&format!("{}/ivshmem/{name}", architecture.name()), result);
        holds
    };
    // Nothing that follows could hold without these.
    if !part("find", &find) {
        bail!("the machine's functions cannot be used");
    }
    part("words", &words);
    part("rings", &rings);
    part("pings", &pings);
    part("copies", &copies);
    part("plain", &plain);
    part("errors", &errors);
    part("alignment", &|link| alignment(link, architecture));
    link.machine.power_off(&mut link.stage.scene)
}

/// Two functions are found, told apart, and one is given to VFIO.
fn find(link: &mut Link<'_, '_>) -> Result<()> {
    let list = link.guest("info")?;
    let line = |address: &str| {
        let line = list.lines().find(|line| line.starts_with(address));
        line.with_context(|| format!("no {address} in {list:?}"))
    };
    let (doorbell, plain) = (line(MESSAGES)?, line(WINDOW)?);
    has(
        doorbell,
        " ivshmem-doorbell revision=1 memory=1MiB driver=- ",
    )?;
    has(doorbell, " vectors=2 ")?;
    has(plain, " ivshmem-plain revision=1 memory=1MiB ")?;
    let by_sysfs = link.guest(&format!("info --pci {MESSAGES} --access sysfs"))?;
    has(&by_sysfs, "no doorbell is heard")?;
    has(
        &link.guest("bind auto")?,
        &format!("{MESSAGES} driver=vfio-pci"),
    )?;
    let by_vfio = link.guest("info --pci auto --access vfio")?;
    has(&by_vfio, "vectors 2")?;
    has(&by_vfio, "ordinary memory")?;
    let id = field(doorbell, "id")?;
    has(&by_vfio, &format!("id      {id}"))?;
    has(
        &link.host(&["info", "--socket", SOCKET])?,
        &format!("peers   {id} (2 vectors)"),
    )
}

/// A word that one side stores the other one loads, in each width.
fn words(link: &mut Link<'_, '_>) -> Result<()> {
    for (guest, host) in [
        ("--pci auto", ["--socket", SOCKET]),
        (&format!("--pci {WINDOW}"), ["--file", PLAIN]),
    ] {
        for (offset, width, value) in [
            ("0", "8", "0x1122334455667788"),
            ("0x1004", "4", "0x99aabbcc"),
            ("0x2006", "2", "0xddee"),
            ("0xfffff", "1", "0x5a"),
        ] {
            link.guest(&format!("poke {guest} {offset} {width} {value}"))?;
            let seen = link.host(&["peek", host[0], host[1], offset, width])?;
            ensure!(seen == value, "{width} bytes at {offset}: {seen}");
            link.host(&["poke", host[0], host[1], offset, width, "0x42"])?;
            let seen = link.guest(&format!("peek {guest} {offset} {width}"))?;
            ensure!(seen.ends_with("42") && seen.len() == value.len(), "{seen}");
        }
        let text = "48 65 6c 6c 6f";
        for (at, byte) in (0x100..).zip(text.split(' ')) {
            link.host(&[
                "poke",
                host[0],
                host[1],
                &format!("{at}"),
                "1",
                &format!("0x{byte}"),
            ])?;
        }
        has(
            &link.guest(&format!("dump {guest} 0x100 0x20"))?,
            "|Hello...........|",
        )?;
    }
    Ok(())
}

/// Doorbells of both vectors in both directions.
fn rings(link: &mut Link<'_, '_>) -> Result<()> {
    let Link { stage, machine, .. } = link;
    let mut waiting = machine.spawn(
        &mut stage.scene,
        "wait",
        "vmsg ivshmem wait --pci auto --timeout 30 --count 2",
    )?;
    let line = waiting.expect(&mut stage.scene, "'waiting'", STEP, |line| {
        line.text.starts_with("waiting ").then(|| line.text.clone())
    })?;
    let id = field(&line, "id")?;
    for vector in ["1", "0"] {
        link.host(&["ring", "--socket", SOCKET, &format!("{id}:{vector}")])?;
        waiting.expect(&mut link.stage.scene, "the ring", STEP, |line| {
            has(&line.text, &format!("rung vector={vector} times=1")).ok()
        })?;
    }
    let (host, line) = link.host_begin(
        &[
            "wait",
            "--socket",
            SOCKET,
            "--timeout",
            "30",
            "--count",
            "2",
        ],
        "waiting ",
    )?;
    let id = field(&line, "id")?;
    for vector in ["1", "0"] {
        link.guest(&format!("ring --pci auto {id}:{vector}"))?;
        let what = format!("rung vector={vector} times=1");
        let scene = link.scene();
        scene.expect((host, Stream::Out), &what, STEP, |line| {
            line.text.contains(&what).then_some(())
        })?;
    }
    link.host_end(host).map(drop)
}

/// Round trips, asked by each side.
fn pings(link: &mut Link<'_, '_>) -> Result<()> {
    let Link { stage, machine, .. } = link;
    let mut answering = machine.spawn(
        &mut stage.scene,
        "answer",
        "vmsg ivshmem ping --answer --pci auto --timeout 30 --count 300",
    )?;
    let line = answering.expect(&mut stage.scene, "'answering'", STEP, |line| {
        line.text
            .starts_with("answering ")
            .then(|| line.text.clone())
    })?;
    let id = field(&line, "id")?;
    let times = link.host(&[
        "ping",
        "--socket",
        SOCKET,
        &id,
        "--count",
        "300",
        "--timeout",
        "20",
    ])?;
    has(
        &times,
        "300 pings, 300 answers, round trip min/median/p99/max",
    )?;
    println!("      host to machine: {times}");
    let (host, line) = link.host_begin(
        &[
            "ping",
            "--answer",
            "--socket",
            SOCKET,
            "--timeout",
            "30",
            "--count",
            "300",
        ],
        "answering ",
    )?;
    let id = field(&line, "id")?;
    let times = link.guest(&format!("ping --pci auto {id} --count 300 --timeout 20"))?;
    has(&times, "300 pings, 300 answers")?;
    println!("      machine to host: {times}");
    link.host_end(host).map(drop)
}

/// A file each way over the doorbells.
fn copies(link: &mut Link<'_, '_>) -> Result<()> {
    copy_both_ways(link, "--pci auto", ["--socket", SOCKET], "doorbells")
}

/// The same where there are no doorbells.
fn plain(link: &mut Link<'_, '_>) -> Result<()> {
    let guest = format!("--pci {WINDOW}");
    copy_both_ways(link, &guest, ["--file", PLAIN], "intervals")
}

fn copy_both_ways(link: &mut Link<'_, '_>, guest: &str, host: [&str; 2], name: &str) -> Result<()> {
    let (sent, back) = (format!("{name}.sent"), format!("{name}.back"));
    let sum = link.file(&sent)?;
    let Link { stage, machine, .. } = link;
    let receive = format!("vmsg ivshmem copy --receive /tmp/{sent} {guest}");
    let mut receiving = machine.spawn(&mut stage.scene, &format!("{name}-receive"), &receive)?;
    let said = link.host(&["copy", &sent, host[0], host[1]])?;
    println!("      {said}");
    has(&said, &sum)?;
    receiving.expect(&mut link.stage.scene, "'received'", STEP, |line| {
        (line.text.starts_with("received ") && line.text.contains(&sum)).then_some(())
    })?;
    has(&link.shell(&format!("sha256sum /tmp/{sent}"))?, &sum)?;
    let Link { stage, machine, .. } = link;
    let send = format!("vmsg ivshmem copy /tmp/{sent} {guest}");
    let mut sending = machine.spawn(&mut stage.scene, &format!("{name}-send"), &send)?;
    let said = link.host(&["copy", "--receive", &back, host[0], host[1]])?;
    println!("      {said}");
    has(&said, &sum)?;
    sending.expect(&mut link.stage.scene, "'sent'", STEP, |line| {
        line.text.starts_with("sent ").then_some(())
    })?;
    let bytes = fs::read(link.stage.scene.dir().join(&back))?;
    ensure!(
        http::sum_of(bytes.as_slice())? == sum,
        "{back} is another file"
    );
    link.shell(&format!("rm /tmp/{sent}")).map(drop)
}

/// What does not work says why and what to do, and ends.
fn errors(link: &mut Link<'_, '_>) -> Result<()> {
    for (words, part) in [
        (format!("wait --pci {WINDOW}"), "no doorbells here"),
        (format!("ring --pci {WINDOW} 0"), "no doorbells here"),
        (
            format!("info --pci {WINDOW} --access vfio"),
            "vmsg ivshmem bind",
        ),
        (
            "peek --pci 0000:00:00.0 0".to_owned(),
            "no ivshmem function at",
        ),
        (
            format!("ping --pci {WINDOW} --count 1 --timeout 0.2"),
            "nobody answers",
        ),
        (
            format!("copy /bin/vmsg --pci {WINDOW} --timeout 0.2"),
            "nobody is there",
        ),
        (
            "wait --pci auto --timeout 0.2".to_owned(),
            "no doorbell for",
        ),
    ] {
        let said = link.shell(&format!("! vmsg ivshmem {words}"))?;
        has(&said, part)?;
    }
    let Link { stage, machine, .. } = link;
    let mut holder = machine.spawn(&mut stage.scene, "hold", "vmsg ivshmem wait --pci auto")?;
    holder.expect(&mut stage.scene, "'waiting'", STEP, |line| {
        line.text.starts_with("waiting ").then_some(())
    })?;
    let said = link.shell("! vmsg ivshmem info --pci auto")?;
    has(&said, "another process uses IOMMU group")?;
    // While somebody holds it, its memory can be looked at by sysfs.
    link.guest("peek --pci auto --access sysfs 0")?;
    let Link { stage, machine, .. } = link;
    machine.stop(&mut stage.scene, &holder, "TERM")?;
    has(&link.guest("unbind auto")?, "driver=none")
}

/// On arm64 memory of a device faults at what is not aligned, and nothing of ours is; `resource2_wc` bears both.
fn alignment(link: &mut Link<'_, '_>, machine: Machine) -> Result<()> {
    let file = |name: &str| format!("/sys/bus/pci/devices/{WINDOW}/{name}");
    let mut borne = |name: &str| -> Result<(bool, bool)> {
        let said = link.shell(&format!("misaligned {}; echo status=$?", file(name)))?;
        let status = field(&said, "status")?;
        let misaligned = said.contains("misaligned accesses are borne");
        ensure!(
            status == if misaligned { "0" } else { SIGBUS },
            "{name}: {said}"
        );
        Ok((
            said.contains("\naligned accesses") || said.starts_with("aligned"),
            misaligned,
        ))
    };
    let (device, ordinary) = (borne("resource2")?, borne("resource2_wc")?);
    ensure!(ordinary == (true, true), "resource2_wc: {ordinary:?}");
    let faults = machine == Machine::Arm64;
    ensure!(device == (true, !faults), "resource2: {device:?}");
    if !faults {
        return Ok(());
    }
    // The tools on the memory that faults.
    let resource = file("resource2");
    let said = link.guest(&format!("info --file {resource}"))?;
    has(&said, "device memory, for aligned accesses only")?;
    link.guest(&format!("poke --file {resource} 0x801 1 0x77"))?;
    has(
        &link.guest(&format!("dump --file {resource} 0x7fd 9"))?,
        "77",
    )?;
    copy_both_ways(
        link,
        &format!("--file {resource}"),
        ["--file", PLAIN],
        "device",
    )
}
