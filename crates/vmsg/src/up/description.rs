// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a description says, after everything in it was found to be right.

use std::path::{Path, PathBuf};
use std::time::Duration;

use vmsg_bus::BusSpec;
use vmsg_device::net::Mac;
use vmsg_proxy::FrontKind;
use vmsg_proxy::front::qemu::{Arch, MemoryBackend};

use super::source::Span;
use crate::spec::DeviceSpec;

/// Buses, devices, switches, guests and other programs that belong together.
#[derive(Clone, Debug)]
pub(super) struct Description {
    /// What it is called: `[host] name`, or the file's name without its ending.
    pub(super) name: String,
    /// Where the file is; paths in it start there.
    pub(super) folder: PathBuf,
    pub(super) host: HostTable,
    pub(super) buses: Vec<Bus>,
    pub(super) devices: Vec<Device>,
    /// `--switch`, `--port` and `--uplink`, each with its argument.
    pub(super) fabric: Vec<(&'static str, String)>,
    pub(super) guests: Vec<Guest>,
    pub(super) programs: Vec<Program>,
}

/// `[host]`.
#[derive(Clone, Debug)]
pub(super) struct HostTable {
    /// Where sockets and logs are.
    pub(super) runtime: PathBuf,
    /// The control socket.
    pub(super) control: PathBuf,
    /// `serve --workers`.
    pub(super) workers: u64,
    /// `serve --keep`.
    pub(super) keep: Option<u64>,
    pub(super) restart: Restart,
}

/// `[bus.X]`.
#[derive(Clone, Debug)]
pub(super) struct Bus {
    /// The table's name.
    pub(super) id: String,
    pub(super) spec: BusSpec,
    /// As `--bus` of `serve` has it.
    pub(super) text: String,
    /// As `--bus` of `proxy` has it.
    pub(super) proxy_text: String,
    pub(super) span: Span,
}

/// `[device.X]`.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) id: String,
    /// As `--device` has it.
    pub(super) text: String,
    /// Position among the buses.
    pub(super) bus: usize,
    pub(super) num: u16,
    pub(super) spec: DeviceSpec,
    /// What a VMM has to be told.
    pub(super) shape: Shape,
    pub(super) span: Span,
}

/// A device as far as a VMM has to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Virtio device id.
    pub(super) device_id: u32,
    pub(super) queues: usize,
    /// Entries of the smallest queue; 0: not known.
    pub(super) queue_size: u16,
    pub(super) config_size: u32,
    pub(super) mac: Option<Mac>,
    pub(super) pairs: u16,
    pub(super) mtu: Option<u16>,
    /// Of a file system.
    pub(super) tag: Option<String>,
}

impl Shape {
    /// Virtio id of block devices.
    pub(super) const BLOCK: u32 = 2;

    /// A device whose type needs no more to be said.
    pub(super) fn new(device_id: u32, queues: usize, config_size: u32) -> Self {
        Self {
            device_id,
            queues,
            queue_size: 0,
            config_size,
            mac: None,
            pairs: 1,
            mtu: None,
            tag: None,
        }
    }

    pub(super) fn is_disk(&self) -> bool {
        self.device_id == Self::BLOCK
    }
}

/// `[guest.X]`.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) name: String,
    pub(super) machine: Arch,
    pub(super) qemu: String,
    /// Major and minor.
    pub(super) version: (u32, u32),
    /// As QEMU's `-m` has it.
    pub(super) memory: String,
    /// What it must be for the buses.
    pub(super) backend: MemoryBackend,
    pub(super) cpus: u64,
    pub(super) cpu: Option<String>,
    pub(super) accel: Option<String>,
    pub(super) kernel: Option<String>,
    pub(super) initrd: Option<String>,
    pub(super) append: Option<String>,
    /// Positions among the devices.
    pub(super) devices: Vec<usize>,
    pub(super) front: FrontKind,
    pub(super) isolate: bool,
    pub(super) serial: bool,
    /// Root ports that wait for devices.
    pub(super) hotplug: u16,
    pub(super) restart: Restart,
    pub(super) stop: StopBy,
    /// How long it may take to power down.
    pub(super) stop_timeout: Duration,
    pub(super) args: Vec<String>,
}

/// How a guest is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopBy {
    /// Its power button is pressed, and QEMU told to end if nothing comes of it.
    PowerDown,
    /// QEMU is told to end.
    Quit,
}

/// `[program.X]`.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) command: Vec<String>,
    /// Part of a line by which it says that it is ready; by default it is ready when it runs.
    pub(super) ready: Option<String>,
    /// Parts that it waits for; without, everything else waits for it.
    pub(super) after: Vec<String>,
    pub(super) restart: Restart,
}

/// When a part is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restart {
    /// Not at all.
    Never,
    /// When it has failed.
    OnFailure,
    /// Whenever it has ended.
    Always,
}

impl Restart {
    pub(super) const WORDS: [(&'static str, Self); 3] = [
        ("never", Self::Never),
        ("on-failure", Self::OnFailure),
        ("always", Self::Always),
    ];
}

/// Major and minor number of a QEMU.
pub(super) type Version = (u32, u32);

/// What a check looks at besides the text.
pub(super) struct World<'a> {
    /// Whether there is such a file; relative to the description's folder.
    pub(super) exists: &'a dyn Fn(&Path) -> bool,
    /// Whether there is such a program to be run.
    pub(super) runs: &'a dyn Fn(&str) -> bool,
    /// This program.
    pub(super) program: String,
    /// The version of a QEMU.
    pub(super) qemu_version: &'a dyn Fn(&str) -> Result<Version, String>,
    /// The machine whose guests run without emulation, if there are any.
    pub(super) kvm: Option<Arch>,
    /// Folder for folders of running descriptions.
    pub(super) runtimes: PathBuf,
}
