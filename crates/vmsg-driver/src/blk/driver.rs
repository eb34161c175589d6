// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A whole block device over a bus of this workspace.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use virtio_msg::{DevNum, QueueIndex};
use vmsg_bus::Bus;
use vmsg_queue::QueueError;

use super::check::check;
use super::options::BlkOptions;
use super::request::{Completion, ID_LEN, Request};
use super::requests::{CELL, Pending, Requests};
use super::{CONFIG_LEN, Config, DEVICE_ID, SECTOR, WRITEBACK_OFFSET, feature_bit};
use crate::client::Client;
use crate::device::{Device, Wanted};
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::event::Event;
use crate::queue::{CallWait, Queue, Records, check_type, reset};
use crate::wait::Wait;

/// Bytes that [`BlkDriver::read`] and [`BlkDriver::write`] ask for at once.
const CHUNK: usize = 1 << 20;

/// The tag of requests that the driver waits for itself.
const OWN: u64 = u64::MAX;

/// What a driver has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkCounters {
    /// Requests submitted.
    pub submitted: u64,
    /// Requests that came back.
    pub completed: u64,
    /// Of those, the ones that did not go well.
    pub failed: u64,
    /// Of those that went well, the ones of which the device says that it has not filled all buffers.
    pub short: u64,
}

/// A queue with its requests.
#[derive(Debug)]
struct Lane<'p> {
    queue: Queue<'p>,
    requests: Requests<'p, Vec<Pending>>,
    _cells: DmaBuffer<'p>,
}

/// Drives a block device.
///
/// ```text
/// submit … submit → commit
/// loop: poll …
/// wait → poll …
/// ```
///
/// For the lowest latency call [`poll`](Self::poll) again and again; to sleep, [`wait`](Self::wait).
#[derive(Debug)]
pub struct BlkDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    client: Client<C, W, B>,
    device: Device,
    config: Config,
    lanes: Vec<Lane<'p>>,
    records: Option<Records>,
    pool: &'p DmaPool,
    wait: CallWait,
    counters: BlkCounters,
    unchecked: bool,
    /// Completions that came while this driver waited for one of its own.
    done: VecDeque<Completion>,
}

