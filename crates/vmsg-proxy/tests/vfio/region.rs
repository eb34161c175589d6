// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file system without files: what there is of it is a region of shared memory.

use std::sync::Arc;
use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, SharedRegion, VENDOR_ID, transport_features,
};
use vmsg_mem::Mapping;

/// Bytes of the region.
pub const LEN: u64 = 0x2_0000;
/// Where it begins in its file.
pub const FILE_OFFSET: u64 = 0x1000;

pub struct WithRegion(SharedRegion);

impl WithRegion {
    /// The device, and its file as it sees that.
    pub fn new() -> (WithRegion, Mapping) {
        let (mapping, fd) = Mapping::memfd("region", FILE_OFFSET + LEN, true).unwrap();
        let region = SharedRegion {
            id: 0,
            len: LEN,
            file: Arc::new(fd),
            file_offset: FILE_OFFSET,
        };
        (WithRegion(region), mapping)
    }
}

impl Device for WithRegion {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 26,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {}

    fn shared_memory(&self) -> Vec<SharedRegion> {
        vec![self.0.clone()]
    }

    fn process(
        &mut self,
        _queue: usize,
        _budget: usize,
        _io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        Ok(Progress::Idle)
    }
}
