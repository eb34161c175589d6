// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Batches of chains whose memory is elsewhere.

use alloc::boxed::Box;
use core::fmt;

use super::table::Run;
use crate::chain::ChainSlot;
use crate::{Buffer, ChainHead};

/// Room for a batch of chains. Make one for each worker and use it again and again.
pub struct RemoteStorage {
    pub(super) buffers: Box<[Buffer]>,
    pub(super) chains: Box<[ChainSlot]>,
    /// Entries of the available ring, as they lie there.
    pub(super) heads: Box<[u8]>,
    pub(super) direct: Run,
    pub(super) indirect: Run,
}

impl RemoteStorage {
    /// Room for `chains` chains of `buffers` buffers in all, both at least 1. The longest chain that can be taken at all has
    /// `buffers` of them.
    pub fn with_capacity(chains: usize, buffers: usize) -> Self {
        let chains = chains.clamp(1, 1 << 15);
        Self {
            buffers: alloc::vec![Buffer::default(); buffers.clamp(1, 1 << 24)].into(),
            chains: alloc::vec![ChainSlot::EMPTY; chains].into(),
            heads: alloc::vec![0; 2 * chains].into(),
            direct: Run::default(),
            indirect: Run::default(),
        }
    }

    /// Buffers of the longest chain that can be taken.
    pub fn longest_chain(&self) -> usize {
        self.buffers.len()
    }
}

impl fmt::Debug for RemoteStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "RemoteStorage({}, {})",
            self.chains.len(),
            self.buffers.len()
        )
    }
}

/// Chains taken from a queue together, in the order in which the driver made them available.
#[derive(Clone, Copy)]
pub struct RemoteBatch<'b> {
    pub(super) buffers: &'b [Buffer],
    /// Each begins in `buffers` where the one before it ends.
    pub(super) chains: &'b [ChainSlot],
}

impl<'b> RemoteBatch<'b> {
    /// No chains.
    pub(super) const EMPTY: RemoteBatch<'static> = RemoteBatch {
        buffers: &[],
        chains: &[],
    };

    /// Number of chains.
    pub const fn len(&self) -> usize {
        self.chains.len()
    }

    /// True if the driver had made no chain available.
    pub const fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// The chains in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = RemoteChain<'b>> + use<'b> {
        let buffers = self.buffers;
        let mut start = 0;
        self.chains.iter().map(move |slot| {
            let (split, end) = (slot.split as usize, slot.end as usize);
            let chain = RemoteChain {
                head: slot.head,
                readable: &buffers[start..split],
                writable: &buffers[split..end],
            };
            start = end;
            chain
        })
    }
}

impl fmt::Debug for RemoteBatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// One descriptor chain, checked as far as it can be without touching its memory: the addresses are the driver's word.
#[derive(Clone, Copy, Debug)]
pub struct RemoteChain<'b> {
    head: ChainHead,
    readable: &'b [Buffer],
    writable: &'b [Buffer],
}

impl<'b> RemoteChain<'b> {
    /// What to give back with [`RemoteQueue::complete`](super::RemoteQueue::complete).
    pub const fn head(&self) -> ChainHead {
        self.head
    }

    /// The device-readable buffers; none is empty. May be none.
    pub const fn readable(&self) -> &'b [Buffer] {
        self.readable
    }

    /// The device-writable buffers; none is empty. May be none. All buffers together have at most 2³² bytes.
    pub const fn writable(&self) -> &'b [Buffer] {
        self.writable
    }
}
