// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `Transport` over a channel.

use core::cell::RefCell;
use core::ops::{Deref, DerefMut};

use ::virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use ::virtio_drivers::{Error as DriverError, PhysAddr};
use virtio_msg::{
    Channel, DevNum, DeviceInfo, FeatureSet, QueueIndex, QueueSize, VqueueConfig, feature,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::client::Client;
use crate::error::Error;
use crate::event::Event;
use crate::wait::Wait;

/// One device of a bus as a transport for the drivers of `virtio-drivers`. `L` is a way to the client, which several transports may
/// share: a `&RefCell<Client<…>>`, an `Rc<RefCell<Client<…>>>`.
///
/// Few methods of `Transport` can tell of an error. After one that matters the transport is broken: it does
/// nothing more, its status reads FAILED, everything else reads 0, and [`MsgTransport::error`] tells why.
#[derive(Debug)]
pub struct MsgTransport<L> {
    client: L,
    number: DevNum,
    device_type: DeviceType,
    info: DeviceInfo,
    /// Features that the driver does not know of but must accept.
    forced: FeatureSet,
    broken: RefCell<Option<Error>>,
}

impl<L, C, W, B> MsgTransport<L>
where
    L: Deref<Target = RefCell<Client<C, W, B>>>,
    C: Channel,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    /// For device `number`.
    ///
    /// # Errors
    /// [`Error::NoDevice`], also for a type of device that `virtio-drivers` does not know; [`Error::Timeout`], [`Error::Channel`].
    pub fn new(client: L, number: DevNum) -> Result<Self, Error> {
        let info = client.borrow_mut().device_info(number)?;
        let device_type =
            DeviceType::try_from(info.device_id).map_err(|_| Error::NoDevice(number))?;
        Ok(Self {
            client,
            number,
            device_type,
            info,
            forced: FeatureSet::new(),
            broken: RefCell::new(None),
        })
    }

    /// Takes out why the transport is broken, if it is; it stays so.
    pub fn error(&self) -> Option<Error> {
        let mut broken = self.broken.borrow_mut();
        let error = broken.take();
        if error.is_some() {
            *broken = Some(Error::NeedsReset);
        }
        error
    }

    /// Makes a request, unless the transport is broken; if it fails, the transport is.
    fn ask<R>(&self, request: impl FnOnce(&mut Client<C, W, B>) -> Result<R, Error>) -> Option<R> {
        if self.broken.borrow().is_some() {
            return None;
        }
        // Borrowed for this call only, and no call is made out of another.
        let result = request(self.client.borrow_mut().deref_mut());
        result
            .map_err(|error| *self.broken.borrow_mut() = Some(error))
            .ok()
    }

    /// The range of a configuration field, if the device has it.
    fn field(&self, offset: usize, len: usize) -> Result<u32, DriverError> {
        if self.info.config_size == 0 {
            return Err(DriverError::ConfigSpaceMissing);
        }
        let start = u32::try_from(offset).map_err(|_| DriverError::ConfigSpaceTooSmall)?;
        let end = u32::try_from(len)
            .ok()
            .and_then(|len| start.checked_add(len));
        match end {
            Some(end) if end <= self.info.config_size => Ok(start),
            _ => Err(DriverError::ConfigSpaceTooSmall),
        }
    }
}

