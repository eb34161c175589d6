// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The baseline: two guests whose QEMUs are joined by QEMU's own `-netdev stream`, and nothing of ours between them.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};

use crate::kit::Kit;
use crate::lan::Host;
use crate::machine::Machine;
use crate::qemu::{self, Hardware};
use crate::scene::Scene;
use crate::shell::Shell;

/// The socket between them, relative to the run's folder.
const WIRE: &str = "wire.sock";

/// Starts both with this initrd, and waits until they can be told what to do.
pub(crate) fn pair(scene: &mut Scene, kit: &Kit, initrd: &str) -> Result<[Host; 2]> {
    let start = |scene: &mut Scene, number: u8, server: &str| -> Result<Host> {
        let name = format!("stream{number}");
        let address = Ipv4Addr::new(192, 168, 1, number);
        let arguments = arguments(kit.machine, number, server);
        let words = format!("NAME={name} ADDRESS={address}/24");
        let hardware = Hardware::Alone(&arguments, &words);
        let command = qemu::command(kit, qemu::version(&kit.qemu)?, hardware, initrd)?;
        let id = scene.start(&name, &command)?;
        Ok(Host {
            shell: Shell::new(id, &name),
            address,
        })
    };
    // QEMU connects once, so the one that listens comes first.
    let mut first = start(scene, 1, "on")?;
    first.shell.booted(scene)?;
    let mut second = start(scene, 2, "off")?;
    second.shell.booted(scene)?;
    Ok([first, second])
}

/// Ends both.
pub(crate) fn end(scene: &mut Scene, hosts: [Host; 2]) -> Result<()> {
    for host in hosts {
        host.shell
            .power_off(scene)
            .context("the baseline's guest")?;
    }
    Ok(())
}

/// The same board as that of guests behind a switch.
fn arguments(machine: Machine, number: u8, server: &str) -> Vec<String> {
    let ram = "256M";
    let netdev = format!("stream,id=net,server={server},addr.type=unix,addr.path={WIRE}");
    let mac = format!("52:54:00:76:6e:{number:02x}");
    let (board, device) = match machine {
        Machine::X86 => (
            "q35",
            format!("virtio-net-pci,netdev=net,mac={mac},romfile="),
        ),
        Machine::Arm64 => ("virt", format!("virtio-net-device,netdev=net,mac={mac}")),
    };
    let memory = format!("memory-backend-memfd,id=mem,size={ram},share=on");
    let board = format!("{board},memory-backend=mem");
    let mut words = vec!["-object", &memory, "-machine", &board, "-m", ram];
    if machine == Machine::Arm64 {
        words.extend(["-global", "virtio-mmio.force-legacy=false"]);
    }
    words.extend(["-netdev", &netdev, "-device", &device]);
    words.iter().map(|w| (*w).to_owned()).collect()
}
