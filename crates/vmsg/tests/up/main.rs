// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg up` with processes: the device host and proxies are the real ones, QEMU is played by this program itself.

mod bench;
mod hostile;
mod hotplug;
mod isolation;
mod life;
mod qemu;
mod words;
