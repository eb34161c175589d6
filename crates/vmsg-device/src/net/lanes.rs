// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The receive buffers of each pair, from when they are taken from the driver until they are given back.

use vmsg_mem::AddressSpace;
use vmsg_queue::{Batch, ChainStorage, Need, QueueError};

use crate::device::ActiveQueue;

/// Receive buffers looked at in one go. A 64 KiB frame fills 44 buffers of
/// 1,536 bytes, so a batch holds two of the largest.
const BATCH: usize = 96;

/// The buffers of one pair.
pub(super) struct Lane<'a> {
    pub(super) pair: usize,
    active: &'a mut ActiveQueue,
    /// What buffers are for, if that is known.
    need: Option<Need>,
    /// Until buffers are looked for.
    storage: Option<&'a mut ChainStorage>,
    pub(super) batch: Batch<'a>,
    /// The first chain that holds no frame yet.
    pub(super) next: usize,
    /// For each chain before that, the bytes written to it.
    pub(super) written: Vec<u32>,
    /// Frames in them, and their bytes.
    pub(super) frames: u64,
    pub(super) bytes: u64,
    /// Waiting cannot bring more buffers than the batch holds.
    pub(super) all_at_hand: bool,
    /// There was not enough for a frame.
    pub(super) refused: bool,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        pair: usize,
        active: &'a mut ActiveQueue,
        storage: &'a mut ChainStorage,
        need: Option<Need>,
    ) -> Self {
        Self {
            pair,
            need,
            active,
            storage: Some(storage),
            batch: Batch::EMPTY,
            next: 0,
            written: Vec::new(),
            frames: 0,
            bytes: 0,
            all_at_hand: false,
            refused: false,
        }
    }

    /// Takes buffers from the driver, once.
    #[inline]
    pub(super) fn fill(
        &mut self,
        space: AddressSpace<'a>,
        spare: &mut Vec<u32>,
    ) -> Result<(), QueueError> {
        match self.storage.take() {
            None => Ok(()),
            Some(storage) => self.fill_from(space, storage, spare),
        }
    }

    fn fill_from(
        &mut self,
        space: AddressSpace<'a>,
        storage: &'a mut ChainStorage,
        spare: &mut Vec<u32>,
    ) -> Result<(), QueueError> {
        let ring = self.active.ring();
        self.batch = match self.need {
            Some(need) => ring.pop_for(space, storage, BATCH, need)?,
            None => ring.pop(space, storage, BATCH)?,
        };
        self.all_at_hand = self.batch.len() >= BATCH.min(usize::from(ring.config().size));
        self.written = std::mem::take(spare);
        self.written.clear();
        self.written.reserve(self.batch.len());
        Ok(())
    }

    /// Completes what was used and gives back what was not. With `wait`, asks the driver to say when
    /// it has more; sets `refilled` if it has already.
    pub(super) fn finish(
        self,
        space: AddressSpace<'_>,
        wait: bool,
        refilled: &mut bool,
        spare: &mut Vec<u32>,
    ) -> Result<&'a mut ActiveQueue, QueueError> {
        let ring = self.active.ring();
        let looked = self.storage.is_none();
        let count = self.batch.len();
        if !self.written.is_empty() {
            let mut completer = ring.completer(space)?;
            for (chain, written) in self.batch.iter().zip(&self.written) {
                completer.complete(chain.head(), *written);
            }
        }
        if self.written.capacity() > spare.capacity() {
            *spare = self.written;
        }
        if looked {
            ring.rewind(count - self.next);
        }
        if wait {
            let enough = if looked {
                u16::try_from(count).unwrap_or(u16::MAX)
            } else {
                ring.available(space)?
            };
            *refilled |= ring.enable_notifications_beyond(space, enough)?;
        }
        Ok(self.active)
    }
}

/// The lanes of all pairs; nearly all devices have one pair.
pub(super) struct Lanes<'a> {
    pub(super) first: Option<Lane<'a>>,
    pub(super) more: Vec<Option<Lane<'a>>>,
}

impl<'a> Lanes<'a> {
    pub(super) fn len(&self) -> usize {
        1 + self.more.len()
    }

    pub(super) fn get(&self, lane: usize) -> Option<&Lane<'a>> {
        match lane.checked_sub(1) {
            None => self.first.as_ref(),
            Some(behind) => self.more.get(behind)?.as_ref(),
        }
    }

    pub(super) fn get_mut(&mut self, lane: usize) -> Option<&mut Lane<'a>> {
        match lane.checked_sub(1) {
            None => self.first.as_mut(),
            Some(behind) => self.more.get_mut(behind)?.as_mut(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Lane<'a>> {
        self.first.iter().chain(self.more.iter().flatten())
    }
}

impl<'a> IntoIterator for Lanes<'a> {
    type Item = Lane<'a>;
    type IntoIter = std::iter::Flatten<
        std::iter::Chain<std::iter::Once<Option<Lane<'a>>>, std::vec::IntoIter<Option<Lane<'a>>>>,
    >;

    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.more).flatten()
    }
}
