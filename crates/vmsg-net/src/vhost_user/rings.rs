// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that a back end is lent, and the two queues in it. There is nothing else in it: no guest's memory, no page of this
//! process that serves another purpose; and each connection has its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmsg_mem::{BusAddr, Doorbell, Mapping, Pieces, RamSlice};
use vmsg_queue::{DriverQueue, DriverSlot, Layout, ParkedDriver, QueueConfig, QueueFeatures};

use super::Trouble;
use super::handshake::feature;
use crate::switch::{Delivered, TagChange, deliver};
use crate::{Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Buffers for frames from the back end.
const RX: u16 = 1024;
/// Bytes of each. Large frames take several.
const RX_LEN: u32 = 4096;
const RX_BYTES: usize = RX_LEN as usize;
/// Buffers for frames to the back end.
const TX: u16 = 256;
/// Bytes of each: the longest frame with two tags and the header, in whole pages; those that are never written cost nothing.
const TX_BYTES: usize = 68 * 1024;
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
/// Longest frame that is taken.
const LONGEST: usize = 65535 + 14 + 8;
/// Most buffers of one frame, twice as many as the longest one fills.
const MOST_BUFFERS: usize = 2 * LONGEST.div_ceil(RX_BYTES);
/// The bus address of the memory: any would do that is no null pointer of anybody.
const BASE: u64 = 1 << 32;

const RX_RING: usize = 0;

/// Where what is in the memory.
#[derive(Clone, Copy, Debug)]
struct Places {
    rx: Layout,
    tx: Layout,
    tx_ring: usize,
    rx_buffers: usize,
    tx_buffers: usize,
    len: usize,
}

impl Places {
    fn new() -> Result<Self, Trouble> {
        const PAGE: usize = 4096;
        let (rx, tx) = (Layout::new(RX, 0)?, Layout::new(TX, 0)?);
        let tx_ring = (RX_RING + rx.total_len()).next_multiple_of(PAGE);
        let rx_buffers = (tx_ring + tx.total_len()).next_multiple_of(PAGE);
        let tx_buffers = rx_buffers + usize::from(RX) * RX_BYTES;
        Ok(Self {
            rx,
            tx,
            tx_ring,
            rx_buffers,
            tx_buffers,
            len: tx_buffers + usize::from(TX) * TX_BYTES,
        })
    }
}

const fn bus(offset: usize) -> BusAddr {
    BusAddr(BASE + offset as u64)
}

/// How a queue is shown to the back end.
#[derive(Debug)]
pub(super) struct End {
    pub(super) config: QueueConfig,
    /// Rung here: there are new buffers.
    pub(super) kick: Doorbell,
    /// Rung by the back end: it has used some. It is watched by edges and never read.
    pub(super) call: Doorbell,
}

impl End {
    fn new(config: QueueConfig) -> Result<Self, Trouble> {
        Ok(Self {
            config,
            kick: Doorbell::new()?,
            call: Doorbell::new()?,
        })
    }
}

type Running<'m> = DriverQueue<'m, Vec<DriverSlot>>;

/// A queue between two uses, and whose buffer each of its chains is.
#[derive(Debug)]
struct Queue {
    /// Always there, but while it is in use.
    parked: Option<ParkedDriver<Vec<DriverSlot>>>,
    /// For each chain, by its token.
    buffer: Vec<u16>,
}

impl Queue {
    fn new(
        layout: Layout,
        features: QueueFeatures,
        ram: RamSlice<'_>,
        base: BusAddr,
    ) -> Result<(Self, QueueConfig), Trouble> {
        let size = usize::from(layout.size());
        let slots = vec![DriverSlot::default(); size];
        let queue = DriverQueue::new(layout, features, ram, base, slots)?;
        let config = queue.config();
        let this = Self {
            parked: Some(queue.park()),
            buffer: vec![0; size],
        };
        Ok((this, config))
    }

    /// The queue, which lies at `at`. After an error it is not parked again: the connection ends.
    fn resume<'m>(&mut self, ram: RamSlice<'m>, at: usize) -> Result<Running<'m>, Trouble> {
        let parked = self.parked.take().ok_or(Trouble::Lost)?;
        Ok(parked.resume(ram.split_at(at).1)?)
    }
}

