// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk with several requests under way at once.

use virtio_msg::{DevNum, FeatureSet, QueueIndex, feature};
use vmsg_driver::blk::{CONFIG_LEN, Config, Pending, Request, Requests, SECTOR, feature_bit};
use vmsg_driver::{Device, Error, Wanted};
use vmsg_queue::{DriverSlot, Layout, QueueError};

use crate::{Failure, Machine, dma};

/// Requests under way.
pub const DEPTH: usize = 8;
/// Bytes of each.
const LEN: u32 = 4096;
/// Bytes that are read at most.
const MOST: u64 = 1 << 20;
/// Entries of the queue: three for each request.
const SIZE: u16 = 32;
const QUEUE: QueueIndex = QueueIndex(0);

/// Reads the beginning of the disk; gives how much that was, and the sum of its bytes.
pub fn read(client: &mut Machine, number: DevNum) -> Result<(u64, u64), Failure> {
    let failed = |source: QueueError| Error::Queue {
        queue: QUEUE,
        source,
    };
    let features = [feature_bit::BLK_SIZE, feature::RING_EVENT_IDX];
    let wanted = Wanted {
        supported: FeatureSet::from_bits(&features),
        ..Wanted::default()
    };
    let mut device = Device::open(client, number, &wanted)?;
    let mut bytes = [0; CONFIG_LEN];
    let there = usize::try_from(device.info().config_size).unwrap_or(CONFIG_LEN);
    let bytes = &mut bytes[..there.min(CONFIG_LEN)];
    device.read_config(client, 0, bytes)?;
    let config = Config::parse(bytes, &device.features()).ok_or(Error::BadAnswer {
        request: "GET_CONFIG of a disk",
    })?;

    let memory = || dma::pages(2).ok_or(Failure::NoMemory);
    let (layout, slots) = (
        Layout::new(SIZE, 0).map_err(failed)?,
        [DriverSlot::default(); SIZE as usize],
    );
    let mut ring = device.create_queue(client, QUEUE, layout, memory()?, slots)?;
    let pending = [Pending::default(); SIZE as usize];
    let mut requests = Requests::new(SIZE, memory()?, pending).map_err(failed)?;
    let (buffers, base) = dma::pages(DEPTH).ok_or(Failure::NoMemory)?;
    device.start(client)?;

    let total = config.bytes().min(MOST) / u64::from(LEN) * u64::from(LEN);
    let (mut begun, mut ended, mut sum) = (0, 0, 0);
    // The tag of a request is the number of its buffer.
    let mut free: [Option<u64>; DEPTH] = core::array::from_fn(|number| Some(number as u64));
    while ended < total {
        for slot in &mut free {
            let Some(number) = slot.take_if(|_| begun < total) else {
                continue;
            };
            let to = [(vmsg_mem::BusAddr(base.0 + number * u64::from(LEN)), LEN)];
            let request = Request::Read {
                sector: begun / SECTOR,
                to: &to,
            };
            requests.add(&mut ring, number, request).map_err(failed)?;
            begun += u64::from(LEN);
        }
        if ring.publish().map_err(failed)? {
            client.notify_available(number, QUEUE, 0)?;
        }
        while let Some(done) = requests.pop(&mut ring).map_err(failed)? {
            done.result.map_err(Error::Disk)?;
            // The tag is one that was given to it.
            let at = done.tag as usize;
            let mut block = [0; LEN as usize];
            buffers.read(at * LEN as usize, &mut block);
            sum += block.iter().map(|&byte| u64::from(byte)).sum::<u64>();
            free[at] = Some(done.tag);
            ended += u64::from(LEN);
        }
        // What the other side says meanwhile must not fill the bus.
        while client.next_event()?.is_some() {}
    }
    device.reset(client)?;
    Ok((ended, sum))
}
