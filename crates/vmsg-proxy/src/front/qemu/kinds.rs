// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which of QEMU's vhost-user devices stands for which type of device.

use super::{Arch, Machine, QemuDevice};
use std::fmt::Write as _;
use vmsg_bus::keyval::escape;

/// The oldest QEMU with a vhost-user device for any type.
pub const GENERIC_SINCE: (u32, u32) = (11, 1);

/// Types whose vhost-user device QEMU had by 7.2, the oldest that is supported.
const LONG_AGO: (u32, u32) = (7, 2);

/// A vhost-user device of QEMU, for one type.
#[derive(Debug)]
struct Kind {
    device_id: u32,
    /// On PCI with `-pci` behind it.
    name: &'static str,
    /// On virtio-mmio with this behind it.
    mmio: &'static str,
    /// The oldest version that is known to have it.
    since: (u32, u32),
    arm_only: bool,
    /// From which version on it is known that it can be started with `reconnect` on its socket. The others take the connection for granted when
    /// they start, and `reconnect` makes it later: QEMU ends then, 7.2 with a failed assertion (vhost-user-rng).
    reconnects: Option<(u32, u32)>,
}

const fn kind(device_id: u32, name: &'static str, mmio: &'static str) -> Kind {
    Kind {
        device_id,
        name,
        mmio,
        since: LONG_AGO,
        arm_only: false,
        reconnects: None,
    }
}

/// Network devices are not here: theirs is a `-netdev`. Nor is vhost-user-gpu, which needs a second connection, for pictures.
const KINDS: [Kind; 13] = [
    Kind {
        reconnects: Some(LONG_AGO),
        ..kind(2, "vhost-user-blk", "")
    },
    kind(4, "vhost-user-rng", ""),
    Kind {
        reconnects: Some(GENERIC_SINCE),
        ..kind(8, "vhost-user-scsi", "")
    },
    Kind {
        since: GENERIC_SINCE,
        ..kind(17, "vhost-user-rtc", "")
    },
    kind(18, "vhost-user-input", ""),
    kind(19, "vhost-user-vsock", "-device"),
    Kind {
        since: (10, 0),
        ..kind(25, "vhost-user-snd", "")
    },
    kind(26, "vhost-user-fs", "-device"),
    Kind {
        since: (10, 0),
        arm_only: true,
        ..kind(32, "vhost-user-scmi", "")
    },
    kind(34, "vhost-user-i2c", "-device"),
    kind(41, "vhost-user-gpio", "-device"),
    Kind {
        since: GENERIC_SINCE,
        ..kind(45, "vhost-user-spi", "-device")
    },
    // Any device, told what it is.
    Kind {
        since: GENERIC_SINCE,
        ..kind(0, "vhost-user-test-device", "")
    },
];

/// QEMU's own device for a type, or the one for all types.
fn find(device_id: u32, arch: Arch, version: (u32, u32)) -> Option<&'static Kind> {
    let own = |kind: &&Kind| {
        kind.device_id == device_id
            && version >= kind.since
            && (arch == Arch::Arm64 || !kind.arm_only)
    };
    let any = |kind: &&Kind| kind.device_id == 0 && version >= kind.since;
    KINDS
        .iter()
        .find(own)
        .or_else(|| KINDS.iter().find(any))
        .filter(|_| device_id != 0)
}

/// Whether a QEMU can have a device of this type behind vhost-user.
pub fn has_vhost_user(device_id: u32, arch: Arch, version: (u32, u32)) -> bool {
    device_id == 1 || find(device_id, arch, version).is_some()
}

/// The oldest QEMU that is known to have a device of this type behind vhost-user.
pub fn vhost_user_since(device_id: u32, arch: Arch) -> (u32, u32) {
    if device_id == 1 {
        return LONG_AGO;
    }
    let fits =
        |kind: &&Kind| kind.device_id == device_id && (arch == Arch::Arm64 || !kind.arm_only);
    KINDS
        .iter()
        .find(fits)
        .map_or(GENERIC_SINCE, |kind| kind.since)
}

/// The key that has the chardev of a device connect again, if it can.
pub(super) fn reconnect(device_id: u32, machine: &Machine) -> &'static str {
    let can = match device_id {
        1 => true,
        id => find(id, machine.arch, machine.version)
            .and_then(|kind| kind.reconnects)
            .is_some_and(|since| machine.version >= since),
    };
    match can {
        false => "",
        true if machine.version >= (9, 2) => ",reconnect-ms=1000",
        true => ",reconnect=1",
    }
}

/// The value of `-device`, for anything but network devices. A QEMU that has none for the type gets the one for all types, which it refuses.
pub(super) fn spec(device: &QemuDevice<'_>, machine: &Machine) -> String {
    let any = KINDS.last().expect("there are kinds");
    let kind = find(device.device_id, machine.arch, machine.version).unwrap_or(any);
    let mut spec = match machine.arch {
        Arch::X86 => format!("{}-pci", kind.name),
        Arch::Arm64 => format!("{}{}", kind.name, kind.mmio),
    };
    let _ = write!(spec, ",chardev=vmsg-{}", device.id);
    let queues = device.queues.max(1);
    // QEMU has no larger ones.
    let size = device.queue_size.min(1024);
    let mut key = |key: &str, value: &dyn std::fmt::Display| {
        let _ = write!(spec, ",{key}={value}");
    };
    match kind.device_id {
        // By itself QEMU takes as many queues as the guest has processors, and ends if the device has fewer.
        2 => {
            key("num-queues", &queues);
            if size != 0 {
                key("queue-size", &size);
            }
        }
        // Behind control and event queue.
        8 => {
            key("num_queues", &queues.saturating_sub(2).max(1));
            if size != 0 {
                key("virtqueue_size", &size);
            }
        }
        26 => {
            let tag = device.tag.as_deref().unwrap_or(device.id);
            key("tag", &escape(tag));
            let requests = device.request_queues.map_or(queues - 1, usize::from);
            key(
                "num-request-queues",
                &requests.clamp(1, (queues - 1).max(1)),
            );
            if size != 0 {
                key("queue-size", &size);
            }
        }
        0 => {
            key("virtio-id", &device.device_id);
            key("num_vqs", &queues);
            if size != 0 {
                key("vq_size", &size);
            }
            key("config_size", &device.config_size);
        }
        _ => {}
    }
    spec
}
