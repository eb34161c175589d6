// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Demo vswitch: three stock guests, each behind a bus of its own, on one switch, as `demos/vswitch` describes them.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::demo::{self, tell};
use crate::described::Up;
use crate::dirs;
use crate::guest_files::{self, Variables};
use crate::kit::{self, Kit};
use crate::lan::{self, Host, Pings};
use crate::machine::Machine;
use crate::pcap::{self, Carries, Frame, Mac};
use crate::scene::Scene;
use crate::stream;
use crate::vmsg::Vmsg;

/// How often one guest pings another to measure, and the seconds between.
const PINGS: u32 = 100;
const PAUSE: &str = "0.1";
/// The guests, which are also the ports, in the order of their addresses from 192.168.1.1.
const GUESTS: [&str; 3] = ["vm1", "vm2", "vm3"];
/// The switch.
const SWITCH: &str = "s0";
/// What the page of the seL4 VMM's virtio demo of 2023 shows: six pings between two VMs on emulated arm64, a switch in each VMM.
const SEL4: &str = "min 2.258, avg 5.369, max 17.897 ms";

/// Options of `demo vswitch`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Machine type of the guests
    #[arg(long, value_enum, default_value_t = Machine::X86)]
    machine: Machine,
    /// Leave out the same pings over QEMU's own `-netdev stream`
    #[arg(long)]
    switch_only: bool,
    /// Keep logs and captures in this folder, new or empty [default: a new one under target/xtask]
    #[arg(long, value_name = "DIR")]
    keep_dir: Option<PathBuf>,
    /// Use this program instead of building one
    #[arg(long, value_name = "FILE", hide = true)]
    vmsg: Option<PathBuf>,
    #[command(flatten)]
    kit: kit::Options,
}

/// What is measured between two guests.
#[derive(Debug)]
pub(crate) struct Measured {
    pings: Pings,
    /// Of a transfer.
    bytes: usize,
    seconds: f64,
}

/// Runs the demo; prints `TEST PASSED` or `TEST FAILED` as last line and gives whether it passed.
pub(crate) fn run(options: &Options) -> bool {
    demo::told(play(options))
}

fn play(options: &Options) -> Result<String> {
    let mut kits = kit::gather(&[options.machine], &options.kit)?;
    let kit = kits.pop().expect("one kit for one machine");
    let vmsg = match &options.vmsg {
        Some(program) => Vmsg::built(program)?,
        None => {
            println!("building vmsg");
            Vmsg::build()?
        }
    };
    let name = format!("demo-vswitch-{}", options.machine.name());
    let dir = dirs::run_folder(&name, options.keep_dir.as_deref())?;
    println!("logs: {}", dir.display());
    let mut scene = Scene::new(dir);
    let variables = guest_files::guests(&kit, scene.dir(), true)?;
    let own = match options.switch_only {
        true => None,
        false => Some(baseline(&mut scene, &kit)?),
    };
    let measured = act(&mut scene, &vmsg, &variables, PINGS)?;
    println!();
    compare(&measured, own.as_ref());
    println!("logs, commands and captures: {}", scene.dir().display());
    Ok(format!(
        "three {} guests on one switch: each pings each, {} MiB with the right checksum, a rule cuts one pair and only that; {}",
        options.machine.name(),
        measured.bytes >> 20,
        measured.pings
    ))
}

/// What two guests see over QEMU's own network.
fn baseline(scene: &mut Scene, kit: &Kit) -> Result<Measured> {
    let mut hosts = stream::pair(scene, kit, guest_files::INITRD)?;
    tell(scene, "two guests run, joined by QEMU's own -netdev stream");
    lan::reach(scene, &mut hosts, |_, _| true)?;
    let measured = measure(scene, &mut hosts, PINGS)?;
    tell(scene, &format!("over QEMU's stream: {}", measured.pings));
    stream::end(scene, hosts)?;
    Ok(measured)
}

/// Pings and a transfer between the first two.
fn measure(scene: &mut Scene, hosts: &mut [Host], count: u32) -> Result<Measured> {
    let [a, b, ..] = hosts else {
        bail!("two guests are needed");
    };
    let pings = a.ping(scene, b.address, count, PAUSE)?;
    ensure!(pings.all(), "pings were lost: {pings}");
    let (bytes, seconds) = lan::transfer(scene, a, b)?;
    Ok(Measured {
        pings,
        bytes,
        seconds,
    })
}

/// All that is shown on the switch.
pub(crate) fn act(
    scene: &mut Scene,
    vmsg: &Vmsg,
    variables: &Variables,
    count: u32,
) -> Result<Measured> {
    let up = Up::start(scene, "up", vmsg, "vswitch", variables)?;
    tell(
        scene,
        &format!(
            "vmsg up runs demos/vswitch/vswitch.toml (process {})",
            scene.pid(up.id)
        ),
    );
    let mut hosts = hosts(scene, &up)?;
    let macs = hosts
        .iter_mut()
        .map(|host| host.mac(scene))
        .collect::<Result<Vec<Mac>>>()?;

    capture(scene, &up, Some("open"))?;
    lan::reach(scene, &mut hosts, |_, _| true)?;
    tell(scene, "each guest pings each");
    capture(scene, &up, None)?;
    check_open(scene, &hosts, &macs)?;

    let measured = measure(scene, &mut hosts, count)?;
    tell(scene, &format!("vm1 pings vm2: {}", measured.pings));
    tell(
        scene,
        &format!(
            "{} MiB from vm1 to vm2 over TCP in {:.2} s, SHA-256 is right",
            measured.bytes >> 20,
            measured.seconds
        ),
    );

    capture(scene, &up, Some("cut"))?;
    up.ctl(scene, &["rule", "deny", "vm1 <> vm2"])?;
    let cut = |from: usize, to: usize| from + to == 1;
    lan::reach(scene, &mut hosts, |from, to| !cut(from, to))?;
    capture(scene, &up, None)?;
    check_cut(scene, &macs)?;
    tell(scene, "a rule cuts vm1 <> vm2, and nothing else");
    up.ctl(scene, &["rule", "allow", "vm1 <> vm2"])?;
    lan::reach(scene, &mut hosts, |_, _| true)?;
    tell(scene, "allowed again, each guest pings each");

    let known = up.ctl(scene, &["macs", SWITCH])?;
    for (name, mac) in GUESTS.iter().zip(&macs) {
        ensure!(
            known
                .lines()
                .any(|l| l.contains(&format!("{mac:?}")) && l.contains(name)),
            "the switch does not know that {mac:?} is behind {name}: {known}"
        );
    }
    // The consoles end with what they show.
    for host in &hosts {
        scene.may_end(host.shell.id);
    }
    up.end(scene)?;
    tell(scene, "guests, proxies and device host have ended");
    Ok(measured)
}

