// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames are handed to their receivers, each once for all of a chunk.

use std::mem;
use std::sync::atomic::Ordering;

use super::counters::Tally;
use super::fabric::{CHUNK, Fabric, FabricPort, Info, Now, reason};
use super::shared::Tagging;
use super::{Delivered, Reason, TagChange, deliver};
use crate::{Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader, Wanted};

/// Bytes of a VLAN tag.
const TAG_LEN: usize = 4;

/// The frames of a chunk that one receiver is to get, lowest first.
pub(super) fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = word.trailing_zeros() as usize;
            word &= word - 1;
            bit
        })
    })
}

/// What became of the frames that one receiver was handed.
#[derive(Debug, Default)]
pub(super) struct Handed {
    output: Tally,
    segmented: u64,
    segments: u64,
    segments_lost: u64,
    no_buffers: u64,
    too_large: u64,
    malformed: u64,
}

impl Handed {
    /// Notes what became of a frame; true if the receiver has it, or some of it.
    #[inline]
    pub(super) fn note(&mut self, info: &Info, delivered: Delivered) -> bool {
        let (count, bytes, lost) = match delivered {
            Delivered::Frame(len) => {
                self.output.note(info.cast, len);
                return true;
            }
            Delivered::Frames { count, bytes } => (count, bytes, 0),
            Delivered::NoBuffers { count: 0, .. } => {
                self.no_buffers += 1;
                return false;
            }
            Delivered::NoBuffers { count, bytes, lost } => (count, bytes, lost),
            Delivered::TooLarge => {
                self.too_large += 1;
                return false;
            }
            Delivered::Malformed => {
                self.malformed += 1;
                return false;
            }
        };
        self.output.note(info.cast, bytes);
        self.segmented += 1;
        self.segments += count as u64;
        self.segments_lost += lost as u64;
        true
    }

    /// Counts all of it at the receiver.
    #[inline]
    pub(super) fn count(&self, port: &FabricPort) {
        let counters = &port.shared.counters;
        counters.output.add(&self.output);
        counters.segmented.add(self.segmented);
        counters.segments.add(self.segments);
        counters.segments_lost.add(self.segments_lost);
        for (reason, frames) in [
            (Reason::NoBuffers, self.no_buffers),
            (Reason::TooLarge, self.too_large),
            (Reason::Malformed, self.malformed),
        ] {
            counters.dropped_out.add(reason, frames);
        }
    }
}

impl Info {
    /// What becomes of the tag when the frame leaves; `None` if it may not leave there.
    #[inline]
    pub(super) fn tag(&self, to: Tagging) -> Option<TagChange> {
        let tagged = match to {
            Tagging::Plain => return Some(TagChange::Keep),
            Tagging::Access(_) => false,
            Tagging::Trunk { native } => native != Some(self.vlan),
        };
        match (self.head.tci(), tagged) {
            (None, false) => Some(TagChange::Keep),
            (None, true) => Some(TagChange::Push(self.vlan)),
            // The tag behind it would be taken for the frame's own: it would be in another VLAN.
            (Some(_), false) if self.head.has_inner_tag() => None,
            (Some(_), false) => Some(TagChange::Strip),
            (Some(tci), true) if tci & 0x0fff == self.vlan => Some(TagChange::Keep),
            (Some(tci), true) => Some(TagChange::Replace(tci & 0xf000 | self.vlan)),
        }
    }
}

/// True if a receiver with these offloads can be given the frame as it is.
pub(super) fn is_whole(header: &VnetHeader, to: &Offloads) -> bool {
    if header.needs_csum() && !to.guest_csum {
        return false;
    }
    let ecn = header.gso_type & VnetHeader::GSO_ECN == 0 || to.guest_ecn;
    match header.gso_type & !VnetHeader::GSO_ECN {
        VnetHeader::GSO_NONE => true,
        VnetHeader::GSO_TCPV4 => to.guest_tso4 && ecn,
        VnetHeader::GSO_TCPV6 => to.guest_tso6 && ecn,
        VnetHeader::GSO_UDP_L4 => to.guest_uso4 && to.guest_uso6,
        VnetHeader::GSO_UDP => to.guest_ufo,
        _ => false,
    }
}

/// Puts one frame into the receiver's buffers.
#[inline]
fn put(
    frame: &TxFrame<'_>,
    info: &Info,
    tag: TagChange,
    guest: &Guest,
    sink: &mut dyn RxSink,
) -> Delivered {
    let header = &frame.header;
    let simple = header.gso_type == VnetHeader::GSO_NONE && !header.needs_csum();
    if simple && !guest.heads && guest.pairs <= 1 {
        let checked = info.head.checked();
        let rest = frame.payload.skip(checked.len());
        let changed;
        // Bytes that were just written somewhere else would have to be waited for.
        let front = if tag == TagChange::Keep {
            checked
        } else {
            changed = info.head.changed(tag);
            match &changed {
                Some((front, len)) => &front[..*len],
                None => return Delivered::Malformed,
            }
        };
        let all = front.len() + rest.len();
        // With more tags than that one it may still fit: that is looked at below.
        if all <= usize::from(guest.offloads.mtu) + 14 {
            let mut out = VnetHeader::default();
            if guest.offloads.guest_csum {
                out.flags = header.flags & VnetHeader::DATA_VALID;
            }
            return if sink.put(Target::Pair(0), out, front, rest) {
                Delivered::Frame(all)
            } else {
                Delivered::NoBuffers {
                    count: 0,
                    bytes: 0,
                    lost: 1,
                }
            };
        }
    }
    let mut front = [0; Target::HEAD];
    let len = info.head.longer(frame.payload, &mut front);
    deliver(frame, &front[..len], tag, &guest.offloads, sink)
}

