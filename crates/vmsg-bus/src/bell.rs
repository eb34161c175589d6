// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What wakes one side of a connection.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmsg_mem::{Doorbell, RingError};

pub(crate) enum Bell {
    /// An eventfd.
    Fd(Doorbell),
    /// Nothing to wait on: for one thread that runs both sides.
    #[cfg_attr(not(feature = "loopback"), allow(dead_code))]
    Flag(Arc<AtomicBool>),
    /// A stream socket, both ways.
    #[cfg(feature = "linux-user")]
    Stream(Arc<crate::linux_user::Stream>),
    /// Doorbells of memory that is shared, both ways.
    #[cfg(feature = "ivshmem")]
    Port(Arc<crate::ivshmem::Port>),
}

impl Bell {
    /// Wakes whoever waits.
    ///
    /// # Errors
    /// What the other side has done to the eventfd that it cannot be rung.
    pub(crate) fn ring(&self) -> Result<(), &'static str> {
        match self {
            Self::Fd(doorbell) => match doorbell.ring() {
                // Full: only whoever waits on it can have filled it, and only itself it hurts.
                Ok(()) | Err(RingError::Full) => Ok(()),
                Err(RingError::Stuck) => Err("the doorbell blocks"),
                Err(_) => Err("the doorbell cannot be rung"),
            },
            Self::Flag(flag) => {
                flag.store(true, Ordering::Release);
                Ok(())
            }
            #[cfg(feature = "linux-user")]
            Self::Stream(stream) => {
                stream.ring();
                Ok(())
            }
            #[cfg(feature = "ivshmem")]
            Self::Port(port) => {
                port.ring();
                Ok(())
            }
        }
    }

    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Fd(doorbell) => Some(doorbell.as_fd()),
            Self::Flag(_) => None,
            #[cfg(feature = "linux-user")]
            Self::Stream(stream) => Some(stream.as_fd()),
            #[cfg(feature = "ivshmem")]
            Self::Port(port) => Some(port.as_fd()),
        }
    }

    /// Takes what has come in, where the other side may wait for that.
    pub(crate) fn drain(&self) {
        #[cfg(feature = "linux-user")]
        if let Self::Stream(stream) = self {
            stream.drain();
        }
        #[cfg(feature = "ivshmem")]
        if let Self::Port(port) = self {
            port.drain();
        }
    }

    /// Wakes this side after a while, where the other side does not ring when there is room.
    pub(crate) fn wait_for_room(&self) {
        #[cfg(feature = "linux-user")]
        if let Self::Stream(stream) = self {
            stream.wait_for_room();
        }
        #[cfg(feature = "ivshmem")]
        if let Self::Port(port) = self {
            port.wait_for_room();
        }
    }

    /// There was room.
    #[inline]
    pub(crate) fn room_found(&self) {
        #[cfg(feature = "linux-user")]
        if let Self::Stream(stream) = self {
            stream.room_found();
        }
        #[cfg(feature = "ivshmem")]
        if let Self::Port(port) = self {
            port.room_found();
        }
    }

    /// The owner goes to sleep: makes sure that it wakes where nobody rings.
    pub(crate) fn before_sleep(&self) {
        #[cfg(feature = "ivshmem")]
        if let Self::Port(port) = self {
            port.before_sleep();
        }
    }

    /// This side has looked for messages, and there was none. True if the connection turns out to be over.
    #[inline]
    pub(crate) fn polled(&self) -> bool {
        match self {
            #[cfg(feature = "ivshmem")]
            Self::Port(port) => port.polled(),
            _ => false,
        }
    }

    /// A message was received.
    #[inline]
    pub(crate) fn received(&self, message: &[u8]) {
        #[cfg(feature = "ivshmem")]
        if let Self::Port(port) = self {
            port.received(message);
        }
        let _ = message;
    }

    /// Whether it was rung since the last time; false for eventfds, which are never read.
    pub(crate) fn take(&self) -> bool {
        match self {
            Self::Flag(flag) => flag.swap(false, Ordering::AcqRel),
            _ => false,
        }
    }
}
