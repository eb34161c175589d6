// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and names of feature bits (virtio 1.3 §5 for the device types, §6 for the reserved bits).

/// A device may be driven with buffer descriptors that point to tables of descriptors.
pub const RING_INDIRECT_DESC: u32 = 28;
/// Notifications are asked for by index.
pub const RING_EVENT_IDX: u32 = 29;
/// The device follows virtio 1.0 or later.
pub const VERSION_1: u32 = 32;
/// The device reaches memory through translated, limited addresses.
pub const ACCESS_PLATFORM: u32 = 33;
/// Packed virtqueues.
pub const RING_PACKED: u32 = 34;
/// Buffers are used in the order they were made available.
pub const IN_ORDER: u32 = 35;
/// Memory accesses are ordered as the platform orders them.
pub const ORDER_PLATFORM: u32 = 36;
/// Single Root I/O Virtualization.
pub const SR_IOV: u32 = 37;
/// Notifications of the driver carry extra data.
pub const NOTIFICATION_DATA: u32 = 38;
/// Notifications of the driver carry data that the device chose.
pub const NOTIF_CONFIG_DATA: u32 = 39;
/// A single queue can be reset.
pub const RING_RESET: u32 = 40;
/// Administration queues.
pub const ADMIN_VQ: u32 = 41;

/// The name of feature bit `bit` of a device with virtio id `device_id`, as the specification has it without its prefix. `None`: not known.
pub fn name(device_id: u32, bit: u32) -> Option<&'static str> {
    Some(match bit {
        24 => "NOTIFY_ON_EMPTY",
        27 => "ANY_LAYOUT",
        RING_INDIRECT_DESC => "RING_INDIRECT_DESC",
        RING_EVENT_IDX => "RING_EVENT_IDX",
        VERSION_1 => "VERSION_1",
        ACCESS_PLATFORM => "ACCESS_PLATFORM",
        RING_PACKED => "RING_PACKED",
        IN_ORDER => "IN_ORDER",
        ORDER_PLATFORM => "ORDER_PLATFORM",
        SR_IOV => "SR_IOV",
        NOTIFICATION_DATA => "NOTIFICATION_DATA",
        NOTIF_CONFIG_DATA => "NOTIF_CONFIG_DATA",
        RING_RESET => "RING_RESET",
        ADMIN_VQ => "ADMIN_VQ",
        _ => return device_bit(device_id, bit),
    })
}

