// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our driver side on the bus `linux-user`: a client, and random bytes by way of a queue in the guest's memory.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::time::Duration;

use virtio_msg::{DevNum, FeatureSet, QueueIndex, feature};
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::{BusClient, Client, Device, Wanted};
use vmsg_mem::{Access, BusAddr, Mapping};
use vmsg_queue::{DriverSlot, Layout};

use super::party::{Listens, Place};

/// Where queue and buffer are in the guest's memory.
const OFFSET: u64 = 1 << 20;
const BASE: BusAddr = BusAddr(0x4000_0000 + OFFSET);
const RING: usize = 4096;
const QUEUE: QueueIndex = QueueIndex(0);

/// A client of the peer that listens in `place`.
pub(crate) fn client(place: &Place, timeout: Duration) -> BusClient {
    let spec: BusSpec = place.bus(Listens::Theirs).parse().expect("a bus");
    let bus: DriverBus = spec
        .connector("peers-test")
        .timeout(Duration::from_secs(60))
        .connect()
        .expect("the peer listens");
    let mut client = Client::on_bus(bus);
    client.set_timeout(timeout);
    client
}

/// Brings up entropy device `number`, takes `len` bytes from it, and resets it.
pub(crate) fn fetch(
    place: &Place,
    client: &mut BusClient,
    number: DevNum,
    len: usize,
) -> Result<Vec<u8>, vmsg_driver::Error> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(place.file("ram"))
        .expect("the guest's memory");
    let mapping = Mapping::of_fd(file.as_fd(), OFFSET, 1 << 16, Access::ReadWrite).expect("mapped");
    let (ring_ram, buffer) = mapping.ram().split_at(RING);
    let address = BusAddr(BASE.0 + RING as u64);

    let wanted = Wanted {
        supported: FeatureSet::from_bits(&[feature::RING_INDIRECT_DESC]),
        ..Wanted::default()
    };
    let mut opened = Device::open(client, number, &wanted)?;
    let layout = Layout::new(8, 0).expect("a layout");
    let slots = [DriverSlot::default(); 8];
    let mut ring = opened.create_queue(client, QUEUE, layout, (ring_ram, BASE), slots)?;
    opened.start(client)?;
    let mut data = Vec::new();
    while data.len() < len {
        let want = u32::try_from((len - data.len()).min(4096)).expect("small");
        ring.add(&[], &[(address, want)]).expect("room");
        if ring.publish().expect("a ring") {
            client.notify_available(number, QUEUE, 0)?;
        }
        let used = loop {
            if let Some(used) = ring.pop_used().expect("a ring that is whole") {
                break used;
            }
            if client.wait_event(client.timeout())?.is_none() {
                return Err(vmsg_driver::Error::Timeout {
                    request: "a used buffer",
                });
            }
        };
        let mut part = vec![0; used.written as usize];
        assert_eq!(buffer.read(0, &mut part), part.len());
        data.extend(part);
    }
    opened.reset(client)?;
    Ok(data)
}

/// All 16-byte blocks are different, and none is zero.
pub(crate) fn assert_random(data: &[u8]) {
    let mut blocks: Vec<&[u8]> = data.chunks_exact(16).collect();
    let count = blocks.len();
    blocks.sort_unstable();
    blocks.dedup();
    assert_eq!(blocks.len(), count, "the same 16 bytes twice");
    assert!(!blocks.contains(&[0; 16].as_slice()), "zeros");
}
