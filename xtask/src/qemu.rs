// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of a stock QEMU.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kit::{Kit, Qemu};
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
    /// The same behind QEMU's generic vhost-user device (QEMU 11.1), which hands everything on as it is: the
    /// configuration space and the control queue too. Only as a network device.
    Generic {
        /// The socket.
        socket: String,
        /// Virtqueues that the device has.
        queues: u32,
        /// Bytes of its configuration space.
        config_size: u32,
    },
    /// What these arguments describe; `net` is the name of the `-netdev`.
    Netdev(Vec<String>),
    /// A whole PCI device, served over vfio-user on this socket (QEMU 10.1).
    VfioUser(String),
    /// QEMU's own, on PCI whatever the machine, as the standard has it: no transitional device, addresses by the
    /// platform's rules.
    Pci,
}

/// The hardware of a guest.
#[derive(Clone, Debug)]
pub(crate) struct Board {
    /// RAM in MiB.
    pub(crate) ram_mib: u32,
    /// RAM is a memfd that back ends can map. Without that vhost-user cannot work.
    pub(crate) ram_shared: bool,
    /// RAM is this file, instead of one without a name.
    pub(crate) ram_file: Option<&'static str>,
    /// Processors.
    pub(crate) cpus: u32,
    /// The network device under test.
    pub(crate) net: Backend,
    /// The entropy device under test.
    pub(crate) rng: Backend,
    /// QEMU connects again when a vhost-user back end goes away.
    pub(crate) reconnect: bool,
    /// The address of the network device under test.
    pub(crate) net_mac: &'static str,
    /// Queue pairs of the network device.
    pub(crate) pairs: u32,
    /// The MTU that the guest is told, unless it is the usual one.
    pub(crate) mtu: Option<u32>,
    /// There is an IOMMU: `intel-iommu` on x86, `virtio-iommu-pci` on arm64.
    pub(crate) iommu: bool,
    /// More words for the kernel's command line.
    pub(crate) words: Vec<&'static str>,
    /// More arguments of QEMU.
    pub(crate) more: Vec<String>,
    /// The guest may reboot; otherwise that ends QEMU, as a panic does.
    pub(crate) may_reboot: bool,
}