/// The guests of the description, all running.
pub(crate) fn hosts(scene: &mut Scene, up: &Up) -> Result<Vec<Host>> {
    let mut hosts = Vec::new();
    for (number, name) in (1..).zip(GUESTS) {
        hosts.push(Host {
            shell: up.console(scene, name)?,
            address: Ipv4Addr::new(192, 168, 1, number),
        });
    }
    for host in &mut hosts {
        let kernel = host.shell.booted(scene)?;
        tell(
            scene,
            &format!(
                "{} runs Linux {kernel}, {}",
                host.shell.name(),
                host.address
            ),
        );
    }
    Ok(hosts)
}

/// The capture of the port `name` in the part `part` of the run.
fn file(scene: &Scene, part: &str, name: &str) -> PathBuf {
    scene.dir().join(format!("{part}-{name}.pcap"))
}

/// Starts captures on all ports, or ends them.
fn capture(scene: &Scene, up: &Up, part: Option<&str>) -> Result<()> {
    for name in GUESTS {
        match part {
            Some(part) => {
                let file = file(scene, part, name);
                up.ctl(scene, &["capture", name, &file.display().to_string()])?;
            }
            None => drop(up.ctl(scene, &["capture", name, "off"])?),
        }
    }
    Ok(())
}

/// Each port has seen the questions and answers of its guest with each other one.
fn check_open(scene: &Scene, hosts: &[Host], macs: &[Mac]) -> Result<()> {
    for (own, name) in GUESTS.iter().enumerate() {
        let frames = pcap::read(&file(scene, "open", name))?;
        let seen = |from: usize, wanted: Carries| {
            let fits = |f: &&Frame| f.source == macs[from] && f.carries == wanted;
            let found = frames.iter().find(fits);
            found.with_context(|| {
                format!(
                    "the port {name} has not seen {wanted:?} of {:?} among {} frames",
                    macs[from],
                    frames.len()
                )
            })
        };
        for other in (0..GUESTS.len()).filter(|other| *other != own) {
            for (a, b) in [(own, other), (other, own)] {
                let (from, to) = (hosts[a].address, hosts[b].address);
                for asks in [true, false] {
                    seen(a, Carries::Echo { asks, from, to })?;
                }
            }
            // Who has asked for whose address is a matter of who was first.
            let arp = |f: &&Frame| match f.carries {
                Carries::Arp { from, to, .. } => {
                    [from, to] == [own, other].map(|n| hosts[n].address)
                        || [to, from] == [own, other].map(|n| hosts[n].address)
                }
                _ => false,
            };
            ensure!(
                frames.iter().any(|f| arp(&f)),
                "the port {name} has seen no ARP between {} and {}",
                hosts[own].address,
                hosts[other].address
            );
        }
        tell(
            scene,
            &format!(
                "the capture of port {name}: {} frames, ARP and ICMP of all addresses",
                frames.len()
            ),
        );
    }
    Ok(())
}

/// Nothing of the one has come to the other of the pair that was cut.
fn check_cut(scene: &Scene, macs: &[Mac]) -> Result<()> {
    for (own, other) in [(0, 1), (1, 0)] {
        let name = GUESTS[own];
        let frames = pcap::read(&file(scene, "cut", name))?;
        let own_frames = frames.iter().filter(|f| f.source == macs[own]).count();
        let third = frames.iter().filter(|f| f.source == macs[2]).count();
        let wrong: Vec<&Frame> = frames.iter().filter(|f| f.source == macs[other]).collect();
        ensure!(
            wrong.is_empty() && own_frames > 0 && third > 0,
            "after the cut the port {name} has seen {own_frames} frames of its own guest, {third} of {}, and of {} {wrong:?}",
            GUESTS[2],
            GUESTS[other]
        );
    }
    Ok(())
}

/// Prints round trips beside those of others.
fn compare(measured: &Measured, own: Option<&Measured>) {
    #[expect(clippy::cast_precision_loss, reason = "some MiB")]
    let rate = |m: &Measured| (m.bytes >> 20) as f64 / m.seconds.max(0.01);
    println!("round trips from guest to guest, all of them emulated:");
    println!("  this switch          {}", measured.pings);
    if let Some(own) = own {
        println!("  QEMU -netdev stream  {}", own.pings);
        println!(
            "  ratio of the medians {:.2}, of the means {:.2}; transfer of {} MiB: {:.0} against {:.0} MiB/s",
            measured.pings.median() / own.pings.median(),
            measured.pings.mean() / own.pings.mean(),
            measured.bytes >> 20,
            rate(measured),
            rate(own)
        );
    }
    println!("  seL4 VMM, 2023       {SEL4} (its own figures: two VMs, 6 pings)");
}
