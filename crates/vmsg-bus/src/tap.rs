// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Listening in on a bus.

use virtio_msg::{Channel, ChannelError};

/// Which way a message goes, seen from the end that is tapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Sent from here.
    Sent,
    /// Received here.
    Received,
}

/// Shows every message that is carried to a function, for traces and captures.
///
/// Messages are shown as the bus carries them, so before anything was
/// checked: received ones may be malformed. What could not be sent is not shown.
pub struct Tap<B, F> {
    inner: B,
    see: F,
}

impl<B, F: FnMut(Direction, &[u8])> Tap<B, F> {
    /// Taps `inner`.
    pub fn new(inner: B, see: F) -> Self {
        Self { inner, see }
    }

    /// What is tapped.
    pub fn get_ref(&self) -> &B {
        &self.inner
    }

    /// What is tapped; what is sent or received through this is not seen.
    pub fn get_mut(&mut self) -> &mut B {
        &mut self.inner
    }

    /// Ends the tap.
    pub fn into_inner(self) -> B {
        self.inner
    }
}

impl<B: Channel, F: FnMut(Direction, &[u8])> Channel for Tap<B, F> {
    fn max_message_size(&self) -> usize {
        self.inner.max_message_size()
    }

    fn try_send(&mut self, message: &[u8]) -> Result<(), ChannelError> {
        self.inner.try_send(message)?;
        (self.see)(Direction::Sent, message);
        Ok(())
    }

    fn try_recv(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ChannelError> {
        let received = self.inner.try_recv(buf)?;
        if let Some(message) = received.and_then(|len| buf.get(..len)) {
            (self.see)(Direction::Received, message);
        }
        Ok(received)
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        self.inner.flush()
    }
}

#[cfg(any(feature = "loopback", feature = "unix"))]
mod bus {
    use super::{Direction, Tap};
    use crate::{Bus, Capabilities, Peer, WakeFds};
    use std::os::fd::{BorrowedFd, OwnedFd};
    use virtio_msg::ChannelError;

    impl<B: Bus, F: FnMut(Direction, &[u8])> Bus for Tap<B, F> {
        fn capabilities(&self) -> &Capabilities {
            self.inner.capabilities()
        }

        fn try_send_with_fds(
            &mut self,
            message: &[u8],
            fds: &[BorrowedFd<'_>],
        ) -> Result<(), ChannelError> {
            self.inner.try_send_with_fds(message, fds)?;
            (self.see)(Direction::Sent, message);
            Ok(())
        }

        fn try_recv_with_fds(
            &mut self,
            buf: &mut [u8],
            fds: &mut Vec<OwnedFd>,
        ) -> Result<Option<usize>, ChannelError> {
            let received = self.inner.try_recv_with_fds(buf, fds)?;
            if let Some(message) = received.and_then(|len| buf.get(..len)) {
                (self.see)(Direction::Received, message);
            }
            Ok(received)
        }

        fn arm(&mut self) -> bool {
            self.inner.arm()
        }

        fn arm_for_room(&mut self) -> bool {
            self.inner.arm_for_room()
        }

        fn wake_fds(&self) -> WakeFds<'_> {
            self.inner.wake_fds()
        }

        fn is_closed(&self) -> bool {
            self.inner.is_closed()
        }

        fn peer(&self) -> &Peer {
            self.inner.peer()
        }
    }
}
