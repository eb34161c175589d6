// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue of a device over a bus of this workspace: its ring, its memory, its doorbells.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use virtio_msg::{DevNum, DeviceStatus, QueueIndex, QueueSize, VqueueConfig};
use vmsg_bus::Bus;
use vmsg_bus::control::{QueueInflight, Resume};
use vmsg_mem::{Doorbell, Mapping};
use vmsg_queue::{DriverQueue, DriverSlot, Inflight, Layout, QueueError};

use crate::client::Client;
use crate::device::Device;
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::event::Event;
use crate::wait::Wait;

/// How a queue is to be made.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Number of entries; the device may have fewer. Rounded down to a power of two.
    pub size: u16,
    /// Entries of each indirect table; 0 for none.
    pub indirect: u16,
    /// Whether kick and call go over eventfds of the queue, where the bus can do that.
    pub doorbells: bool,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self {
            size: 256,
            indirect: 0,
            doorbells: true,
        }
    }
}

/// A queue in the memory of a [`DmaPool`].
#[derive(Debug)]
pub struct Queue<'p> {
    ring: DriverQueue<'p, Vec<DriverSlot>>,
    device: DevNum,
    index: QueueIndex,
    kick: Option<Doorbell>,
    call: Option<Doorbell>,
    /// Given back after the ring is gone.
    _memory: DmaBuffer<'p>,
}

impl<'p> Queue<'p> {
    /// Lays a queue out in `pool` and sets it up, with its doorbells.
    ///
    /// # Errors
    /// As [`Device::create_queue`] and [`Client::queue_notify`]; [`Error::NoMemory`].
    pub fn create<C, W, B>(
        client: &mut Client<C, W, B>,
        device: &mut Device,
        pool: &'p DmaPool,
        index: QueueIndex,
        options: &QueueOptions,
    ) -> Result<Self, Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        Self::create_with(client, device, pool, index, options, None)
    }

    /// As [`create`](Self::create), with memory for the record of what is in flight.
    ///
    /// # Errors
    /// As there, and [`Client::queue_inflight`].
    pub fn create_with<C, W, B>(
        client: &mut Client<C, W, B>,
        device: &mut Device,
        pool: &'p DmaPool,
        index: QueueIndex,
        options: &QueueOptions,
        records: Option<&Records>,
    ) -> Result<Self, Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let max = device.queue(client, index)?.max_size;
        let size = u16::try_from(max.0)
            .unwrap_or(u16::MAX)
            .min(options.size)
            .min(1 << 15);
        // The largest power of two that is not above; 0 for none.
        let size = size.checked_ilog2().map_or(0, |bits| 1 << bits);
        let failed = |source| Error::Queue {
            queue: index,
            source,
        };
        let layout = Layout::new(size, options.indirect).map_err(failed)?;
        let memory = pool.alloc(layout.total_len())?;
        let slots = vec![DriverSlot::default(); usize::from(size)];
        if let Some(records) = records {
            records.lend(client, device.number(), index, size, false)?;
        }
        let ring =
            device.create_queue(client, index, layout, (memory.ram(), memory.addr()), slots)?;
        let (mut kick, mut call) = (None, None);
        if options.doorbells && client.channel().capabilities().out_of_band_notify {
            let (k, c) = (Doorbell::new()?, Doorbell::new()?);
            client.queue_notify(device.number(), index, Some(k.as_fd()), Some(c.as_fd()))?;
            (kick, call) = (Some(k), Some(c));
        }
        Ok(Self {
            ring,
            device: device.number(),
            index,
            kick,
            call,
            _memory: memory,
        })
    }

    /// Sets the queue up in the same memory, for a device that was not there when it was used before: it goes on at the used index that
    /// stands in the ring, and with what the record says is in flight.
    ///
    /// # Errors
    /// As [`create`](Self::create), and [`Client::queue_resume`].
    pub fn resume<C, W, B>(
        &mut self,
        client: &mut Client<C, W, B>,
        device: &mut Device,
        records: Option<&Records>,
    ) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let (number, index) = (device.number(), self.index);
        let config = self.ring.config();
        // The state machine of the device wants to have seen it.
        device.queue(client, index)?;
        if let (Some(kick), Some(call)) = (&self.kick, &self.call) {
            client.queue_notify(number, index, Some(kick.as_fd()), Some(call.as_fd()))?;
        }
        client.queue_resume(number, index, Resume::UsedInRing)?;
        if let Some(records) = records {
            records.lend(client, number, index, config.size, true)?;
        }
        device.set_queue(
            client,
            VqueueConfig {
                index,
                size: QueueSize(config.size.into()),
                descriptor: config.desc.0,
                driver: config.driver.0,
                device: config.device.0,
            },
        )
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut DriverQueue<'p, Vec<DriverSlot>> {
        &mut self.ring
    }

    /// Its index in the device.
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// What the device rings when it has used buffers; `None`: it sends events.
    pub fn call(&self) -> Option<&Doorbell> {
        self.call.as_ref()
    }

    /// What the device waits on for buffers; `None`: it waits for events.
    pub fn kick(&self) -> Option<&Doorbell> {
        self.kick.as_ref()
    }

    /// Shows the device what was added, and kicks it if it wants that.
    ///
    /// # Errors
    /// [`Error::Queue`] if the queue is broken; [`Error::Channel`], [`Error::Timeout`]; [`Error::Io`] if the kick is of no use any more.
    pub fn publish<C, W, B>(&mut self, client: &mut Client<C, W, B>) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let wanted = self.ring.publish().map_err(|source| self.failed(source))?;
        if !wanted {
            return Ok(());
        }
        self.kick_anyway(client)
    }

    /// Kicks the device, whether it wants that or not.
    ///
    /// # Errors
    /// [`Error::Channel`], [`Error::Timeout`]; [`Error::Io`] if the kick is of no use any more.
    pub fn kick_anyway<C, W, B>(&self, client: &mut Client<C, W, B>) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        match &self.kick {
            Some(kick) => kick
                .ring()
                .map_err(|error| Error::Io(std::io::Error::other(error))),
            None => client.notify_available(self.device, self.index, 0),
        }
    }

    pub(crate) fn failed(&self, source: QueueError) -> Error {
        Error::Queue {
            queue: self.index,
            source,
        }
    }
}

