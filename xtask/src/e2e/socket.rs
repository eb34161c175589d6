// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `backend=socket`: a guest behind vmsg, and a guest of a QEMU that knows nothing of it, joined by QEMU's own framing.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use rustix::process::Signal;

use super::{ALL_CHECKS, Stage};
use crate::guest::Guest;
use crate::kit::has_tool;
use crate::qemu::{Backend, Board, Hardware, OWN_MAC, TEST_MAC};
use crate::report::Report;
use crate::scene::Id;
use crate::vmsg::{self, NET_SOCKET};

const NIC: &str = include_str!("../guest/nic.sh");
const PEER: &str = include_str!("../guest/peer.sh");

/// The address of the other guest's network device.
const PEER_MAC: &str = "52:54:00:76:6d:02";

/// A device host with this network device, and a proxy with a front for it.
fn serve(stage: &mut Stage, device: &str) -> Result<()> {
    let vmsg = stage.vmsg()?;
    vmsg.serve_on(&mut stage.scene, "serve", vmsg::BUS, &[device])?;
    let front = format!("vhost-user,socket={NET_SOCKET},dev=net0");
    vmsg.proxy_on(&mut stage.scene, vmsg::BUS, &[&front])?;
    Ok(())
}

/// Over a stream socket on which the device host listens.
pub(super) fn stream(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let kit = stage.kit.with_tools()?;
    let device =
        format!("net,id=net0,backend=socket,mode=stream,path=wire.sock,server=on,mac={TEST_MAC}");
    serve(stage, &device)?;
    let stock = Board {
        ram_shared: false,
        net_mac: PEER_MAC,
        ..Board::new(
            Backend::Netdev(vec![
                "-netdev".to_owned(),
                "stream,id=net,server=off,addr.type=unix,addr.path=wire.sock".to_owned(),
            ]),
            Backend::Qemu,
        )
    };
    let peer = Guest::start(
        &mut stage.scene,
        "peer",
        &kit,
        Hardware::Board(&stock),
        PEER,
        &[
            ("OWN_MAC", OWN_MAC.to_owned()),
            ("TEST_MAC", PEER_MAC.to_owned()),
            ("STATIC", "192.168.7.2/24".to_owned()),
        ],
    )?;
    peer.booted(&mut stage.scene)?;
    peer.mark(&mut stage.scene, "serving", ALL_CHECKS)?;
    let board = Board::new(Backend::VhostUser(NET_SOCKET.to_owned()), Backend::Qemu);
    let settings = [
        ("OWN_MAC", OWN_MAC.to_owned()),
        ("TEST_MAC", TEST_MAC.to_owned()),
        ("VIA", "vhost-user".to_owned()),
        ("PAIRS", "1".to_owned()),
        ("MTU", "1500".to_owned()),
        ("TRAFFIC", "192.168.7.2 5201".to_owned()),
        ("GATEWAY", "192.168.7.2".to_owned()),
        ("GATEWAY6", String::new()),
        ("STATIC", "192.168.7.1/24".to_owned()),
        ("STATIC6", String::new()),
        ("LINK", String::new()),
        // The other end takes nothing that is left to it.
        ("OFFLOADS", "off".to_owned()),
    ];
    let guest = Guest::start(
        &mut stage.scene,
        "nic",
        &kit,
        Hardware::Board(&board),
        NIC,
        &settings,
    )?;
    guest.booted(&mut stage.scene)?;
    stage.finish(guest, report)?;
    peer.tell(&mut stage.scene, "that is all")?;
    stage.finish(peer, report)
}

/// passt at the other end, which also goes away and comes back.
pub(super) fn passt(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let machine = stage.kit.machine.name();
    if !has_tool("passt")? {
        println!("skip  {machine}/socket-passt: needs passt");
        return Ok(());
    }
    // Where another user comes, too, whoever owns the folders above the run's.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o777))?;
    let socket = dir.path().join("passt.sock");
    let device = format!(
        "net,id=net0,backend=socket,path={},mac={TEST_MAC}",
        socket.display()
    );
    serve(stage, &device)?;
    let first = start_passt(stage, "passt", &socket)?;
    let board = Board::new(Backend::VhostUser(NET_SOCKET.to_owned()), Backend::Qemu);
    let guest = stage.guest("guest", &board, include_str!("../guest/passt.sh"))?;
    guest.mark(&mut stage.scene, "kill", ALL_CHECKS)?;
    stage.scene.kill(first, Signal::KILL)?;
    // Killed, it leaves its socket behind and would not take its place.
    std::fs::remove_file(&socket)?;
    start_passt(stage, "passt-again", &socket)?;
    guest.tell(&mut stage.scene, "done")?;
    stage.finish(guest, report)
}

/// passt, which does not run as root.
fn start_passt(stage: &mut Stage, name: &str, socket: &Path) -> Result<Id> {
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "passt"]);
        command
    } else {
        Command::new("passt")
    };
    command
        .args(["--foreground", "--quiet", "--socket"])
        .arg(socket)
        .args(["-a", "10.11.0.15", "-n", "24", "-g", "10.11.0.2"]);
    stage.scene.start(name, &command)
}
