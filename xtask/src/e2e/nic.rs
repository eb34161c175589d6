// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A network device with everything it has, in guests with `ethtool` and `iperf3`.
//!
//! QEMU's vhost-user network device keeps the control queue and the configuration to itself; its generic vhost-user
//! device (QEMU 11.1) hands on everything. So what a guest asks of the device itself is seen with the latter.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{ALL_CHECKS, STEP, Stage};
use rustix::process::Signal;

use crate::guest::Guest;
use crate::kit::{Kit, has_tool};
use crate::namespace::Namespace;
use crate::qemu::{Backend, Board, Hardware, OWN_MAC, TEST_MAC};
use crate::report::Report;
use crate::scene::{Scene, Stream};
use crate::tree;
use crate::vmsg::{self, NET_SOCKET, Vmsg};

const NIC: &str = include_str!("../guest/nic.sh");
const LINK_DOWN: &str = include_str!("../guest/link-down.sh");

/// Queue pairs of the device under test.
const PAIRS: u32 = 2;
/// The largest packet that its guest is told.
const MTU: u32 = 9000;
/// Bytes of the configuration space of a network device, up to the hash types.
const CONFIG_SIZE: u32 = 24;
const CONTROL: &str = "control.sock";

/// The device as the device host offers it.
fn device(backend: &str, more: &str) -> String {
    format!("net,id=net0,{backend},queues={PAIRS},mtu={MTU},mac={TEST_MAC},pcap=net.pcap{more}")
}

/// Everything, through QEMU's generic vhost-user device.
pub(super) fn generic(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = stage.kit.with_new_qemu()?.with_tools()?;
    play(stage, report, &kit, &behind_generic(USER))
}

/// The same through QEMU's vhost-user network device, which is what most have.
pub(super) fn vhost_user(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = stage.kit.with_tools()?;
    let behind = Behind {
        via: "vhost-user",
        net: Backend::VhostUser(NET_SOCKET.to_owned()),
        ..behind_generic(USER)
    };
    play(stage, report, &kit, &behind)
}

/// On a tap interface of this machine, in a network namespace.
pub(super) fn tap(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = stage.kit.with_new_qemu()?.with_tools()?;
    let namespace = Namespace::new(&mut stage.scene, TAP)?;
    stage.scene.enter(namespace);
    let behind = Behind {
        address: "192.168.9.1",
        address6: "fd09::1",
        own: "192.168.9.2/24",
        own6: "fd09::2/64",
        ..behind_generic("backend=tap,ifname=tap0")
    };
    play(stage, report, &kit, &behind)
}

/// The guest's driver starts while the link is down.
pub(super) fn boot_link_down(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let device = format!("net,id=net0,{USER},mac={TEST_MAC},link=down");
    let options = [
        ("--bus", vmsg::BUS),
        ("--device", device.as_str()),
        ("--control", CONTROL),
    ];
    vmsg.run(&mut stage.scene, "serve", "serve", &options, 1)?;
    let front = format!("vhost-user,socket={NET_SOCKET},dev=net0");
    let options = [("--bus", vmsg::BUS), ("--front", front.as_str())];
    vmsg.run(&mut stage.scene, "proxy", "proxy", &options, 1)?;
    let board = Board::new(Backend::VhostUser(NET_SOCKET.to_owned()), Backend::Qemu);
    let guest = stage.guest("guest", &board, LINK_DOWN)?;
    guest.mark(&mut stage.scene, "link-up", ALL_CHECKS)?;
    set_link(stage, &vmsg, "up")?;
    stage.finish(guest, report)
}

