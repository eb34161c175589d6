// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus of QEMU's virtio-msg between programs of ours: the guest's memory is a file that both know, kicks and
//! interrupts are messages.

use anyhow::Result;
use rustix::process::Signal;

use super::{CHECKS, Stage, endure};
use crate::machine::Machine;
use crate::qemu::{Backend, Board};
use crate::report::Report;
use crate::vmsg::{NET, NET_SOCKET, RNG_SOCKET};

/// Fronts for the two devices.
pub(crate) const NET_FRONT: &str = "vhost-user,socket=net.sock,dev=0";
pub(crate) const RNG_FRONT: &str = "vhost-user,socket=rng.sock,dev=1";
/// The guest's memory.
const RAM: &str = "ram";

/// The bus, with the guest's memory where the machine has it.
pub(crate) fn bus(machine: Machine, revision: &str) -> String {
    let offset = match machine {
        Machine::X86 => "0",
        Machine::Arm64 => "0x40000000",
    };
    format!("linux-user,ram={RAM},mem-offset={offset},revision={revision}")
}

/// Hardware with that memory.
pub(crate) fn board(net: Backend, rng: Backend) -> Board {
    Board {
        ram_file: Some(RAM),
        ..Board::new(net, rng)
    }
}

fn fronts() -> (Backend, Backend) {
    (
        Backend::VhostUser(NET_SOCKET.to_owned()),
        Backend::VhostUser(RNG_SOCKET.to_owned()),
    )
}

/// Both devices, and all checks of an ordinary boot.
pub(super) fn revision_1(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let bus = bus(stage.kit.machine, "1");
    sides(stage, &bus, &[NET, "rng"], &[NET_FRONT, RNG_FRONT])?;
    let (net, rng) = fronts();
    checked(stage, report, &board(net, rng), "SET_VQUEUE")
}

/// The 40-byte messages of the first demos: one device.
pub(super) fn r1(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let bus = bus(stage.kit.machine, "r1");
    sides(stage, &bus, &[NET], &[NET_FRONT])?;
    let (net, _) = fronts();
    checked(stage, report, &board(net, Backend::Qemu), "r1 dev 0")
}

/// Both processes; the device host records what goes over the bus.
fn sides(stage: &mut Stage, bus: &str, devices: &[&str], fronts: &[&str]) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let recorded = format!("{bus},trace=bus.pcapng");
    vmsg.serve_on(&mut stage.scene, "serve", &recorded, devices)?;
    vmsg.proxy_on(&mut stage.scene, bus, fronts)?;
    Ok(())
}

/// A guest with all checks; then `message` is in what was recorded.
fn checked(stage: &mut Stage, report: &mut Report, board: &Board, message: &str) -> Result<()> {
    let guest = stage.guest("checks", board, CHECKS)?;
    stage.finish(guest, report)?;
    recorded(stage, report, message)
}

/// The conversation was recorded, and reads as one.
fn recorded(stage: &Stage, report: &mut Report, message: &str) -> Result<()> {
    let output = stage.vmsg()?.trace(stage.scene.dir(), "bus.pcapng")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = text.lines().filter(|line| line.contains(message)).count();
    report.check(
        &format!("{}/linux-user/trace", stage.kit.machine.name()),
        output.status.success() && found > 0,
        || format!("{}: {found} {message}", output.status),
    );
    Ok(())
}

/// The device host is killed again and again under traffic.
pub(super) fn device_host_killed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let kills = if stage.full { 50 } else { 5 };
    let bus = bus(stage.kit.machine, "1");
    let mut host = vmsg.serve_on(&mut stage.scene, "serve", &bus, &[NET])?;
    vmsg.proxy_on(&mut stage.scene, &bus, &[NET_FRONT])?;
    let (net, _) = fronts();
    endure(
        stage,
        report,
        &board(net, Backend::Qemu),
        kills,
        |scene, n| {
            scene.kill(host, Signal::KILL)?;
            host = vmsg.serve_on(scene, &format!("serve-{n}"), &bus, &[NET])?;
            Ok(())
        },
    )
}
