// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From the driver to the back end.

use vmsg_mem::Pieces;
use vmsg_net::{Target, TxFrame, VnetHeader};

use super::flow::Flow;
use super::steering::Steering;
use super::{Net, transmit_queue};
use crate::device::{DeviceError, Io, Progress};

/// Frames handed to the back end at a time.
const BATCH: usize = 32;
/// Or so many bytes, with which a batch of full frames of 1,500 bytes just fits: a turn is to take about as long whatever is in the
/// queue, or others would wait for a megabyte of large segments.
const BATCH_BYTES: usize = 48 << 10;
/// Shorter than an Ethernet header is no frame.
const SHORTEST: usize = 14;
const NOTHING: TxFrame<'static> = TxFrame {
    header: VnetHeader {
        flags: 0,
        gso_type: 0,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    },
    payload: Pieces::EMPTY,
};

impl Net {
    /// Hands frames of one pair to the back end until `budget` chains, the
    /// queue or the back end's patience are used up.
    pub(super) fn transmit(
        &mut self,
        pair: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let queue = transmit_queue(pair);
        let Io {
            queues,
            space,
            storage,
            now,
            others,
            notices,
            ..
        } = io;
        let failed = |source| DeviceError::Queue { queue, source };
        let Some(Some(active)) = queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let batch = ring
            .pop(*space, *storage, budget.min(BATCH))
            .map_err(failed)?;
        let counters = &self.counters.pairs[pair];
        let mut room = [NOTHING; BATCH];
        // For each frame the number of chains up to and with it: malformed chains have no frame.
        let mut ends = [0; BATCH];
        let mut count = 0;
        let mut total = 0;
        let mut looked = 0;
        for chain in batch.iter() {
            looked += 1;
            let bytes = chain.readable();
            let header = bytes.read_array::<{ VnetHeader::LEN }>();
            let payload = bytes.skip(self.session.header);
            match header {
                Some(header) if payload.len() >= SHORTEST => {
                    let header = VnetHeader::from_bytes(&header);
                    room[count] = TxFrame { header, payload };
                    ends[count] = looked;
                    count += 1;
                    total += payload.len();
                    if total >= BATCH_BYTES {
                        break;
                    }
                }
                _ => {}
            }
        }
        let frames = &room[..count];
        let sent = if self.config.link_is_up() {
            // A pair that the driver has not enabled is none that the back end knows.
            let pair = u16::try_from(pair).expect("at most MAX_PAIRS");
            let known = pair % self.session.pairs();
            let sent = self.backend.transmit_to(*now, known, frames, *others);
            debug_assert!(
                sent <= frames.len(),
                "a back end cannot send more than it was given"
            );
            counters.tx_frames.add(sent as u64);
            let bytes = frames[..sent].iter().map(|frame| frame.payload.len());
            counters.tx_bytes.add(bytes.sum::<usize>() as u64);
            if self.session.pairs() > 1
                && let Steering::Automatic(table) = self.session.steering_mut()
            {
                for frame in &frames[..sent] {
                    let mut head = [0; Target::HEAD];
                    let len = frame.payload.read(&mut head);
                    if let Some(flow) = Flow::of(&head[..len]) {
                        table.note(&flow, known);
                    }
                }
            }
            sent
        } else {
            counters.tx_link_down.add(frames.len() as u64);
            frames.len()
        };
        let blocked = sent < frames.len();
        self.session.blocked[pair] = blocked;
        let used = match (blocked, sent) {
            (false, _) => looked,
            (true, 0) => 0,
            (true, sent) => ends[sent - 1],
        };
        counters.tx_malformed.add((used - sent) as u64);
        let mut completer = ring.completer(*space).map_err(failed)?;
        for chain in batch.iter().take(used) {
            completer.complete(chain.head(), 0);
        }
        let count = batch.len();
        ring.rewind(count - used);
        active.publish_and_notify(queue, *space, notices)?;
        Ok(match (blocked, count) {
            (true, _) => Progress::Blocked,
            (false, 0) => Progress::Idle,
            (false, _) => Progress::More,
        })
    }
}
