// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver for network devices (virtio 1.3 §5.1) that is made for tests and measurements: frames in and out, in batches.

use std::time::Duration;

use virtio_msg::{DevNum, FeatureSet, Generation, QueueIndex, feature};
use vmsg_bus::Bus;
use vmsg_mem::{BusAddr, Pieces, RamSlice};
use vmsg_queue::QueueError;

use crate::client::Client;
use crate::device::{Device, Wanted};
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::queue::{CallWait, Queue, QueueOptions, check_type, reset};
use crate::wait::Wait;

/// Virtio id of a network device.
pub const DEVICE_ID: u32 = 1;

/// Length in bytes of the header before each frame (virtio 1.3 §5.1.6): flags, gso_type, then hdr_len, gso_size, csum_start,
/// csum_offset and num_buffers in 16 bits each.
pub const HEADER_LEN: usize = 12;

/// Where num_buffers lies in the header.
const NUM_BUFFERS: usize = 10;

/// Feature bits of network devices (virtio 1.3 §5.1.3).
pub mod feature_bit {
    /// The device takes frames with partial checksums.
    pub const CSUM: u32 = 0;
    /// The driver takes frames with partial checksums.
    pub const GUEST_CSUM: u32 = 1;
    /// The device tells its MTU.
    pub const MTU: u32 = 3;
    /// The device tells its MAC address.
    pub const MAC: u32 = 5;
    /// A frame may lie in several receive buffers.
    pub const MRG_RXBUF: u32 = 15;
    /// The device tells whether the link is up.
    pub const STATUS: u32 = 16;
    /// There is a control queue.
    pub const CTRL_VQ: u32 = 17;
    /// Receive modes can be set over the control queue.
    pub const CTRL_RX: u32 = 18;
    /// There may be more than one pair of queues.
    pub const MQ: u32 = 22;
    /// The MAC address can be set over the control queue.
    pub const CTRL_MAC_ADDR: u32 = 23;
}

/// How a network device is to be driven.
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// Both queues.
    pub queue: QueueOptions,
    /// Bytes of each buffer, header included.
    pub buffer_len: usize,
    /// Bytes of each receive buffer, if it is to be another number; with MRG_RXBUF a frame may lie in several.
    pub rx_buffer_len: Option<usize>,
    /// Features to be used if they are offered. Beside those of [`NetOptions::default`] the caller deals with what they mean for
    /// headers and frames.
    pub features: FeatureSet,
}

impl Default for NetOptions {
    /// 256 buffers of 2 KiB each way; MAC, STATUS, MTU, MRG_RXBUF, the control queue, EVENT_IDX.
    fn default() -> Self {
        use feature_bit::{CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, MAC, MRG_RXBUF, MTU, STATUS};
        let features = [
            MAC,
            STATUS,
            MTU,
            MRG_RXBUF,
            CTRL_VQ,
            CTRL_RX,
            CTRL_MAC_ADDR,
            feature::RING_EVENT_IDX,
        ];
        Self {
            queue: QueueOptions::default(),
            buffer_len: 2048,
            rx_buffer_len: None,
            features: FeatureSet::from_bits(&features),
        }
    }
}

/// What a driver has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Frames sent.
    pub sent: u64,
    /// Frames received.
    pub received: u64,
    /// Frames from the device that could not be: without a whole header, or over more buffers than were used.
    pub bad: u64,
}

/// A received frame. The device side can still change it: copy first, look then.
#[derive(Debug)]
pub struct RxFrame<'a> {
    /// The header, copied.
    pub header: [u8; HEADER_LEN],
    /// The frame, from the Ethernet header on.
    pub payload: Pieces<'a>,
}

impl RxFrame<'_> {
    /// Copies the frame into `into` and gives how much of it fitted.
    pub fn copy_to<'b>(&self, into: &'b mut [u8]) -> &'b mut [u8] {
        let len = self.payload.read(into);
        &mut into[..len]
    }
}

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

/// Drives a network device with one pair of queues, and its control queue if it has one.
///
/// For the lowest latency call [`receive`](Self::receive) again and again; to sleep, [`wait`](Self::wait).
#[derive(Debug)]
pub struct NetDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    client: Client<C, W, B>,
    device: Device,
    rx: Queue<'p>,
    tx: Queue<'p>,
    control: Option<(Queue<'p>, DmaBuffer<'p>)>,
    rx_buffers: Buffers<'p>,
    tx_buffers: Buffers<'p>,
    mergeable: bool,
    rx_wait: CallWait,
    tx_wait: CallWait,
    control_wait: CallWait,
    /// The pieces of the frame at hand, and the buffers they are in.
    pieces: Vec<RamSlice<'p>>,
    in_hand: Vec<u16>,
    counters: NetCounters,
}

