// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vfio-user front: a socket behind which VMMs (QEMU from 10.1 on, cloud-hypervisor) find a whole virtio-pci device.
//!
//! One front is one device, and serves one client after another, on one thread. What the guest does to the device's registers comes as
//! messages, goes through [`transport`](crate::transport) and ends as operations of the session. The client waits for each answer, and its
//! guest with it: no answer takes longer than some 3 s, whatever the device host does.
//!
//! * **Kicks** are writes to a register. The thread rings the device's eventfd, or that of the copying thread.
//! * **Interrupts.** The eventfd of an MSI-X vector that is not masked is the device's call: nothing runs here. For everything else the
//!   device rings an eventfd of ours.
//! * **Memory.** The client says which memory the device may reach: all of the guest's, or with a vIOMMU what the guest has mapped for it at the
//!   moment. Where files come with it they are lent to the device host. With [`isolate`](VfioUserOptions::isolate), and where no files come,
//!   the device host gets [copies](crate::shadow).
//! * QEMU ends when the process at the other end of its socket does. So whatever comes over the socket or from the device host, this
//!   thread lives and answers.

mod away;
mod behind;
mod calls;
mod function;
mod lending;
mod server;

pub(crate) use server::session_options;
pub use server::{VfioUserFront, VfioUserOptions};
