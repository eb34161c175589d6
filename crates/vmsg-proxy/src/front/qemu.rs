// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QEMU arguments that fit a front.

mod kinds;

pub use kinds::{GENERIC_SINCE, has_vhost_user, vhost_user_since};

use crate::session::{DeviceFacts, OtherMemory};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use virtio_msg::feature;
use vmsg_bus::keyval::escape;

/// What to do about a guest whose memory is not shared.
pub const SHARE_REMEDY: &str = "the guest's memory is not shared with this process, so its devices cannot work. \
Start QEMU with `-object memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem` (size= as in -m)";

/// What to do about a guest whose memory is not shared, behind a front that can do without.
pub const COPY_REMEDY: &str = "the guest's memory is not shared with this process, so everything is copied by messages to its VMM, which is slow. \
Start QEMU with `-object memory-backend-memfd,id=mem,size=…,share=on -machine memory-backend=mem` (size= as in -m)";

/// What to do about a guest whose memory is not the file that the bus has in common.
pub fn memory_remedy(other: &OtherMemory) -> Option<String> {
    let (path, size) = match other {
        OtherMemory::OtherFile { path, size, .. } if size.is_multiple_of(1 << 20) => {
            (path, format!("{}M", size >> 20))
        }
        OtherMemory::OtherFile { path, size, .. } => (path, size.to_string()),
        OtherMemory::NoFile { path, .. } => (path, "…".to_owned()),
        OtherMemory::NoPlace { .. } => {
            return Some(format!(
                "{other}. `vmsg proxy --print-qemu` shows the memory that QEMU has to have"
            ));
        }
        // Said well enough.
        _ => return None,
    };
    let path = escape(path);
    Some(format!(
        "the guest's memory is not the file that the bus has in common, so its devices cannot work. Start QEMU with \
`-object memory-backend-file,id=mem,size={size},mem-path={path},share=on -machine memory-backend=mem` (size= as in -m)"
    ))
}

/// Which machine QEMU is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// `qemu-system-x86_64 -machine q35`: devices on PCI.
    X86,
    /// `qemu-system-aarch64 -machine virt`: devices on virtio-mmio.
    Arm64,
}

/// The machine the arguments are for.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Which one.
    pub arch: Arch,
    /// Its memory as `-m` has it, for example `512M`.
    pub memory: String,
    /// QEMU's version, as far as it matters: from 9.2 on `reconnect` is called `reconnect-ms`.
    pub version: (u32, u32),
    /// What its memory is to be.
    pub backend: MemoryBackend,
}

/// What a guest's memory is to be, so that a bus can do something with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryBackend {
    /// Any memory that is shared.
    #[default]
    Any,
    /// This file, which the bus has in common.
    File(PathBuf),
    /// Huge pages, which stay where they are; of this NUMA node, if it has to be one.
    Huge(Option<u32>),
}

/// Where Linux distributions have mounted hugetlbfs.
pub const HUGE_PAGES: &str = "/dev/hugepages";

impl Default for Machine {
    /// An x86 machine with 512 MiB in QEMU 7.2.
    fn default() -> Self {
        Machine {
            arch: Arch::X86,
            memory: "512M".into(),
            version: (7, 2),
            backend: MemoryBackend::Any,
        }
    }
}

/// The device a front presents, as far as QEMU has to be told.
#[derive(Clone, Debug)]
pub struct QemuDevice<'a> {
    /// Name for ids, unique among the devices: letters, digits, `-`, `_`, `.`.
    pub id: &'a str,
    /// The socket of the front.
    pub socket: &'a Path,
    /// Virtio device id (virtio 1.3 §5).
    pub device_id: u32,
    /// Queues of the device.
    pub queues: usize,
    /// Entries that its queues can have, the one with the least; 0: not known.
    pub queue_size: u16,
    /// Bytes of configuration space.
    pub config_size: u32,
    /// For network devices.
    pub mac: Option<[u8; 6]>,
    /// For network devices: pairs of queues.
    pub pairs: u16,
    /// For network devices: the MTU that the guest is told.
    pub mtu: Option<u16>,
    /// For file systems: the name by which the guest mounts it; otherwise `id`.
    pub tag: Option<Cow<'a, str>>,
    /// For file systems: queues for requests; otherwise all but one.
    pub request_queues: Option<u16>,
    /// Its place among those that the machine's firmware boots from, from 0 on.
    pub boot_index: Option<u32>,
}

