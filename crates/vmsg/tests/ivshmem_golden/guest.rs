// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of the recorded driver's guest: a file whose offsets are guest physical addresses, less where the memory begins.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use virtio_msg::{DevNum, Message, QueueIndex};

/// Behind everything that was recorded, and enough for that.
const BUFFERS: u64 = 112 << 20;
pub(crate) const SIZE: u64 = 128 << 20;
const ROOM: u64 = 2048;
const WRITABLE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// A split queue at recorded addresses.
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next: u16,
}

/// A driver's queues in its guest's memory.
pub(crate) struct Guest {
    memory: File,
    base: u64,
    rings: BTreeMap<(DevNum, QueueIndex), Ring>,
    buffers: u64,
}

impl Guest {
    pub(crate) fn new(memory: File, base: u64) -> Self {
        memory.set_len(SIZE).expect("room for it");
        Self {
            memory,
            base,
            rings: BTreeMap::new(),
            buffers: base + BUFFERS,
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let offset = at - self.base;
        assert!(offset + bytes.len() as u64 <= SIZE, "{at:#x}");
        self.memory.write_all_at(bytes, offset).expect("a file");
    }

    fn load16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory
            .read_exact_at(&mut bytes, at - self.base)
            .expect("a file");
        u16::from_le_bytes(bytes)
    }

    /// Takes notice of what the driver says, before it says it.
    pub(crate) fn about_to_send(&mut self, dev: DevNum, message: &Message<'_>) {
        match *message {
            Message::SetVqueue(queue) => {
                let size = u16::try_from(queue.size.0).expect("a queue size");
                let ring = Ring {
                    size,
                    desc: queue.descriptor,
                    avail: queue.driver,
                    used: queue.device,
                    next: 0,
                };
                let entries = u64::from(size);
                self.put(ring.desc, &vec![0; 16 * usize::from(size)]);
                self.put(ring.avail, &[0; 4]);
                self.put(ring.used, &vec![0; 4 + 8 * usize::from(size)]);
                assert!(entries > 0);
                self.rings.insert((dev, queue.index), ring);
            }
            Message::SetDeviceStatus(status) if status.bits() == 0 => {
                self.rings.retain(|(owner, _), _| *owner != dev);
            }
            _ => {}
        }
    }

    /// Offers a buffer, as the driver had before it sent EVENT_AVAIL; `told` says whether it wants to hear when it is used. The first byte of what the
    /// device reads is `first`.
    pub(crate) fn offer(
        &mut self,
        dev: DevNum,
        index: QueueIndex,
        writable: bool,
        first: u8,
        told: bool,
    ) {
        let buffer = self.buffers;
        self.buffers += ROOM;
        let mut content = vec![0; usize::try_from(ROOM).expect("2048")];
        content[0] = first;
        self.put(buffer, &content);
        let ring = self
            .rings
            .get_mut(&(dev, index))
            .expect("a queue that was set up");
        let slot = ring.next % ring.size;
        ring.next = ring.next.wrapping_add(1);
        let mut descriptor = Vec::new();
        descriptor.extend(buffer.to_le_bytes());
        descriptor.extend(u32::try_from(ROOM).expect("2048").to_le_bytes());
        descriptor.extend(if writable { WRITABLE } else { 0 }.to_le_bytes());
        descriptor.extend([0, 0]);
        let ring = &self.rings[&(dev, index)];
        self.put(ring.desc + 16 * u64::from(slot), &descriptor);
        self.put(ring.avail + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        let flags = if told { 0 } else { NO_INTERRUPT };
        self.put(ring.avail, &flags.to_le_bytes());
        self.put(ring.avail + 2, &ring.next.to_le_bytes());
    }

    /// How many buffers of a queue the device has used.
    pub(crate) fn used(&self, dev: DevNum, index: QueueIndex) -> u16 {
        self.rings
            .get(&(dev, index))
            .map_or(0, |ring| self.load16(ring.used + 2))
    }
}
