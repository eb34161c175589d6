// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg up` with real guests: the descriptions of `demos/`, what it does when a part dies, devices that come and go.

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{STEP, Stage};
use crate::cross;
use crate::described::{self, Up};
use crate::disk;
use crate::guest_files;
use crate::lan::{self, Host};
use crate::machine::Machine;
use crate::pair::GATEWAY;
use crate::report::Report;
use crate::scene::Stream;
use crate::shell::Shell;
use crate::vswitch;

/// How often a device comes and goes.
const ROUNDS: usize = 3;
/// The second guest's address in the network of the device that comes and goes.
const SECOND: &str = "192.168.2.2";
/// Pings of the short demo.
const PINGS: u32 = 20;

/// The demo of the switch without the comparison.
pub(super) fn vswitch(stage: &mut Stage, _: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let variables = guest_files::guests(stage.kit, stage.scene.dir(), true)?;
    let measured = vswitch::act(&mut stage.scene, &vmsg, &variables, PINGS)?;
    println!("      {measured:?}");
    Ok(())
}

/// The switch of the demo with each guest on another kind of bus: each reaches each, also when the device host was killed.
pub(super) fn buses(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine;
    let dir = stage.scene.dir().display().to_string();
    let variables = guest_files::guests(stage.kit, stage.scene.dir(), true)?;
    let mut text = std::fs::read_to_string(described::demo("vswitch"))?;
    // Where the guest's memory begins for itself.
    let begin = match machine {
        Machine::X86 => "0",
        Machine::Arm64 => "0x40000000",
    };
    let socket = format!("{dir}/iv.sock");
    for (bus, keys) in [
        (
            "b2",
            format!("type = \"linux-user\"\nram = \"{dir}/ram\"\nmem-offset = {begin}"),
        ),
        (
            "b3",
            format!(
                "type = \"ivshmem\"\nsocket = \"{socket}\"\nmemory = \"bounce\"\nram = \"bar\""
            ),
        ),
    ] {
        let plain = format!("[bus.{bus}]\ntype = \"unix\"");
        ensure!(text.contains(&plain), "the demo has no {plain}");
        text = text.replace(&plain, &format!("[bus.{bus}]\n{keys}"));
    }
    text.push_str(&format!(
        "\n[program.ivshmem]\ncommand = [\"vmsg\", \"ivshmem\", \"server\", \"--socket\", \"{socket}\", \"--size\", \"32M\"]\nready = \"ready \"\n"
    ));
    let file = stage.scene.dir().join("buses.toml");
    std::fs::write(&file, text)?;
    let up = Up::start_file(&mut stage.scene, "up", &vmsg, &file, &variables)?;
    let mut hosts = vswitch::hosts(&mut stage.scene, &up)?;
    let reach = lan::reach(&mut stage.scene, &mut hosts, |_, _| true);
    report.result(&format!("{}/each-reaches-each", machine.name()), reach);
    let third = hosts[2].address.to_string();
    let killed = kill_part(stage, &up, "serve", &mut hosts[1].shell, &third)
        .and_then(|()| lan::reach(&mut stage.scene, &mut hosts, |_, _| true));
    report.result(&format!("{}/serve-killed", machine.name()), killed);
    for host in &hosts {
        stage.scene.may_end(host.shell.id);
    }
    let end = up.end(&mut stage.scene);
    report.result(&format!("{}/nothing-left", machine.name()), end);
    Ok(())
}

/// What the guests of the demos 2a and 2b show: an address, pings, a file.
fn shows(stage: &mut Stage, report: &mut Report, shell: &mut Shell, gateway: &str) -> Result<()> {
    let machine = stage.kit.machine.name();
    let scene = &mut stage.scene;
    let mut run = |name: &str, command: &str, wanted: &str| -> Result<()> {
        let said = shell.run(scene, &format!("{command}; true"))?.join("\n");
        report.check(&format!("{machine}/{name}"), said.contains(wanted), || said);
        Ok(())
    };
    run("dhcp", "cat /tmp/lease.eth0", "lease eth0")?;
    run(
        "ping",
        &format!("ping -c 5 -i 0.2 {gateway}"),
        " 0% packet loss",
    )?;
    let url = format!("http://10.0.2.2:{}/file", stage.server.port());
    run(
        "http",
        &format!("wget -q -O - {url} | sha256sum"),
        stage.server.sha256(),
    )
}

/// The entropy device gives bytes.
fn random(stage: &mut Stage, report: &mut Report, shell: &mut Shell) -> Result<()> {
    let command = "dd if=/dev/hwrng bs=64 count=16 2> /dev/null | wc -c";
    let said = shell.run(&mut stage.scene, command)?.concat();
    let machine = stage.kit.machine.name();
    report.check(&format!("{machine}/rng"), said.trim() == "1024", || said);
    Ok(())
}