/// A frame that comes in.
#[derive(Debug, Default)]
struct Coming {
    /// Its buffers so far, and the bytes in each.
    parts: Vec<(u16, u32)>,
    /// How many there will be; 0 if there is no frame.
    count: usize,
    header: VnetHeader,
}

/// What happened to frames for the guest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Received {
    /// Frames of the back end that the guest has, whole or in pieces.
    pub(super) frames: u64,
    /// Frames that were no good.
    pub(super) bad: u64,
    /// Frames of which the guest had no room for some pieces.
    pub(super) cut_off: u64,
}

/// What happened to frames of the guest.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    /// Frames that need not be offered again.
    pub(super) taken: usize,
    /// Of those, frames that were no good.
    pub(super) bad: u64,
    /// Of those, frames of which there was no room for some pieces.
    pub(super) cut_off: u64,
}

/// The memory as the back end gets to know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) address: u64,
    pub(super) len: u64,
}

/// Both queues and their buffers.
#[derive(Debug)]
pub(super) struct Rings {
    memory: Mapping,
    file: OwnedFd,
    places: Places,
    ends: [End; 2],
    rx: Queue,
    tx: Queue,
    /// The present frame from the back end.
    coming: Coming,
    /// Buffers for frames to the back end that are not in use.
    free: Vec<u16>,
    mergeable: bool,
    /// The back end has been asked to tell when there is room.
    waiting: bool,
}

impl Rings {
    /// For a back end that has agreed on `features`; all receive buffers are in place.
    pub(super) fn new(features: u64) -> Result<Self, Trouble> {
        let places = Places::new()?;
        let (memory, file) = Mapping::memfd("vmsg-vhost-user", places.len as u64, true)?;
        let ram = memory.ram();
        let queue = |at: usize, layout: Layout| {
            let ram = ram.get(at, layout.total_len()).ok_or(Trouble::Lost)?;
            Queue::new(layout, QueueFeatures::from_bits(features), ram, bus(at))
        };
        let (rx, rx_config) = queue(RX_RING, places.rx)?;
        let (tx, tx_config) = queue(places.tx_ring, places.tx)?;
        let mut this = Self {
            ends: [End::new(rx_config)?, End::new(tx_config)?],
            rx,
            tx,
            coming: Coming::default(),
            free: (0..TX).collect(),
            mergeable: features & feature::MRG_RXBUF != 0,
            waiting: true,
            memory,
            file,
            places,
        };
        this.fill()?;
        Ok(this)
    }

