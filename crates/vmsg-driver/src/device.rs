// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One device, brought up in the order in which Linux does it.

#[cfg(feature = "queue")]
use virtio_msg::QueueSize;
use virtio_msg::driver::{Bringup, BringupError, BringupStep};
use virtio_msg::{
    Channel, DevNum, DeviceInfo, DeviceStatus, FeatureSet, Generation, QueueIndex, VqueueConfig,
    VqueueInfo, feature,
};
#[cfg(feature = "queue")]
use vmsg_mem::{BusAddr, RamSlice};
#[cfg(feature = "queue")]
use vmsg_queue::{DriverQueue, DriverSlot, Layout, QueueFeatures};

use crate::client::Client;
use crate::error::Error;
use crate::wait::Wait;

/// What a driver wants of a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Features that the driver can use. VERSION_1 and ACCESS_PLATFORM are accepted in any case.
    pub supported: FeatureSet,
    /// Features without which the driver cannot do. VERSION_1 is one in any case.
    pub required: FeatureSet,
}

/// A device whose features are settled.
///
/// [`Device::open`], [`Device::set_queue`] or (with the feature `queue`) `create_queue` for each queue, [`Device::start`]; in the end [`Device::reset`]. A device that is dropped
/// is not reset: it may still write to the memory of its queues.
#[derive(Debug)]
pub struct Device {
    number: DevNum,
    bringup: Bringup,
}

/// Where the bring-up waits for this side.
enum Pause {
    Choose(FeatureSet),
    Queues(Option<VqueueInfo>),
    Ready,
}

