// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the worker knows of the switch, and how that changes.

use std::fs::File;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bucket::Bucket;
use super::counters::Cast;
use super::head::Head;
use super::ports::Tables;
use super::shared::{Answer, Change, Limits, Mailbox, PortShared, Request, Tagging};
use super::table::{Entry, Key, Table};
use super::uplink::{Stage, Uplink};
use super::{MAX_PORTS, Reason};
use crate::capture::PcapWriter;
use crate::{Guest, Outlets, TxFrame};

/// Frames that are looked at before they are handed on: as many as a word has bits.
pub(super) const CHUNK: usize = 64;
/// Places of the table that are searched for old addresses at a time.
const SWEEP: usize = 1024;
/// Bytes that a capture keeps back at most in the middle of a batch.
const CAPTURE_BUFFER: usize = 1 << 18;

/// One moment, in the forms in which it is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// Nanoseconds since the switch was made.
    pub(super) ns: u64,
    /// Milliseconds since then, wrapping.
    pub(super) ms: u32,
}

/// A port, as the worker sees it.
pub(super) struct FabricPort {
    pub(super) shared: Arc<PortShared>,
    /// Tells it from others that had its number.
    pub(super) generation: u32,
    pub(super) key: Option<u64>,
    pub(super) guest: Guest,
    pub(super) tagging: Tagging,
    /// Only addresses that are fixed here may be used.
    pub(super) pinned: bool,
    pub(super) link: bool,
    /// Addresses learned here, and how many there may be.
    pub(super) macs: usize,
    pub(super) most_macs: usize,
    pub(super) storm: Option<Bucket>,
    pub(super) rate_in: Option<Bucket>,
    pub(super) rate_out: Option<Bucket>,
    pub(super) capture: Option<Box<PcapWriter<File>>>,
    pub(super) uplink: Option<Uplink>,
}

impl FabricPort {
    pub(super) fn new(shared: Arc<PortShared>, generation: u32) -> Self {
        Self {
            shared,
            generation,
            key: None,
            guest: Guest::NONE,
            tagging: Tagging::Plain,
            pinned: false,
            link: true,
            macs: 0,
            most_macs: 0,
            storm: None,
            rate_in: None,
            rate_out: None,
            capture: None,
            uplink: None,
        }
    }

    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.most_macs = limits.macs;
        self.link = limits.link;
        for (place, new) in [
            (&mut self.storm, limits.storm),
            (&mut self.rate_in, limits.rate_in),
            (&mut self.rate_out, limits.rate_out),
        ] {
            if let Some(new) = new {
                *place = new;
            }
        }
    }

    fn look_at_place(&mut self) {
        let place = self.shared.place();
        self.key = place.key;
        self.guest = place.guest;
        if self.uplink.is_none() {
            self.shared
                .running
                .store(place.guest.running, Ordering::Relaxed);
        }
    }

    pub(super) fn count_macs(&self) {
        self.shared.counters.macs.set(self.macs as u64);
    }

    /// Records a frame that begins with `head`.
    pub(super) fn record(&mut self, head: &[u8], rest: vmsg_mem::Pieces<'_>) {
        if let Some(writer) = &mut self.capture {
            writer.record_behind(head, rest);
            if writer.pending() > CAPTURE_BUFFER {
                self.flush_capture();
            }
        }
    }

    /// Writes what was recorded. A file that fails is given up.
    pub(super) fn flush_capture(&mut self) {
        if let Some(writer) = &mut self.capture {
            writer.flush(0);
            if !writer.is_writing() {
                self.capture = None;
                self.shared.capturing.store(false, Ordering::Relaxed);
            }
        }
    }
}

/// What was found out about a frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Info {
    pub(super) head: Head,
    pub(super) vlan: u16,
    pub(super) cast: Cast,
    /// Bytes as they came.
    pub(super) len: usize,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// So many; the port may send again at that moment.
    Some(usize, Instant),
    /// There is no such port: not yet, or not any more.
    NotThere,
}

/// The worker's side of the switch.
pub(super) struct Fabric {
    start: Instant,
    pub(super) mailbox: Arc<Mailbox>,
    /// Empty; changes places with the mailbox.
    room: Vec<Request>,
    pub(super) table: Table,
    pub(super) tables: Arc<Tables>,
    pub(super) ports: Vec<Option<Box<FabricPort>>>,
    pub(super) uplinks: Vec<u16>,
    /// About the frames of a chunk.
    pub(super) infos: Box<[Info; CHUNK]>,
    /// For each port those frames of the chunk that it is to get; zero between chunks.
    pub(super) wanted: Box<[u64]>,
    /// Ports that are to get any, in no order.
    pub(super) touched: Vec<u16>,
    pub(super) stage: Stage,
    sweep_every: u64,
    sweep_at: u64,
}

