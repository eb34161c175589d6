// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Doorbell vectors for queues, where no descriptors can be passed and there are more doorbells than the bus needs.

use virtio_msg::{DevNum, QueueIndex};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// QUEUE_VECTORS: which doorbells stand for EVENT_AVAIL and EVENT_USED of a queue. Several queues may have the same ones: whoever is rung then
/// looks at all of them. It lasts until the next one or a device reset; messages are always understood as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueVectors {
    /// The device.
    pub dev: DevNum,
    /// Its queue, one of the first 65,536.
    pub queue: QueueIndex,
    /// The vector of the device's end that the driver rings, below 0xffff. `None`: kicks come as EVENT_AVAIL.
    pub kick: Option<u16>,
    /// The vector of the driver's end that the device rings, below 0xffff. `None`: calls go as EVENT_USED.
    pub call: Option<u16>,
}

/// On the wire: no vector.
const NONE: u16 = u16::MAX;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct QueueVectorsWire {
    dev: U16,
    queue: U16,
    kick: U16,
    call: U16,
}

impl QueueVectors {
    /// The queue as it is on the wire.
    pub(super) fn queue_wire(&self) -> u16 {
        // No device has so many; one that had would say that it does not know this one.
        u16::try_from(self.queue.0).unwrap_or(u16::MAX)
    }
}

impl From<QueueVectors> for QueueVectorsWire {
    fn from(v: QueueVectors) -> Self {
        Self {
            dev: v.dev.0.into(),
            queue: v.queue_wire().into(),
            kick: v.kick.unwrap_or(NONE).into(),
            call: v.call.unwrap_or(NONE).into(),
        }
    }
}

impl From<QueueVectorsWire> for QueueVectors {
    fn from(w: QueueVectorsWire) -> Self {
        let vector = |vector: U16| Some(vector.get()).filter(|vector| *vector != NONE);
        Self {
            dev: DevNum(w.dev.get()),
            queue: QueueIndex(w.queue.get().into()),
            kick: vector(w.kick),
            call: vector(w.call),
        }
    }
}
