// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio device as a PCI function (virtio 1.3 §4.1), without legacy interface.
//!
//! | BAR | bits | holds |
//! |---|---|---|
//! | 1 | 32 | MSI-X table, and from the middle of the BAR the pending bits |
//! | 2 | 64, prefetchable | shared-memory regions, if there are any |
//! | 4 | 64 | 0x0 common configuration, 0x1000 ISR, 0x2000 device configuration, 0x3000 notifications: 4 bytes for each queue |
//!
//! **Interrupts.** MSI-X is in use while the capability says so, or while a client has set an eventfd for a vector. A client may keep table and masks to
//! itself and never write ours, as QEMU does; so a vector counts as masked only once its entry was written, or the function mask was set,
//! through the region, or [`mask`](Function::mask) was called. What comes while it is masked, or has no eventfd, is pending, shows in the pending bits, and is
//! rung later. Without MSI-X the INTx line is raised while the ISR is not 0; its eventfd is rung once and then masked until
//! [`unmask`](Function::unmask), as VFIO does it.
//!
//! The memory and bus-master bits of the command register can be written and read, and have no effect: who routes accesses to a BAR knows
//! whether it is enabled.

mod bars;
mod common;
mod config;
mod function;
mod ids;
mod intx;
mod msix;

pub use bars::SharedAt;
pub use function::Function;

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What of a function can be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Region {
    /// The configuration space: 256 bytes.
    Config,
    /// A BAR, by its number.
    Bar(u8),
}

/// Where the notifications are, up to the end of the BAR. Writing there kicks, and does nothing else.
pub(crate) const NOTIFICATIONS: (Region, u64) = (Region::Bar(bars::VIRTIO_BAR), bars::NOTIFY);

/// An interrupt, as VFIO counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Irq {
    /// The interrupt line.
    Intx,
    /// A vector.
    Msix(u16),
    /// Tells of errors of the bus. Never rung by the function.
    Err,
    /// Asks for the device back. Never rung by the function.
    Req,
}

/// How the driver is told of used buffers in a queue.
#[derive(Clone, Debug)]
pub enum Route {
    /// A vector that is not masked: whoever uses the buffers may ring this eventfd itself.
    Direct(Arc<OwnedFd>),
    /// [`Function::queue_used`] must be called.
    Through,
    /// It is not: the driver has chosen no vector.
    Nobody,
}

impl PartialEq for Route {
    fn eq(&self, other: &Route) -> bool {
        match (self, other) {
            (Route::Direct(a), Route::Direct(b)) => Arc::ptr_eq(a, b),
            (Route::Through, Route::Through) | (Route::Nobody, Route::Nobody) => true,
            _ => false,
        }
    }
}

impl Eq for Route {}
