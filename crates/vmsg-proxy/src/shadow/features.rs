// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Features on either side of shadow queues.

use virtio_msg::{FeatureSet, feature};
use vmsg_queue::QueueFeatures;

/// What concerns rings and their neighbourhood, and is not passed on: what is in flight is kept for split rings only, completions come as
/// the device likes, kicks carry no index, memory is memory.
const NEVER: [u32; 6] = [
    feature::RING_PACKED,
    feature::IN_ORDER,
    feature::ORDER_PLATFORM,
    feature::SR_IOV,
    feature::NOTIFICATION_DATA,
    feature::NOTIF_CONFIG_DATA,
];

/// What each side has by itself, whether or not the other side has it.
const OWN: [u32; 2] = [feature::RING_INDIRECT_DESC, feature::RING_EVENT_IDX];

/// What a guest may be offered of a device that offers `device`.
pub fn offered(device: &FeatureSet) -> FeatureSet {
    let mut set = *device;
    NEVER.into_iter().for_each(|bit| set.remove(bit));
    OWN.into_iter().for_each(|bit| set.insert(bit));
    set
}

/// What to negotiate with a device that offers `device`, for a guest that has negotiated `guest`. What a front offers of its own stays with it.
pub(super) fn towards_device(guest: &FeatureSet, device: &FeatureSet) -> FeatureSet {
    let mut set = guest.intersection(device);
    NEVER.into_iter().for_each(|bit| set.remove(bit));
    OWN.into_iter()
        .for_each(|bit| set.set(bit, device.contains(bit)));
    set
}

/// What of a set concerns a queue.
pub(super) fn of_queue(set: &FeatureSet) -> QueueFeatures {
    QueueFeatures {
        event_idx: set.contains(feature::RING_EVENT_IDX),
        indirect: set.contains(feature::RING_INDIRECT_DESC),
    }
}