    pub(super) fn region(&self) -> Region {
        Region {
            address: BASE,
            len: self.memory.len() as u64,
        }
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Of receiving and sending, in the order of the device's queues.
    pub(super) const fn ends(&self) -> &[End; 2] {
        &self.ends
    }

    /// Hands all receive buffers to the back end.
    fn fill(&mut self) -> Result<(), Trouble> {
        let mut queue = self.rx.resume(self.memory.ram(), RX_RING)?;
        for buffer in 0..RX {
            give(&mut queue, &mut self.rx.buffer, self.places, buffer)?;
        }
        queue.publish()?;
        self.rx.parked = Some(queue.park());
        self.ends[0].kick.ring()?;
        Ok(())
    }

    /// True if a frame waits for the guest's room.
    pub(super) const fn has_frame(&self) -> bool {
        self.coming.is_whole()
    }

    /// Hands frames to a guest who has settled on `to`, at most `most`. `Ok` with true: there are no more, and the back end will
    /// tell when there are.
    pub(super) fn receive(
        &mut self,
        to: &Offloads,
        sink: &mut dyn RxSink,
        most: u64,
        told: &mut Received,
    ) -> Result<bool, Trouble> {
        let ram = self.memory.ram();
        let mut queue = self.rx.resume(ram, RX_RING)?;
        // Until there are no more it is asked anyhow.
        queue.disable_notifications()?;
        let mut empty = false;
        for _ in 0..most {
            while !self.coming.is_whole() {
                let Some(used) = queue.pop_used()? else {
                    empty = !queue.enable_notifications()?;
                    if empty {
                        break;
                    }
                    continue;
                };
                let buffer = self.rx.buffer.get(used.token.index()).copied();
                let buffer = buffer.ok_or(Trouble::Lost)?;
                let part = self.places.receive_buffer(ram, buffer, used.written)?;
                self.coming.add(buffer, part, self.mergeable)?;
            }
            if empty {
                break;
            }
            let mut pieces = [RamSlice::EMPTY; MOST_BUFFERS];
            for (piece, (buffer, len)) in pieces.iter_mut().zip(&self.coming.parts) {
                *piece = self.places.receive_buffer(ram, *buffer, *len)?;
            }
            let whole = Pieces::new(&pieces[..self.coming.count]);
            let frame = TxFrame {
                header: self.coming.header,
                payload: whole.skip(HEADER),
            };
            match relay(&frame, to, sink) {
                Fate::Taken => told.frames += 1,
                Fate::Waits => break,
                Fate::CutOff => told.cut_off += 1,
                Fate::Bad => told.bad += 1,
            }
            self.coming.count = 0;
            for (buffer, _) in self.coming.parts.drain(..) {
                give(&mut queue, &mut self.rx.buffer, self.places, buffer)?;
            }
        }
        let kick = queue.publish()?;
        self.rx.parked = Some(queue.park());
        if kick {
            self.ends[0].kick.ring()?;
        }
        Ok(empty)
    }

    /// Takes frames of the guest for a back end that takes what `to` says; those that find no room may be offered again after
    /// the back end has said that there is some.
    pub(super) fn transmit(
        &mut self,
        frames: &[TxFrame<'_>],
        to: &Offloads,
    ) -> Result<Sent, Trouble> {
        let ram = self.memory.ram();
        let mut queue = self.tx.resume(ram, self.places.tx_ring)?;
        reap(&mut queue, &self.tx.buffer, &mut self.free)?;
        if std::mem::take(&mut self.waiting) {
            queue.disable_notifications()?;
        }
        let mut sent = Sent::default();
        for frame in frames {
            let fate = loop {
                let mut room = Room {
                    queue: &mut queue,
                    buffer: &mut self.tx.buffer,
                    free: &mut self.free,
                    places: self.places,
                    ram,
                    room: [RamSlice::EMPTY],
                    failed: None,
                };
                let fate = if room.free.len() < pieces(frame, to) {
                    Fate::Waits
                } else {
                    relay(frame, to, &mut room)
                };
                if let Some(trouble) = room.failed {
                    return Err(trouble);
                }
                if fate == Fate::Waits {
                    self.waiting = true;
                    if queue.enable_notifications()? {
                        reap(&mut queue, &self.tx.buffer, &mut self.free)?;
                        continue;
                    }
                }
                break fate;
            };
            match fate {
                Fate::Taken => {}
                Fate::Waits => break,
                Fate::CutOff => sent.cut_off += 1,
                Fate::Bad => sent.bad += 1,
            }
            sent.taken += 1;
        }
        let kick = queue.publish()?;
        self.tx.parked = Some(queue.park());
        if kick {
            self.ends[1].kick.ring()?;
        }
        Ok(sent)
    }

    /// Takes back what the back end has sent.
    pub(super) fn reap(&mut self) -> Result<(), Trouble> {
        let ram = self.memory.ram();
        let mut queue = self.tx.resume(ram, self.places.tx_ring)?;
        reap(&mut queue, &self.tx.buffer, &mut self.free)?;
        self.tx.parked = Some(queue.park());
        Ok(())
    }
}

impl Places {
    /// The first `len` bytes of a receive buffer.
    fn receive_buffer<'m>(
        &self,
        ram: RamSlice<'m>,
        buffer: u16,
        len: u32,
    ) -> Result<RamSlice<'m>, Trouble> {
        let at = self.rx_buffers + usize::from(buffer) * RX_BYTES;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        ram.get(at, len).ok_or(Trouble::Lost)
    }
}

impl Coming {
    const fn is_whole(&self) -> bool {
        self.count > 0 && self.parts.len() == self.count
    }

    /// Takes the next buffer, of which `part` was written.
    fn add(&mut self, buffer: u16, part: RamSlice<'_>, mergeable: bool) -> Result<(), Trouble> {
        if self.count == 0 {
            let pieces = [part];
            let Some(bytes) = Pieces::new(&pieces).read_array::<HEADER>() else {
                return Err(Trouble::Short { len: part.len() });
            };
            let [header @ .., low, high] = bytes;
            self.header = VnetHeader::from_bytes(&header);
            self.count = match mergeable {
                true => usize::from(u16::from_le_bytes([low, high])),
                false => 1,
            };
            if self.count == 0 || self.count > MOST_BUFFERS {
                return Err(Trouble::Buffers { count: self.count });
            }
        }
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        self.parts.push((buffer, len));
        Ok(())
    }
}

