// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons of vhost-user as devices: `vmsg serve` in a process of its own, a driver in this one, and the daemon beside both.

mod calling;
mod clinging;
mod daemon;
mod disk;
mod hostile;
mod isolated;
mod ivshmem;
mod memory;
mod others;
mod passt;
mod refused;
#[path = "../isolated/search.rs"]
mod search;
mod station;
mod talking;
mod vain;
#[path = "../../../vmsg-proxy/tests/vhost/mod.rs"]
mod vhost_guest;
mod waiting;
mod wrong;