impl<L, C, W, B> Transport for MsgTransport<L>
where
    L: Deref<Target = RefCell<Client<C, W, B>>>,
    C: Channel,
    W: Wait<C>,
    B: AsRef<[u8]> + AsMut<[u8]>,
{
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let info = self.info;
        let offered = self
            .ask(|client| client.device_features(self.number, &info))
            .unwrap_or_default();
        // Every address on a bus is a bus address, so the driver needs to know nothing of this; and QEMU's device side aborts if
        // it is offered and not accepted.
        self.forced = FeatureSet::from_bits(&[feature::ACCESS_PLATFORM]).intersection(&offered);
        offered.low_u64()
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        let features = FeatureSet::from_u64(driver_features).union(&self.forced);
        let info = self.info;
        self.ask(|client| client.set_driver_features(self.number, &info, &features));
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        let result = self.ask(
            |client| match client.queue(self.number, QueueIndex(queue.into())) {
                Err(Error::NoQueue(_)) => Ok(0),
                other => other.map(|info| info.max_size.0),
            },
        );
        result.unwrap_or(0)
    }

    fn notify(&mut self, queue: u16) {
        self.ask(|client| {
            // Drivers poll the rings: the events of the device must not pile up meanwhile.
            client.poll()?;
            client.notify_available(self.number, QueueIndex(queue.into()), 0)
        });
    }

    fn get_status(&self) -> DeviceStatus {
        let status = self.ask(|client| client.status(self.number));
        status.map_or(DeviceStatus::FAILED, |status| {
            DeviceStatus::from_bits_retain(status.bits())
        })
    }

    fn set_status(&mut self, status: DeviceStatus) {
        let wanted = virtio_msg::DeviceStatus::from_bits_retain(status.bits());
        self.ask(|client| {
            let answered = client.set_status(self.number, wanted)?;
            // A driver never looks whether its status was taken: the reset, the features, the start.
            let refused = if wanted.is_empty() {
                !answered.is_empty()
            } else {
                !answered.contains(wanted)
            };
            if refused {
                Err(Error::StatusRefused(answered))
            } else {
                Ok(())
            }
        });
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {
        // For legacy devices only.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let config = VqueueConfig {
            index: QueueIndex(queue.into()),
            size: QueueSize(size),
            descriptor: descriptors,
            driver: driver_area,
            device: device_area,
        };
        self.ask(|client| {
            client.set_queue(self.number, config)?;
            let now = client.queue(self.number, config.index)?;
            let taken = (now.size, now.descriptor, now.driver, now.device)
                == (config.size, config.descriptor, config.driver, config.device);
            if taken {
                Ok(())
            } else {
                Err(Error::QueueRefused(config.index))
            }
        });
    }

    fn queue_unset(&mut self, queue: u16) {
        // Drivers do this when they are dropped, with whatever features. A device without RING_RESET may let the request time out,
        // and would go on using memory that is about to be freed: only the reset of the whole device is sure to stop it.
        let _ = queue;
        self.ask(|client| client.set_status(self.number, virtio_msg::DeviceStatus::RESET));
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        let result = self.ask(|client| {
            let info = client.queue(self.number, QueueIndex(queue.into()))?;
            // QEMU shows the largest size as the present one before a queue is set up, but no address.
            Ok(info.size.0 != 0 && info.descriptor != 0)
        });
        result.unwrap_or(false)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let mut status = InterruptStatus::empty();
        let number = self.number;
        let pending = self.ask(|client| {
            let mut used = false;
            let mut config = false;
            while let Some(event) = client.take_event(|event| match *event {
                Event::Used { device, .. } | Event::Config { device, .. } => device == number,
                Event::Lost => true,
                _ => false,
            })? {
                used |= matches!(event, Event::Used { .. } | Event::Lost);
                config |= matches!(event, Event::Config { .. } | Event::Lost);
            }
            Ok((used, config))
        });
        let (used, config) = pending.unwrap_or_default();
        status.set(InterruptStatus::QUEUE_INTERRUPT, used);
        status.set(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT, config);
        status
    }

    fn read_config_generation(&self) -> u32 {
        self.ask(|client| client.config_generation(self.number))
            .map_or(0, |generation| generation.0)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let at = self.field(offset, size_of::<T>())?;
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        self.ask(|client| client.read_config(self.number, at, bytes))
            .ok_or(DriverError::IoError)?;
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        let bytes = value.as_bytes();
        let at = self.field(offset, bytes.len())?;
        self.ask(|client| match client.write_config(self.number, at, bytes) {
            // The device is none the worse for it.
            Err(Error::ConfigRefused) => Ok(Err(DriverError::Unsupported)),
            other => other.map(|_| Ok(())),
        })
        .unwrap_or(Err(DriverError::IoError))
    }
}
