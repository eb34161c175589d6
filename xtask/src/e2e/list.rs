// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The list of the end-to-end tests.

use anyhow::Result;

use super::{
    Stage, bare_metal, console, demo2b, disk, disk_daemon, disk_errors, disk_killed,
    disk_two_drivers, ivshmem, ivshmem_server, linux_user, nic, share, socket, switch, up,
    vfio_user,
};
use super::{
    checks, device_host_killed, memory_not_shared, next_guest, printed_arguments, proxy_first,
    proxy_killed,
};
use crate::report::Report;

/// A test: guests and what is done to them.
pub(super) struct Test {
    /// Its name.
    pub(super) name: &'static str,
    /// It makes sense with QEMU's own devices too.
    pub(super) reference: bool,
    /// The short run plays it on these machines.
    pub(super) short: Short,
    /// The test.
    pub(super) play: fn(&mut Stage, &mut Report) -> Result<()>,
}

/// What the short run plays of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Short {
    /// It on both machines.
    Both,
    /// It on x86 only: the other machine would show the same.
    X86,
    /// It on arm64 only.
    Arm64,
    /// Nothing.
    No,
}

/// All tests, in the order in which they are played.
pub(super) const TESTS: [Test; 67] = [
    Test {
        name: "checks",
        reference: true,
        short: Short::Both,
        play: checks,
    },
    Test {
        name: "next-guest",
        reference: true,
        short: Short::Both,
        play: next_guest,
    },
    Test {
        name: "device-host-killed",
        reference: false,
        short: Short::Both,
        play: device_host_killed,
    },
    Test {
        name: "proxy-killed",
        reference: false,
        short: Short::Both,
        play: proxy_killed,
    },
    Test {
        name: "proxy-first",
        reference: false,
        short: Short::X86,
        play: proxy_first,
    },
    Test {
        name: "printed-arguments",
        reference: false,
        short: Short::Both,
        play: printed_arguments,
    },
    Test {
        name: "linux-user",
        reference: false,
        short: Short::Both,
        play: linux_user::revision_1,
    },
    Test {
        name: "linux-user-r1",
        reference: false,
        short: Short::Both,
        play: linux_user::r1,
    },
    Test {
        name: "linux-user-killed",
        reference: false,
        short: Short::X86,
        play: linux_user::device_host_killed,
    },
    Test {
        name: "ivshmem-server",
        reference: false,
        short: Short::Both,
        play: ivshmem_server::stock_qemu,
    },
    Test {
        name: "nic-generic",
        reference: false,
        short: Short::Both,
        play: nic::generic,
    },
    Test {
        name: "nic-vhost-user",
        reference: false,
        short: Short::X86,
        play: nic::vhost_user,
    },
    Test {
        name: "nic-tap",
        reference: false,
        short: Short::X86,
        play: nic::tap,
    },
    Test {
        name: "boot-link-down",
        reference: false,
        short: Short::Both,
        play: nic::boot_link_down,
    },
    Test {
        name: "socket-stream",
        reference: false,
        short: Short::X86,
        play: socket::stream,
    },
    Test {
        name: "socket-passt",
        reference: false,
        short: Short::X86,
        play: socket::passt,
    },
    Test {
        name: "vfio-user",
        reference: true,
        short: Short::X86,
        play: vfio_user::whole,
    },
    Test {
        name: "vfio-user-isolate",
        reference: false,
        short: Short::Arm64,
        play: vfio_user::isolate,
    },
    Test {
        name: "vfio-user-new-kernel",
        reference: true,
        short: Short::No,
        play: vfio_user::new_kernel,
    },
    Test {
        name: "vfio-user-isolate-new-kernel",
        reference: false,
        short: Short::No,
        play: vfio_user::isolate_new_kernel,
    },
    Test {
        name: "vfio-user-iommu",
        reference: true,
        short: Short::No,
        play: vfio_user::iommu,
    },
    Test {
        name: "vfio-user-iommu-new-kernel",
        reference: true,
        short: Short::No,
        play: vfio_user::iommu_new_kernel,
    },
    Test {
        name: "vfio-user-iommu-isolate",
        reference: false,
        short: Short::No,
        play: vfio_user::iommu_isolate,
    },
    Test {
        name: "vfio-user-unshared",
        reference: false,
        short: Short::No,
        play: vfio_user::unshared,
    },
    Test {
        name: "vfio-user-intx",
        reference: true,
        short: Short::No,
        play: vfio_user::intx,
    },
    Test {
        name: "vfio-user-gone",
        reference: false,
        short: Short::No,
        play: vfio_user::gone,
    },
    Test {
        name: "vfio-user-stuck",
        reference: false,
        short: Short::No,
        play: vfio_user::stuck,
    },
    Test {
        name: "vfio-user-printed-arguments",
        reference: false,
        short: Short::No,
        play: vfio_user::printed,
    },
    Test {
        name: "vfio-user-next-guest",
        reference: true,
        short: Short::No,
        play: vfio_user::next_guest,
    },
    Test {
        name: "ivshmem-tools",
        reference: false,
        short: Short::Both,
        play: ivshmem::tools,
    },
    Test {
        name: "console",
        reference: false,
        short: Short::Both,
        play: console::vfio_user,
    },
    Test {
        name: "console-generic",
        reference: false,
        short: Short::X86,
        play: console::generic,
    },
    Test {
        name: "memory-not-shared",
        reference: false,
        short: Short::X86,
        play: memory_not_shared,
    },
    Test {
        name: "vswitch",
        reference: false,
        short: Short::X86,
        play: up::vswitch,
    },
    Test {
        name: "up",
        reference: false,
        short: Short::X86,
        play: up::up,
    },
    Test {
        name: "up-2b",
        reference: false,
        short: Short::No,
        play: up::two_machines,
    },
    Test {
        name: "hotplug",
        reference: false,
        short: Short::X86,
        play: up::hotplug,
    },
    Test {
        name: "switch-buses",
        reference: false,
        short: Short::X86,
        play: up::buses,
    },
    Test {
        name: "switch-offloads",
        reference: false,
        short: Short::X86,
        play: switch::offloads,
    },
    Test {
        name: "switch-vlan",
        reference: false,
        short: Short::No,
        play: switch::vlan,
    },
    Test {
        name: "demo-2b-bounce",
        reference: false,
        short: Short::Both,
        play: demo2b::bounce,
    },
    Test {
        name: "demo-2b-segment",
        reference: false,
        short: Short::No,
        play: demo2b::segment,
    },
    Test {
        name: "demo-2b-segment-bar",
        reference: false,
        short: Short::No,
        play: demo2b::segment_bar,
    },
    Test {
        name: "demo-2b-whole",
        reference: false,
        short: Short::No,
        play: demo2b::whole,
    },
    Test {
        name: "demo-2b-bounce-spsc",
        reference: false,
        short: Short::No,
        play: demo2b::bounce_spsc,
    },
    Test {
        name: "demo-2b-deaths",
        reference: false,
        short: Short::No,
        play: demo2b::deaths,
    },
    Test {
        name: "demo-2b-deaths-segment",
        reference: false,
        short: Short::No,
        play: demo2b::deaths_segment,
    },
    Test {
        name: "demo-2b-power",
        reference: false,
        short: Short::No,
        play: demo2b::power,
    },
    Test {
        name: "demo-2b-power-segment",
        reference: false,
        short: Short::No,
        play: demo2b::power_segment,
    },
    Test {
        name: "disk",
        reference: true,
        short: Short::X86,
        play: disk::vhost_user,
    },
    Test {
        name: "disk-vfio-user",
        reference: true,
        short: Short::Arm64,
        play: disk::vfio_user,
    },
    Test {
        name: "disk-whole",
        reference: true,
        short: Short::No,
        play: disk::whole_vhost_user,
    },
    Test {
        name: "disk-whole-vfio-user",
        reference: true,
        short: Short::No,
        play: disk::whole_vfio_user,
    },
    Test {
        name: "disk-killed",
        reference: true,
        short: Short::X86,
        play: disk_killed::vhost_user,
    },
    Test {
        name: "disk-killed-vfio-user",
        reference: true,
        short: Short::Arm64,
        play: disk_killed::vfio_user,
    },
    Test {
        name: "disk-guest-killed",
        reference: true,
        short: Short::No,
        play: disk_killed::guest_killed,
    },
    Test {
        name: "disk-guest-killed-vfio-user",
        reference: true,
        short: Short::No,
        play: disk_killed::guest_killed_vfio_user,
    },
    Test {
        name: "disk-errors",
        reference: false,
        short: Short::No,
        play: disk_errors::vhost_user,
    },
    Test {
        name: "disk-errors-vfio-user",
        reference: false,
        short: Short::No,
        play: disk_errors::vfio_user,
    },
    Test {
        name: "disk-two-drivers",
        reference: false,
        short: Short::X86,
        play: disk_two_drivers::vhost_user,
    },
    Test {
        name: "disk-two-drivers-vfio-user",
        reference: false,
        short: Short::No,
        play: disk_two_drivers::vfio_user,
    },
    Test {
        name: "disk-daemon",
        reference: false,
        short: Short::No,
        play: disk_daemon::vhost_user,
    },
    Test {
        name: "disk-daemon-vfio-user",
        reference: false,
        short: Short::No,
        play: disk_daemon::vfio_user,
    },
    Test {
        name: "share-folder",
        reference: false,
        short: Short::X86,
        play: share::vhost_user,
    },
    Test {
        name: "share-folder-vfio-user",
        reference: false,
        short: Short::Arm64,
        play: share::vfio_user,
    },
    Test {
        name: "bare-metal",
        reference: false,
        short: Short::Arm64,
        play: bare_metal::reads_a_disk,
    },
    Test {
        name: "up-disk",
        reference: false,
        short: Short::No,
        play: up::disk,
    },
];