impl Fabric {
    /// Hands the frames of a chunk to those that [`sort`](Self::sort) has found.
    #[inline]
    pub(super) fn hand_out(&mut self, chunk: &[TxFrame<'_>], now: Now, others: &mut dyn Outlets) {
        let mut touched = mem::take(&mut self.touched);
        for to in touched.drain(..) {
            let mut wanted = mem::take(&mut self.wanted[usize::from(to)]);
            let Some(port) = self.ports[usize::from(to)].as_deref_mut() else {
                debug_assert!(false, "frames for a port that is not there");
                continue;
            };
            if let Some(reason) = shut(port) {
                let frames = u64::from(wanted.count_ones());
                port.shared.counters.dropped_out.add(reason, frames);
                continue;
            }
            if let Some(bucket) = &mut port.rate_out {
                for index in bits(wanted) {
                    if !bucket.take(now.ns, self.infos[index].len) {
                        wanted &= !(1 << index);
                        port.shared.counters.dropped_out.add(Reason::RateOut, 1);
                    }
                }
            }
            if wanted == 0 {
                continue;
            }
            if port.uplink.is_some() {
                self.stage
                    .hand_up(port, wanted, chunk, &self.infos, now, &self.mailbox);
            } else {
                hand_to(port, wanted, chunk, &self.infos, others);
            }
            port.flush_capture();
        }
        self.touched = touched;
    }
}

/// Why a port gets nothing at all.
#[inline]
fn shut(port: &FabricPort) -> Option<Reason> {
    if port.shared.gone.load(Ordering::Relaxed) {
        Some(Reason::Gone)
    } else if !port.link {
        Some(Reason::LinkDown)
    } else if let Some(uplink) = &port.uplink {
        (!uplink.carrier).then_some(Reason::LinkDown)
    } else {
        (!port.guest.running).then_some(Reason::NoDriver)
    }
}

/// Hands frames to a device.
fn hand_to(
    port: &mut FabricPort,
    wanted: u64,
    chunk: &[TxFrame<'_>],
    infos: &[Info; CHUNK],
    others: &mut dyn Outlets,
) {
    let Some(key) = port.key else {
        let frames = u64::from(wanted.count_ones());
        port.shared.counters.dropped_out.add(Reason::Gone, frames);
        return;
    };
    let guest = port.guest;
    let tagging = port.tagging;
    let mut left = wanted;
    while left != 0 {
        let before = left;
        let mut handed = Handed::default();
        let mut barred = 0;
        let mut give = |sink: &mut dyn RxSink| {
            let mut got = false;
            while left != 0 {
                let index = left.trailing_zeros() as usize;
                let (info, frame) = (&infos[index], &chunk[index]);
                // One turn has buffers for one frame that must be cut.
                if got && !is_whole(&frame.header, &guest.offloads) && is_large(frame) {
                    return;
                }
                if let Some(tag) = info.tag(tagging) {
                    let delivered = put(frame, info, tag, &guest, sink);
                    // There may be more buffers than one turn has.
                    if got && matches!(delivered, Delivered::NoBuffers { count: 0, .. }) {
                        return;
                    }
                    if handed.note(info, delivered) {
                        got = true;
                        if port.capture.is_some()
                            && let Some((front, len)) = info.head.changed(tag)
                        {
                            let rest = frame.payload.skip(info.head.checked().len());
                            port.record(&front[..len], rest);
                        }
                    }
                } else {
                    barred += 1;
                }
                left &= left - 1;
            }
        };
        let result = match wanted_of(before, chunk, &guest.offloads) {
            Some(wanted) => others.fill_with(key, wanted, &mut give),
            None => others.fill(key, &mut give),
        };
        let dropped = &port.shared.counters.dropped_out;
        match result {
            Ok(()) if left != before => {
                handed.count(port);
                dropped.add(Reason::Vlan, barred);
            }
            Ok(()) => {
                dropped.add(Reason::Gone, u64::from(before.count_ones()));
                return;
            }
            Err(closed) => {
                dropped.add(reason(closed), u64::from(before.count_ones()));
                return;
            }
        }
    }
}

/// What frames take that need not be cut; `None` if any must be.
#[inline]
fn wanted_of(frames: u64, chunk: &[TxFrame<'_>], to: &Offloads) -> Option<Wanted> {
    let mut wanted = Wanted {
        frames: 0,
        bytes: 0,
        longest: 0,
    };
    for frame in bits(frames).map(|index| &chunk[index]) {
        if is_large(frame) && !is_whole(&frame.header, to) {
            return None;
        }
        // A tag may be added.
        let len = frame.payload.len() + TAG_LEN;
        wanted.frames += 1;
        wanted.bytes += len;
        wanted.longest = wanted.longest.max(len);
    }
    Some(wanted)
}

fn is_large(frame: &TxFrame<'_>) -> bool {
    frame.header.gso_type & !VnetHeader::GSO_ECN != VnetHeader::GSO_NONE
}