fn device_bit(device_id: u32, bit: u32) -> Option<&'static str> {
    Some(match (device_id, bit) {
        // 1: network (§5.1.3)
        (1, 0) => "CSUM",
        (1, 1) => "GUEST_CSUM",
        (1, 2) => "CTRL_GUEST_OFFLOADS",
        (1, 3) => "MTU",
        (1, 5) => "MAC",
        (1, 6) => "GSO",
        (1, 7) => "GUEST_TSO4",
        (1, 8) => "GUEST_TSO6",
        (1, 9) => "GUEST_ECN",
        (1, 10) => "GUEST_UFO",
        (1, 11) => "HOST_TSO4",
        (1, 12) => "HOST_TSO6",
        (1, 13) => "HOST_ECN",
        (1, 14) => "HOST_UFO",
        (1, 15) => "MRG_RXBUF",
        (1, 16) => "STATUS",
        (1, 17) => "CTRL_VQ",
        (1, 18) => "CTRL_RX",
        (1, 19) => "CTRL_VLAN",
        (1, 20) => "CTRL_RX_EXTRA",
        (1, 21) => "GUEST_ANNOUNCE",
        (1, 22) => "MQ",
        (1, 23) => "CTRL_MAC_ADDR",
        (1, 50) => "DEVICE_STATS",
        (1, 51) => "HASH_TUNNEL",
        (1, 52) => "VQ_NOTF_COAL",
        (1, 53) => "NOTF_COAL",
        (1, 54) => "GUEST_USO4",
        (1, 55) => "GUEST_USO6",
        (1, 56) => "HOST_USO",
        (1, 57) => "HASH_REPORT",
        (1, 59) => "GUEST_HDRLEN",
        (1, 60) => "RSS",
        (1, 61) => "RSC_EXT",
        (1, 62) => "STANDBY",
        (1, 63) => "SPEED_DUPLEX",
        // 2: block (§5.2.3)
        (2, 0) => "BARRIER",
        (2, 1) => "SIZE_MAX",
        (2, 2) => "SEG_MAX",
        (2, 4) => "GEOMETRY",
        (2, 5) => "RO",
        (2, 6) => "BLK_SIZE",
        (2, 7) => "SCSI",
        (2, 9) => "FLUSH",
        (2, 10) => "TOPOLOGY",
        (2, 11) => "CONFIG_WCE",
        (2, 12) => "MQ",
        (2, 13) => "DISCARD",
        (2, 14) => "WRITE_ZEROES",
        (2, 15) => "LIFETIME",
        (2, 16) => "SECURE_ERASE",
        (2, 17) => "ZONED",
        // 3: console (§5.3.3)
        (3, 0) => "SIZE",
        (3, 1) => "MULTIPORT",
        (3, 2) => "EMERG_WRITE",
        // 5: traditional memory balloon (§5.5.3)
        (5, 0) => "MUST_TELL_HOST",
        (5, 1) => "STATS_VQ",
        (5, 2) => "DEFLATE_ON_OOM",
        (5, 3) => "FREE_PAGE_HINT",
        (5, 4) => "PAGE_POISON",
        (5, 5) => "PAGE_REPORTING",
        // 8: SCSI host (§5.6.3)
        (8, 0) => "INOUT",
        (8, 1) => "HOTPLUG",
        (8, 2) => "CHANGE",
        (8, 3) => "T10_PI",
        // 9: 9P transport
        (9, 0) => "MOUNT_TAG",
        // 16: GPU (§5.7.3)
        (16, 0) => "VIRGL",
        (16, 1) => "EDID",
        (16, 2) => "RESOURCE_UUID",
        (16, 3) => "RESOURCE_BLOB",
        (16, 4) => "CONTEXT_INIT",
        // 19: socket (§5.10.3)
        (19, 0) => "STREAM",
        (19, 1) => "SEQPACKET",
        (19, 2) => "NO_IMPLIED_STREAM",
        // 23: IOMMU (§5.13.3)
        (23, 0) => "INPUT_RANGE",
        (23, 1) => "DOMAIN_RANGE",
        (23, 2) => "MAP_UNMAP",
        (23, 3) => "BYPASS",
        (23, 4) => "PROBE",
        (23, 5) => "MMIO",
        (23, 6) => "BYPASS_CONFIG",
        // 24: memory (§5.15.3)
        (24, 0) => "ACPI_PXM",
        (24, 1) => "UNPLUGGED_INACCESSIBLE",
        // 26: file system (§5.11.3)
        (26, 0) => "NOTIFICATION",
        // 27: persistent memory (§5.19.3)
        (27, 0) => "SHMEM_REGION",
        // 34: I2C adapter (§5.16.3)
        (34, 0) => "ZERO_LENGTH_REQUEST",
        // 41: GPIO (§5.18.3)
        (41, 0) => "IRQ",
        _ => return None,
    })
}

/// The name of a device type (virtio 1.3 §5), in the short form used on a command line. `None`: not known.
pub fn device_name(device_id: u32) -> Option<&'static str> {
    Some(match device_id {
        1 => "net",
        2 => "blk",
        3 => "console",
        4 => "rng",
        5 => "balloon",
        8 => "scsi",
        9 => "9p",
        16 => "gpu",
        18 => "input",
        19 => "vsock",
        20 => "crypto",
        23 => "iommu",
        24 => "mem",
        25 => "sound",
        26 => "fs",
        27 => "pmem",
        28 => "rpmb",
        32 => "scmi",
        34 => "i2c",
        36 => "can",
        39 => "audio-policy",
        40 => "bluetooth",
        41 => "gpio",
        42 => "rdma",
        43 => "camera",
        45 => "spi",
        _ => return None,
    })
}
