// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known of one ring, gathered from many requests.

use super::memory::GuestMemory;
use super::wire::RingAddresses;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// Where to begin; `None`: at the beginning.
    pub(super) base: Option<u16>,
    pub(super) kick: Option<Arc<OwnedFd>>,
    /// SET_VRING_KICK without descriptor: the back end is to poll.
    pub(super) polled: bool,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) err: Option<OwnedFd>,
    pub(super) enabled: bool,
    /// Set up on the device.
    pub(super) running: bool,
}

impl Ring {
    /// Whether it can be set up now, and is not yet.
    pub(super) fn is_complete(&self) -> bool {
        !self.running
            && self.enabled
            && self.size != 0
            && self.addresses.is_some()
            && (self.kick.is_some() || self.polled)
    }

    /// Size and guest physical addresses of descriptor table, available ring and used ring, and where the used index stands.
    /// `None` if one of them does not lie in one region. Split layout (virtio 1.3 §2.7).
    #[allow(clippy::type_complexity)]
    pub(super) fn setup(&self, memory: &GuestMemory) -> Option<((u16, u64, u64, u64), u64)> {
        let at = self.addresses?;
        let n = u64::from(self.size);
        let descriptor = memory.to_guest(at.descriptor, 16 * n)?;
        // Flags, index, entries, event index.
        let avail = memory.to_guest(at.avail, 6 + 2 * n)?;
        let used = memory.to_guest(at.used, 6 + 8 * n)?;
        Some(((self.size, descriptor, avail, used), used + 2))
    }

    /// After GET_VRING_BASE the front end tells everything again before the next start.
    pub(super) fn forget(&mut self) {
        self.addresses = None;
        self.base = None;
        self.kick = None;
        self.polled = false;
        self.call = None;
    }
}