impl<'p, C, W, B> BlkDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    /// Brings the device up. `pool` is lent to the other side already.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the device is none, or of another type; [`Error::BadAnswer`] if its configuration is impossible; as
    /// [`Device::open`] and [`Queue::create`].
    pub fn new(
        mut client: Client<C, W, B>,
        number: DevNum,
        pool: &'p DmaPool,
        options: &BlkOptions,
    ) -> Result<Self, Error> {
        check_type(&mut client, number, DEVICE_ID)?;
        let wanted = Wanted {
            supported: options.features,
            ..Wanted::default()
        };
        let c = &mut client;
        let mut device = Device::open(c, number, &wanted)?;
        let config = read_config(c, &device)?;
        let capabilities = c.channel().capabilities();
        let lends = capabilities.passes_fds && capabilities.runtime_windows;
        let count = options.queues.clamp(1, config.queues);
        let records = (options.record && lends)
            .then(|| Records::new(count))
            .transpose()?;
        let mut lanes = Vec::new();
        for index in 0..count {
            let index = QueueIndex(index.into());
            let records = records.as_ref();
            let queue = &options.queue;
            let mut queue = Queue::create_with(c, &mut device, pool, index, queue, records)?;
            let size = queue.ring().config().size;
            let cells = pool.alloc(CELL * usize::from(size))?;
            let pending = vec![Pending::default(); usize::from(size)];
            let requests = Requests::new(size, (cells.ram(), cells.addr()), pending)
                .map_err(|source| queue.failed(source))?;
            lanes.push(Lane {
                queue,
                requests,
                _cells: cells,
            });
        }
        device.start(c).inspect_err(|_| reset(c, number))?;
        let mut driver = Self {
            client,
            device,
            config,
            lanes,
            records,
            pool,
            wait: CallWait::default(),
            counters: BlkCounters::default(),
            unchecked: options.unchecked,
            done: VecDeque::new(),
        };
        driver.quiet()?;
        Ok(driver)
    }

    /// Goes on with the same device, after its host has ended and another one is there: all that was in flight is done by it, and comes back
    /// from [`poll`](Self::poll) as if nothing had happened. `client` is a new connection, over which the pool was lent as before.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] if it is not the device that it was; [`Error::QueueRefused`] if it cannot go on in the middle of a queue; as
    /// [`Self::new`]. It can be tried again, with another connection.
    pub fn resume(&mut self, mut client: Client<C, W, B>) -> Result<(), Error> {
        let c = &mut client;
        let number = self.device.number();
        check_type(c, number, DEVICE_ID)?;
        let features = self.device.features();
        let wanted = Wanted {
            supported: features,
            required: features,
        };
        let mut device = Device::open(c, number, &wanted)?;
        for lane in &mut self.lanes {
            lane.queue
                .resume(c, &mut device, self.records.as_ref())
                .inspect_err(|_| reset(c, number))?;
        }
        let config = read_config(c, &device)?;
        device.start(c).inspect_err(|_| reset(c, number))?;
        self.client = client;
        self.device = device;
        self.config = config;
        self.wait = CallWait::default();
        for lane in &self.lanes {
            // Whether the last kick was heard nobody knows.
            lane.queue.kick_anyway(&mut self.client)?;
        }
        Ok(())
    }

    /// The device: its features, what it is.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The client, for requests of other kinds.
    pub fn client(&mut self) -> &mut Client<C, W, B> {
        &mut self.client
    }

    /// The memory that buffers of requests are to come from.
    pub fn pool(&self) -> &'p DmaPool {
        self.pool
    }

    /// What was counted.
    pub fn counters(&self) -> BlkCounters {
        self.counters
    }

    /// What the device has said about itself when it was last asked.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Asks it again: after an [`Event::Config`], for one.
    ///
    /// # Errors
    /// [`Error::BadAnswer`]; as [`Device::read_config`].
    pub fn refresh(&mut self) -> Result<&Config, Error> {
        self.config = read_config(&mut self.client, &self.device)?;
        Ok(&self.config)
    }

    /// Turns the write cache of the device on or off (CONFIG_WCE).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if that was not negotiated; as [`Device::write_config`].
    pub fn set_write_back(&mut self, on: bool) -> Result<(), Error> {
        if !self.device.features().bit(feature_bit::CONFIG_WCE) {
            return Err(Error::Unsupported {
                request: "turning the write cache on and off",
            });
        }
        let byte = [u8::from(on)];
        self.device
            .write_config(&mut self.client, WRITEBACK_OFFSET, &byte)?;
        self.refresh().map(|_| ())
    }

    /// Queues that are set up.
    pub fn queues(&self) -> usize {
        self.lanes.len()
    }

    /// A queue, to do with its ring what this driver does not. Chains added there must be taken back there as well, before the next
    /// [`poll`](Self::poll).
    ///
    /// # Panics
    /// If there is no such queue.
    pub fn queue(&mut self, queue: usize) -> &mut Queue<'p> {
        &mut self.lanes[queue].queue
    }

    /// Requests that were submitted and have not come back.
    pub fn in_flight(&self) -> usize {
        let lanes = self.lanes.iter();
        lanes.map(|lane| lane.requests.in_flight()).sum()
    }

    /// Adds a request to a queue. The device hears of it by [`commit`](Self::commit); it comes back from [`poll`](Self::poll) by its `tag`,
    /// which may be anything below `u64::MAX`. False: the queue is full.
    ///
    /// # Errors
    /// [`Error::BadRequest`] if no driver may make such a request of this device; [`Error::Queue`].
    ///
    /// # Panics
    /// If there is no such queue.
    pub fn submit(&mut self, queue: usize, tag: u64, request: Request<'_>) -> Result<bool, Error> {
        if !self.unchecked {
            check(&self.config, &request).map_err(Error::BadRequest)?;
        }
        let lane = &mut self.lanes[queue];
        match lane.requests.add(lane.queue.ring(), tag, request) {
            Ok(()) => {
                self.counters.submitted += 1;
                Ok(true)
            }
            Err(QueueError::Full) => Ok(false),
            Err(source) => Err(lane.queue.failed(source)),
        }
    }

    /// Shows the device everything that was submitted, with one kick for each queue where it wants one.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Channel`].
    pub fn commit(&mut self) -> Result<(), Error> {
        for lane in &mut self.lanes {
            lane.queue.publish(&mut self.client)?;
        }
        Ok(())
    }

    /// Hands what is done to `each`, and gives how many that were.
    ///
    /// # Errors
    /// [`Error::Queue`] if the device breaks a queue.
    pub fn poll(&mut self, mut each: impl FnMut(Completion)) -> Result<usize, Error> {
        let mut count = 0;
        while let Some(completion) = self.done.pop_front() {
            each(completion);
            count += 1;
        }
        let Self {
            lanes, counters, ..
        } = self;
        for lane in lanes {
            count += take(lane, counters, &mut each)?;
        }
        Ok(count)
    }

    /// Waits, asleep, until there is something to [`poll`](Self::poll), at most for `timeout`. False: there is nothing.
    ///
    /// # Errors
    /// [`Error::NeedsReset`] if the device says that it is broken; [`Error::Queue`]; [`Error::Channel`] if the other side is gone.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool, Error> {
        if !self.done.is_empty() {
            return Ok(true);
        }
        let mut queues: Vec<_> = self.lanes.iter_mut().map(|lane| &mut lane.queue).collect();
        let there = self.wait.wait(&mut self.client, &mut queues, timeout)?;
        self.quiet()?;
        Ok(there)
    }

    /// Waits until the device tells that its configuration has changed, reads it, and gives it; `None` if nothing was told within `timeout`.
    ///
    /// # Errors
    /// As [`refresh`](Self::refresh).
    pub fn wait_config(&mut self, timeout: Duration) -> Result<Option<&Config>, Error> {
        let number = self.device.number();
        let end = self.client.now() + timeout;
        let ours =
            |event: &Event| matches!(event, Event::Config { device, .. } if *device == number);
        while self.client.take_event(ours)?.is_none() {
            if self.client.now() >= end {
                return Ok(None);
            }
            self.client.wait_for_message(end);
        }
        self.refresh().map(Some)
    }

    /// Makes one request on the first queue and waits for it. What else is done meanwhile is kept for [`poll`](Self::poll).
    ///
    /// # Errors
    /// [`Error::Timeout`], after which the request is still under way; [`Error::NoRoom`] if the queue is full; as
    /// [`submit`](Self::submit) and [`wait`](Self::wait). Whether the device has done it is in the completion.
    pub fn run(&mut self, request: Request<'_>, timeout: Duration) -> Result<Completion, Error> {
        let end = Instant::now() + timeout;
        if !self.submit(0, OWN, request)? {
            return Err(Error::NoRoom {
                request: "one more request",
                need: 1,
                have: 0,
            });
        }
        self.commit()?;
        loop {
            let Self {
                lanes,
                counters,
                done,
                ..
            } = self;
            let mut own = None;
            for lane in lanes {
                take(lane, counters, |completion| match completion.tag {
                    OWN => own = Some(completion),
                    _ => done.push_back(completion),
                })?;
            }
            if let Some(own) = own {
                return Ok(own);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    request: "a block request",
                });
            }
            let mut queues: Vec<_> = self.lanes.iter_mut().map(|lane| &mut lane.queue).collect();
            self.wait.wait(&mut self.client, &mut queues, left)?;
            self.quiet()?;
        }
    }

    /// Fills `into`, a whole number of sectors, with what is at `sector`; `timeout` is for each MiB.
    ///
    /// # Errors
    /// [`Error::Disk`] if the device has failed; [`Error::NoMemory`]; as [`run`](Self::run).
    pub fn read(&mut self, sector: u64, into: &mut [u8], timeout: Duration) -> Result<(), Error> {
        let chunk = self.chunk();
        let buffer = self.pool.alloc(chunk.min(into.len()))?;
        let mut at = sector;
        for part in into.chunks_mut(chunk) {
            let to = [(buffer.addr(), length(part.len()))];
            let done = self.run(
                Request::Read {
                    sector: at,
                    to: &to,
                },
                timeout,
            )?;
            done.result.map_err(Error::Disk)?;
            buffer.ram().read(0, part);
            at += part.len() as u64 / SECTOR;
        }
        Ok(())
    }

    /// Puts `from`, a whole number of sectors, at `sector`; `timeout` is for each MiB.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&mut self, sector: u64, from: &[u8], timeout: Duration) -> Result<(), Error> {
        let chunk = self.chunk();
        let buffer = self.pool.alloc(chunk.min(from.len()))?;
        let mut at = sector;
        for part in from.chunks(chunk) {
            buffer.ram().write(0, part);
            let from = [(buffer.addr(), length(part.len()))];
            let request = Request::Write {
                sector: at,
                from: &from,
            };
            let done = self.run(request, timeout)?;
            done.result.map_err(Error::Disk)?;
            at += part.len() as u64 / SECTOR;
        }
        Ok(())
    }

    /// Waits until everything that was told as written is on the medium.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn flush(&mut self, timeout: Duration) -> Result<(), Error> {
        let done = self.run(Request::Flush, timeout)?;
        done.result.map_err(Error::Disk)
    }

    /// The name that the device gives itself, in ASCII; the rest is 0.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn id(&mut self, timeout: Duration) -> Result<[u8; ID_LEN], Error> {
        let done = self.run(Request::GetId, timeout)?;
        done.result.map_err(Error::Disk)?;
        done.id.ok_or(Error::BadAnswer { request: "GET_ID" })
    }

    /// Bytes of one request of [`read`](Self::read) and [`write`](Self::write).
    fn chunk(&self) -> usize {
        let most = usize::try_from(self.config.size_max).unwrap_or(CHUNK);
        let block = usize::try_from(self.config.block_size).unwrap_or(CHUNK);
        (most.min(CHUNK) / block).max(1) * block
    }

    /// Asks the device not to tell of used buffers.
    fn quiet(&mut self) -> Result<(), Error> {
        for lane in &mut self.lanes {
            let quiet = lane.queue.ring().disable_notifications();
            quiet.map_err(|source| lane.queue.failed(source))?;
        }
        Ok(())
    }
}