impl Device {
    /// Resets device `number` and settles its features with it.
    ///
    /// # Errors
    /// [`Error::NoDevice`], [`Error::MissingFeatures`], [`Error::FeaturesRefused`], [`Error::StatusRefused`], [`Error::BadAnswer`],
    /// [`Error::Timeout`], [`Error::Channel`]. The device was told that the driver has given up, if it got so far.
    pub fn open<C, W, B>(
        client: &mut Client<C, W, B>,
        number: DevNum,
        wanted: &Wanted,
    ) -> Result<Self, Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let mut device = Self {
            number,
            bringup: Bringup::new(),
        };
        let offered = match device.run(client)? {
            Pause::Choose(offered) => offered,
            _ => return Err(Error::OutOfStep),
        };
        let missing = wanted
            .required
            .with(feature::VERSION_1)
            .difference(&offered);
        if !missing.is_empty() {
            device.give_up(client);
            return Err(Error::MissingFeatures(missing));
        }
        let chosen = wanted
            .supported
            .union(&wanted.required)
            .with(feature::VERSION_1);
        device.bringup.choose_features(chosen);
        device.run(client)?;
        Ok(device)
    }

    /// Its number.
    pub fn number(&self) -> DevNum {
        self.number
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        self.bringup.info()
    }

    /// The features that both sides use.
    pub fn features(&self) -> FeatureSet {
        self.bringup.features()
    }

    /// What a queue can be and is.
    ///
    /// # Errors
    /// [`Error::NoQueue`], [`Error::BadAnswer`], [`Error::Timeout`], [`Error::Channel`].
    pub fn queue<C, W, B>(
        &mut self,
        client: &mut Client<C, W, B>,
        queue: QueueIndex,
    ) -> Result<VqueueInfo, Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.bringup.get_queue(queue);
        match self.run(client)? {
            Pause::Queues(Some(info)) if info.max_size.0 == 0 => Err(Error::NoQueue(queue)),
            Pause::Queues(Some(info)) => Ok(info),
            _ => Err(Error::OutOfStep),
        }
    }

    /// Sets a queue up that the caller has laid out, and looks whether the device has taken it so.
    ///
    /// # Errors
    /// [`Error::QueueRefused`] if it has not; [`Error::BadAnswer`], [`Error::Timeout`], [`Error::Channel`].
    pub fn set_queue<C, W, B>(
        &mut self,
        client: &mut Client<C, W, B>,
        config: VqueueConfig,
    ) -> Result<(), Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.bringup.set_queue(config);
        match self.run(client)? {
            Pause::Queues(None) => Ok(()),
            _ => Err(Error::OutOfStep),
        }
    }

    /// Lays a queue out at the beginning of `ram`, which the device knows at `base`, and sets it up. `slots` holds
    /// one element for each entry of the queue.
    ///
    /// # Errors
    /// [`Error::QueueSize`] if the device does not allow that size; [`Error::QueueRefused`] if it did not take the queue;
    /// [`Error::Queue`] if memory or slots do not suit; [`Error::NoQueue`], [`Error::BadAnswer`], [`Error::Timeout`], [`Error::Channel`].
    #[cfg(feature = "queue")]
    pub fn create_queue<'m, S, C, W, B>(
        &mut self,
        client: &mut Client<C, W, B>,
        queue: QueueIndex,
        layout: Layout,
        (ram, base): (RamSlice<'m>, BusAddr),
        slots: S,
    ) -> Result<DriverQueue<'m, S>, Error>
    where
        S: AsRef<[DriverSlot]> + AsMut<[DriverSlot]>,
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        let max = self.queue(client, queue)?.max_size;
        let size = layout.size();
        if QueueSize(size.into()) > max {
            return Err(Error::QueueSize { queue, size, max });
        }
        let features = QueueFeatures::from_bits(self.features().low_u64());
        let ring = DriverQueue::new(layout, features, ram, base, slots)
            .map_err(|source| Error::Queue { queue, source })?;
        let areas = ring.config();
        let config = VqueueConfig {
            index: queue,
            size: QueueSize(size.into()),
            descriptor: areas.desc.0,
            driver: areas.driver.0,
            device: areas.device.0,
        };
        self.set_queue(client, config)?;
        Ok(ring)
    }

    /// Makes the device start (DRIVER_OK). Queues that were not set up stay out of use.
    ///
    /// # Errors
    /// [`Error::StatusRefused`], [`Error::Timeout`], [`Error::Channel`].
    pub fn start<C, W, B>(&mut self, client: &mut Client<C, W, B>) -> Result<(), Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.bringup.finish();
        match self.run(client)? {
            Pause::Ready => Ok(()),
            _ => Err(Error::OutOfStep),
        }
    }

    /// Reads configuration bytes that belong together.
    ///
    /// # Errors
    /// [`Error::ConfigRange`] if the device does not have them; otherwise as [`Client::read_config`].
    pub fn read_config<C, W, B>(
        &self,
        client: &mut Client<C, W, B>,
        offset: u32,
        into: &mut [u8],
    ) -> Result<Generation, Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.check_config(offset, into.len())?;
        client.read_config(self.number, offset, into)
    }

    /// Writes configuration bytes.
    ///
    /// # Errors
    /// [`Error::ConfigRange`] if the device does not have them; otherwise as [`Client::write_config`].
    pub fn write_config<C, W, B>(
        &self,
        client: &mut Client<C, W, B>,
        offset: u32,
        data: &[u8],
    ) -> Result<Generation, Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        self.check_config(offset, data.len())?;
        client.write_config(self.number, offset, data)
    }

    /// Resets the device. When this returns, it does not use the memory of its queues any more.
    ///
    /// # Errors
    /// [`Error::StatusRefused`] if it is not reset; [`Error::Timeout`], [`Error::Channel`].
    pub fn reset<C, W, B>(self, client: &mut Client<C, W, B>) -> Result<(), Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        match client.set_status(self.number, DeviceStatus::RESET)? {
            DeviceStatus::RESET => Ok(()),
            status => Err(Error::StatusRefused(status)),
        }
    }

    fn check_config(&self, offset: u32, len: usize) -> Result<(), Error> {
        let end = u32::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len));
        match end {
            Some(end) if end <= self.info().config_size => Ok(()),
            _ => Err(Error::ConfigRange { offset, len }),
        }
    }

    /// Asks and takes answers until it is this side's turn to say what comes next.
    fn run<C, W, B>(&mut self, client: &mut Client<C, W, B>) -> Result<Pause, Error>
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        loop {
            // A request borrows from the machine that takes its answer, so a copy asks.
            let mut asking = self.bringup.clone();
            match asking.step() {
                BringupStep::Send(request) => {
                    // The same step, so that it expects the answer.
                    let _ = self.bringup.step();
                    let bringup = &mut self.bringup;
                    client
                        .ask(self.number, request, |answer| {
                            bringup.handle_response(answer);
                            Some(())
                        })
                        .inspect_err(|_| self.bringup.handle_timeout())?;
                }
                BringupStep::ChooseFeatures(offered) => return Ok(Pause::Choose(offered)),
                BringupStep::Queues(info) => return Ok(Pause::Queues(info)),
                BringupStep::Ready => return Ok(Pause::Ready),
                BringupStep::Failed(error) => {
                    let error = self.error(error);
                    if !matches!(error, Error::NoDevice(_)) {
                        self.give_up(client);
                    }
                    return Err(error);
                }
                BringupStep::Wait => return Err(Error::OutOfStep),
            }
        }
    }

    fn give_up<C, W, B>(&self, client: &mut Client<C, W, B>)
    where
        C: Channel,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        // Only good manners; there is another error to be told.
        let _ = client.set_status(self.number, DeviceStatus::FAILED);
    }

    fn error(&self, error: BringupError) -> Error {
        match error {
            BringupError::Absent => Error::NoDevice(self.number),
            BringupError::FeaturesRefused(_) => Error::FeaturesRefused(self.features()),
            BringupError::NotReset(status) | BringupError::NotReady(status) => {
                Error::StatusRefused(status)
            }
            BringupError::QueueRefused(queue) => Error::QueueRefused(queue),
            _ => Error::BadAnswer {
                request: "the bring-up",
            },
        }
    }
}
