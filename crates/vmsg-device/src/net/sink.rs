// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's receive buffers, as a back end sees them.

use std::cell::OnceCell;
use std::sync::atomic::AtomicU64;

use vmsg_mem::{AddressSpace, Pieces, RamSlice};
use vmsg_net::{Mac, RxSink, Target, VnetHeader};
use vmsg_queue::QueueError;

use super::counters::{Counters, DeviceCounters};
use super::filter::LOOK;
use super::flow::Flow;
use super::hash::Hash;
use super::lanes::Lanes;
use super::receive_queue;
use super::session::{HASH_HEADER, HEADER, Session};
use super::steering::Steering;
use crate::device::DeviceError;
use crate::worker::Notice;

/// Why a frame is not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Filtered,
    LinkDown,
    NoQueue,
    /// No buffer of this pair can hold it.
    TooBig(usize),
}

impl Reason {
    fn count(self, counters: &Counters) {
        match self {
            Self::TooBig(pair) => counters.pairs[pair].rx_too_big.add(1),
            other => other.count_in(&counters.device),
        }
    }

    fn count_in(self, counters: &DeviceCounters) {
        match self {
            Self::Filtered => counters.rx_filtered.add(1),
            Self::LinkDown => counters.rx_link_down.add(1),
            Self::NoQueue | Self::TooBig(_) => counters.rx_no_queue.add(1),
        }
    }
}

/// The present offer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offer {
    /// The first chains of a lane that hold no frame yet.
    Buffers {
        lane: usize,
        hash: Option<Hash>,
        /// The frame's beginning has been looked at.
        seen: bool,
    },
    /// The scratch memory: the frame is dropped.
    Scratch(Reason),
}

/// The driver's buffers, of all its pairs.
pub(super) struct Buffers<'a> {
    pub(super) lanes: Lanes<'a>,
    /// A list that is used again and again.
    pub(super) spare: &'a mut Vec<u32>,
    pub(super) space: AddressSpace<'a>,
    /// The memory of the present offer, the header included.
    pub(super) room: Vec<RamSlice<'a>>,
    pub(super) present: Option<Offer>,
    pub(super) scratch: &'a Scratch,
    pub(super) session: &'a Session,
    /// The driver's address.
    pub(super) own: Mac,
    pub(super) counters: &'a Counters,
    pub(super) error: Option<(usize, QueueError)>,
}

impl<'a> Buffers<'a> {
    /// Gives the driver what was put into its buffers. If `starved`, has it say when there are more of them; true if there are already.
    pub(super) fn close(
        self,
        starved: bool,
        notices: &mut Vec<Notice>,
    ) -> Result<bool, DeviceError> {
        let Self {
            lanes,
            spare,
            space,
            counters,
            error,
            ..
        } = self;
        if let Some((pair, source)) = error {
            return Err(failed(pair, source));
        }
        let nobody_refused = !lanes.iter().any(|lane| lane.refused);
        let mut refilled = false;
        for lane in lanes {
            let pair = lane.pair;
            counters.pairs[pair].rx_frames.add(lane.frames);
            counters.pairs[pair].rx_bytes.add(lane.bytes);
            let wait = starved && (lane.refused || nobody_refused);
            let active = lane
                .finish(space, wait, &mut refilled, spare)
                .map_err(|source| failed(pair, source))?;
            active.publish_and_notify(receive_queue(pair), space, notices)?;
        }
        Ok(refilled)
    }

    /// Which pair a frame is for.
    fn choose(&self, to: Target<'_>) -> Offer {
        let pairs = self.session.pairs();
        let single = self.lanes.len() == 1;
        let head = match to {
            Target::Pair(pair) => {
                return Offer::Buffers {
                    lane: if single {
                        0
                    } else {
                        self.working(pair % pairs)
                    },
                    hash: None,
                    seen: false,
                };
            }
            Target::Head(head) => head,
        };
        if !self.session.filter.wants(self.own, head) {
            return Offer::Scratch(Reason::Filtered);
        }
        if single && self.session.hasher.is_none() {
            return Offer::Buffers {
                lane: 0,
                hash: None,
                seen: true,
            };
        }
        let flow = Flow::of(head);
        let hash = self.hash(flow.as_ref());
        match self.session.steering() {
            Steering::Automatic(table) => Offer::Buffers {
                lane: self.working(table.choose(flow.as_ref(), pairs)),
                hash,
                seen: true,
            },
            Steering::Rss(indirection) => {
                let lane = usize::from(indirection.choose(hash));
                match self.lanes.get(lane) {
                    Some(_) => Offer::Buffers {
                        lane,
                        hash,
                        seen: true,
                    },
                    None => Offer::Scratch(Reason::NoQueue),
                }
            }
        }
    }

