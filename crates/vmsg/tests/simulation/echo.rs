// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device whose answers can be checked: what it reads comes back inverted.

use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, VENDOR_ID, transport_features,
};

/// Like an entropy device, so that nothing has to be said about features.
pub(crate) const DEVICE_ID: u32 = 4;
pub(crate) const QUEUES: usize = 2;
pub(crate) const QUEUE_SIZE: u16 = 8;

#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) config: [u8; 8],
}

impl Device for Echo {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn activate(&mut self, _features: &FeatureSet) {}

    fn reset(&mut self) {}

    fn process(
        &mut self,
        queue: usize,
        budget: usize,
        io: &mut Io<'_>,
    ) -> Result<Progress, DeviceError> {
        let Some(Some(active)) = io.queues.get_mut(queue) else {
            return Ok(Progress::Idle);
        };
        let ring = active.ring();
        let failed = |source| DeviceError::Queue { queue, source };
        let batch = ring
            .pop(io.space, io.storage, budget.min(2))
            .map_err(failed)?;
        let count = batch.len();
        for chain in batch.iter() {
            let mut bytes = vec![0; chain.readable().len()];
            chain.readable().read(&mut bytes);
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            let written = chain.writable().write(&bytes);
            let written = u32::try_from(written).expect("short buffers");
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
        }
        io.publish(queue)?;
        Ok(if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}