impl Board {
    /// The usual hardware with devices from `net` and `rng`.
    pub(crate) fn new(net: Backend, rng: Backend) -> Self {
        Self {
            ram_mib: 256,
            ram_shared: true,
            ram_file: None,
            cpus: 1,
            net,
            rng,
            reconnect: true,
            net_mac: TEST_MAC,
            pairs: 1,
            mtu: None,
            iommu: false,
            words: Vec::new(),
            more: Vec::new(),
            may_reboot: false,
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
pub(crate) fn version(qemu: &Qemu) -> Result<(u32, u32)> {
    let output = qemu
        .command()?
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

/// What a guest is given besides its kernel and QEMU's own network device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hardware<'a> {
    /// This.
    Board(&'a Board),
    /// What these arguments of QEMU describe: board, memory and devices.
    Arguments(&'a [String]),
    /// The same without a network device of QEMU's own, and more words for the kernel.
    Alone(&'a [String], &'a str),
}

/// The command that boots `kit` on `hardware` with the file `initrd`. The console is on standard input and output.
pub(crate) fn command(
    kit: &Kit,
    version: (u32, u32),
    hardware: Hardware<'_>,
    initrd: &str,
) -> Result<Command> {
    let mut qemu = kit.qemu.command()?;
    qemu.args([
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-accel",
        "tcg",
    ]);
    match kit.machine {
        Machine::X86 => qemu.args(["-cpu", "qemu64,+rdrand"]),
        // Pointer authentication as the architecture defines it costs more than all else under emulation.
        Machine::Arm64 => qemu.args(["-cpu", "max,pauth-impdef=on"]),
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
    let board = match hardware {
        Hardware::Board(board) => Some(board),
        Hardware::Arguments(_) | Hardware::Alone(..) => None,
    };
    if !board.is_some_and(|b| b.may_reboot) {
        qemu.arg("-no-reboot");
    }
    let mut words = append(kit.machine, board);
    if let Hardware::Alone(_, more) = hardware {
        words.push(' ');
        words.push_str(more);
    } else {
        qemu.args(["-netdev", "user,id=own,restrict=on"]);
        qemu.args(["-device", &net_device(kit.machine, "own", OWN_MAC)]);
    }
    qemu.args(["-append", &words]);
    match hardware {
        Hardware::Board(board) => add_board(&mut qemu, kit.machine, version, board),
        Hardware::Arguments(arguments) | Hardware::Alone(arguments, _) => {
            qemu.args(arguments);
        }
    }
    Ok(qemu)
}

/// A network device. It has no boot ROM: the kernel is given.
fn net_device(machine: Machine, netdev: &str, mac: &str) -> String {
    match machine {
        Machine::X86 => format!("virtio-net-pci,netdev={netdev},mac={mac},romfile="),
        Machine::Arm64 => format!("virtio-net-device,netdev={netdev},mac={mac}"),
    }
}

fn add_board(qemu: &mut Command, machine: Machine, version: (u32, u32), board: &Board) {
    let ram = format!("{}M", board.ram_mib);
    let mut name = match machine {
        Machine::X86 => "q35",
        Machine::Arm64 => "virt",
    }
    .to_owned();
    if board.ram_shared {
        let kind = match board.ram_file {
            Some(file) => format!("memory-backend-file,mem-path={file}"),
            None => "memory-backend-memfd".to_owned(),
        };
        qemu.args(["-object", &format!("{kind},id=mem,size={ram},share=on")]);
        name.push_str(",memory-backend=mem");
    }
    qemu.args([
        "-machine",
        &name,
        "-m",
        &ram,
        "-smp",
        &board.cpus.to_string(),
    ]);
    if machine == Machine::Arm64 {
        qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
    }
    if board.iommu {
        // Devices that are named after it are behind it.
        qemu.args(["-device", iommu(machine)]);
    }
    let pairs = match board.pairs {
        1 => String::new(),
        n => format!(",queues={n}"),
    };
    match &board.net {
        Backend::Qemu => qemu.args(["-netdev", "user,id=net"]),
        Backend::VhostUser(socket) => qemu
            .args([
                "-chardev",
                &chardev("netsock", socket, version, board.reconnect),
            ])
            .args([
                "-netdev",
                &format!("vhost-user,id=net,chardev=netsock{pairs}"),
            ]),
        Backend::Generic {
            socket,
            queues,
            config_size,
        } => {
            let device = match machine {
                Machine::X86 => "vhost-user-test-device-pci",
                Machine::Arm64 => "vhost-user-test-device",
            };
            qemu.args(["-chardev", &chardev("netsock", socket, version, false)])
                .args([
                    "-device",
                    &format!(
                        "{device},chardev=netsock,virtio-id=1,num_vqs={queues},vq_size=1024,\
                         config_size={config_size}"
                    ),
                ])
        }
        Backend::Netdev(arguments) => qemu.args(arguments),
        Backend::VfioUser(socket) => qemu.args(["-device", &vfio_user(socket)]),
        Backend::Pci => {
            let device = format!(
                "virtio-net-pci,netdev=net,mac={},romfile=,{MODERN}",
                board.net_mac
            );
            qemu.args(["-netdev", "user,id=net", "-device", &device])
        }
    };
    // QEMU 7.2 without KVM takes the irqfds of a vhost-user network device with MSI-X for granted and crashes
    // (seen in 7.2.22, where the driver sets DRIVER_OK): the device has to do with INTx there.
    let intx =
        machine == Machine::X86 && matches!(board.net, Backend::VhostUser(_)) && version < (8, 0);
    let mut more = match (machine, board.pairs) {
        _ if intx => ",vectors=0".to_owned(),
        (Machine::X86, n) if n > 1 => format!(",vectors={}", 2 * n + 2),
        _ => String::new(),
    };
    if board.pairs > 1 {
        more.push_str(",mq=on");
    }
    if let Some(mtu) = board.mtu {
        more.push_str(&format!(",host_mtu={mtu}"));
    }
    if !matches!(
        board.net,
        Backend::Generic { .. } | Backend::VfioUser(_) | Backend::Pci
    ) {
        qemu.args([
            "-device",
            &format!("{}{more}", net_device(machine, "net", board.net_mac)),
        ]);
    }
    match (&board.rng, machine) {
        (Backend::Qemu, Machine::X86) => qemu.args(["-device", "virtio-rng-pci"]),
        (Backend::Qemu, Machine::Arm64) => qemu.args(["-device", "virtio-rng-device"]),
        (Backend::VhostUser(socket), _) => {
            let device = match machine {
                Machine::X86 => "vhost-user-rng-pci",
                Machine::Arm64 => "vhost-user-rng",
            };
            qemu.args(["-chardev", &chardev("rngsock", socket, version, false)])
                .args(["-device", &format!("{device},chardev=rngsock")])
        }
        (Backend::VfioUser(socket), _) => qemu.args(["-device", &vfio_user(socket)]),
        (Backend::Pci, _) => qemu.args(["-device", &format!("virtio-rng-pci,{MODERN}")]),
        (Backend::Generic { .. } | Backend::Netdev(_), _) => {
            unreachable!("only a network device is plugged in so")
        }
    };
    qemu.args(&board.more);
}

/// Properties of QEMU's own devices that make them what the standard describes.
const MODERN: &str = "disable-legacy=on,iommu_platform=on";

/// A device served over vfio-user. Its socket's address has parts, so it is written in JSON.
pub(crate) fn vfio_user(socket: &str) -> String {
    let device = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket },
    });
    device.to_string()
}

/// The machine's IOMMU. Devices that are emulated elsewhere must learn of each mapping, hence the caching mode.
fn iommu(machine: Machine) -> &'static str {
    match machine {
        Machine::X86 => "intel-iommu,caching-mode=on",
        Machine::Arm64 => "virtio-iommu-pci",
    }
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

/// What every kernel is told.
pub(crate) fn words(machine: Machine) -> String {
    // A panic ends QEMU at once (-no-reboot); only panics come to the console, the rest stays in dmesg.
    let mut words = format!(
        "console={} panic=-1 loglevel=1 rdinit=/init",
        machine.console()
    );
    if machine == Machine::X86 {
        // Checks of timers against each other fail on a busy host, where the emulated processor is stopped at any
        // moment; a false alarm costs the boot.
        words.push_str(" no_timer_check nowatchdog clocksource=hpet tsc=unstable");
    }
    words
}

/// The kernel's command line.
fn append(machine: Machine, board: Option<&Board>) -> String {
    let mut words = vec![words(machine)];
    if let Some(board) = board {
        if board.iommu {
            if machine == Machine::X86 {
                words.push("intel_iommu=on".to_owned());
            }
            // An address is unmapped when the driver says so, not some time later.
            words.push("iommu.strict=1".to_owned());
        }
        words.extend(board.words.iter().map(|w| (*w).to_owned()));
    }
    words.join(" ")
}

#[cfg(test)]
#[path = "qemu_test.rs"]
mod tests;
