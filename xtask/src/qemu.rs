// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of a stock QEMU.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kit::Kit;
use crate::machine::Machine;

/// The oldest QEMU that is known to work.
const OLDEST: (u32, u32) = (7, 2);

/// Where a guest's device comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// QEMU's own: `-netdev user`, `rng-random`.
    Qemu,
    /// A vhost-user back end listening on this socket.
    VhostUser(String),
}

/// The hardware of a guest.
#[derive(Clone, Debug)]
pub(crate) struct Board {
    /// RAM in MiB.
    pub(crate) ram_mib: u32,
    /// RAM is a memfd that back ends can map. Without that vhost-user cannot work.
    pub(crate) ram_shared: bool,
    /// Processors.
    pub(crate) cpus: u32,
    /// The network device under test.
    pub(crate) net: Backend,
    /// The entropy device under test.
    pub(crate) rng: Backend,
    /// QEMU connects again when a vhost-user back end goes away.
    pub(crate) reconnect: bool,
}

impl Board {
    /// The usual hardware with devices from `net` and `rng`.
    pub(crate) fn new(net: Backend, rng: Backend) -> Self {
        Self {
            ram_mib: 256,
            ram_shared: true,
            cpus: 1,
            net,
            rng,
            reconnect: true,
        }
    }
}

/// The address of QEMU's own network device, eth0 in the guest.
pub(crate) const OWN_MAC: &str = "52:54:00:00:00:10";
/// The address of the network device under test, eth1 in the guest.
pub(crate) const TEST_MAC: &str = "52:54:00:76:6d:01";

/// The version of the kit's QEMU.
///
/// # Errors
/// It cannot be run, or is too old.
pub(crate) fn version(kit: &Kit) -> Result<(u32, u32)> {
    let qemu = kit.qemu.display();
    let output = Command::new(&kit.qemu)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {qemu}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = parse_version(&text)
        .with_context(|| format!("{qemu} --version does not tell a version: {text}"))?;
    if found < OLDEST {
        bail!(
            "{qemu} is version {}.{}; at least {}.{} is needed",
            found.0,
            found.1,
            OLDEST.0,
            OLDEST.1
        );
    }
    Ok(found)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text
        .split("version ")
        .nth(1)?
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The command that boots `kit` on `board` with the file `initrd`. The console is on standard input and output.
pub(crate) fn command(kit: &Kit, version: (u32, u32), board: &Board, initrd: &str) -> Command {
    let mut qemu = Command::new(&kit.qemu);
    let ram = format!("{}M", board.ram_mib);
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-accel",
        "tcg",
    ]);
    let mut machine = match kit.machine {
        Machine::X86 => "q35".to_owned(),
        Machine::Arm64 => "virt".to_owned(),
    };
    if board.ram_shared {
        qemu.args([
            "-object",
            &format!("memory-backend-memfd,id=mem,size={ram},share=on"),
        ]);
        machine.push_str(",memory-backend=mem");
    }
    qemu.args([
        "-machine",
        &machine,
        "-m",
        &ram,
        "-smp",
        &board.cpus.to_string(),
    ]);
    match kit.machine {
        Machine::X86 => qemu.args(["-cpu", "qemu64,+rdrand"]),
        // Pointer authentication as the architecture defines it costs more than all else under emulation.
        Machine::Arm64 => qemu.args([
            "-cpu",
            "max,pauth-impdef=on",
            "-global",
            "virtio-mmio.force-legacy=false",
        ]),
    };
    qemu.args([
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    qemu.arg("-kernel")
        .arg(&kit.kernel)
        .args(["-initrd", initrd]);
    qemu.args(["-append", &append(kit.machine)]);

    let suffix = match kit.machine {
        Machine::X86 => "pci",
        Machine::Arm64 => "device",
    };
    // No boot ROM: the kernel is given.
    let rom = match kit.machine {
        Machine::X86 => ",romfile=",
        Machine::Arm64 => "",
    };
    qemu.args(["-netdev", "user,id=own,restrict=on"]);
    qemu.args([
        "-device",
        &format!("virtio-net-{suffix},netdev=own,mac={OWN_MAC}{rom}"),
    ]);
    match &board.net {
        Backend::Qemu => qemu.args(["-netdev", "user,id=net"]),
        Backend::VhostUser(socket) => qemu
            .args([
                "-chardev",
                &chardev("netsock", socket, version, board.reconnect),
            ])
            .args(["-netdev", "vhost-user,id=net,chardev=netsock"]),
    };
    // QEMU 7.2 without KVM takes the irqfds of a vhost-user network device with MSI-X for granted and crashes
    // (seen in 7.2.22, where the driver sets DRIVER_OK): the device has to do with INTx there.
    let intx = kit.machine == Machine::X86 && board.net != Backend::Qemu && version < (8, 0);
    let vectors = if intx { ",vectors=0" } else { "" };
    qemu.args([
        "-device",
        &format!("virtio-net-{suffix},netdev=net,mac={TEST_MAC}{vectors}{rom}"),
    ]);
    match &board.rng {
        Backend::Qemu => qemu.args(["-device", &format!("virtio-rng-{suffix}")]),
        Backend::VhostUser(socket) => {
            let device = match kit.machine {
                Machine::X86 => "vhost-user-rng-pci",
                Machine::Arm64 => "vhost-user-rng",
            };
            qemu.args(["-chardev", &chardev("rngsock", socket, version, false)])
                .args(["-device", &format!("{device},chardev=rngsock")])
        }
    };
    qemu
}

/// A socket to a back end. `reconnect` counts seconds; QEMU 9.2 has put `reconnect-ms` in its place.
fn chardev(id: &str, socket: &str, version: (u32, u32), reconnect: bool) -> String {
    let again = match (reconnect, version >= (9, 2)) {
        (false, _) => "",
        (true, false) => ",reconnect=1",
        (true, true) => ",reconnect-ms=200",
    };
    format!("socket,id={id},path={}{again}", socket.replace(',', ",,"))
}

/// The kernel's command line.
fn append(machine: Machine) -> String {
    let mut words = vec![format!("console={}", machine.console())];
    // A panic ends QEMU at once (-no-reboot); only panics come to the console, the rest stays in dmesg.
    words.extend(["panic=-1", "loglevel=1", "rdinit=/init"].map(str::to_owned));
    if machine == Machine::X86 {
        // Checks of timers against each other fail on a busy host, where the emulated processor is stopped at any
        // moment; a false alarm costs the boot.
        words.extend(
            [
                "no_timer_check",
                "nowatchdog",
                "clocksource=hpet",
                "tsc=unstable",
            ]
            .map(str::to_owned),
        );
    }
    words.join(" ")
}

#[cfg(test)]
#[path = "qemu_test.rs"]
mod tests;
