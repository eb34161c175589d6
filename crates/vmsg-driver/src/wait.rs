// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How to pass the time until the other side has done something.

use virtio_msg::Instant;

/// What a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// A message of the other side.
    Message,
    /// Room to send a message.
    Room,
}

/// A clock, and a way to wait on a channel of type `C`.
///
/// A [`Client`](crate::Client) never waits by itself: a program with threads sleeps on the file descriptors of its bus, a
/// small system spins, a scheduler yields, a test lets the other side run.
pub trait Wait<C: ?Sized> {
    /// The present moment. It must never go back; the zero is the implementation's choice.
    fn now(&mut self) -> Instant;

    /// Waits until `interest` may have come true on `channel`, at most until `deadline`. It may return early for no reason.
    fn wait(&mut self, channel: &mut C, interest: Interest, deadline: Instant);
}

impl<C: ?Sized, W: Wait<C> + ?Sized> Wait<C> for &mut W {
    fn now(&mut self) -> Instant {
        (**self).now()
    }
    fn wait(&mut self, channel: &mut C, interest: Interest, deadline: Instant) {
        (**self).wait(channel, interest, deadline);
    }
}

/// Waits by trying again at once. For systems without a scheduler, and where the answer is a microsecond away.
#[derive(Clone, Copy, Debug)]
pub struct Spin<F> {
    clock: F,
}

impl<F: FnMut() -> Instant> Spin<F> {
    /// Spins with `clock` as the time.
    pub const fn new(clock: F) -> Self {
        Self { clock }
    }
}

impl<C: ?Sized, F: FnMut() -> Instant> Wait<C> for Spin<F> {
    fn now(&mut self) -> Instant {
        (self.clock)()
    }
    fn wait(&mut self, _channel: &mut C, _interest: Interest, _deadline: Instant) {
        core::hint::spin_loop();
    }
}
