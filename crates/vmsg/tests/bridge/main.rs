// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Daemons of vhost-user as devices: `vmsg serve` in a process of its own, a driver in this one, and the daemon beside both.

mod daemon;
mod disk;
mod hostile;
mod memory;
mod others;
mod passt;
mod refused;
mod station;