fn set_link(stage: &Stage, vmsg: &Vmsg, word: &str) -> Result<()> {
    let output = vmsg.control(stage.scene.dir(), CONTROL, &["link", "net0", word])?;
    ensure!(
        output.status.success(),
        "vmsg ctl link net0 {word}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A tap interface with addresses, for as many queue pairs as there are.
const TAP: &str = "ip tuntap add dev tap0 mode tap multi_queue\n\
                   ip addr add 192.168.9.1/24 dev tap0\n\
                   ip -6 addr add fd09::1/64 dev tap0 nodad\n\
                   ip link set tap0 mtu 9000 up\n";
const USER: &str = "backend=user";

/// What is on the other side of the device.
struct Behind {
    backend: &'static str,
    via: &'static str,
    net: Backend,
    address: &'static str,
    address6: &'static str,
    /// The guest's own addresses, where nobody gives it any.
    own: &'static str,
    own6: &'static str,
}

fn behind_generic(backend: &'static str) -> Behind {
    Behind {
        backend,
        via: "generic",
        net: Backend::Generic {
            socket: NET_SOCKET.to_owned(),
            queues: 2 * PAIRS + 1,
            config_size: CONFIG_SIZE,
        },
        address: "10.0.2.2",
        address6: GATEWAY6,
        own: "",
        own6: "",
    }
}

fn play(stage: &mut Stage, report: &mut Report, kit: &Kit, behind: &Behind) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let more = if behind.via == "generic" {
        ",rss=on,hash=on"
    } else {
        ""
    };
    let device = device(behind.backend, more);
    let options = [
        ("--bus", vmsg::BUS),
        ("--device", device.as_str()),
        ("--control", CONTROL),
    ];
    let serve = vmsg.run(&mut stage.scene, "serve", "serve", &options, 1)?;
    let config = if behind.via == "generic" {
        ",config=on"
    } else {
        ""
    };
    let front = format!("vhost-user,socket={NET_SOCKET},dev=net0{config}");
    vmsg.run(
        &mut stage.scene,
        "proxy",
        "proxy",
        &[("--bus", vmsg::BUS), ("--front", &front)],
        1,
    )?;
    let port = traffic_server(&mut stage.scene)?;
    let board = Board {
        ram_mib: 512,
        pairs: PAIRS,
        mtu: Some(MTU),
        cpus: 2,
        ..Board::new(behind.net.clone(), Backend::Qemu)
    };
    let settings = [
        ("OWN_MAC", OWN_MAC.to_owned()),
        ("TEST_MAC", TEST_MAC.to_owned()),
        ("VIA", behind.via.to_owned()),
        ("PAIRS", PAIRS.to_string()),
        ("MTU", MTU.to_string()),
        ("TRAFFIC", format!("{} {port}", behind.address)),
        ("GATEWAY", behind.address.to_owned()),
        ("GATEWAY6", behind.address6.to_owned()),
        ("STATIC", behind.own.to_owned()),
        ("STATIC6", behind.own6.to_owned()),
        ("LINK", "host".to_owned()),
        ("OFFLOADS", "on".to_owned()),
    ];
    let guest = Guest::start(
        &mut stage.scene,
        "nic",
        kit,
        Hardware::Board(&board),
        NIC,
        &settings,
    )?;
    guest.booted(&mut stage.scene)?;
    for (mark, word) in [("link-down", "down"), ("link-up", "up")] {
        guest.mark(&mut stage.scene, mark, ALL_CHECKS)?;
        set_link(stage, &vmsg, word)?;
    }
    // In the middle of what follows another process takes over.
    guest.mark(&mut stage.scene, "kill", ALL_CHECKS)?;
    stage.scene.kill(serve, Signal::KILL)?;
    // Without flows to take over it would begin the capture anew.
    let device = device.replace("net.pcap", "again.pcap");
    let options = options.map(|(name, value)| match name {
        "--device" => (name, device.as_str()),
        _ => (name, value),
    });
    vmsg.run(&mut stage.scene, "serve-again", "serve", &options, 1)?;
    guest.tell(&mut stage.scene, "done")?;
    let id = guest.id;
    stage.finish(guest, report)?;
    for line in stage.scene.lines(id, Stream::Out) {
        if let Some((_, figures)) = line.text.split_once("MARK traffic ") {
            println!("      {figures}");
        }
    }
    capture(stage, port, report)
}

/// The gateway of `backend=user`, as its guests know it.
const GATEWAY6: &str = "fd00:10:0:2::2";

/// Starts `iperf3 -s` on a free port of the loopback.
pub(crate) fn traffic_server(scene: &mut Scene) -> Result<u16> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port();
    let mut command = tree::host_net_tools().fetch()?.command("iperf3")?;
    command.args(["-s", "--forceflush", "-p", &port.to_string()]);
    let id = scene.start("iperf3", &command)?;
    scene.expect((id, Stream::Out), "its listening", STEP, |line| {
        line.text.contains("Server listening").then_some(())
    })?;
    Ok(port)
}

/// What was captured is read back by Wireshark: nothing malformed, and the tagged frames are there.
fn capture(stage: &Stage, port: u16, report: &mut Report) -> Result<()> {
    let machine = stage.kit.machine.name();
    if !has_tool("tshark")? {
        println!("skip  {machine}/nic/capture: needs tshark");
        return Ok(());
    }
    let count = |filter: &str| -> Result<usize> {
        let output = Command::new("tshark")
            .args([
                "-r",
                "net.pcap",
                "-Y",
                filter,
                "-T",
                "fields",
                "-e",
                "frame.number",
            ])
            // Heuristics take iperf3's random bytes for this and that.
            .args(["-d", &format!("udp.port=={port},data")])
            .args(["-d", &format!("tcp.port=={port},data")])
            .current_dir(stage.scene.dir())
            .output()
            .context("cannot run tshark")?;
        ensure!(
            output.status.success(),
            "tshark: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).lines().count())
    };
    let malformed = count("_ws.malformed")?;
    report.check(
        &format!("{machine}/nic/capture-well-formed"),
        malformed == 0,
        || format!("{malformed} malformed frames in net.pcap"),
    );
    let tagged = count("vlan.id == 5")?;
    report.check(&format!("{machine}/nic/capture-vlan"), tagged > 0, || {
        "no frame with VLAN 5 in net.pcap".to_owned()
    });
    Ok(())
}
