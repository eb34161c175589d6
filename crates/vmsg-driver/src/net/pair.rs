// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pair of queues with the buffers of both.

use std::time::Duration;

use virtio_msg::QueueIndex;
use vmsg_bus::Bus;
use vmsg_mem::{BusAddr, Pieces, RamSlice};
use vmsg_queue::QueueError;

use super::{HEADER_LEN, NetCounters, NetOptions, RxFrame};
use crate::client::Client;
use crate::device::Device;
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::queue::{CallWait, Queue};
use crate::wait::Wait;

/// Where num_buffers and the hash lie in the header.
const NUM_BUFFERS: usize = 10;
const HASH: usize = 12;

/// Bytes of a header with the hash (virtio 1.3 §5.1.6).
pub(super) const HASH_HEADER_LEN: usize = 20;

/// Buffers of one queue, all of the same length, in one run of memory.
#[derive(Debug)]
struct Buffers<'p> {
    memory: DmaBuffer<'p>,
    /// Bytes of a buffer.
    len: usize,
    /// Which buffer a chain has, by the index of its token.
    of_token: Vec<u16>,
    free: Vec<u16>,
}

impl<'p> Buffers<'p> {
    fn new(pool: &'p DmaPool, count: u16, len: usize) -> Result<Self, Error> {
        let memory = pool.alloc(usize::from(count).saturating_mul(len))?;
        Ok(Self {
            memory,
            len,
            of_token: vec![0; usize::from(count)],
            free: (0..count).rev().collect(),
        })
    }

    fn addr(&self, buffer: u16) -> BusAddr {
        BusAddr(self.memory.addr().0 + (usize::from(buffer) * self.len) as u64)
    }

    fn ram(&self, buffer: u16) -> RamSlice<'p> {
        self.memory
            .ram()
            .get(usize::from(buffer) * self.len, self.len)
            .expect("a buffer of this memory")
    }
}

/// A pair of queues: its receive queue and its transmit queue.
#[derive(Debug)]
pub(super) struct Pair<'p> {
    pub(super) rx: Queue<'p>,
    tx: Queue<'p>,
    rx_buffers: Buffers<'p>,
    tx_buffers: Buffers<'p>,
    /// Bytes before each frame.
    header_len: usize,
    mergeable: bool,
    tx_wait: CallWait,
    /// The pieces of the frame at hand, and the buffers they are in.
    pieces: Vec<RamSlice<'p>>,
    in_hand: Vec<u16>,
}