/// Bytes of configuration that [`QemuDevice::of`] looks at.
pub const CONFIG_BYTES: u32 = 40;

impl<'a> QemuDevice<'a> {
    /// A device of which nothing is known but its type.
    pub fn new(id: &'a str, socket: &'a Path, device_id: u32) -> QemuDevice<'a> {
        QemuDevice {
            id,
            socket,
            device_id,
            queues: 1,
            queue_size: 0,
            config_size: 0,
            mac: None,
            pairs: 1,
            mtu: None,
            tag: None,
            request_queues: None,
            boot_index: None,
        }
    }

    /// A device as its host describes it, with the first [`CONFIG_BYTES`] of its configuration, as far as there are so many.
    pub fn of(id: &'a str, socket: &'a Path, facts: &DeviceFacts, config: &[u8]) -> QemuDevice<'a> {
        let mut device = QemuDevice::new(id, socket, facts.info.device_id);
        device.queues = facts.queue_sizes.len();
        let sizes = facts.queue_sizes.iter().copied().filter(|size| *size != 0);
        // A power of two, as QEMU wants it.
        device.queue_size = sizes.min().map_or(0, |size| 1 << size.ilog2());
        device.config_size = facts.info.config_size;
        match device.device_id {
            1 => {
                device.mac = mac_of(&facts.offered, config);
                device.mtu = mtu_of(&facts.offered, config);
                if facts.is_ours() {
                    device.pairs = pairs_of(&facts.offered, config);
                }
            }
            26 => {
                device.tag = tag_of(config).map(Cow::Owned);
                let queues = config.get(36..40).and_then(|bytes| bytes.try_into().ok());
                let queues = queues.map(u32::from_le_bytes).filter(|queues| *queues != 0);
                device.request_queues =
                    queues.map(|queues| u16::try_from(queues).unwrap_or(u16::MAX));
            }
            _ => {}
        }
        device
    }
}

/// The tag of a file system (virtio 1.3 §5.11.4): UTF-8, 36 bytes of configuration, filled with NUL. `None`: QEMU could not be told it.
fn tag_of(config: &[u8]) -> Option<String> {
    let tag = config.get(..36)?;
    let end = tag.iter().position(|byte| *byte == 0);
    let tag = std::str::from_utf8(tag.get(..end.unwrap_or(tag.len()))?).ok()?;
    (!tag.is_empty() && !tag.contains(char::is_control)).then(|| tag.to_owned())
}

/// The arguments for the machine itself: once, whatever the number of devices.
pub fn machine_args(machine: &Machine) -> Vec<String> {
    let memory = &machine.memory;
    let name = match machine.arch {
        Arch::X86 => "q35",
        Arch::Arm64 => "virt",
    };
    let backend = match &machine.backend {
        MemoryBackend::File(file) => {
            let file = file.to_string_lossy();
            let file = escape(&file);
            format!("memory-backend-file,id=mem,size={memory},mem-path={file},share=on")
        }
        MemoryBackend::Any => format!("memory-backend-memfd,id=mem,size={memory},share=on"),
        MemoryBackend::Huge(node) => {
            let bind = node.map(|node| format!(",host-nodes={node},policy=bind"));
            let bind = bind.unwrap_or_default();
            format!(
                "memory-backend-file,id=mem,size={memory},mem-path={HUGE_PAGES}{bind},prealloc=on,share=on"
            )
        }
    };
    let mut args = vec![
        "-machine".into(),
        format!("{name},memory-backend=mem"),
        "-m".into(),
        memory.clone(),
        "-object".into(),
        backend,
    ];
    if machine.arch == Arch::Arm64 {
        args.extend(["-global".into(), "virtio-mmio.force-legacy=false".into()]);
    }
    args
}

