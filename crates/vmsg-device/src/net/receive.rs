// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the back end to the driver.

use std::cell::OnceCell;
use std::sync::atomic::AtomicU64;

use vmsg_mem::{AddressSpace, Pieces, RamSlice};
use vmsg_net::{RxSink, Target, VnetHeader};
use vmsg_queue::{Batch, DeviceQueue, QueueError};

use super::{Counters, HEADER, Net, RECEIVE};
use crate::device::{DeviceError, Io, publish};

/// Receive buffers looked at in one go. A 64 KiB frame fills 44 buffers of
/// 1,536 bytes, so a batch holds two of the largest.
const BATCH: usize = 96;

/// Batches before others have their turn.
const ROUNDS: usize = 4;

impl Net {
    /// Gives the driver what the back end has for it, as far as there are
    /// buffers and others need not have a turn.
    pub(super) fn receive(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        for _ in 0..ROUNDS {
            if !self.backend.has_frames() {
                return Ok(());
            }
            let Io {
                queues,
                space,
                storage,
                now,
                notices,
                ..
            } = io;
            let failed = |source| DeviceError::Queue {
                queue: RECEIVE,
                source,
            };
            let Some(Some(active)) = queues.get_mut(RECEIVE) else {
                return Ok(());
            };
            let ring = active.ring();
            let batch = ring.pop(*space, *storage, BATCH).map_err(failed)?;
            let count = batch.len();
            let all_at_hand = count >= BATCH.min(usize::from(ring.config().size));
            let mut sink = Buffers {
                ring,
                space: *space,
                batch,
                next: 0,
                chains: 0,
                room: Vec::with_capacity(4),
                scratch: &self.scratch,
                dropping: false,
                mergeable: self.mergeable,
                all_at_hand,
                counters: &mut self.counters,
                error: None,
            };
            let delivered = self.backend.receive(*now, &mut sink);
            let Buffers { next, error, .. } = sink;
            if let Some(source) = error {
                return Err(failed(source));
            }
            ring.rewind(count - next);
            // The driver has to say when it has more buffers than those that do not suffice.
            let starved = delivered == 0 && self.backend.has_frames();
            let enough = u16::try_from(count).unwrap_or(u16::MAX);
            let refilled = starved
                && ring
                    .enable_notifications_beyond(*space, enough)
                    .map_err(failed)?;
            publish(queues, RECEIVE, *space, notices)?;
            if delivered == 0 && !refilled {
                return Ok(());
            }
        }
        io.again(RECEIVE);
        Ok(())
    }
}

/// The driver's receive buffers, as the back end sees them.
struct Buffers<'a, 'm: 'a> {
    ring: &'a mut DeviceQueue,
    space: AddressSpace<'m>,
    batch: Batch<'m>,
    /// The first chain that holds no frame yet.
    next: usize,
    /// How many chains from there the present offer spans.
    chains: usize,
    /// Their memory, vnet header included.
    room: Vec<RamSlice<'a>>,
    /// Where a frame goes that no buffer can ever hold.
    scratch: &'a Scratch,
    /// The present offer is the scratch memory.
    dropping: bool,
    mergeable: bool,
    /// Waiting cannot bring more buffers than the batch holds.
    all_at_hand: bool,
    counters: &'a mut Counters,
    error: Option<QueueError>,
}

impl RxSink for Buffers<'_, '_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.offer_between(to, len, len)
    }

    fn offer_between(&mut self, _: Target<'_>, least: usize, most: usize) -> Option<Pieces<'_>> {
        if self.error.is_some() {
            return None;
        }
        let need = least.saturating_add(HEADER);
        let enough = most.saturating_add(HEADER);
        let limit = if self.mergeable { usize::MAX } else { 1 };
        self.room.clear();
        self.chains = 0;
        let mut have = 0;
        while have < enough && self.chains < limit {
            let Some(chain) = self.batch.get(self.next + self.chains) else {
                break;
            };
            let writable = chain.writable();
            self.room.extend(writable.iter());
            have += writable.len();
            self.chains += 1;
        }
        self.dropping = have < need;
        if self.dropping {
            let hopeless = !self.mergeable || (self.next == 0 && self.all_at_hand);
            if self.chains == 0 || !hopeless {
                return None;
            }
            // No buffer of this driver can ever hold the frame. It is taken and dropped, so that
            // it does not hold up what comes after it; the buffers stay available.
            self.room.clear();
            self.room.push(self.scratch.room(need)?);
        }
        Some(Pieces::new(&self.room).skip(HEADER))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        if std::mem::take(&mut self.dropping) {
            self.counters.rx_too_big += 1;
            return;
        }
        self.counters.rx_frames += 1;
        let room = Pieces::new(&self.room);
        let mut left = len.saturating_add(HEADER).min(room.len());
        room.write(&header.to_bytes());
        // A frame may need fewer buffers than were offered; only those it fills are used.
        let mut chains = 0;
        let mut capacity = 0;
        while capacity < left {
            let Some(chain) = self.batch.get(self.next + chains) else {
                break;
            };
            capacity += chain.writable().len();
            chains += 1;
        }
        let count = u16::try_from(chains).unwrap_or(u16::MAX);
        room.skip(VnetHeader::LEN).write(&count.to_le_bytes());
        for index in self.next..self.next + chains {
            let Some(chain) = self.batch.get(index) else {
                break;
            };
            let bytes = left.min(chain.writable().len());
            left -= bytes;
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            if let Err(error) = self.ring.complete(self.space, chain.head(), bytes) {
                self.error = Some(error);
                break;
            }
        }
        self.next += chains;
        self.chains = 0;
    }
}

/// Memory for frames that are dropped, made when the first one is.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    words: OnceCell<Box<[AtomicU64]>>,
}

impl Scratch {
    /// The largest frame with all offloads, and its headers.
    const BYTES: usize = 80 * 1024;

    fn room(&self, len: usize) -> Option<RamSlice<'_>> {
        let words = self.words.get_or_init(|| {
            (0..Self::BYTES / size_of::<AtomicU64>())
                .map(|_| AtomicU64::new(0))
                .collect()
        });
        RamSlice::from_atomics(words).get(0, len)
    }
}