/// Hands a receive buffer to the back end.
fn give(
    queue: &mut Running<'_>,
    owners: &mut [u16],
    places: Places,
    buffer: u16,
) -> Result<(), Trouble> {
    let at = bus(places.rx_buffers + usize::from(buffer) * RX_BYTES);
    let token = queue.add(&[], &[(at, RX_LEN)])?;
    owners[token.index()] = buffer;
    Ok(())
}

fn reap(queue: &mut Running<'_>, owners: &[u16], free: &mut Vec<u16>) -> Result<(), Trouble> {
    while let Some(used) = queue.pop_used()? {
        free.push(owners[used.token.index()]);
    }
    Ok(())
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Taken,
    /// There is no room for any of it.
    Waits,
    /// There was room for some pieces of it only; the others are lost.
    CutOff,
    Bad,
}

/// From one side to the other, in the form that the other side takes.
fn relay(frame: &TxFrame<'_>, to: &Offloads, sink: &mut dyn RxSink) -> Fate {
    let mut head = [0; Target::HEAD];
    let len = frame.payload.read(&mut head);
    match deliver(frame, &head[..len], TagChange::Keep, to, sink) {
        Delivered::Frame(_) | Delivered::Frames { .. } => Fate::Taken,
        Delivered::NoBuffers { count: 0, .. } => Fate::Waits,
        Delivered::NoBuffers { .. } => Fate::CutOff,
        Delivered::TooLarge | Delivered::Malformed => Fate::Bad,
    }
}

/// Buffers that a frame may take at most, as far as the ring can ever have them.
fn pieces(frame: &TxFrame<'_>, to: &Offloads) -> usize {
    let whole = to.guest_csum
        && match frame.header.gso_type {
            VnetHeader::GSO_NONE => true,
            VnetHeader::GSO_TCPV4 => to.guest_tso4,
            VnetHeader::GSO_TCPV6 => to.guest_tso6,
            VnetHeader::GSO_UDP_L4 => to.guest_uso4 && to.guest_uso6,
            _ => false,
        };
    let size = usize::from(frame.header.gso_size);
    if whole || size == 0 {
        return 1;
    }
    let most = frame.payload.len().div_ceil(size);
    most.clamp(1, usize::from(TX))
}

/// The buffers for frames to the back end.
struct Room<'a, 'm> {
    queue: &'a mut Running<'m>,
    buffer: &'a mut Vec<u16>,
    free: &'a mut Vec<u16>,
    places: Places,
    ram: RamSlice<'m>,
    /// The one in the present offer.
    room: [RamSlice<'m>; 1],
    failed: Option<Trouble>,
}

impl Room<'_, '_> {
    fn at(&self, buffer: u16) -> usize {
        self.places.tx_buffers + usize::from(buffer) * TX_BYTES
    }

    fn send(&mut self, header: &VnetHeader, len: usize) -> Result<(), Trouble> {
        let buffer = self.free.pop().ok_or(Trouble::Lost)?;
        // The last two bytes are for receivers.
        let mut bytes = [0; HEADER];
        bytes[..VnetHeader::LEN].copy_from_slice(&header.to_bytes());
        self.room[0].write(0, &bytes);
        let len = u32::try_from(HEADER + len).unwrap_or(u32::MAX);
        let token = self.queue.add(&[(bus(self.at(buffer)), len)], &[])?;
        self.buffer[token.index()] = buffer;
        Ok(())
    }
}

impl RxSink for Room<'_, '_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        let buffer = *self.free.last()?;
        self.room = [self.ram.get(self.at(buffer), TX_BYTES)?];
        Some(Pieces::new(&self.room).skip(HEADER).take(len))
    }

    fn commit(&mut self, header: &VnetHeader, len: usize) {
        if len > TX_BYTES - HEADER {
            // Longer than any frame that is let through.
            return;
        }
        if let Err(trouble) = self.send(header, len) {
            self.failed = Some(trouble);
        }
    }
}