impl Fabric {
    pub(super) fn new(
        mailbox: Arc<Mailbox>,
        table: usize,
        age: Duration,
        tables: Arc<Tables>,
    ) -> Self {
        let age_ms = u32::try_from(age.as_millis()).unwrap_or(u32::MAX / 2);
        let table = Table::new(table, age_ms);
        let steps = table.places().div_ceil(SWEEP) as u64;
        // All places are looked at in a quarter of the time that entries last.
        let sweep_every = (u64::from(age_ms) * 1_000_000 / 4 / steps).max(1_000_000);
        Self {
            start: Instant::now(),
            mailbox,
            room: Vec::with_capacity(64),
            table,
            tables,
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            uplinks: Vec::new(),
            infos: Box::new(
                [Info {
                    head: Head::EMPTY,
                    vlan: 0,
                    cast: Cast::Unicast,
                    len: 0,
                }; CHUNK],
            ),
            wanted: vec![0; MAX_PORTS].into(),
            touched: Vec::with_capacity(MAX_PORTS),
            stage: Stage::default(),
            sweep_every,
            sweep_at: 0,
        }
    }

    pub(super) fn now(&self, instant: Instant) -> Now {
        let since = instant.saturating_duration_since(self.start);
        let ns = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let ms = u32::try_from((ns / 1_000_000) & 0xffff_ffff).expect("masked");
        Now { instant, ns, ms }
    }

    pub(super) fn instant(&self, ns: u64) -> Instant {
        self.start + Duration::from_nanos(ns)
    }

    fn port_mut(&mut self, index: u16) -> Option<&mut FabricPort> {
        self.ports.get_mut(usize::from(index))?.as_deref_mut()
    }

    /// The device of a port has said something.
    pub(super) fn place_changed(&mut self, index: u16, generation: u32) {
        let Some(port) = self.port_mut(index) else {
            return;
        };
        if port.generation != generation {
            return;
        }
        let ran = port.guest.running;
        port.look_at_place();
        if ran && !port.guest.running {
            self.forget(index);
        }
    }

    /// Some device has said something; nobody knows which.
    pub(super) fn places_changed(&mut self) {
        for index in 0..self.ports.len() {
            // No more than there are numbers.
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            if let Some(generation) = self.port_mut(index).map(|port| port.generation) {
                self.place_changed(index, generation);
            }
        }
    }

    /// Takes frames of a device.
    pub(super) fn transmit(
        &mut self,
        index: u16,
        generation: u32,
        instant: Instant,
        frames: &[TxFrame<'_>],
        others: &mut dyn Outlets,
    ) -> Sent {
        let now = self.now(instant);
        self.read_mail(now);
        let Some(port) = self.port_mut(index) else {
            return Sent::NotThere;
        };
        if port.generation != generation {
            return Sent::NotThere;
        }
        let mut count = frames.len();
        if let Some(bucket) = &mut port.rate_in {
            let mut passes = |frame: &&TxFrame<'_>| bucket.take(now.ns, frame.payload.len());
            count = frames.iter().take_while(|frame| passes(frame)).count();
        }
        let until = match &port.rate_in {
            Some(bucket) if count < frames.len() => {
                port.shared.counters.waits.add(1);
                Some(bucket.opens_at())
            }
            _ => None,
        };
        self.forward(index, &frames[..count], now, others);
        match until {
            None => Sent::All,
            Some(ns) => Sent::Some(count, self.instant(ns)),
        }
    }

    /// Frames of a port go where they are to go.
    pub(super) fn forward(
        &mut self,
        from: u16,
        frames: &[TxFrame<'_>],
        now: Now,
        others: &mut dyn Outlets,
    ) {
        // Nothing goes back to it, so that nobody misses it meanwhile.
        let Some(mut port) = self.ports[usize::from(from)].take() else {
            return;
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            for chunk in frames.chunks(CHUNK) {
                if port.capture.is_some() {
                    for frame in chunk {
                        port.record(&[], frame.payload);
                    }
                }
                self.sort(from, &mut port, chunk, now);
                self.hand_out(chunk, now, others);
            }
        }));
        port.flush_capture();
        self.ports[usize::from(from)] = Some(port);
        if let Err(panic) = result {
            // Whosever it is: the others go on with a switch that is whole.
            self.touched.clear();
            self.wanted.fill(0);
            resume_unwind(panic);
        }
    }

