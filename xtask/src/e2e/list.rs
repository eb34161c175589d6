// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The list of the end-to-end tests.

use anyhow::Result;

use super::{Stage, linux_user, nic, socket};
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
    /// The short run plays it on x86 only: the other machine would show the same.
    pub(super) once: bool,
    /// The test.
    pub(super) play: fn(&mut Stage, &mut Report) -> Result<()>,
}

/// All tests, in the order in which they are played.
pub(super) const TESTS: [Test; 16] = [
    Test {
        name: "checks",
        reference: true,
        once: false,
        play: checks,
    },
    Test {
        name: "next-guest",
        reference: true,
        once: false,
        play: next_guest,
    },
    Test {
        name: "device-host-killed",
        reference: false,
        once: false,
        play: device_host_killed,
    },
    Test {
        name: "proxy-killed",
        reference: false,
        once: false,
        play: proxy_killed,
    },
    Test {
        name: "proxy-first",
        reference: false,
        once: true,
        play: proxy_first,
    },
    Test {
        name: "printed-arguments",
        reference: false,
        once: false,
        play: printed_arguments,
    },
    Test {
        name: "linux-user",
        reference: false,
        once: false,
        play: linux_user::revision_1,
    },
    Test {
        name: "linux-user-r1",
        reference: false,
        once: false,
        play: linux_user::r1,
    },
    Test {
        name: "linux-user-killed",
        reference: false,
        once: true,
        play: linux_user::device_host_killed,
    },
    Test {
        name: "nic-generic",
        reference: false,
        once: false,
        play: nic::generic,
    },
    Test {
        name: "nic-vhost-user",
        reference: false,
        once: true,
        play: nic::vhost_user,
    },
    Test {
        name: "nic-tap",
        reference: false,
        once: true,
        play: nic::tap,
    },
    Test {
        name: "boot-link-down",
        reference: false,
        once: false,
        play: nic::boot_link_down,
    },
    Test {
        name: "socket-stream",
        reference: false,
        once: true,
        play: socket::stream,
    },
    Test {
        name: "socket-passt",
        reference: false,
        once: true,
        play: socket::passt,
    },
    Test {
        name: "memory-not-shared",
        reference: false,
        once: true,
        play: memory_not_shared,
    },
];