/// The arguments for one device.
pub fn device_args(device: &QemuDevice<'_>, machine: &Machine) -> Vec<String> {
    let id = device.id;
    let reconnect = kinds::reconnect(device.device_id, machine);
    let socket = device.socket.to_string_lossy();
    let mut args = vec![
        "-chardev".into(),
        format!("socket,id=vmsg-{id},path={}{reconnect}", escape(&socket)),
    ];
    let chardev = format!("chardev=vmsg-{id}");
    let mut spec = match device.device_id {
        1 => {
            let pairs = device.pairs.max(1);
            let queues = if pairs > 1 {
                format!(",queues={pairs}")
            } else {
                String::new()
            };
            args.extend([
                "-netdev".into(),
                format!("vhost-user,id=net-{id},{chardev}{queues}"),
            ]);
            let name = match machine.arch {
                Arch::X86 => "virtio-net-pci",
                Arch::Arm64 => "virtio-net-device",
            };
            let mut spec = format!("{name},netdev=net-{id}");
            if let Some(mac) = device.mac {
                let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
                let _ = write!(spec, ",mac={}", mac.join(":"));
            }
            if let Some(mtu) = device.mtu {
                let _ = write!(spec, ",host_mtu={mtu}");
            }
            if pairs > 1 {
                spec.push_str(",mq=on");
            }
            if machine.arch == Arch::X86 && machine.version < (8, 0) {
                // QEMU 7.2 without KVM crashes when the driver starts a vhost-user network device with MSI-X: INTx then.
                spec.push_str(",vectors=0");
            } else if machine.arch == Arch::X86 && pairs > 1 {
                // One for each ring, one for the control queue, one for changes of the configuration.
                let _ = write!(spec, ",vectors={}", 2 * u32::from(pairs) + 2);
            }
            spec
        }
        _ => kinds::spec(device, machine),
    };
    if let Some(index) = device.boot_index {
        let _ = write!(spec, ",bootindex={index}");
    }
    args.extend(["-device".into(), spec]);
    args
}

/// The oldest QEMU with `vfio-user-pci`.
pub const VFIO_USER_SINCE: (u32, u32) = (10, 1);

/// The arguments for a device behind a vfio-user front: QEMU need not be told what it is. `boot_index`: its place among those that the machine's
/// firmware boots from.
pub fn vfio_user_args(socket: &Path, boot_index: Option<u32>) -> Vec<String> {
    let mut path = String::new();
    for c in socket.to_string_lossy().chars() {
        match c {
            '"' | '\\' => path.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                let _ = write!(path, "\\u{:04x}", u32::from(c));
            }
            c => path.push(c),
        }
    }
    let boot = boot_index.map(|index| format!(r#","bootindex":{index}"#));
    let boot = boot.unwrap_or_default();
    let spec =
        format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}{boot}}}"#);
    vec!["-device".into(), spec]
}

/// `args` as text for a shell: an option and its value on a line.
pub fn to_shell(args: &[String]) -> String {
    let plain = |arg: &String| {
        arg.chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c))
    };
    let quote = |arg: &String| {
        if plain(arg) {
            arg.clone()
        } else {
            format!("'{}'", arg.replace('\'', r"'\''"))
        }
    };
    let lines: Vec<String> = args
        .chunks(2)
        .map(|pair| pair.iter().map(quote).collect::<Vec<_>>().join(" "))
        .collect();
    lines.join(" \\\n")
}

/// Pairs of queues that a network device has, by its configuration.
pub fn pairs_of(offered: &virtio_msg::FeatureSet, config: &[u8]) -> u16 {
    let pairs = config
        .get(8..10)
        .filter(|_| offered.bit(crate::front::vhost_user::F_MQ));
    pairs
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(1, u16::from_le_bytes)
        .clamp(1, 128)
}

/// The MTU that a network device has in its configuration, if it offers one.
pub fn mtu_of(offered: &virtio_msg::FeatureSet, config: &[u8]) -> Option<u16> {
    let mtu = config
        .get(10..12)
        .filter(|_| offered.bit(crate::front::vhost_user::F_MTU));
    mtu.and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_le_bytes)
}

/// The MAC address that a network device has in its configuration, if it offers one.
pub fn mac_of(offered: &virtio_msg::FeatureSet, config: &[u8]) -> Option<[u8; 6]> {
    const MAC: u32 = 5;
    debug_assert_eq!(feature::name(1, MAC), Some("MAC"));
    if offered.bit(MAC) {
        config.first_chunk().copied()
    } else {
        None
    }
}

#[cfg(test)]
#[path = "qemu_test.rs"]
mod tests;
