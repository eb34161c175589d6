// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The message queues of a link, as its bus has them.

use crate::memory::Part;
use vmsg_mem::spsc::{Consumer, Corrupt, Producer, PushError};

/// One queue each way.
pub(crate) enum Queue {
    /// Two of their own.
    Pair {
        tx: Producer<Part>,
        rx: Consumer<Part>,
    },
    /// Both in one layout.
    #[cfg(feature = "ivshmem")]
    Amp(vmsg_mem::amp::Queue<Part>),
}

impl Queue {
    #[inline]
    pub(crate) fn try_push(&mut self, message: &[u8]) -> Result<(), PushError> {
        match self {
            Self::Pair { tx, .. } => tx.try_push(message),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.try_push(message),
        }
    }

    #[inline]
    pub(crate) fn unpublished(&self) -> u32 {
        match self {
            Self::Pair { tx, .. } => tx.unpublished(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.unpublished(),
        }
    }

    /// True: ring.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        match self {
            Self::Pair { tx, .. } => tx.publish(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.publish(),
        }
    }

    /// True: ring.
    #[inline]
    pub(crate) fn publish_early(&mut self) -> bool {
        match self {
            Self::Pair { tx, .. } => tx.publish_early(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.publish(),
        }
    }

    /// True: full, sleep.
    pub(crate) fn arm_for_room(&mut self) -> bool {
        match self {
            Self::Pair { tx, .. } => tx.arm_for_room(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.is_full(),
        }
    }

    #[inline]
    pub(crate) fn try_pop_sized(
        &mut self,
        into: &mut [u8],
        len_of: impl FnOnce(&[u8; 8]) -> usize,
    ) -> Result<Option<usize>, Corrupt> {
        match self {
            Self::Pair { rx, .. } => rx.try_pop_sized(into, len_of),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.try_pop_sized(into, len_of),
        }
    }

    /// True: ring.
    #[inline]
    pub(crate) fn release(&mut self) -> bool {
        match self {
            Self::Pair { rx, .. } => rx.release(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => {
                queue.release();
                false
            }
        }
    }

    /// True: nothing to receive, sleep.
    pub(crate) fn arm(&mut self) -> bool {
        match self {
            Self::Pair { rx, .. } => rx.arm(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(queue) => queue.is_empty(),
        }
    }

    pub(crate) fn disarm(&mut self) {
        match self {
            Self::Pair { rx, .. } => rx.disarm(),
            #[cfg(feature = "ivshmem")]
            Self::Amp(_) => {}
        }
    }
}
