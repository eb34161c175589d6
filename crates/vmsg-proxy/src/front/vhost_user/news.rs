// SPDX-License-Identifier: Apache-2.0 OR MIT
//! News of the device, passed on to the front end.

use super::guest::Guest;
use super::wire::{id, message, protocol};
use crate::session::Event;
use rustix::net::{SendFlags, send};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use vmsg_mem::Doorbell;

/// The least time between two CONFIG_CHANGE_MSG. For each a VMM interrupts the guest, and QEMU reads the configuration with all else waiting.
const CHANGES_PACE: Duration = Duration::from_millis(100);

impl Guest {
    /// Passes news of the device on.
    pub(super) fn news(&mut self, event: &Event) {
        match event {
            Event::ConfigChanged => {
                self.changed =
                    self.protocol & protocol::CONFIG != 0 && self.backend_channel.is_some();
                self.look_at_link = self.is_net();
            }
            // The device host may be another one.
            Event::Ready { .. } => self.look_at_link = self.is_net(),
            Event::QueueUsed(queue) => {
                if let Some(fd) = self
                    .rings
                    .get(queue.to_usize())
                    .and_then(|ring| ring.call.as_ref())
                {
                    ring_bell(fd);
                }
            }
            Event::NeedsReset(_) => {
                for fd in self.rings.iter().filter_map(|ring| ring.err.as_ref()) {
                    ring_bell(fd);
                }
            }
            _ => {}
        }
    }

    /// When [`Self::tell_of_changes`] has something to say.
    pub(super) fn tells_of_changes_at(&self) -> Option<Instant> {
        self.changed.then(|| {
            self.changes_told
                .map_or(self.since, |told| told + CHANGES_PACE)
        })
    }

    /// Tells the front end that the configuration has changed, unless it was told just before.
    pub(super) fn tell_of_changes(&mut self) {
        let now = Instant::now();
        if self.tells_of_changes_at().is_none_or(|at| at > now) {
            return;
        }
        self.changed = false;
        self.changes_told = Some(now);
        let Some(channel) = &self.backend_channel else {
            return;
        };
        let bytes = message(id::CONFIG_CHANGE_MSG, false, &[]);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        if let Err(error) = send(channel, &bytes, flags)
            && let Some(unsaid) = self.limit.admit()
        {
            tracing::warn!(%error, unsaid, "the front end does not hear of a configuration change");
        }
    }
}

/// Rings an eventfd of the front end. It may have made it unusable: that is its loss.
pub(super) fn ring_bell(fd: &OwnedFd) {
    let rung = fd
        .try_clone()
        .and_then(Doorbell::from_fd)
        .map(|bell| bell.ring().is_ok());
    if !matches!(rung, Ok(true)) {
        tracing::debug!("an eventfd of the front end cannot be rung");
    }
}
