// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a block device is to be driven.

use virtio_msg::{FeatureSet, feature};

use super::feature_bit;
use crate::queue::QueueOptions;

/// How a block device is to be driven.
#[derive(Clone, Copy, Debug)]
pub struct BlkOptions {
    /// All queues.
    pub queue: QueueOptions,
    /// Queues to be set up, as far as the device has them, which needs MQ.
    pub queues: u16,
    /// Features to be used if they are offered.
    pub features: FeatureSet,
    /// Lends the device memory for the record of what is in flight, where the bus can; needed for [`BlkDriver::resume`](super::BlkDriver::resume).
    pub record: bool,
    /// Sends the device whatever it is told to, also what no driver may: outside of the disk, longer than it takes. For tests of devices.
    pub unchecked: bool,
}

impl Default for BlkOptions {
    /// One queue of 256 entries, indirect tables of 16; every feature of this module, and EVENT_IDX; with a record.
    fn default() -> Self {
        use feature_bit::{
            BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, SIZE_MAX, TOPOLOGY, WRITE_ZEROES,
        };
        let features = [
            SIZE_MAX,
            SEG_MAX,
            RO,
            BLK_SIZE,
            FLUSH,
            TOPOLOGY,
            CONFIG_WCE,
            MQ,
            DISCARD,
            WRITE_ZEROES,
            feature::RING_EVENT_IDX,
            feature::RING_INDIRECT_DESC,
        ];
        Self {
            queue: QueueOptions {
                indirect: 16,
                ..QueueOptions::default()
            },
            queues: 1,
            features: FeatureSet::from_bits(&features),
            record: true,
            unchecked: false,
        }
    }
}
