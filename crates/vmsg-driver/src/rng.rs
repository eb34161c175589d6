// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver for entropy devices (virtio 1.3 §5.4).

use std::time::Duration;

use virtio_msg::{DevNum, FeatureSet, QueueIndex, feature};
use vmsg_bus::Bus;

use crate::client::Client;
use crate::device::{Device, Wanted};
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::queue::{CallWait, Queue, QueueOptions, check_type, reset};
use crate::wait::Wait;

/// Virtio id of an entropy device.
pub const DEVICE_ID: u32 = 4;

/// Bytes asked for at once.
const REQUEST: usize = 4096;

/// Drives an entropy device.
#[derive(Debug)]
pub struct RngDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    client: Client<C, W, B>,
    device: DevNum,
    queue: Queue<'p>,
    buffer: DmaBuffer<'p>,
    wait: CallWait,
}

impl<'p, C, W, B> RngDriver<'p, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    /// Brings the device up. `pool` is lent to the other side already.
    ///
    /// # Errors
    /// [`Error::NoDevice`] if the device is none, or of another type; as [`Device::open`] and [`Queue::create`].
    pub fn new(
        mut client: Client<C, W, B>,
        device: DevNum,
        pool: &'p DmaPool,
        options: &QueueOptions,
    ) -> Result<Self, Error> {
        let supported = FeatureSet::from_bits(&[feature::RING_EVENT_IDX]);
        check_type(&mut client, device, DEVICE_ID)?;
        let mut opened = Device::open(
            &mut client,
            device,
            &Wanted {
                supported,
                ..Wanted::default()
            },
        )?;
        let queue = Queue::create(&mut client, &mut opened, pool, QueueIndex(0), options)?;
        let buffer = pool.alloc(REQUEST)?;
        opened
            .start(&mut client)
            .inspect_err(|_| reset(&mut client, device))?;
        Ok(Self {
            client,
            device,
            queue,
            buffer,
            wait: CallWait::default(),
        })
    }

    /// Fills `into` with what the device gives, all of it within `timeout`.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which the driver is of no use any more; [`Error::Queue`] if the device breaks the queue;
    /// [`Error::Channel`].
    pub fn fill(&mut self, mut into: &mut [u8], timeout: Duration) -> Result<(), Error> {
        let deadline = std::time::Instant::now() + timeout;
        while !into.is_empty() {
            let want = into.len().min(REQUEST);
            let len = u32::try_from(want).expect("a request fits 32 bits");
            let writable = [(self.buffer.addr(), len)];
            self.queue
                .ring()
                .add(&[], &writable)
                .map_err(|source| self.queue.failed(source))?;
            self.queue.publish(&mut self.client)?;
            let used = loop {
                if let Some(used) = self
                    .queue
                    .ring()
                    .pop_used()
                    .map_err(|source| self.queue.failed(source))?
                {
                    break used;
                }
                let left = deadline.saturating_duration_since(std::time::Instant::now());
                if !self
                    .wait
                    .wait(&mut self.client, &mut [&mut self.queue], left)?
                    && left.is_zero()
                {
                    return Err(Error::Timeout { request: "entropy" });
                }
            };
            let got = usize::try_from(used.written)
                .unwrap_or(usize::MAX)
                .min(want);
            let (now, rest) = into.split_at_mut(got);
            self.buffer.ram().read(0, now);
            into = rest;
            if got == 0 && std::time::Instant::now() >= deadline {
                return Err(Error::Timeout { request: "entropy" });
            }
        }
        Ok(())
    }

    /// The client, for requests of other kinds.
    pub fn client(&mut self) -> &mut Client<C, W, B> {
        &mut self.client
    }
}

impl<C, W, B> Drop for RngDriver<'_, C, W, B>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    fn drop(&mut self) {
        reset(&mut self.client, self.device);
    }
}