impl<C, W, B> Drop for BlkDriver<'_, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    fn drop(&mut self) {
        reset(&mut self.client, self.device.number());
    }
}

/// Takes what is done from one queue.
fn take(
    lane: &mut Lane<'_>,
    counters: &mut BlkCounters,
    mut each: impl FnMut(Completion),
) -> Result<usize, Error> {
    let mut count = 0;
    loop {
        let popped = lane.requests.pop(lane.queue.ring());
        let Some(completion) = popped.map_err(|source| lane.queue.failed(source))? else {
            return Ok(count);
        };
        counters.completed += 1;
        counters.failed += u64::from(completion.result.is_err());
        counters.short += u64::from(completion.result.is_ok() && !completion.is_whole());
        count += 1;
        each(completion);
    }
}

/// Reads the configuration, as much of it as there is.
fn read_config<C, W, B>(client: &mut Client<C, W, B>, device: &Device) -> Result<Config, Error>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    let mut bytes = [0; CONFIG_LEN];
    let there = usize::try_from(device.info().config_size).unwrap_or(CONFIG_LEN);
    let bytes = &mut bytes[..there.min(CONFIG_LEN)];
    device.read_config(client, 0, bytes)?;
    Config::parse(bytes, &device.features()).ok_or(Error::BadAnswer {
        request: "GET_CONFIG of a disk",
    })
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
