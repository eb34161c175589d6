// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What stands behind the registers.

use crate::session::{DeviceFacts, OpError, QueueSetup};
use virtio_msg::{DeviceStatus, FeatureSet, QueueIndex};

/// A device as the registers use it.
///
/// Every call ends within a bound well under the 5 s after which a VMM gives up; an error means that the device needs a reset, and the
/// registers say so. Only what makes sense is asked for: queues that exist, sizes and addresses that can be, configuration bytes that are
/// there, features that are offered.
pub trait Backend {
    /// What the device is, as far as is known now. Number, size of the configuration, features and queue sizes may be others after a reset.
    fn facts(&self) -> &DeviceFacts;

    /// The driver accepts these features. FEATURES_OK follows.
    ///
    /// # Errors
    /// [`OpError`].
    fn set_features(&mut self, features: FeatureSet) -> Result<(), OpError>;

    /// The driver writes the device status. Gives what the device has then: FEATURES_OK may be missing, NEEDS_RESET may be set.
    /// [`DeviceStatus::RESET`] resets the device: when this comes back without an error the device does not touch any queue any more.
    ///
    /// # Errors
    /// [`OpError`].
    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError>;

    /// Sets a queue up.
    ///
    /// # Errors
    /// [`OpError`].
    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError>;

    /// Resets one queue: when this comes back without an error the device does not touch it any more.
    ///
    /// # Errors
    /// [`OpError`].
    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError>;

    /// There are buffers. Must not block.
    fn kick(&mut self, queue: QueueIndex);

    /// Reads the configuration space.
    ///
    /// # Errors
    /// [`OpError`].
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError>;

    /// Writes the configuration space.
    ///
    /// # Errors
    /// [`OpError`].
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError>;
}

impl<B: Backend + ?Sized> Backend for Box<B> {
    fn facts(&self) -> &DeviceFacts {
        (**self).facts()
    }

    fn set_features(&mut self, features: FeatureSet) -> Result<(), OpError> {
        (**self).set_features(features)
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError> {
        (**self).set_status(status)
    }

    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        (**self).start_queue(queue, setup)
    }

    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        (**self).stop_queue(queue)
    }

    fn kick(&mut self, queue: QueueIndex) {
        (**self).kick(queue);
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError> {
        (**self).read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError> {
        (**self).write_config(offset, data)
    }
}
