// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a worker looks after for a switch, beside the devices at its ports.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use virtio_msg::FeatureSet;
use vmsg_net::switch;

use crate::device::{Device, DeviceError, Identity, Io, Progress, VENDOR_ID};

/// The pump of a switch, for [`Host::add_resident`](crate::host::Host::add_resident). It belongs to the worker that has all devices at
/// the switch's ports.
#[derive(Debug)]
pub struct Pump(pub switch::Pump);

impl Device for Pump {
    /// None: it is on no bus.
    fn identity(&self) -> Identity {
        Identity {
            device_id: 0,
            vendor_id: VENDOR_ID,
        }
    }

    fn features(&self) -> FeatureSet {
        FeatureSet::EMPTY
    }

    fn queue_sizes(&self) -> Vec<u16> {
        Vec::new()
    }

    fn activate(&mut self, _: &FeatureSet) {}

    fn reset(&mut self) {}

    fn process(&mut self, _: usize, _: usize, _: &mut Io<'_>) -> Result<Progress, DeviceError> {
        Ok(Progress::Blocked)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.event_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.0.next_timeout()
    }

    fn poll(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.0.poll(io.now, io.others);
        Ok(())
    }
}
