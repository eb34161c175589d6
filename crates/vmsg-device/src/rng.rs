// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The entropy device (VIRTIO 1.3, 5.4).

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_msg::FeatureSet;

use crate::device::{Device, DeviceError, Identity, Io, Progress, QUEUE_SIZE, VENDOR_ID};

/// Device id of an entropy device.
pub const DEVICE_ID: u32 = 4;

/// Bytes given for one request at most; the driver asks again for more. It
/// bounds the time that one chain can take from other devices.
const MAX_REQUEST: usize = 64 * 1024;

/// Bytes given in one turn, after which other queues have theirs.
const MAX_TURN: usize = 4 * MAX_REQUEST;

const BATCH: usize = 32;

/// Fills the driver's buffers with bytes from the system's random number generator.
#[derive(Debug, Default)]
pub struct Rng {
    bytes: u64,
}

impl Rng {
    /// A new entropy device.
    pub fn new() -> Self {
        Self::default()
    }

    fn fill(&mut self, to: vmsg_mem::Pieces<'_>) -> Result<u32, DeviceError> {
        let mut to = to.take(MAX_REQUEST);
        let mut chunk = [0u8; 4096];
        let mut done = 0;
        while !to.is_empty() {
            let want = to.len().min(chunk.len());
            let got = getrandom(&mut chunk[..want], GetRandomFlags::empty())
                .map_err(|error| DeviceError::Local(format!("getrandom: {error}")))?;
            to.write(&chunk[..got]);
            to = to.skip(got);
            done += got;
        }
        self.bytes += done as u64;
        Ok(u32::try_from(done).expect("MAX_REQUEST fits in 32 bits"))
    }
}

impl Device for Rng {
    fn identity(&self) -> Identity {
        Identity {
            device_id: DEVICE_ID,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        crate::device::transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
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
            .pop(io.space, io.storage, budget.min(BATCH))
            .map_err(failed)?;
        let count = batch.len();
        let mut left = count;
        let mut bytes = 0;
        for chain in batch.iter() {
            if bytes >= MAX_TURN {
                break;
            }
            let written = self.fill(chain.writable())?;
            bytes += written as usize;
            ring.complete(io.space, chain.head(), written)
                .map_err(failed)?;
            left -= 1;
        }
        ring.rewind(left);
        io.publish(queue)?;
        Ok(if count == 0 {
            Progress::Idle
        } else {
            Progress::More
        })
    }
}
