// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a network device plugs into.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Hub;
use super::fabric::Sent;
use super::shared::{Place, PortShared, hush};
use crate::{Backend, Guest, NoOutlets, Offloads, Outlets, RxSink, TxFrame};

/// How long a port waits when the worker was not to be told of it yet.
const RETRY: Duration = Duration::from_millis(1);

/// A port of a switch. The worker of the device that is plugged into it must be that of all others on the switch, and of its
/// [`Pump`](super::Pump).
///
/// When it is dropped, or shut down, the switch removes it, name and all.
pub struct Port {
    pub(super) hub: Arc<Hub>,
    pub(super) shared: Arc<PortShared>,
    pub(super) name: String,
    pub(super) index: u16,
    pub(super) generation: u32,
    /// The device may send again then.
    pub(super) until: Option<Instant>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("switch", &self.hub.name)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Port {
    /// Its name on the switch.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tells the switch what the device has said. A device that breaks while it is handed frames may do so in the middle of
    /// the switch's work: then the switch looks when it begins the next batch.
    fn set_place(&mut self, change: impl FnOnce(&mut Place)) {
        self.shared.set_place(change);
        match self.hub.try_fabric() {
            Some(mut fabric) => fabric.place_changed(self.index, self.generation),
            None => self.hub.places_changed.store(true, Ordering::Release),
        }
    }
}

impl Backend for Port {
    fn queue_pairs(&self) -> u16 {
        u16::MAX
    }

    /// All but UFO, which hardly any driver has any more.
    fn offloads(&self) -> Offloads {
        Offloads {
            ufo: false,
            guest_ufo: false,
            ..Offloads::ALL
        }
    }

    fn set_guest(&mut self, guest: &Guest) {
        self.set_place(|place| place.guest = *guest);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.shared.event.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.until
    }

    fn poll(&mut self, now: Instant) {
        hush(&self.shared.event);
        self.until = self.until.filter(|until| *until > now);
    }

    fn link_is_up(&self) -> bool {
        self.shared.link.load(Ordering::Relaxed) && !self.shared.gone.load(Ordering::Relaxed)
    }

    fn transmit(&mut self, now: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        self.transmit_to(now, pair, frames, &mut NoOutlets)
    }

    fn transmit_to(
        &mut self,
        now: Instant,
        _: u16,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> usize {
        self.until = None;
        if frames.is_empty() {
            return 0;
        }
        let sent = self
            .hub
            .fabric()
            .transmit(self.index, self.generation, now, frames, others);
        match sent {
            Sent::All => frames.len(),
            Sent::Some(count, until) => {
                self.until = Some(until);
                count
            }
            Sent::NotThere if self.shared.known.load(Ordering::Acquire) => frames.len(),
            Sent::NotThere => {
                self.until = Some(now + RETRY);
                0
            }
        }
    }

    fn set_key(&mut self, key: u64) {
        self.set_place(|place| place.key = Some(key));
    }

    fn receive(&mut self, _: Instant, _: &mut dyn RxSink) -> usize {
        0
    }

    fn has_frames(&self) -> bool {
        false
    }

    fn shutdown(&mut self) {
        self.shared.gone.store(true, Ordering::Relaxed);
        self.set_place(|place| *place = Place::NONE);
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Relaxed);
    }
}
