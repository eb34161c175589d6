// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest sees: the same guest with a network device of vmsg and with one of QEMU itself, on the same tap
//! interface, and in front of a user-mode stack each.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};

use crate::dirs;
use crate::e2e::{STEP, traffic_server};
use crate::guest::Guest;
use crate::kit::{self, Kit};
use crate::machine::Machine;
use crate::namespace::Namespace;
use crate::qemu::{Backend, Board, Hardware, OWN_MAC, TEST_MAC};
use crate::scene::{Scene, Stream};
use crate::vmsg::{self, NET_SOCKET, Vmsg};

const SCRIPT: &str = include_str!("guest/bench.sh");

/// An interface that both can open, with an address that the guest can reach.
const TAP: &str = "ip tuntap add dev tap0 mode tap\n\
                   ip addr add 192.168.9.1/24 dev tap0\n\
                   ip link set tap0 up\n";

/// What the guest does.
const WHAT: [(&str, &str); 5] = [
    ("up", "TCP to the host, one connection"),
    ("down", "TCP from the host, one connection"),
    ("up-8", "TCP to the host, 8 connections"),
    ("down-8", "TCP from the host, 8 connections"),
    ("ping", "ping, one after the other"),
];

/// A network device, and what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    QemuUser,
    VmsgUser,
    QemuTap,
    VmsgTap,
}

const SUBJECTS: [Subject; 4] = [
    Subject::QemuUser,
    Subject::VmsgUser,
    Subject::QemuTap,
    Subject::VmsgTap,
];

/// Rates by subject and what was done, one for each round.
type Rates = BTreeMap<(Subject, String), Vec<f64>>;

/// Measures `rounds` times and gives the tables.
pub(crate) fn run(rounds: usize, program: Option<&std::path::Path>) -> Result<String> {
    let options = kit::Options {
        yes: true,
        ..kit::Options::default()
    };
    let kit = kit::gather(&[Machine::X86], &options)?
        .pop()
        .context("one kit")?
        .with_tools()?;
    let vmsg = match program {
        Some(program) => Vmsg::built(program)?,
        None => Vmsg::build()?,
    };
    let mut rates = Rates::new();
    for round in 0..rounds {
        // Each next to its counterpart, in turn the one and the other first.
        let mut order = SUBJECTS;
        if round % 2 == 1 {
            order.reverse();
        }
        for subject in order {
            for (what, rate) in once(&kit, &vmsg, subject)? {
                rates.entry((subject, what)).or_default().push(rate);
            }
        }
    }
    table(&rates)
}

fn once(kit: &Kit, vmsg: &Vmsg, subject: Subject) -> Result<Vec<(String, f64)>> {
    let mut scene = Scene::new(dirs::run_folder("bench-guest", None)?);
    let namespace = Namespace::new(&mut scene, TAP)?;
    scene.enter(namespace);
    let tap = matches!(subject, Subject::QemuTap | Subject::VmsgTap);
    let backend = match subject {
        Subject::QemuUser => Backend::Qemu,
        Subject::QemuTap => Backend::Netdev(vec![
            "-netdev".to_owned(),
            "tap,id=net,ifname=tap0,script=no,downscript=no,vnet_hdr=on".to_owned(),
        ]),
        Subject::VmsgUser | Subject::VmsgTap => {
            let behind = if tap { "tap,ifname=tap0" } else { "user" };
            let device = format!("net,id=net0,backend={behind},mac={TEST_MAC}");
            let front = format!("vhost-user,socket={NET_SOCKET},dev=net0");
            vmsg.serve_on(&mut scene, "serve", vmsg::BUS, &[&device])?;
            vmsg.proxy_on(&mut scene, vmsg::BUS, &[&front])?;
            Backend::VhostUser(NET_SOCKET.to_owned())
        }
    };
    let port = traffic_server(&mut scene)?;
    let (address, own) = if tap {
        ("192.168.9.1", "192.168.9.2/24")
    } else {
        ("10.0.2.2", "")
    };
    let board = Board::new(backend, Backend::Qemu);
    let settings = [
        ("OWN_MAC", OWN_MAC.to_owned()),
        ("TEST_MAC", TEST_MAC.to_owned()),
        ("TRAFFIC", format!("{address} {port}")),
        ("STATIC", own.to_owned()),
    ];
    let hardware = Hardware::Board(&board);
    let guest = Guest::start(&mut scene, "guest", kit, hardware, SCRIPT, &settings)?;
    guest.booted(&mut scene)?;
    guest.mark(&mut scene, "done", 3 * STEP)?;
    let mut rates = Vec::new();
    for line in scene.lines(guest.id, Stream::Out) {
        if let Some((_, rate)) = line.text.split_once("MARK rate ") {
            let (what, rate) = rate.split_once(' ').context("a rate has a name")?;
            let rate: f64 = rate.trim().parse().with_context(|| line.text.clone())?;
            eprintln!("{subject:?} {what} {rate}");
            rates.push((what.to_owned(), rate));
        }
        if line.text.contains("CHECK guest FAIL") {
            bail!("{}: {}", scene.dir().display(), line.text);
        }
    }
    Ok(rates)
}

fn table(rates: &Rates) -> Result<String> {
    let mut text =
        "| what | behind it | vmsg ÷ QEMU | vmsg | QEMU | rounds |\n|---|---|---|---|---|---|\n"
            .to_owned();
    for (what, description) in WHAT {
        for (behind, ours, theirs) in [
            ("user-mode stack", Subject::VmsgUser, Subject::QemuUser),
            ("tap", Subject::VmsgTap, Subject::QemuTap),
        ] {
            let of = |subject| {
                rates
                    .get(&(subject, what.to_owned()))
                    .with_context(|| format!("{subject:?} has not measured {what}"))
            };
            let (ours, theirs) = (of(ours)?, of(theirs)?);
            let ratios = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
            let unit = if what == "ping" { "ms" } else { "Mb/s" };
            writeln!(
                text,
                "| {description} | {behind} | {:.2} | {:.3} {unit} | {:.3} {unit} | {} |",
                median(ratios),
                median(ours.clone()),
                median(theirs.clone()),
                ours.len().min(theirs.len())
            )?;
        }
    }
    Ok(text)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
