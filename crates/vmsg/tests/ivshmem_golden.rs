// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recorded conversations of Linux's and QEMU's drivers, held once more with our bus `ivshmem` and our device host: every byte that the driver
//! sent is written into the memory as it wrote it, and every answer is compared with the recorded one. Where they may differ is a
//! table: [`compare::ALLOWED`]. The recordings and where they are from: `crates/virtio-msg/tests/golden/README.md`.

#[path = "ivshmem_golden/compare.rs"]
mod compare;
#[path = "ivshmem_golden/device.rs"]
mod device;
#[path = "ivshmem_golden/guest.rs"]
mod guest;
#[path = "ivshmem_golden/place.rs"]
mod place;
#[path = "../../virtio-msg/tests/support/recording.rs"]
mod recording;
#[path = "ivshmem_golden/replay.rs"]
mod replay;
#[path = "ivshmem_golden/wire.rs"]
mod wire;

use place::Devices;
use recording::Recording;
use wire::Layout;

/// The recordings whose names begin so, without those whose bus had longer messages (`g2-blk`: 60 bytes of configuration at once).
fn recordings(beginning: &str) -> Vec<Recording> {
    let mut found = recording::recordings();
    found.retain(|recording| {
        let fits = recording
            .lines
            .iter()
            .all(|line| line.bytes.len() <= wire::SLOT);
        recording.name.starts_with(beginning) && fits
    });
    assert!(!found.is_empty(), "no recording {beginning}…");
    found
}

/// Replays them over a layout; at least so many answers and events must have been compared.
fn replay(beginning: &str, layout: Layout, devices: Devices, least: usize) {
    let mut compared = 0;
    for recording in recordings(beginning) {
        compared += replay::replay(&recording, layout, devices);
    }
    assert!(compared >= least, "only {compared} messages were compared");
}

#[test]
fn linux_2025_over_two_pages_without_a_beginning() {
    replay("linux/amp-rng", Layout::Spsc, Devices::Recorded, 29);
}

#[test]
fn linux_2025_against_our_own_devices() {
    replay("linux/amp-rng", Layout::Spsc, Devices::Ours, 29);
}

#[test]
fn linux_2026_over_the_layout_that_describes_itself() {
    replay("linux/amp2-", Layout::Amp, Devices::Recorded, 90);
}

#[test]
fn linux_2026_against_our_own_devices() {
    replay("linux/amp2-rng", Layout::Amp, Devices::Ours, 20);
    replay("linux/amp2-net", Layout::Amp, Devices::Ours, 40);
}

#[test]
fn the_strict_linux_of_2026_over_ivshmem() {
    replay("linux/g2iv-", Layout::Amp, Devices::Recorded, 50);
    replay("linux/g2iv-", Layout::Amp, Devices::Ours, 40);
    replay("linux/g2iv-", Layout::Spsc, Devices::Recorded, 50);
}

/// Conversations over other buses: what is said does not depend on the bus.
#[test]
fn linux_over_other_buses_says_the_same_here() {
    for layout in [Layout::Amp, Layout::Spsc] {
        replay("linux/g15-", layout, Devices::Recorded, 20);
        replay("linux/g2-", layout, Devices::Recorded, 100);
    }
}

#[test]
fn qemu_over_the_layout_that_describes_itself() {
    replay("qemu/v2-amp-vmamp", Layout::Amp, Devices::Recorded, 14);
}

#[test]
fn qemu_over_two_pages() {
    replay("qemu/v2-amp-spsc", Layout::Spsc, Devices::Recorded, 14);
}

#[test]
fn qemu_over_the_registers_of_the_amp_function() {
    replay("qemu/v2-amp-spsc", Layout::AmpPci, Devices::Recorded, 14);
}