    /// Does what control has asked for.
    #[inline]
    pub(super) fn read_mail(&mut self, now: Now) {
        let mut requests = mem::take(&mut self.room);
        if self.mailbox.take(&mut requests) {
            let count = requests.len();
            for Request { changes, reply } in requests.drain(..) {
                let mut answer = Answer::default();
                for change in changes {
                    self.change(change, now, &mut answer);
                }
                if let Some(reply) = reply {
                    // Nobody listens any more: then nobody cares.
                    let _ = reply.try_send(answer);
                }
            }
            self.mailbox.note_done(count);
        }
        self.room = requests;
    }

    fn change(&mut self, change: Change, now: Now, answer: &mut Answer) {
        match change {
            Change::AddPort(index, mut port) => {
                port.look_at_place();
                if port.uplink.is_some() {
                    self.uplinks.push(index);
                    self.stage.prepare();
                }
                port.shared.known.store(true, Ordering::Release);
                self.ports[usize::from(index)] = Some(port);
            }
            Change::RemovePort(index) => {
                self.table.retain(|entry| entry.port != index, |_| {});
                self.uplinks.retain(|uplink| *uplink != index);
                answer.port = self.ports[usize::from(index)].take();
            }
            Change::Tables(tables) => answer.tables = Some(mem::replace(&mut self.tables, tables)),
            Change::Limits(index, limits) => {
                if let Some(port) = self.port_mut(index) {
                    port.set_limits(limits);
                    if !port.link {
                        self.forget(index);
                    }
                }
            }
            Change::Addresses(index, tagging, pinned, keys) => {
                self.table.retain(|entry| entry.port != index, |_| {});
                let ports = &mut self.ports;
                for key in keys {
                    self.table.fix(key, index, |gone| unlearn(ports, gone));
                }
                if let Some(port) = self.port_mut(index) {
                    port.tagging = tagging;
                    port.pinned = pinned;
                    port.macs = 0;
                    port.count_macs();
                }
            }
            Change::Capture(index, writer) => {
                if let Some(port) = self.port_mut(index) {
                    port.flush_capture();
                    let on = writer.is_some();
                    port.shared.capturing.store(on, Ordering::Relaxed);
                    answer.capture = mem::replace(&mut port.capture, writer);
                }
            }
            Change::Flush(Some(index)) => self.forget(index),
            Change::Flush(None) => {
                self.table.retain(|entry| entry.fixed, |_| {});
                for port in self.ports.iter_mut().flatten() {
                    port.macs = 0;
                    port.count_macs();
                }
            }
            Change::List => answer.entries.extend(self.table.entries(now.ms)),
        }
    }

    /// Forgets what was learned at a port.
    pub(super) fn forget(&mut self, index: u16) {
        let Some(port) = self.port_mut(index) else {
            return;
        };
        if port.macs > 0 {
            port.macs = 0;
            port.count_macs();
            self.table
                .retain(|entry| entry.fixed || entry.port != index, |_| {});
        }
    }

    /// Forgets a part of what is old, if it is time for that.
    pub(super) fn sweep(&mut self, now: Now) {
        if now.ns >= self.sweep_at {
            self.sweep_at = now.ns.saturating_add(self.sweep_every);
            let ports = &mut self.ports;
            self.table.sweep(SWEEP, now.ms, |gone| unlearn(ports, gone));
        }
    }

    pub(super) fn next_sweep(&self) -> Option<Instant> {
        (self.table.len() > 0).then(|| self.instant(self.sweep_at))
    }

    /// Learns that `key` is at the port `from`, unless it has too many already.
    pub(super) fn learn(&mut self, key: Key, from: u16, port: &mut FabricPort, now: Now) {
        let counters = &port.shared.counters;
        if port.macs >= port.most_macs {
            counters.not_learned.add(1);
            return;
        }
        let Ok(old) = self.table.learn(key, from, now.ms) else {
            counters.not_learned.add(1);
            return;
        };
        match old {
            Some(old) if old.port == from => return,
            Some(old) => unlearn(&mut self.ports, &old),
            None => {}
        }
        port.macs += 1;
        port.count_macs();
    }
}

/// An address is no longer known at its port.
fn unlearn(ports: &mut [Option<Box<FabricPort>>], gone: &Entry) {
    if !gone.fixed
        && let Some(Some(port)) = ports.get_mut(usize::from(gone.port))
    {
        port.macs = port.macs.saturating_sub(1);
        port.count_macs();
    }
}

/// Memory for frames in words.
pub(super) fn words(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

/// Why a device takes no frames, as it is counted.
pub(super) const fn reason(closed: crate::Closed) -> Reason {
    match closed {
        crate::Closed::Gone => Reason::Gone,
        crate::Closed::NoDriver => Reason::NoDriver,
        crate::Closed::LinkDown => Reason::LinkDown,
        crate::Closed::Broken => Reason::Broken,
    }
}