    fn hash(&self, flow: Option<&Flow>) -> Option<Hash> {
        self.session.hasher.as_ref()?.hash(flow?)
    }

    /// `pair`, or the next one if its receive queue is being reset.
    fn working(&self, pair: u16) -> usize {
        let pair = usize::from(pair);
        let all = self.lanes.len();
        (pair..all)
            .chain(0..pair.min(all))
            .find(|lane| self.lanes.get(*lane).is_some())
            .unwrap_or(0)
    }

    /// Collects buffers of a lane for a frame of `least` bytes, up to `most`.
    /// False if that has to wait.
    fn collect(&mut self, lane: usize, least: usize, most: usize) -> bool {
        let Some(lane) = self.lanes.get_mut(lane) else {
            return false;
        };
        if let Err(source) = lane.fill(self.space, self.spare) {
            self.error = Some((lane.pair, source));
            return false;
        }
        let header = self.session.header;
        let need = least.saturating_add(header);
        let enough = most.saturating_add(header);
        let mergeable = self.session.mergeable;
        let limit = if mergeable { usize::MAX } else { 1 };
        self.room.clear();
        let mut chains = 0;
        let mut have = 0;
        while have < enough && chains < limit {
            let Some(chain) = lane.batch.get(lane.next + chains) else {
                break;
            };
            let writable = chain.writable_slices();
            self.room.extend_from_slice(writable);
            have += writable.iter().map(RamSlice::len).sum::<usize>();
            chains += 1;
        }
        if have >= need {
            return true;
        }
        let hopeless = !mergeable || (lane.next == 0 && lane.all_at_hand);
        if chains == 0 || !hopeless {
            lane.refused = true;
            return false;
        }
        // No buffer of this driver can ever hold the frame. It is taken and dropped, so that it
        // does not hold up what comes after it; the buffers stay available.
        self.present = Some(Offer::Scratch(Reason::TooBig(lane.pair)));
        true
    }

    /// Hands over the frame of `len` bytes that stands in `room`.
    fn deliver(&mut self, lane: usize, header: &VnetHeader, len: usize, hash: Option<Hash>) {
        let Some(lane) = self.lanes.get_mut(lane) else {
            return;
        };
        let room = Pieces::new(&self.room);
        let before = self.session.header;
        let mut left = len.saturating_add(before).min(room.len());
        // A frame may need fewer buffers than were offered; only those it fills are used.
        let first = lane.next;
        while left > 0 {
            let Some(chain) = lane.batch.get(lane.next) else {
                break;
            };
            let capacity: usize = chain.writable_slices().iter().map(RamSlice::len).sum();
            let bytes = left.min(capacity);
            left -= bytes;
            lane.written.push(u32::try_from(bytes).unwrap_or(u32::MAX));
            lane.next += 1;
        }
        let count = u16::try_from(lane.next - first).unwrap_or(u16::MAX);
        let bytes = header_bytes(header, count, hash);
        match bytes.first_chunk::<HEADER>() {
            Some(bytes) if before == HEADER => {
                room.write_array(bytes);
            }
            _ => {
                room.write(&bytes[..before]);
            }
        }
        lane.frames += 1;
        lane.bytes += len as u64;
    }

    /// Hands over a frame as nearly all are: for a device with one pair and without hashes, into one buffer. `None` if that is not so.
    #[inline]
    fn put_one(
        &mut self,
        to: Target<'_>,
        header: VnetHeader,
        front: &[u8],
        rest: Pieces<'_>,
    ) -> Option<bool> {
        let len = front.len() + rest.len();
        let Session { header: before, .. } = *self.session;
        if !matches!(to, Target::Pair(_))
            || self.lanes.len() != 1
            || self.session.hasher.is_some()
            || before != HEADER
            || len > self.session.longest
            || self.error.is_some()
        {
            return None;
        }
        if !self.session.filter.is_open() {
            if front.len() < LOOK && !rest.is_empty() && is_tag(front) {
                return None;
            }
            if !self.session.filter.wants(self.own, front) {
                Reason::Filtered.count(self.counters);
                return Some(true);
            }
        }
        let lane = self.lanes.first.as_mut()?;
        if let Err(source) = lane.fill(self.space, self.spare) {
            self.error = Some((lane.pair, source));
            return Some(false);
        }
        let [room] = lane.batch.get(lane.next)?.writable_slices() else {
            return None;
        };
        if room.len() < before + len {
            return None;
        }
        self.present = None;
        let bytes = header_bytes(&header, 1, None);
        room.write_array::<HEADER>(0, bytes.first_chunk()?);
        match <&[u8; 14]>::try_from(front) {
            Ok(front) => room.write_array(before, front),
            Err(_) => room.write(before, front) == front.len(),
        };
        let (_, behind) = room.split_at(before + front.len());
        rest.copy_to(Pieces::new(&[behind]));
        lane.written
            .push(u32::try_from(before + len).unwrap_or(u32::MAX));
        lane.next += 1;
        lane.frames += 1;
        lane.bytes += len as u64;
        Some(true)
    }
}

