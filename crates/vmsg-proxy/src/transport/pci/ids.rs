// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers by which a driver finds the function.

/// Red Hat, whose number virtio devices have (virtio 1.3 §4.1.2).
pub(super) const VENDOR: u16 = 0x1af4;
/// Of modern devices at least 1.
pub(super) const REVISION: u8 = 1;
/// What virtual machines have; drivers for Windows ask for it together with [`VENDOR`].
pub(super) const SUBSYSTEM: u16 = 0x1100;

/// The PCI device id of a virtio device id.
pub(super) fn device(virtio: u32) -> u16 {
    // What is past the end is nobody's; ids in use end below 64.
    u16::try_from(virtio)
        .ok()
        .and_then(|id| id.checked_add(0x1040))
        .unwrap_or(0xffff)
}

/// Base class, sub-class and programming interface of a virtio device id, as guests are used to them.
pub(super) fn class(virtio: u32) -> [u8; 3] {
    match virtio {
        // Network controller, Ethernet.
        1 => [0x02, 0x00, 0x00],
        // Mass storage: SCSI for block devices and SCSI hosts, other for file systems.
        2 | 8 => [0x01, 0x00, 0x00],
        26 => [0x01, 0x80, 0x00],
        // Simple communication controller, other.
        3 | 19 => [0x07, 0x80, 0x00],
        9 => [0x00, 0x02, 0x00],
        // Display controller, other.
        16 => [0x03, 0x80, 0x00],
        // Input device controller, other.
        18 => [0x09, 0x80, 0x00],
        // Multimedia, audio.
        25 => [0x04, 0x01, 0x00],
        _ => [0x00, 0xff, 0x00],
    }
}
