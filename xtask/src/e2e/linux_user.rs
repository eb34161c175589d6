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
    let vmsg = stage.vmsg()?;
    let bus = bus(stage.kit.machine, "1");
    vmsg.run(
        &mut stage.scene,
        "serve",
        "serve",
        &[
            ("--bus", &format!("{bus},trace=bus.pcapng")),
            ("--device", NET),
            ("--device", "rng"),
        ],
        1,
    )?;
    vmsg.run(
        &mut stage.scene,
        "proxy",
        "proxy",
        &[
            ("--bus", &bus),
            ("--front", "vhost-user,socket=net.sock,dev=0"),
            ("--front", "vhost-user,socket=rng.sock,dev=1"),
        ],
        2,
    )?;
    let (net, rng) = fronts();
    let guest = stage.guest("checks", &board(net, rng), CHECKS)?;
    stage.finish(guest, report)?;
    recorded(stage, report, "SET_VQUEUE")
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

/// The 40-byte messages of the first demos: one device.
pub(super) fn r1(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let bus = bus(stage.kit.machine, "r1");
    vmsg.run(
        &mut stage.scene,
        "serve",
        "serve",
        &[
            ("--bus", &format!("{bus},trace=bus.pcapng")),
            ("--device", NET),
        ],
        1,
    )?;
    vmsg.run(
        &mut stage.scene,
        "proxy",
        "proxy",
        &[
            ("--bus", &bus),
            ("--front", "vhost-user,socket=net.sock,dev=0"),
        ],
        1,
    )?;
    let (net, _) = fronts();
    let guest = stage.guest("checks", &board(net, Backend::Qemu), CHECKS)?;
    stage.finish(guest, report)?;
    recorded(stage, report, "r1 dev 0")
}

/// The device host is killed again and again under traffic.
pub(super) fn device_host_killed(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let vmsg = stage.vmsg()?;
    let kills = if stage.full { 50 } else { 5 };
    let bus = bus(stage.kit.machine, "1");
    let serve = [("--bus", bus.as_str()), ("--device", NET)];
    let mut host = vmsg.run(&mut stage.scene, "serve", "serve", &serve, 1)?;
    vmsg.run(
        &mut stage.scene,
        "proxy",
        "proxy",
        &[
            ("--bus", &bus),
            ("--front", "vhost-user,socket=net.sock,dev=0"),
        ],
        1,
    )?;
    let (net, _) = fronts();
    endure(
        stage,
        report,
        &board(net, Backend::Qemu),
        kills,
        |scene, n| {
            scene.kill(host, Signal::KILL)?;
            host = vmsg.run(scene, &format!("serve-{n}"), "serve", &serve, 1)?;
            Ok(())
        },
    )
}
