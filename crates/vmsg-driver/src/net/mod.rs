// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver for network devices (virtio 1.3 §5.1) that is made for tests and measurements: frames in and out, in batches.

mod control;
mod pair;

use std::time::Duration;

use virtio_msg::{DevNum, FeatureSet, Generation, feature};
use vmsg_bus::Bus;
use vmsg_mem::Pieces;

use self::control::{Control, pairs_of};
use self::pair::{Pair, quiet};
use crate::client::Client;
use crate::device::{Device, Wanted};
use crate::dma::DmaPool;
use crate::error::Error;
use crate::queue::{CallWait, Queue, QueueOptions, check_type, reset};
use crate::wait::Wait;

/// Virtio id of a network device.
pub const DEVICE_ID: u32 = 1;

/// Length in bytes of the header before each frame (virtio 1.3 §5.1.6): flags, gso_type, then hdr_len, gso_size, csum_start,
/// csum_offset and num_buffers in 16 bits each.
pub const HEADER_LEN: usize = 12;

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
    /// VLANs can be filtered over the control queue.
    pub const CTRL_VLAN: u32 = 19;
    /// The driver announces itself to the network when it is asked to.
    pub const GUEST_ANNOUNCE: u32 = 21;
    /// There may be more than one pair of queues.
    pub const MQ: u32 = 22;
    /// The MAC address can be set over the control queue.
    pub const CTRL_MAC_ADDR: u32 = 23;
    /// The device tells the hash of each frame, in a longer header.
    pub const HASH_REPORT: u32 = 57;
    /// The driver says which hash goes to which queue.
    pub const RSS: u32 = 60;
}

/// How a network device is to be driven.
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// All queues but the control queue.
    pub queue: QueueOptions,
    /// Pairs of queues to be set up, as far as the device has them, which needs MQ or RSS; with MQ and a control queue they are
    /// enabled, too.
    pub pairs: u16,
    /// Bytes of each buffer, header included.
    pub buffer_len: usize,
    /// Bytes of each receive buffer, if it is to be another number; with MRG_RXBUF a frame may lie in several.
    pub rx_buffer_len: Option<usize>,
    /// Features to be used if they are offered. Beside those of [`NetOptions::default`] the caller deals with what they mean for
    /// headers and frames.
    pub features: FeatureSet,
}

impl Default for NetOptions {
    /// One pair of queues, 256 buffers of 2 KiB each way; MAC, STATUS, MTU, MRG_RXBUF, the control queue, EVENT_IDX.
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
            pairs: 1,
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
    /// With HASH_REPORT the hash, and over what it was calculated (0: there is none).
    pub hash: Option<(u32, u16)>,
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

/// How long the device may take to enable queue pairs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Class and command that enable queue pairs (virtio 1.3 §5.1.6.5.6).
const PAIRS_SET: (u8, u8) = (4, 0);

/// Drives a network device with its pairs of queues, and its control queue if it has one.
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
    /// At least one.
    pairs: Vec<Pair<'p>>,
    control: Option<Control<'p>>,
    wait: CallWait,
    counters: NetCounters,
}

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
        let all = pairs_of(c, &device)?;
        let mut pairs = Vec::new();
        for index in 0..options.pairs.clamp(1, all) {
            pairs.push(Pair::create(c, &mut device, pool, index, options)?);
        }
        let control = features
            .bit(feature_bit::CTRL_VQ)
            .then(|| Control::create(c, &mut device, pool, all, &options.queue))
            .transpose()?;
        device.start(c).inspect_err(|_| reset(c, number))?;
        let mut driver = Self {
            client,
            device,
            pairs,
            control,
            wait: CallWait::default(),
            counters: NetCounters::default(),
        };
        for pair in &mut driver.pairs {
            pair.start(&mut driver.client)?;
        }
        let count = driver.pairs.len();
        if count > 1 && features.bit(feature_bit::MQ) && driver.control.is_some() {
            let count = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
            let (class, command) = PAIRS_SET;
            if driver.control(class, command, &count, PATIENCE)? != 0 {
                return Err(Error::Unsupported {
                    request: "as many queue pairs as it says it has",
                });
            }
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
        self.transmit_on(0, frames)
    }

    /// As [`transmit_with`](Self::transmit_with), on the transmit queue of pair `pair`.
    ///
    /// # Errors
    /// As [`transmit`](Self::transmit).
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn transmit_on<'f>(
        &mut self,
        pair: usize,
        frames: impl IntoIterator<Item = ([u8; HEADER_LEN], &'f [u8])>,
    ) -> Result<usize, Error> {
        self.pairs[pair].transmit(&mut self.client, &mut self.counters, frames)
    }

    /// Pairs of queues that are set up.
    pub fn pairs(&self) -> usize {
        self.pairs.len()
    }

    /// Frames that were sent and that the device has not yet taken.
    ///
    /// # Errors
    /// [`Error::Queue`].
    pub fn in_flight(&mut self) -> Result<usize, Error> {
        self.pairs.iter_mut().map(Pair::in_flight).sum()
    }

    /// Hands up to `max` received frames to `each` and gives how many; their buffers go back to the device afterwards, all at once.
    ///
    /// # Errors
    /// [`Error::Queue`] if the device breaks the queue; [`Error::Channel`].
    pub fn receive(&mut self, max: usize, each: impl FnMut(RxFrame<'_>)) -> Result<usize, Error> {
        self.receive_on(0, max, each)
    }

    /// As [`receive`](Self::receive), from the receive queue of pair `pair`.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    ///
    /// # Panics
    /// If there is no such pair.
    pub fn receive_on(
        &mut self,
        pair: usize,
        max: usize,
        each: impl FnMut(RxFrame<'_>),
    ) -> Result<usize, Error> {
        self.pairs[pair].receive(&mut self.client, &mut self.counters, max, each)
    }

    /// Waits, asleep, until there is something to [`receive`](Self::receive) in any pair, at most for `timeout`. False: there is nothing.
    ///
    /// # Errors
    /// [`Error::Queue`]; [`Error::Channel`] if the other side is gone.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        let mut queues: Vec<&mut Queue<'p>> =
            self.pairs.iter_mut().map(|pair| &mut pair.rx).collect();
        let there = self.wait.wait(&mut self.client, &mut queues, timeout)?;
        for queue in queues {
            quiet(queue)?;
        }
        Ok(there)
    }

    /// Waits, asleep, until the device has taken at least one of the frames in flight in the first pair, at most for `timeout`.
    ///
    /// # Errors
    /// [`Error::Queue`]; [`Error::Channel`] if the other side is gone.
    pub fn wait_sent(&mut self, timeout: Duration) -> Result<bool, Error> {
        self.pairs[0].wait_sent(&mut self.client, timeout)
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
        let Some(control) = &mut self.control else {
            return Err(Error::Unsupported {
                request: "the control queue",
            });
        };
        control.request(&mut self.client, (class, command), data, timeout)
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
