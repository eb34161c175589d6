// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that do nothing but touch the bytes of each request once.

use std::os::fd::BorrowedFd;
use std::time::Instant;
use virtio_msg::FeatureSet;
use vmsg_device::device::{
    Device, DeviceError, Identity, Io, Progress, VENDOR_ID, transport_features,
};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Bytes of a frame.
pub(crate) const FRAME: usize = 1514;

/// Reads what it is given and fills what it is asked for. To its driver it is a block device.
pub(crate) struct Touch {
    scratch: Vec<u8>,
}

impl Touch {
    pub(crate) fn new() -> Self {
        Self {
            scratch: vec![0x77; 0x1_0000],
        }
    }
}

impl Device for Touch {
    fn identity(&self) -> Identity {
        Identity {
            device_id: 2,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        transport_features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn config(&self) -> Vec<u8> {
        (0..64).collect()
    }

    fn activate(&mut self, _: &FeatureSet) {}

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
        let batch = ring.pop(io.space, io.storage, budget.min(32));
        let batch = batch.map_err(failed)?;
        let count = batch.len();
        for chain in batch.iter() {
            chain.readable().read(&mut self.scratch);
            let written = chain.writable().write(&self.scratch);
            let written = u32::try_from(written).expect("as long as the scratch space");
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

/// Takes every frame, and always has one.
pub(crate) struct Wire {
    scratch: Vec<u8>,
}

impl Wire {
    pub(crate) fn new() -> Self {
        Self {
            scratch: vec![0xff; FRAME],
        }
    }
}

impl Backend for Wire {
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn set_guest(&mut self, _: &Guest) {}

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    fn poll(&mut self, _: Instant) {}

    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        for frame in frames {
            frame.payload.read(&mut self.scratch);
        }
        frames.len()
    }

    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut count = 0;
        while let Some(room) = sink.offer(Target::Pair(0), FRAME) {
            room.write(&[0xff; FRAME]);
            sink.commit(&VnetHeader::default(), FRAME);
            count += 1;
        }
        count
    }

    fn has_frames(&self) -> bool {
        true
    }

    fn shutdown(&mut self) {}
}