/// What stands behind the addresses is a VLAN tag.
fn is_tag(front: &[u8]) -> bool {
    front.get(12..14) == Some(&[0x81, 0x00])
}

fn failed(pair: usize, source: QueueError) -> DeviceError {
    DeviceError::Queue {
        queue: receive_queue(pair),
        source,
    }
}

impl RxSink for Buffers<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.offer_between(to, len, len)
    }

    fn offer_between(&mut self, to: Target<'_>, least: usize, most: usize) -> Option<Pieces<'_>> {
        self.present = None;
        if self.error.is_some() {
            return None;
        }
        let offer = self.choose(to);
        self.present = Some(offer);
        if let Offer::Buffers { lane, .. } = offer
            && !self.collect(lane, least, most)
        {
            self.present = None;
            return None;
        }
        if matches!(self.present, Some(Offer::Scratch(_))) {
            self.room.clear();
            let bytes = most.saturating_add(self.session.header);
            self.room.push(self.scratch.room(bytes));
        }
        Some(Pieces::new(&self.room).skip(self.session.header))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let (lane, mut hash, seen) = match self.present.take() {
            Some(Offer::Buffers { lane, hash, seen }) => (lane, hash, seen),
            Some(Offer::Scratch(reason)) => {
                reason.count(self.counters);
                return;
            }
            None => return,
        };
        if !seen {
            let frame = Pieces::new(&self.room).skip(self.session.header).take(len);
            if !self.session.filter.is_open() {
                let mut head = [0; LOOK];
                let len = frame.read(&mut head);
                if !self.session.filter.wants(self.own, &head[..len]) {
                    Reason::Filtered.count(self.counters);
                    return;
                }
            }
            if self.session.hasher.is_some() {
                let mut head = [0; Target::HEAD];
                let len = frame.read(&mut head);
                hash = self.hash(Flow::of(&head[..len]).as_ref());
            }
        }
        let segmented = header.gso_type & !VnetHeader::GSO_ECN != VnetHeader::GSO_NONE;
        if !segmented && len > self.session.longest {
            self.counters.pairs[lane].rx_over_mtu.add(1);
            return;
        }
        self.deliver(lane, header, len, hash);
    }

    fn put(&mut self, to: Target<'_>, header: VnetHeader, front: &[u8], rest: Pieces<'_>) -> bool {
        if let Some(taken) = self.put_one(to, header, front, rest) {
            return taken;
        }
        let len = front.len() + rest.len();
        let Some(room) = self.offer(to, len) else {
            return false;
        };
        room.write(front);
        rest.copy_to(room.skip(front.len()));
        self.commit(&header, len);
        true
    }
}

/// `struct virtio_net_hdr_v1_hash`; without the hash it ends after [`HEADER`] bytes.
fn header_bytes(header: &VnetHeader, buffers: u16, hash: Option<Hash>) -> [u8; HASH_HEADER] {
    let mut bytes = [0; HASH_HEADER];
    bytes[..VnetHeader::LEN].copy_from_slice(&header.to_bytes());
    bytes[VnetHeader::LEN..HEADER].copy_from_slice(&buffers.to_le_bytes());
    if let Some(hash) = hash {
        bytes[HEADER..16].copy_from_slice(&hash.value.to_le_bytes());
        bytes[16..18].copy_from_slice(&hash.report.to_le_bytes());
    }
    bytes
}

/// Takes every frame and drops it.
pub(super) struct Discard<'a> {
    room: [RamSlice<'a>; 1],
    counters: &'a DeviceCounters,
    reason: Reason,
}

impl<'a> Discard<'a> {
    pub(super) fn new(scratch: &'a Scratch, counters: &'a DeviceCounters, reason: Reason) -> Self {
        Self {
            room: [scratch.room(usize::MAX)],
            counters,
            reason,
        }
    }
}

impl RxSink for Discard<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        Some(Pieces::new(&self.room).take(len))
    }

    fn commit(&mut self, _: &VnetHeader, _: usize) {
        self.reason.count_in(self.counters);
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

    /// `len` bytes, or as many as there are.
    fn room(&self, len: usize) -> RamSlice<'_> {
        let words = self.words.get_or_init(|| {
            (0..Self::BYTES / size_of::<AtomicU64>())
                .map(|_| AtomicU64::new(0))
                .collect()
        });
        let all = RamSlice::from_atomics(words);
        all.split_at(len).0
    }
}