/// The description of demo 2a, and its parts killed one after another while the guest pings.
pub(super) fn up(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine.name();
    let variables = guest_files::guests(stage.kit, stage.scene.dir(), true)?;
    let up = Up::start(&mut stage.scene, "up", &vmsg, "2a", &variables)?;
    let mut shell = up.console(&mut stage.scene, "vm")?;
    shell.booted(&mut stage.scene)?;
    shows(stage, report, &mut shell, "10.0.2.2")?;
    random(stage, report, &mut shell)?;
    for part in ["serve", "vm.proxy", "serve", "vm.proxy"] {
        let killed = kill_part(stage, &up, part, &mut shell, "10.0.2.2");
        report.result(&format!("{machine}/{part}-killed"), killed);
    }
    // QEMU's entropy device does not connect to another proxy.
    shows(stage, report, &mut shell, "10.0.2.2")?;
    stage.scene.may_end(shell.id);
    report.result(&format!("{machine}/nothing-left"), up.end(&mut stage.scene));
    let again = Up::start(&mut stage.scene, "up-again", &vmsg, "2a", &variables)?;
    let left = again.kill(&mut stage.scene);
    report.result(&format!("{machine}/killed-nothing-left"), left);
    Ok(())
}

/// Kills a part while the guest is there: another process takes its place, and the guest's pings are answered again.
fn kill_part(stage: &mut Stage, up: &Up, part: &str, shell: &mut Shell, to: &str) -> Result<()> {
    let pid = up.pid(&stage.scene, part)?;
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(process.context("a process without an id")?, Signal::KILL)?;
    let said = format!("will be started again part=\"{part}\"");
    stage.scene.expect(
        (up.id, Stream::Err),
        &format!("its word that {part} is started again"),
        STEP,
        |line| line.text.contains(&said).then_some(()),
    )?;
    pings_again(stage, shell, to)?;
    let now = up.pid(&stage.scene, part)?;
    ensure!(now != pid, "{part} is still process {pid}");
    Ok(())
}

/// The guest's pings are answered again, from a moment on all of them.
fn pings_again(stage: &mut Stage, shell: &mut Shell, to: &str) -> Result<()> {
    let command = format!("await 20 ping -q -c 3 -i 0.1 -W 1 {to} && ping -q -c 5 -i 0.1 {to}");
    let said = shell.run(&mut stage.scene, &command)?.join("\n");
    ensure!(said.contains(" 0% packet loss"), "{said}");
    Ok(())
}

/// The description of the guest that boots from a disk: the device host is killed, and the disk is whole at the end.
pub(super) fn disk(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine.name();
    let dir = stage.scene.dir().to_owned();
    let mut variables = guest_files::guests(stage.kit, &dir, true)?;
    variables.extend(guest_files::disk(stage.kit, &dir, true)?);
    let up = Up::start(&mut stage.scene, "up", &vmsg, "disk", &variables)?;
    let mut shell = up.console(&mut stage.scene, "vm")?;
    shell.booted(&mut stage.scene)?;
    let said = shell
        .run(&mut stage.scene, "grep ' / ' /proc/mounts")?
        .concat();
    report.check(
        &format!("{machine}/root"),
        said.contains("/dev/vda / ext4"),
        || said,
    );
    shows(stage, report, &mut shell, "10.0.2.2")?;
    random(stage, report, &mut shell)?;
    let write = "head -c 3000000 /dev/urandom > /root/before && sync && sha256sum < /root/before";
    let before = shell.run(&mut stage.scene, write)?.concat();
    let killed = kill_part(stage, &up, "serve", &mut shell, "10.0.2.2");
    report.result(&format!("{machine}/serve-killed"), killed);
    let read = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /root/before";
    let after = shell.run(&mut stage.scene, read)?.concat();
    report.check(&format!("{machine}/kept"), before == after, || {
        format!("{after} instead of {before}")
    });
    shell.run(&mut stage.scene, "sync; mount -o remount,ro /")?;
    stage.scene.may_end(shell.id);
    report.result(&format!("{machine}/nothing-left"), up.end(&mut stage.scene));
    let clean = disk::check_ext4(&dir.join("root.img"));
    report.result(&format!("{machine}/root-clean"), clean);
    Ok(())
}