impl<'p> Pair<'p> {
    /// Sets up both queues of pair `index` of a device that is not started yet.
    pub(super) fn create<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        client: &mut Client<C, W, B>,
        device: &mut Device,
        pool: &'p DmaPool,
        index: u16,
        options: &NetOptions,
    ) -> Result<Self, Error> {
        let first = u32::from(index) * 2;
        let mut rx = Queue::create(client, device, pool, QueueIndex(first), &options.queue)?;
        let mut tx = Queue::create(client, device, pool, QueueIndex(first + 1), &options.queue)?;
        let (rx_size, tx_size) = (rx.ring().config().size, tx.ring().config().size);
        let features = device.features();
        let header_len = if features.bit(super::feature_bit::HASH_REPORT) {
            HASH_HEADER_LEN
        } else {
            HEADER_LEN
        };
        let least = header_len + 64;
        let len = options.buffer_len.max(least);
        let rx_len = options.rx_buffer_len.map_or(len, |len| len.max(least));
        Ok(Self {
            rx_buffers: Buffers::new(pool, rx_size, rx_len)?,
            tx_buffers: Buffers::new(pool, tx_size, len)?,
            rx,
            tx,
            header_len,
            mergeable: features.bit(super::feature_bit::MRG_RXBUF),
            tx_wait: CallWait::default(),
            pieces: Vec::new(),
            in_hand: Vec::new(),
        })
    }

    /// Gives the device all receive buffers; it tells of none until somebody sleeps.
    pub(super) fn start<C: Bus, W, B>(&mut self, client: &mut Client<C, W, B>) -> Result<(), Error>
    where
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.refill(client)?;
        for queue in [&mut self.rx, &mut self.tx] {
            quiet(queue)?;
        }
        Ok(())
    }

    /// Sends as many frames as there is room for.
    pub(super) fn transmit<'f, C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        &mut self,
        client: &mut Client<C, W, B>,
        counters: &mut NetCounters,
        frames: impl IntoIterator<Item = ([u8; HEADER_LEN], &'f [u8])>,
    ) -> Result<usize, Error> {
        self.reclaim()?;
        let mut count = 0;
        let mut result = Ok(());
        for (header, frame) in frames {
            let (need, have) = (self.header_len + frame.len(), self.tx_buffers.len);
            if need > have {
                result = Err(Error::NoRoom {
                    request: "the frame",
                    need,
                    have,
                });
                break;
            }
            let Some(&buffer) = self.tx_buffers.free.last() else {
                break;
            };
            let ram = self.tx_buffers.ram(buffer);
            ram.write(0, &header);
            // What follows in a longer header is for the other direction.
            ram.write(
                HEADER_LEN,
                &[0; HASH_HEADER_LEN][..self.header_len - HEADER_LEN],
            );
            ram.write(self.header_len, frame);
            let readable = [(self.tx_buffers.addr(buffer), length(need))];
            match self.tx.ring().add_direct(&readable, &[]) {
                Ok(token) => self.tx_buffers.of_token[token.index()] = buffer,
                Err(QueueError::Full) => break,
                Err(source) => return Err(self.tx.failed(source)),
            }
            self.tx_buffers.free.pop();
            count += 1;
        }
        if count > 0 {
            self.tx.publish(client)?;
            counters.sent += count as u64;
        }
        result.map(|()| count)
    }

    /// Frames that the device has not yet taken.
    pub(super) fn in_flight(&mut self) -> Result<usize, Error> {
        self.reclaim()?;
        Ok(usize::from(self.tx.ring().outstanding()))
    }

    /// Hands up to `max` received frames to `each`.
    pub(super) fn receive<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        &mut self,
        client: &mut Client<C, W, B>,
        counters: &mut NetCounters,
        max: usize,
        mut each: impl FnMut(RxFrame<'_>),
    ) -> Result<usize, Error> {
        let mut count = 0;
        let mut taken = 0;
        while taken < max {
            let Some((buffer, written)) = self.pop_rx()? else {
                break;
            };
            taken += 1;
            let first = self.rx_buffers.ram(buffer);
            let mut header = [0; HASH_HEADER_LEN];
            let header = &mut header[..self.header_len];
            self.pieces.clear();
            self.in_hand.clear();
            self.in_hand.push(buffer);
            let whole = first.split_at(written).0.read(0, header) == self.header_len;
            self.pieces.push(first.split_at(written).0);
            let mut complete = whole;
            if whole && self.mergeable {
                let buffers = u16::from_le_bytes([header[NUM_BUFFERS], header[NUM_BUFFERS + 1]]);
                complete = buffers > 0;
                for _ in 1..buffers {
                    // The device shows all buffers of a frame at once (virtio 1.3 §5.1.6.4).
                    let Some((buffer, written)) = self.pop_rx()? else {
                        complete = false;
                        break;
                    };
                    self.in_hand.push(buffer);
                    self.pieces
                        .push(self.rx_buffers.ram(buffer).split_at(written).0);
                }
            }
            if complete {
                each(RxFrame {
                    header: *header.first_chunk().expect("at least as long"),
                    hash: hash(header),
                    payload: Pieces::new(&self.pieces).skip(self.header_len),
                });
                count += 1;
            } else {
                counters.bad += 1;
            }
            self.rx_buffers.free.append(&mut self.in_hand);
        }
        if taken > 0 {
            counters.received += count as u64;
            self.refill(client)?;
        }
        Ok(count)
    }

    /// Waits until a frame was taken.
    pub(super) fn wait_sent<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        &mut self,
        client: &mut Client<C, W, B>,
        timeout: Duration,
    ) -> Result<bool, Error> {
        let there = self.tx_wait.wait(client, &mut [&mut self.tx], timeout)?;
        quiet(&mut self.tx)?;
        Ok(there)
    }

    /// Takes a used receive buffer: which, and how many bytes of it were written.
    fn pop_rx(&mut self) -> Result<Option<(u16, usize)>, Error> {
        let used = self
            .rx
            .ring()
            .pop_used()
            .map_err(|source| self.rx.failed(source))?;
        Ok(used.map(|used| {
            let written = usize::try_from(used.written).unwrap_or(usize::MAX);
            (self.rx_buffers.of_token[used.token.index()], written)
        }))
    }

    /// Gives all free receive buffers to the device.
    fn refill<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        &mut self,
        client: &mut Client<C, W, B>,
    ) -> Result<(), Error> {
        while let Some(&buffer) = self.rx_buffers.free.last() {
            let writable = [(self.rx_buffers.addr(buffer), length(self.rx_buffers.len))];
            match self.rx.ring().add_direct(&[], &writable) {
                Ok(token) => self.rx_buffers.of_token[token.index()] = buffer,
                Err(QueueError::Full) => break,
                Err(source) => return Err(self.rx.failed(source)),
            }
            self.rx_buffers.free.pop();
        }
        self.rx.publish(client)
    }

    /// Takes back the buffers of frames that the device has taken.
    fn reclaim(&mut self) -> Result<(), Error> {
        while let Some(used) = self
            .tx
            .ring()
            .pop_used()
            .map_err(|source| self.tx.failed(source))?
        {
            let buffer = self.tx_buffers.of_token[used.token.index()];
            self.tx_buffers.free.push(buffer);
        }
        Ok(())
    }
}

/// Asks the device not to tell of used buffers.
pub(super) fn quiet(queue: &mut Queue<'_>) -> Result<(), Error> {
    let quiet = queue.ring().disable_notifications();
    quiet.map_err(|source| queue.failed(source))
}

/// Value and type of the hash, if the header has one.
fn hash(header: &[u8]) -> Option<(u32, u16)> {
    let (value, rest) = header.get(HASH..)?.split_first_chunk()?;
    let report = rest.first_chunk()?;
    Some((u32::from_le_bytes(*value), u16::from_le_bytes(*report)))
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
