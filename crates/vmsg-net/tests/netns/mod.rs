// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tap interfaces in network namespaces that tests have for themselves.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test needs another part of it"
)]

use std::net::Ipv4Addr;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use vmsg_net::tap::TapConfig;
use vmsg_net::{Guest, Offloads};

use crate::wire::missing;

pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Moves this thread into a network namespace of its own; false if that is not possible here.
pub fn own_network() -> bool {
    // SAFETY: only the network namespace changes, of this thread alone; no descriptor or memory is shared less.
    let result = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
    if let Err(error) = result {
        missing(&format!("a network namespace ({error})"));
        return false;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        missing("/dev/net/tun");
        return false;
    }
    ip("link set lo up");
    true
}

/// Runs ip(8) in this thread's namespace; returns what it prints.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip(8)");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub fn config() -> TapConfig {
    TapConfig {
        ifname: "t0".to_owned(),
        addresses: vec![(HOST.into(), 24)],
        ..TapConfig::default()
    }
}

pub fn running(offloads: Offloads) -> Guest {
    Guest {
        offloads,
        running: true,
        ..Guest::NONE
    }
}
