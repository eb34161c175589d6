// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ports with a back end behind them: the way out of the switch.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmsg_mem::{Pieces, RamSlice};

use super::bucket::Bucket;
use super::fabric::{CHUNK, Fabric, FabricPort, Info, Now, words};
use super::hand::{Handed, bits, is_whole};
use super::shared::Mailbox;
use super::{Delivered, Reason, TagChange, deliver};
use crate::{Backend, Guest, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

/// Memory for frames that come from a back end, or that are cut for one.
const STAGE: usize = 512 * 1024;
/// Frames that come from a back end at a time.
const TURN: usize = CHUNK;
/// Turns of one back end before others have theirs.
const TURNS: usize = 8;
/// Segments of one frame for a back end.
const SEGMENTS: usize = 256;
/// Room for a frame's beginning.
const FRONT: usize = 24;

/// A back end that is plugged into the switch.
pub(super) struct Uplink {
    pub(super) backend: Box<dyn Backend>,
    /// What it takes, in the terms of one who receives.
    takes: Offloads,
    pub(super) carrier: bool,
    /// It was given something since the pump last looked.
    stirred: bool,
    /// When the pump knows that it must look.
    due: Option<Instant>,
    /// Its frames wait until then, as it sends too much.
    until: Option<Instant>,
}

impl Uplink {
    /// Tells the back end that the switch takes all it can give.
    pub(super) fn new(mut backend: Box<dyn Backend>) -> Self {
        let can = backend.offloads();
        let wanted = Offloads {
            ufo: false,
            guest_ufo: false,
            ..Offloads::ALL
        };
        backend.set_guest(&Guest {
            offloads: wanted.intersection(can),
            pairs: 1,
            running: true,
            heads: true,
        });
        let takes = Offloads {
            guest_csum: can.csum,
            guest_tso4: can.csum && can.tso4,
            guest_tso6: can.csum && can.tso6,
            guest_ecn: can.csum && can.ecn,
            guest_ufo: false,
            guest_uso4: can.csum && can.uso,
            guest_uso6: can.csum && can.uso,
            ..can
        };
        let carrier = backend.link_is_up();
        Self {
            backend,
            takes,
            carrier,
            stirred: true,
            due: None,
            until: None,
        }
    }

    fn next_timeout(&self) -> Option<Instant> {
        [self.backend.next_timeout(), self.until]
            .into_iter()
            .flatten()
            .min()
    }
}

/// Memory of the switch's own, for uplinks; there is none before there is an uplink.
#[derive(Default)]
pub(super) struct Stage {
    /// Frames from back ends.
    incoming: Vec<AtomicU64>,
    /// Segments for back ends.
    cut: Vec<AtomicU64>,
    /// The beginnings of frames for back ends, one for each of a chunk.
    fronts: Vec<AtomicU64>,
}

impl Stage {
    pub(super) fn prepare(&mut self) {
        if self.incoming.is_empty() {
            self.incoming = words(STAGE);
            self.cut = words(STAGE);
            self.fronts = words(FRONT * CHUNK);
        }
    }

    /// Hands frames to a back end, straight from their senders' memory as far as it takes them as they are.
    pub(super) fn hand_up(
        &mut self,
        port: &mut FabricPort,
        wanted: u64,
        chunk: &[TxFrame<'_>],
        infos: &[Info; CHUNK],
        now: Now,
        mailbox: &Mailbox,
    ) {
        let Some(mut uplink) = port.uplink.take() else {
            return;
        };
        let fronts = RamSlice::from_atomics(&self.fronts);
        let mut pieces: Vec<RamSlice<'_>> = Vec::with_capacity(4 * CHUNK);
        let mut run = Run::default();
        for index in bits(wanted) {
            let (info, frame) = (&infos[index], &chunk[index]);
            let Some(tag) = info.tag(port.tagging) else {
                port.shared.counters.dropped_out.add(Reason::Vlan, 1);
                continue;
            };
            if !is_whole(&frame.header, &uplink.takes) {
                run.send(&mut uplink, port, &pieces, chunk, infos, now);
                pieces.clear();
                cut(&self.cut, &mut uplink, port, frame, info, tag, now);
                continue;
            }
            let Some((front, len)) = info.head.changed(tag) else {
                port.shared.counters.dropped_out.add(Reason::Malformed, 1);
                continue;
            };
            let Some(header) = shifted(frame, info.head.checked().len(), len) else {
                port.shared.counters.dropped_out.add(Reason::Malformed, 1);
                continue;
            };
            let Some(place) = fronts.get(index * FRONT, len) else {
                continue;
            };
            place.write(0, &front[..len]);
            let start = pieces.len();
            pieces.push(place);
            let rest = frame.payload.skip(info.head.checked().len());
            pieces.extend(rest.iter());
            run.frames.push((index, start..pieces.len(), header));
        }
        run.send(&mut uplink, port, &pieces, chunk, infos, now);
        uplink.stirred = true;
        // What it has been given may be answered at once, or change what it waits for.
        if uplink.backend.has_frames() || uplink.next_timeout() != uplink.due {
            mailbox.ring();
        }
        port.uplink = Some(uplink);
    }
}

/// What the sender says of a frame, when its beginning has become longer or shorter. `None` if the checksum that it leaves to others
/// would be written behind the frame's end, or into what was checked here: addresses and tag.
fn shifted(frame: &TxFrame<'_>, before: usize, after: usize) -> Option<VnetHeader> {
    let mut header = frame.header;
    let shift = |place: u16| {
        let moved = (usize::from(place) + after).saturating_sub(before);
        u16::try_from(moved).unwrap_or(u16::MAX)
    };
    if header.needs_csum() {
        let start = usize::from(header.csum_start);
        let end = start + usize::from(header.csum_offset) + 2;
        if start < before || end > frame.payload.len() {
            return None;
        }
        header.csum_start = shift(header.csum_start);
    }
    if header.gso_type != VnetHeader::GSO_NONE {
        header.hdr_len = shift(header.hdr_len);
    }
    Some(header)
}

/// Frames that are handed to a back end together.
#[derive(Default)]
struct Run {
    /// Which of the chunk, where its pieces are, and what is said of it.
    frames: Vec<(usize, Range<usize>, VnetHeader)>,
}

impl Run {
    fn send(
        &mut self,
        uplink: &mut Uplink,
        port: &mut FabricPort,
        pieces: &[RamSlice<'_>],
        chunk: &[TxFrame<'_>],
        infos: &[Info; CHUNK],
        now: Now,
    ) {
        if self.frames.is_empty() {
            return;
        }
        let ready: Vec<TxFrame<'_>> = self
            .frames
            .iter()
            .map(|(_, range, header)| TxFrame {
                header: *header,
                payload: Pieces::new(&pieces[range.clone()]),
            })
            .collect();
        let taken = uplink
            .backend
            .transmit(now.instant, 0, &ready)
            .min(ready.len());
        let mut handed = Handed::default();
        for ((index, ..), frame) in self.frames.iter().zip(&ready[..taken]) {
            debug_assert!(*index < chunk.len(), "one of the chunk");
            handed.note(&infos[*index], Delivered::Frame(frame.payload.len()));
            if port.capture.is_some() {
                port.record(&[], frame.payload);
            }
        }
        handed.count(port);
        let full = (ready.len() - taken) as u64;
        port.shared
            .counters
            .dropped_out
            .add(Reason::UplinkFull, full);
        self.frames.clear();
    }
}

/// Cuts a frame for a back end, or completes its checksum, in memory of the switch.
fn cut(
    memory: &[AtomicU64],
    uplink: &mut Uplink,
    port: &mut FabricPort,
    frame: &TxFrame<'_>,
    info: &Info,
    tag: TagChange,
    now: Now,
) {
    let mut front = [0; Target::HEAD];
    let len = info.head.longer(frame.payload, &mut front);
    let mut tray = Tray::new(memory, SEGMENTS);
    let mut delivered = deliver(frame, &front[..len], tag, &uplink.takes, &mut tray);
    let slices = tray.slices();
    let ready = tray.frames(&slices);
    let taken = if ready.is_empty() {
        0
    } else {
        uplink
            .backend
            .transmit(now.instant, 0, &ready)
            .min(ready.len())
    };
    if taken == 0 && !ready.is_empty() {
        port.shared.counters.dropped_out.add(Reason::UplinkFull, 1);
        return;
    }
    if taken < ready.len() {
        let (before, lost) = match delivered {
            Delivered::NoBuffers { lost, .. } => (ready.len(), lost),
            _ => (ready.len(), 0),
        };
        delivered = Delivered::NoBuffers {
            count: taken,
            bytes: ready[..taken].iter().map(|frame| frame.payload.len()).sum(),
            lost: before - taken + lost,
        };
    }
    let mut handed = Handed::default();
    if handed.note(info, delivered)
        && port.capture.is_some()
        && let Some((front, len)) = info.head.changed(tag)
    {
        let rest = frame.payload.skip(info.head.checked().len());
        port.record(&front[..len], rest);
    }
    handed.count(port);
}

/// A place for frames in memory of the switch.
struct Tray<'m> {
    memory: RamSlice<'m>,
    /// The rest of the memory, which is what is offered.
    room: [RamSlice<'m>; 1],
    used: usize,
    /// Where frames are, and what is said of them.
    ready: Vec<(Range<usize>, VnetHeader)>,
    most: usize,
    /// What comes from this back end is limited, and the present time.
    limit: Option<(Bucket, u64)>,
}

impl<'m> Tray<'m> {
    fn new(memory: &'m [AtomicU64], most: usize) -> Self {
        Self {
            memory: RamSlice::from_atomics(memory),
            room: [RamSlice::EMPTY],
            used: 0,
            ready: Vec::with_capacity(TURN),
            most,
            limit: None,
        }
    }

    fn is_open(&self) -> bool {
        self.ready.len() < self.most
            && self
                .limit
                .as_ref()
                .is_none_or(|(bucket, now)| bucket.is_open(*now))
    }

    fn slices(&self) -> Vec<RamSlice<'m>> {
        self.ready
            .iter()
            .filter_map(|(range, _)| self.memory.get(range.start, range.len()))
            .collect()
    }

    fn frames<'a>(&self, slices: &'a [RamSlice<'a>]) -> Vec<TxFrame<'a>> {
        slices
            .chunks(1)
            .zip(&self.ready)
            .map(|(piece, (_, header))| TxFrame {
                header: *header,
                payload: Pieces::new(piece),
            })
            .collect()
    }
}

impl RxSink for Tray<'_> {
    fn offer(&mut self, to: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.offer_between(to, len, len)
    }

    fn offer_between(&mut self, _: Target<'_>, least: usize, most: usize) -> Option<Pieces<'_>> {
        if !self.is_open() {
            return None;
        }
        let (_, rest) = self.memory.split_at(self.used);
        if rest.len() < least {
            return None;
        }
        let (room, _) = rest.split_at(most.max(least));
        self.room = [room];
        Some(Pieces::new(&self.room))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        let len = len.min(self.room[0].len());
        self.room = [RamSlice::EMPTY];
        if len > 0 && self.ready.len() < self.most {
            self.ready.push((self.used..self.used + len, *header));
            self.used += len;
            if let Some((bucket, now)) = &mut self.limit {
                bucket.charge(*now, len);
            }
        }
    }
}

impl Fabric {
    /// Looks after the uplinks of which `woken` says that something has happened, that were given something, or whose time
    /// has come.
    pub(super) fn poll_uplinks(
        &mut self,
        woken: impl Fn(u16) -> bool,
        now: Now,
        others: &mut dyn Outlets,
    ) {
        let mut place = 0;
        while let Some(index) = self.uplinks.get(place).copied() {
            place += 1;
            self.poll_uplink(index, woken(index), now, others);
        }
    }

    fn poll_uplink(&mut self, index: u16, woken: bool, now: Now, others: &mut dyn Outlets) {
        let Some(port) = self.ports[usize::from(index)].as_deref_mut() else {
            return;
        };
        let Some(uplink) = &mut port.uplink else {
            return;
        };
        let due = uplink.next_timeout().is_some_and(|due| due <= now.instant);
        if !(woken || due || uplink.stirred || uplink.backend.has_frames()) {
            return;
        }
        uplink.stirred = false;
        uplink.until = None;
        uplink.backend.poll(now.instant);
        let carrier = uplink.backend.link_is_up();
        port.shared.running.store(carrier, Ordering::Relaxed);
        if uplink.carrier && !carrier {
            uplink.carrier = false;
            self.forget(index);
        } else {
            uplink.carrier = carrier;
        }
        let mut more = false;
        let memory = std::mem::take(&mut self.stage.incoming);
        for _ in 0..TURNS {
            more = self.take_from(index, &memory, now, others);
            if !more {
                break;
            }
        }
        self.stage.incoming = memory;
        let uplink = self.ports[usize::from(index)]
            .as_deref_mut()
            .and_then(|port| port.uplink.as_mut());
        if let Some(uplink) = uplink {
            uplink.due = uplink.next_timeout();
        }
        if more {
            self.mailbox.ring();
        }
    }

    /// Takes some frames of an uplink; false if it has no more, or may not send more now.
    fn take_from(
        &mut self,
        index: u16,
        memory: &[AtomicU64],
        now: Now,
        others: &mut dyn Outlets,
    ) -> bool {
        let Some(port) = self.ports[usize::from(index)].as_deref_mut() else {
            return false;
        };
        let Some(uplink) = &mut port.uplink else {
            return false;
        };
        if !uplink.backend.has_frames() {
            return false;
        }
        let mut tray = Tray::new(memory, TURN);
        if let Some(bucket) = &port.rate_in
            && !bucket.is_open(now.ns)
        {
            port.shared.counters.waits.add(1);
            let opens = bucket.opens_at();
            uplink.until = Some(now.instant + Duration::from_nanos(opens.saturating_sub(now.ns)));
            return false;
        }
        tray.limit = port.rate_in.take().map(|bucket| (bucket, now.ns));
        let taken = uplink.backend.receive(now.instant, &mut tray);
        port.rate_in = tray.limit.take().map(|(bucket, _)| bucket);
        if tray.ready.is_empty() {
            // All of them may have been no good.
            return taken > 0;
        }
        let slices = tray.slices();
        let frames = tray.frames(&slices);
        self.forward(index, &frames, now, others);
        true
    }

    /// When the pump must look after the uplinks.
    pub(super) fn next_uplink(&self) -> Option<Instant> {
        self.uplinks
            .iter()
            .filter_map(|index| self.ports[usize::from(*index)].as_deref()?.uplink.as_ref())
            .filter_map(Uplink::next_timeout)
            .min()
    }
}
