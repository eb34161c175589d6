// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a network device needs of whatever it is plugged into.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::{Guest, Offloads, Outlets, RxSink, TxFrame};

/// The other end of a network device's cable.
///
/// Nothing here blocks. One thread uses a back end at a time: it waits for
/// [`event_fd`](Self::event_fd) and [`next_timeout`](Self::next_timeout) beside its own business,
/// calls [`poll`](Self::poll), and then [`receive`](Self::receive) as long as
/// [`has_frames`](Self::has_frames) and the guest has buffers.
pub trait Backend: Send {
    /// The most queue pairs that this back end has use for.
    fn queue_pairs(&self) -> u16 {
        1
    }

    /// All that this back end can do; a device offers no more than this to its guest.
    fn offloads(&self) -> Offloads;

    /// What the guest has negotiated and enabled; called again whenever that changes. Until then
    /// it is [`Guest::NONE`].
    fn set_guest(&mut self, guest: &Guest);

    /// A descriptor that is readable when [`poll`](Self::poll) has something to do. It stays the
    /// same as long as the back end lives.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// When [`poll`](Self::poll) wants to be called, whatever happens until then. It changes with
    /// every other call.
    fn next_timeout(&self) -> Option<Instant>;

    /// Looks after events and timers.
    fn poll(&mut self, now: Instant);

    /// False while the cable leads nowhere: no carrier, the peer is gone. It is looked at after
    /// each [`poll`](Self::poll); the guest hears of a change.
    fn link_is_up(&self) -> bool {
        true
    }

    /// Takes frames that the guest sends on its queue pair `pair`; returns how many it has taken, in order. Fewer than all: call
    /// again with the rest after the next [`poll`](Self::poll).
    ///
    /// Frames come as the guest made them. A bad one is taken, counted and dropped.
    fn transmit(&mut self, now: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize;

    /// As [`transmit`](Self::transmit), for a back end that puts frames straight into `others`, devices that the same thread
    /// serves. A device calls this one.
    fn transmit_to(
        &mut self,
        now: Instant,
        pair: u16,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> usize {
        let _ = others;
        self.transmit(now, pair, frames)
    }

    /// The device has got its place: `key` is what [`Outlets::fill`] finds it by. Called before anything is transmitted.
    fn set_key(&mut self, key: u64) {
        let _ = key;
    }

    /// Hands frames for the guest to `sink` until there are no more, `sink` has no room, or this
    /// back end finds that others should have a turn; returns how many it were.
    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize;

    /// True if [`receive`](Self::receive) would find something.
    fn has_frames(&self) -> bool;

    /// Lets go of everything outside this process that should not outlive the device: called when
    /// the device is taken away, not when the process dies or is replaced.
    fn shutdown(&mut self);
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn queue_pairs(&self) -> u16 {
        (**self).queue_pairs()
    }

    fn offloads(&self) -> Offloads {
        (**self).offloads()
    }

    fn set_guest(&mut self, guest: &Guest) {
        (**self).set_guest(guest);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).event_fd()
    }

    fn next_timeout(&self) -> Option<Instant> {
        (**self).next_timeout()
    }

    fn poll(&mut self, now: Instant) {
        (**self).poll(now);
    }

    fn link_is_up(&self) -> bool {
        (**self).link_is_up()
    }

    fn transmit(&mut self, now: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        (**self).transmit(now, pair, frames)
    }

    fn transmit_to(
        &mut self,
        now: Instant,
        pair: u16,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> usize {
        (**self).transmit_to(now, pair, frames, others)
    }

    fn set_key(&mut self, key: u64) {
        (**self).set_key(key);
    }

    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize {
        (**self).receive(now, sink)
    }

    fn has_frames(&self) -> bool {
        (**self).has_frames()
    }

    fn shutdown(&mut self) {
        (**self).shutdown();
    }
}
