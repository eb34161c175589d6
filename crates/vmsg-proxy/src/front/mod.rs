// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Fronts: what a session looks like to a VMM.

pub mod qemu;
pub mod vfio_user;
pub mod vhost_user;
