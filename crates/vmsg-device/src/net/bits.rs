// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Feature bits of the network device (VIRTIO 1.3, 5.1.3), and what they need of each other.

use virtio_msg::FeatureSet;

/// The device handles frames with a partial checksum.
pub const CSUM: u32 = 0;
/// The driver handles frames with a partial checksum.
pub const GUEST_CSUM: u32 = 1;
/// The control queue switches the driver's offloads.
pub const CTRL_GUEST_OFFLOADS: u32 = 2;
/// The configuration holds the largest frame.
pub const MTU: u32 = 3;
/// The configuration holds a MAC address.
pub const MAC: u32 = 5;
/// The driver takes large TCP segments over IPv4.
pub const GUEST_TSO4: u32 = 7;
/// The driver takes large TCP segments over IPv6.
pub const GUEST_TSO6: u32 = 8;
/// The driver takes large TCP segments with ECN marks.
pub const GUEST_ECN: u32 = 9;
/// The driver takes large UDP datagrams unfragmented.
pub const GUEST_UFO: u32 = 10;
/// The device takes large TCP segments over IPv4.
pub const HOST_TSO4: u32 = 11;
/// The device takes large TCP segments over IPv6.
pub const HOST_TSO6: u32 = 12;
/// The device takes large TCP segments with ECN marks.
pub const HOST_ECN: u32 = 13;
/// The device takes large UDP datagrams unfragmented.
pub const HOST_UFO: u32 = 14;
/// A frame may fill several receive buffers.
pub const MRG_RXBUF: u32 = 15;
/// The configuration holds the link status.
pub const STATUS: u32 = 16;
/// There is a control queue.
pub const CTRL_VQ: u32 = 17;
/// The control queue sets receive modes.
pub const CTRL_RX: u32 = 18;
/// The control queue sets the VLAN filter.
pub const CTRL_VLAN: u32 = 19;
/// The control queue sets more receive modes.
pub const CTRL_RX_EXTRA: u32 = 20;
/// The driver announces itself when asked to.
pub const GUEST_ANNOUNCE: u32 = 21;
/// There may be several queue pairs, with automatic steering.
pub const MQ: u32 = 22;
/// The control queue sets the MAC address.
pub const CTRL_MAC_ADDR: u32 = 23;
/// The driver takes runs of UDP datagrams over IPv4 as one frame.
pub const GUEST_USO4: u32 = 54;
/// The driver takes runs of UDP datagrams over IPv6 as one frame.
pub const GUEST_USO6: u32 = 55;
/// The device takes runs of UDP datagrams as one frame.
pub const HOST_USO: u32 = 56;
/// The device tells the hash of each frame.
pub const HASH_REPORT: u32 = 57;
/// The driver says which hash goes to which queue.
pub const RSS: u32 = 60;
/// The configuration holds speed and duplex.
pub const SPEED_DUPLEX: u32 = 63;

/// A feature, and those of which it needs one.
///
/// `MQ` and `GUEST_ANNOUNCE` are not here: QEMU's vhost-user front end keeps the
/// control queue to itself and hands these two on. Without that queue the pairs
/// that are set up are the enabled ones, and nobody is asked to announce itself.
const NEEDS: [(u32, &[u32]); 16] = [
    (GUEST_TSO4, &[GUEST_CSUM]),
    (GUEST_TSO6, &[GUEST_CSUM]),
    (GUEST_ECN, &[GUEST_TSO4, GUEST_TSO6]),
    (GUEST_UFO, &[GUEST_CSUM]),
    (GUEST_USO4, &[GUEST_CSUM]),
    (GUEST_USO6, &[GUEST_CSUM]),
    (HOST_TSO4, &[CSUM]),
    (HOST_TSO6, &[CSUM]),
    (HOST_ECN, &[HOST_TSO4, HOST_TSO6]),
    (HOST_UFO, &[CSUM]),
    (HOST_USO, &[CSUM]),
    (CTRL_RX, &[CTRL_VQ]),
    (CTRL_VLAN, &[CTRL_VQ]),
    (CTRL_RX_EXTRA, &[CTRL_VQ]),
    (CTRL_MAC_ADDR, &[CTRL_VQ]),
    (RSS, &[CTRL_VQ]),
];

/// Looks for a feature that cannot work without one that is missing
/// (VIRTIO 1.3, 5.1.3.1), and names it.
pub(super) fn check(features: &FeatureSet) -> Result<(), String> {
    for (feature, needs) in NEEDS {
        if features.contains(feature) && !needs.iter().any(|need| features.contains(*need)) {
            let needs: Vec<String> = needs.iter().copied().map(name).collect();
            return Err(format!("{} needs {}", name(feature), needs.join(" or ")));
        }
    }
    Ok(())
}

fn name(bit: u32) -> String {
    virtio_msg::feature::name(super::DEVICE_ID, bit)
        .map_or_else(|| format!("feature {bit}"), str::to_owned)
}