/// Memory in which a device keeps what is in flight in its queues, for the one that comes after it (`vmsg_queue::Inflight`).
#[derive(Debug)]
pub struct Records {
    fd: OwnedFd,
    queues: u16,
}

impl Records {
    /// Bytes from the record of one queue to that of the next: room for the largest queue. What is not used takes no memory.
    const STRIDE: u64 = (Inflight::bytes_for(1 << 15) as u64).next_multiple_of(4096);

    /// For `queues` queues.
    ///
    /// # Errors
    /// [`Error::Mem`] if there is no memory.
    pub fn new(queues: u16) -> Result<Self, Error> {
        let len = Self::STRIDE * u64::from(queues.max(1));
        let (_, fd) = Mapping::memfd("vmsg-inflight", len, true)?;
        Ok(Self { fd, queues })
    }

    /// Lends the record of one queue; `resume`: the queue goes on with what is in it.
    fn lend<C, W, B>(
        &self,
        client: &mut Client<C, W, B>,
        dev: DevNum,
        queue: QueueIndex,
        size: u16,
        resume: bool,
    ) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        if queue.0 >= u32::from(self.queues) {
            return Err(Error::NoQueue(queue));
        }
        let record = QueueInflight {
            dev,
            queue,
            resume,
            offset: Self::STRIDE * u64::from(queue.0),
            len: Inflight::bytes_for(size) as u64,
        };
        client.queue_inflight(record, self.fd.as_fd())
    }
}

/// Looks, before anything is changed, whether `device` is of the type that a driver is for.
pub(crate) fn check_type<C, W, B>(
    client: &mut Client<C, W, B>,
    device: DevNum,
    device_id: u32,
) -> Result<(), Error>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    if client.device_info(device)?.device_id != device_id {
        return Err(Error::NoDevice(device));
    }
    // What it said before it is set up anew is of no interest any more.
    let stale = |event: &Event| matches!(event, Event::Config { device: of, .. } if *of == device);
    while client.take_event(stale)?.is_some() {}
    Ok(())
}

/// Makes a device let go of the memory of its queues, before the pool gives it to others.
pub(crate) fn reset<C, W, B>(client: &mut Client<C, W, B>, device: DevNum)
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    // If there is no answer the connection is of no use any more, and its end resets the device as well.
    let _ = client.set_status(device, DeviceStatus::RESET);
}

/// Sleeps until the device has used buffers of any of some queues.
#[derive(Debug, Default)]
pub(crate) struct CallWait {
    epoll: Option<OwnedFd>,
}

impl CallWait {
    /// Waits until one of `queues`, always the same ones, has used chains to take, at most for `timeout`; tells whether one has.
    pub(crate) fn wait<C, W, B>(
        &mut self,
        client: &mut Client<C, W, B>,
        queues: &mut [&mut Queue<'_>],
        timeout: Duration,
    ) -> Result<bool, Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let end = client.now() + timeout;
        loop {
            let mut there = false;
            for queue in queues.iter_mut() {
                there |= queue
                    .ring
                    .enable_notifications()
                    .map_err(|source| queue.failed(source))?;
            }
            let left = end.saturating_since(client.now());
            if there || left.is_zero() {
                return Ok(there);
            }
            // What the other side says meanwhile must not fill the bus.
            client.poll()?;
            if let Some(gone) = queues.iter().find(|queue| client.is_removed(queue.device)) {
                return Err(Error::NoDevice(gone.device));
            }
            if queues.iter().any(|queue| client.needs_reset(queue.device)) {
                return Err(Error::NeedsReset);
            }
            if queues.iter().all(|queue| queue.call.is_some()) {
                // Arming is what notices the end of the connection.
                if client.channel_mut().arm() {
                    self.sleep(client, queues, left)?;
                }
            } else {
                // Other events are for whoever asks the client for them.
                let ours = |event: &Event| match *event {
                    Event::Used { device, queue } => queues
                        .iter()
                        .any(|q| q.device == device && q.index == queue),
                    _ => false,
                };
                if client.take_event(ours)?.is_none() {
                    client.wait_for_message(end);
                }
            }
        }
    }

    fn sleep<C: Bus, W, B>(
        &mut self,
        client: &Client<C, W, B>,
        queues: &[&mut Queue<'_>],
        timeout: Duration,
    ) -> Result<(), Error>
    where
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let failed = |error: rustix::io::Errno| Error::Io(error.into());
        let epoll = match &self.epoll {
            Some(epoll) => epoll,
            None => {
                // Edge-triggered: the device side holds the eventfds as well, so they are never read.
                let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
                let data = epoll::EventData::new_u64(0);
                for call in queues.iter().filter_map(|queue| queue.call.as_ref()) {
                    epoll::add(
                        &epoll,
                        call.as_fd(),
                        data,
                        epoll::EventFlags::IN | epoll::EventFlags::ET,
                    )
                    .map_err(failed)?;
                }
                let bus = client.channel().wake_fds();
                bus.add_to(&epoll).map_err(Error::Io)?;
                self.epoll.insert(epoll)
            }
        };
        let timeout = Timespec::try_from(timeout).ok();
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 4];
        match epoll::wait(epoll, &mut events, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}