/// The description of demo 2b: a guest in a machine, its devices in another.
pub(super) fn two_machines(stage: &mut Stage, report: &mut Report) -> Result<()> {
    if stage.kit.machine == Machine::Arm64 {
        println!("skip  arm64/up-2b: the description is of x86 machines");
        return Ok(());
    }
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine.name();
    let dir = stage.scene.dir().to_owned();
    let mut variables = guest_files::guests(stage.kit, &dir, true)?;
    let program = cross::vmsg(stage.kit.machine)?;
    variables.extend(guest_files::machines(stage.kit, &dir, &program, true)?);
    let up = Up::start(&mut stage.scene, "up", &vmsg, "2b", &variables)?;
    // Three kernels boot, one inside of another.
    let mut shell = up.console(&mut stage.scene, "a")?;
    shell.booted(&mut stage.scene)?;
    shows(stage, report, &mut shell, GATEWAY)?;
    random(stage, report, &mut shell)?;
    stage.scene.may_end(shell.id);
    report.result(&format!("{machine}/nothing-left"), up.end(&mut stage.scene));
    Ok(())
}

/// A network device is plugged into a running guest and taken out again, and again.
pub(super) fn hotplug(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let machine = stage.kit.machine.name();
    let variables = guest_files::guests(stage.kit, stage.scene.dir(), true)?;
    let up = Up::start(&mut stage.scene, "up", &vmsg, "vswitch", &variables)?;
    let mut hosts = vswitch::hosts(&mut stage.scene, &up)?;
    lan::reach(&mut stage.scene, &mut hosts, |_, _| true)?;
    let mut numbers = Vec::new();
    for round in 0..ROUNDS {
        let plugged = plug(stage, &up, &mut hosts).map(|number| numbers.push(number));
        report.result(&format!("{machine}/plugged-{round}"), plugged);
        if round == 0 {
            let kept = changes_stay(stage, &up, &mut hosts);
            report.result(&format!("{machine}/changes-stay"), kept);
        }
        let pulled = pull(stage, &up, &mut hosts);
        report.result(&format!("{machine}/pulled-{round}"), pulled);
    }
    let mut distinct = numbers.clone();
    distinct.sort_unstable();
    distinct.dedup();
    report.check(
        &format!("{machine}/numbers-not-reused"),
        distinct.len() == ROUNDS,
        || format!("{numbers:?}"),
    );
    let reach = lan::reach(&mut stage.scene, &mut hosts, |_, _| true);
    report.result(&format!("{machine}/the-others-go-on"), reach);
    for host in &hosts {
        stage.scene.may_end(host.shell.id);
    }
    report.result(&format!("{machine}/nothing-left"), up.end(&mut stage.scene));
    Ok(())
}

/// Adds a device to vm1, which uses it; gives its number.
fn plug(stage: &mut Stage, up: &Up, hosts: &mut [Host]) -> Result<u64> {
    let scene = &mut stage.scene;
    up.ctl(
        scene,
        &[
            "add-device",
            "net,id=more,bus=b1,switch=s0",
            "--guest",
            "vm1",
        ],
    )?;
    let number = number_of(&up.ask(scene, &["list"])?, "more")?;
    let [first, second, ..] = hosts else {
        anyhow::bail!("two guests are needed");
    };
    first.shell.run(
        scene,
        "await 20 test -e /sys/class/net/eth1 && ip link set eth1 up && ip addr add 192.168.2.1/24 dev eth1",
    )?;
    second
        .shell
        .run(scene, &format!("ip addr replace {SECOND}/24 dev eth0"))?;
    let said = first
        .shell
        .run(scene, &format!("ping -q -c 3 -i 0.1 -W 1 {SECOND}; true"))?
        .join("\n");
    ensure!(said.contains(" 0% packet loss"), "{said}");
    Ok(number)
}

/// A device host that was killed is as it was before: with the device that was added, and the rule that was.
fn changes_stay(stage: &mut Stage, up: &Up, hosts: &mut [Host]) -> Result<()> {
    up.ctl(&stage.scene, &["rule", "deny", "vm2 <> vm3"])?;
    kill_part(stage, up, "serve", &mut hosts[0].shell, SECOND)?;
    lan::reach(&mut stage.scene, hosts, |from, to| from + to != 3)?;
    up.ctl(&stage.scene, &["rule", "allow", "vm2 <> vm3"])?;
    lan::reach(&mut stage.scene, hosts, |_, _| true)
}

/// Takes it out again.
fn pull(stage: &mut Stage, up: &Up, hosts: &mut [Host]) -> Result<()> {
    let scene = &mut stage.scene;
    up.ctl(scene, &["remove-device", "more"])?;
    hosts[0]
        .shell
        .run(scene, "await 20 test ! -e /sys/class/net/eth1")?;
    let list = up.ask(scene, &["list"])?;
    ensure!(
        list.is_array() && number_of(&list, "more").is_err(),
        "the device is still listed"
    );
    Ok(())
}

/// The number of the device `id` in what `vmsg ctl list --json` says.
fn number_of(list: &Value, id: &str) -> Result<u64> {
    list.as_array()
        .and_then(|all| all.iter().find(|device| device["id"] == id))
        .and_then(|device| device["number"].as_u64())
        .with_context(|| format!("no device {id} is listed"))
}
