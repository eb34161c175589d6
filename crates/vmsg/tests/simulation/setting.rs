// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a case takes place with, and what it comes to.

use crate::line::Bus;

/// What may go wrong in a case.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// Messages get lost.
    pub(crate) drops: bool,
    /// Messages come twice.
    pub(crate) duplicates: bool,
    /// The device host is killed and comes back.
    pub(crate) kills: bool,
    /// The guest is reset and starts over.
    pub(crate) reboots: bool,
    /// The guest takes buffers away while the device has them.
    pub(crate) early: bool,
    /// The connection ends, and both sides live on.
    pub(crate) cuts: bool,
    /// A disk takes seconds for its requests.
    pub(crate) hangs: bool,
    /// The device is removed from the running device host, and one of the same name added.
    pub(crate) unplugs: bool,
}

/// What a case takes place with.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Setting {
    pub(crate) bus: Bus,
    pub(crate) kind: Kind,
    /// Kicks and interrupts through eventfds instead of messages.
    pub(crate) eventfds: bool,
    /// The front end keeps what is in flight.
    pub(crate) keeps_inflight: bool,
    /// Each request has windows of its own, which come before it and go after it.
    pub(crate) iommu: bool,
}

/// Which device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Uses its queues in order.
    #[default]
    Echo,
    /// Does not.
    Disk,
    /// A network device whose frames come back.
    Net,
}

/// What a case came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) completed: u64,
    pub(crate) kills: u64,
    pub(crate) replays: u64,
    pub(crate) dropped: u64,
    pub(crate) reboots: u64,
    /// Times the device said that it needs a reset.
    pub(crate) refused: u64,
    pub(crate) unplugs: u64,
    /// Times a guest that ended had to wait for requests under way.
    pub(crate) waits: u64,
}