/// Bytes of the control queue's buffer: command, data, acknowledgement.
const CONTROL_LEN: usize = 4096;

impl<'p, C, W, B> NetDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    /// Brings the device up and gives it all receive buffers. `pool` is lent to the other side already.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the device is none, or of another type; as [`Device::open`] and [`Queue::create`].
    pub fn new(
        mut client: Client<C, W, B>,
        number: DevNum,
        pool: &'p DmaPool,
        options: &NetOptions,
    ) -> Result<Self, Error> {
        check_type(&mut client, number, DEVICE_ID)?;
        let mut device = Device::open(
            &mut client,
            number,
            &Wanted {
                supported: options.features,
                ..Wanted::default()
            },
        )?;
        let features = device.features();
        let c = &mut client;
        let mut rx = Queue::create(c, &mut device, pool, QueueIndex(0), &options.queue)?;
        let mut tx = Queue::create(c, &mut device, pool, QueueIndex(1), &options.queue)?;
        let mut control = None;
        if features.bit(feature_bit::CTRL_VQ) {
            let index = control_index(c, &device)?;
            let queue = QueueOptions {
                size: 16,
                ..options.queue
            };
            control = Some((
                Queue::create(c, &mut device, pool, index, &queue)?,
                pool.alloc(CONTROL_LEN)?,
            ));
        }
        let least = HEADER_LEN + 64;
        let len = options.buffer_len.max(least);
        let rx_len = options.rx_buffer_len.map_or(len, |len| len.max(least));
        let rx_buffers = Buffers::new(pool, rx.ring().config().size, rx_len)?;
        let tx_buffers = Buffers::new(pool, tx.ring().config().size, len)?;
        device.start(c).inspect_err(|_| reset(c, number))?;
        let mut driver = Self {
            client,
            device,
            rx,
            tx,
            control,
            rx_buffers,
            tx_buffers,
            mergeable: features.bit(feature_bit::MRG_RXBUF),
            rx_wait: CallWait::default(),
            tx_wait: CallWait::default(),
            control_wait: CallWait::default(),
            pieces: Vec::new(),
            in_hand: Vec::new(),
            counters: NetCounters::default(),
        };
        driver.refill()?;
        // Until somebody sleeps.
        for queue in [&mut driver.rx, &mut driver.tx] {
            let quiet = queue.ring().disable_notifications();
            quiet.map_err(|source| queue.failed(source))?;
        }
        Ok(driver)
    }

    /// The device: its features, what it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The client, for requests of other kinds.
    pub fn client(&mut self) -> &mut Client<C, W, B> {
        &mut self.client
    }

    /// What was counted.
    pub fn counters(&self) -> NetCounters {
        self.counters
    }

    /// The MAC address that the device tells, if it does.
    ///
    /// # Errors
    /// As [`Device::read_config`].
    pub fn mac(&mut self) -> Result<Option<[u8; 6]>, Error> {
        if !self.device.features().bit(feature_bit::MAC) {
            return Ok(None);
        }
        let mut mac = [0; 6];
        self.read_config(0, &mut mac)?;
        Ok(Some(mac))
    }

    /// Reads from the configuration space.
    ///
    /// # Errors
    /// As [`Device::read_config`].
    pub fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<Generation, Error> {
        self.device.read_config(&mut self.client, offset, into)
    }

    /// Sends as many of `frames` as there is room for and gives how many: one copy each, one kick for all of them.
    ///
    /// # Errors
    /// [`Error::NoRoom`] for a frame longer than a buffer, after those before it; [`Error::Queue`], [`Error::Channel`].
    pub fn transmit<'f>(
        &mut self,
        frames: impl IntoIterator<Item = &'f [u8]>,
    ) -> Result<usize, Error> {
        self.transmit_with(frames.into_iter().map(|frame| ([0; HEADER_LEN], frame)))
    }

    /// As [`transmit`](Self::transmit), with a header for each frame.
    ///
    /// # Errors
    /// As [`transmit`](Self::transmit).
    pub fn transmit_with<'f>(
        &mut self,
        frames: impl IntoIterator<Item = ([u8; HEADER_LEN], &'f [u8])>,
    ) -> Result<usize, Error> {
        self.reclaim()?;
        let mut count = 0;
        let mut result = Ok(());
        for (header, frame) in frames {
            let (need, have) = (HEADER_LEN + frame.len(), self.tx_buffers.len);
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
            ram.write(HEADER_LEN, frame);
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
            self.tx.publish(&mut self.client)?;
            self.counters.sent += count as u64;
        }
        result.map(|()| count)
    }

    /// Frames that were sent and that the device has not yet taken.
    ///
    /// # Errors
    /// [`Error::Queue`].
    pub fn in_flight(&mut self) -> Result<usize, Error> {
        self.reclaim()?;
        Ok(usize::from(self.tx.ring().outstanding()))
    }

    /// Hands up to `max` received frames to `each` and gives how many; their buffers go back to the device afterwards, all at once.
    ///
    /// # Errors
    /// [`Error::Queue`] if the device breaks the queue; [`Error::Channel`].
    pub fn receive(
        &mut self,
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
            let mut header = [0; HEADER_LEN];
            self.pieces.clear();
            self.in_hand.clear();
            self.in_hand.push(buffer);
            let whole = first.split_at(written).0.read(0, &mut header) == HEADER_LEN;
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
                    header,
                    payload: Pieces::new(&self.pieces).skip(HEADER_LEN),
                });
                count += 1;
            } else {
                self.counters.bad += 1;
            }
            self.rx_buffers.free.append(&mut self.in_hand);
        }
        if taken > 0 {
            self.counters.received += count as u64;
            self.refill()?;
        }
        Ok(count)
    }

    /// Waits, asleep, until there is something to [`receive`](Self::receive), at most for `timeout`. False: there is nothing.
    ///
    /// # Errors
    /// [`Error::Queue`]; [`Error::Channel`] if the other side is gone.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        let there = self
            .rx_wait
            .wait(&mut self.client, &mut [&mut self.rx], timeout)?;
        self.rx
            .ring()
            .disable_notifications()
            .map_err(|source| self.rx.failed(source))?;
        Ok(there)
    }

    /// Waits, asleep, until the device has taken at least one of the frames in flight, at most for `timeout`.
    ///
    /// # Errors
    /// [`Error::Queue`]; [`Error::Channel`] if the other side is gone.
    pub fn wait_sent(&mut self, timeout: Duration) -> Result<bool, Error> {
        let there = self
            .tx_wait
            .wait(&mut self.client, &mut [&mut self.tx], timeout)?;
        self.tx
            .ring()
            .disable_notifications()
            .map_err(|source| self.tx.failed(source))?;
        Ok(there)
    }

    /// Makes a request over the control queue (virtio 1.3 §5.1.6.5) and gives the acknowledgement: 0 is "done".
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a control queue; [`Error::NoRoom`], [`Error::Timeout`], [`Error::Queue`], [`Error::Channel`].
    pub fn control(
        &mut self,
        class: u8,
        command: u8,
        data: &[u8],
        timeout: Duration,
    ) -> Result<u8, Error> {
        let Some((queue, memory)) = &mut self.control else {
            return Err(Error::Unsupported {
                request: "the control queue",
            });
        };
        let (need, have) = (data.len() + 3, memory.len());
        if need > have {
            return Err(Error::NoRoom {
                request: "the control command",
                need,
                have,
            });
        }
        let ram = memory.ram();
        ram.write(0, &[class, command]);
        ram.write(2, data);
        let ack = need - 1;
        // Not what any device answers.
        ram.write(ack, &[0xff]);
        let readable = [(memory.addr(), length(ack))];
        let writable = [(BusAddr(memory.addr().0 + ack as u64), 1)];
        queue
            .ring()
            .add_direct(&readable, &writable)
            .map_err(|source| queue.failed(source))?;
        queue.publish(&mut self.client)?;
        self.control_wait
            .wait(&mut self.client, &mut [&mut *queue], timeout)?;
        match queue
            .ring()
            .pop_used()
            .map_err(|source| queue.failed(source))?
        {
            Some(_) => {
                let mut answer = [0];
                ram.read(ack, &mut answer);
                Ok(answer[0])
            }
            None => Err(Error::Timeout {
                request: "the control command",
            }),
        }
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
    fn refill(&mut self) -> Result<(), Error> {
        while let Some(&buffer) = self.rx_buffers.free.last() {
            let writable = [(self.rx_buffers.addr(buffer), length(self.rx_buffers.len))];
            match self.rx.ring().add_direct(&[], &writable) {
                Ok(token) => self.rx_buffers.of_token[token.index()] = buffer,
                Err(QueueError::Full) => break,
                Err(source) => return Err(self.rx.failed(source)),
            }
            self.rx_buffers.free.pop();
        }
        self.rx.publish(&mut self.client)
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

impl<C, W, B> Drop for NetDriver<'_, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    fn drop(&mut self) {
        reset(&mut self.client, self.device.number());
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The control queue comes after all pairs of queues that the device has (virtio 1.3 §5.1.2), of which there is one without MQ.
fn control_index<C, W, B>(
    client: &mut Client<C, W, B>,
    device: &Device,
) -> Result<QueueIndex, Error>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    let mut pairs = 1;
    if device.features().bit(feature_bit::MQ) {
        let mut bytes = [0; 2];
        device.read_config(client, 8, &mut bytes)?;
        pairs = u16::from_le_bytes(bytes);
    }
    Ok(QueueIndex(u32::from(pairs) * 2))
}
