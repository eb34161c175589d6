// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the driver to the back end.

use vmsg_net::{TxFrame, VnetHeader};

use super::{HEADER, Net, TRANSMIT};
use crate::device::{DeviceError, Io, Progress, publish};

/// Frames handed to the back end at a time.
const BATCH: usize = 32;
/// Shorter than an Ethernet header is no frame.
const SHORTEST: usize = 14;

impl Net {
    /// Hands frames to the back end until `budget` chains, the queue or the
    /// back end's patience are used up.
    pub(super) fn transmit(
        &mut self,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let Io {
            queues,
            space,
            storage,
            now,
            notices,
            ..
        } = io;
        let failed = |source| DeviceError::Queue {
            queue: TRANSMIT,
            source,
        };
        let Some(Some(active)) = queues.get_mut(TRANSMIT) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let batch = ring
            .pop(*space, *storage, budget.min(BATCH))
            .map_err(failed)?;
        let mut frames = Vec::with_capacity(batch.len());
        // For each frame the number of chains up to and with it: malformed chains have no frame.
        let mut ends = Vec::with_capacity(batch.len());
        for (index, chain) in batch.iter().enumerate() {
            let bytes = chain.readable();
            let header = bytes.read_array::<{ VnetHeader::LEN }>();
            let payload = bytes.skip(HEADER);
            match header {
                Some(header) if payload.len() >= SHORTEST => {
                    let header = VnetHeader::from_bytes(&header);
                    frames.push(TxFrame { header, payload });
                    ends.push(index + 1);
                }
                _ => self.counters.tx_malformed += 1,
            }
        }
        let sent = self.backend.transmit(*now, 0, &frames);
        debug_assert!(
            sent <= frames.len(),
            "a back end cannot send more than it was given"
        );
        self.blocked = sent < frames.len();
        self.counters.tx_frames += sent as u64;
        let used = match (self.blocked, sent) {
            (false, _) => batch.len(),
            (true, 0) => 0,
            (true, sent) => ends[sent - 1],
        };
        for chain in batch.iter().take(used) {
            ring.complete(*space, chain.head(), 0).map_err(failed)?;
        }
        let count = batch.len();
        ring.rewind(count - used);
        publish(queues, TRANSMIT, *space, notices)?;
        Ok(match (self.blocked, count) {
            (true, _) => Progress::Blocked,
            (false, 0) => Progress::Idle,
            (false, _) => Progress::More,
        })
    }
}
