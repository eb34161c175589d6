// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control queue (virtio 1.3 §5.1.6.5).

use std::time::Duration;

use virtio_msg::QueueIndex;
use vmsg_bus::Bus;
use vmsg_mem::BusAddr;

use super::feature_bit;
use crate::client::Client;
use crate::device::Device;
use crate::dma::{DmaBuffer, DmaPool};
use crate::error::Error;
use crate::queue::{CallWait, Queue, QueueOptions};
use crate::wait::Wait;

/// Bytes of the control queue's buffer: command, data, acknowledgement.
const CONTROL_LEN: usize = 4096;

/// A control queue with memory for one command.
#[derive(Debug)]
pub(super) struct Control<'p> {
    queue: Queue<'p>,
    memory: DmaBuffer<'p>,
    wait: CallWait,
}

impl<'p> Control<'p> {
    /// Sets the queue up, which comes after `pairs` pairs of queues.
    pub(super) fn create<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        client: &mut Client<C, W, B>,
        device: &mut Device,
        pool: &'p DmaPool,
        pairs: u16,
        options: &QueueOptions,
    ) -> Result<Self, Error> {
        let options = QueueOptions {
            size: 16,
            ..*options
        };
        let index = QueueIndex(u32::from(pairs) * 2);
        Ok(Self {
            queue: Queue::create(client, device, pool, index, &options)?,
            memory: pool.alloc(CONTROL_LEN)?,
            wait: CallWait::default(),
        })
    }

    /// Makes a request and gives the acknowledgement.
    pub(super) fn request<C: Bus, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>>(
        &mut self,
        client: &mut Client<C, W, B>,
        (class, command): (u8, u8),
        data: &[u8],
        timeout: Duration,
    ) -> Result<u8, Error> {
        let Self {
            queue,
            memory,
            wait,
        } = self;
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
        let length = u32::try_from(ack).unwrap_or(u32::MAX);
        let readable = [(memory.addr(), length)];
        let writable = [(BusAddr(memory.addr().0 + ack as u64), 1)];
        queue
            .ring()
            .add_direct(&readable, &writable)
            .map_err(|source| queue.failed(source))?;
        queue.publish(client)?;
        wait.wait(client, &mut [&mut *queue], timeout)?;
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
}

/// Pairs of queues that the device has with the features that were negotiated (virtio 1.3 §5.1.2).
pub(super) fn pairs_of<C, W, B>(client: &mut Client<C, W, B>, device: &Device) -> Result<u16, Error>
where
    C: Bus,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    let features = device.features();
    if !features.bit(feature_bit::MQ) && !features.bit(feature_bit::RSS) {
        return Ok(1);
    }
    let mut bytes = [0; 2];
    device.read_config(client, 8, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes).max(1))
}
