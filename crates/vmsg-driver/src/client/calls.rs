// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A call for each request of virtio-msg.

use core::time::Duration;

use virtio_msg::driver::{ConfigError, ConfigReader, ConfigStep, ConfigWriter};
use virtio_msg::{
    Channel, DevNum, DeviceInfo, DeviceStatus, FeatureBlocks, FeatureSet, Generation, MAX_BLOCKS,
    Message, QueueIndex, ShmInfo, U32, VqueueConfig, VqueueInfo,
};

use super::Client;
use crate::error::Error;
use crate::wait::Wait;

/// Bytes of a message that carries feature blocks, without them.
const FEATURES_HEAD: usize = 16;
/// How often a write is tried again because the configuration changed meanwhile.
const CONFIG_RETRIES: usize = 16;

impl<C: Channel, W: Wait<C>, B: AsRef<[u8]> + AsMut<[u8]>> Client<C, W, B> {
    /// What device `device` is (GET_DEVICE_INFO).
    ///
    /// # Errors
    /// [`Error::NoDevice`] if there is none; [`Error::Timeout`], [`Error::Channel`].
    pub fn device_info(&mut self, device: DevNum) -> Result<DeviceInfo, Error> {
        let info = self.ask(device, Message::GetDeviceInfo, |answer| match answer {
            Message::DeviceInfo(info) => Some(*info),
            _ => None,
        })?;
        if info.is_present() {
            Ok(info)
        } else {
            Err(Error::NoDevice(device))
        }
    }

    /// All features that a device offers (GET_DEVICE_FEATURES), in as many messages as the bus makes necessary. `info` says how
    /// many there are; bits that no [`FeatureSet`] can hold are left out.
    ///
    /// # Errors
    /// [`Error::BadAnswer`] if the answer has other blocks than those asked for; [`Error::Timeout`], [`Error::Channel`].
    pub fn device_features(
        &mut self,
        device: DevNum,
        info: &DeviceInfo,
    ) -> Result<FeatureSet, Error> {
        let mut features = FeatureSet::new();
        let blocks = blocks(info);
        let step = self.blocks_per_message();
        let mut first = 0;
        while first < blocks {
            let count = step.min(blocks - first);
            self.ask(
                device,
                Message::GetDeviceFeatures { first, count },
                |answer| match answer {
                    Message::DeviceFeatures(part) if part.first == first && part.count == count => {
                        part.store(&mut features);
                        Some(())
                    }
                    _ => None,
                },
            )?;
            first += count;
        }
        Ok(features)
    }

    /// Tells a device which features the driver accepts (SET_DRIVER_FEATURES): all blocks that the device has.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`]. Whether the device agrees shows when FEATURES_OK is set.
    pub fn set_driver_features(
        &mut self,
        device: DevNum,
        info: &DeviceInfo,
        features: &FeatureSet,
    ) -> Result<(), Error> {
        let blocks = blocks(info);
        let step = self.blocks_per_message();
        let mut first = 0;
        while first < blocks {
            let count = step.min(blocks - first);
            let mut words = [U32::ZERO; MAX_BLOCKS];
            for (i, word) in (0..count).zip(&mut words) {
                *word = features.block(first + i).into();
            }
            let words = &words[..count as usize];
            let request = Message::SetDriverFeatures(FeatureBlocks {
                first,
                count,
                words,
            });
            self.ask(device, request, |answer| {
                matches!(answer, Message::DriverFeaturesSet).then_some(())
            })?;
            first += count;
        }
        Ok(())
    }

    /// The status of a device (GET_DEVICE_STATUS).
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`].
    pub fn status(&mut self, device: DevNum) -> Result<DeviceStatus, Error> {
        self.ask(device, Message::GetDeviceStatus, |answer| match answer {
            Message::DeviceStatus(status) => Some(*status),
            _ => None,
        })
    }

    /// Sets the status of a device and gives the one that resulted (SET_DEVICE_STATUS). The reset, status 0, is complete when
    /// this returns 0.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`].
    pub fn set_status(
        &mut self,
        device: DevNum,
        status: DeviceStatus,
    ) -> Result<DeviceStatus, Error> {
        self.ask(
            device,
            Message::SetDeviceStatus(status),
            |answer| match answer {
                Message::DeviceStatusSet(status) => Some(*status),
                _ => None,
            },
        )
    }

    /// The generation of the configuration space (GET_CONFIG of no bytes).
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`].
    pub fn config_generation(&mut self, device: DevNum) -> Result<Generation, Error> {
        self.read_config(device, 0, &mut [])
    }

    /// Reads configuration bytes that belong together (GET_CONFIG), in as many messages as the bus makes necessary, until all of
    /// them are of one generation.
    ///
    /// # Errors
    /// [`Error::ConfigUnstable`] if they change each time; [`Error::ConfigRange`]; [`Error::BadAnswer`], [`Error::Timeout`],
    /// [`Error::Channel`].
    pub fn read_config(
        &mut self,
        device: DevNum,
        offset: u32,
        into: &mut [u8],
    ) -> Result<Generation, Error> {
        let len = into.len();
        let mut reader = ConfigReader::new(offset, into, self.max);
        loop {
            match reader.step() {
                ConfigStep::Send(request) => self.ask(device, request, |answer| {
                    reader.handle_response(answer);
                    Some(())
                })?,
                ConfigStep::Done(generation) => return Ok(generation),
                ConfigStep::Failed(error) => {
                    return Err(config_error(error, "GET_CONFIG", offset, len));
                }
                ConfigStep::Wait => {
                    return Err(Error::BadAnswer {
                        request: "GET_CONFIG",
                    });
                }
            }
        }
    }

    /// Writes configuration bytes (SET_CONFIG), in as many messages as the bus makes necessary, each on top of the generation that
    /// the one before resulted in. If the configuration has changed meanwhile, what was refused is written again on top of that.
    ///
    /// # Errors
    /// [`Error::ConfigRefused`] if the device does not take them; then a part may be written. [`Error::ConfigRange`],
    /// [`Error::BadAnswer`], [`Error::Timeout`], [`Error::Channel`].
    pub fn write_config(
        &mut self,
        device: DevNum,
        offset: u32,
        data: &[u8],
    ) -> Result<Generation, Error> {
        let mut known = self.config_generation(device)?;
        let mut at = offset;
        let mut rest = data;
        for _ in 0..CONFIG_RETRIES {
            let mut writer = ConfigWriter::new(at, rest, known, self.max);
            let (generation, written) = loop {
                match writer.step() {
                    ConfigStep::Send(request) => self.ask(device, request, |answer| {
                        writer.handle_response(answer);
                        Some(())
                    })?,
                    ConfigStep::Done(generation) => return Ok(generation),
                    ConfigStep::Failed(ConfigError::Rejected {
                        generation,
                        written,
                    }) => break (generation, written),
                    ConfigStep::Failed(error) => {
                        return Err(config_error(error, "SET_CONFIG", offset, data.len()));
                    }
                    ConfigStep::Wait => {
                        return Err(Error::BadAnswer {
                            request: "SET_CONFIG",
                        });
                    }
                }
            };
            // Refused although nothing has changed: it will not be taken at all.
            if written == 0 && generation == known {
                break;
            }
            known = generation;
            rest = rest.get(written..).unwrap_or(&[]);
            // Within the range that the writer has checked.
            at = at.saturating_add(u32::try_from(written).unwrap_or(u32::MAX));
        }
        Err(Error::ConfigRefused)
    }

    /// What a queue can be and is (GET_VQUEUE).
    ///
    /// # Errors
    /// [`Error::NoQueue`] if there is none; [`Error::BadAnswer`] if the answer is about another queue; [`Error::Timeout`],
    /// [`Error::Channel`].
    pub fn queue(&mut self, device: DevNum, queue: QueueIndex) -> Result<VqueueInfo, Error> {
        let info = self.ask(device, Message::GetVqueue(queue), |answer| match answer {
            Message::Vqueue(info) if info.index == queue => Some(*info),
            _ => None,
        })?;
        if info.max_size.0 == 0 {
            Err(Error::NoQueue(queue))
        } else {
            Ok(info)
        }
    }

    /// Sets a queue up (SET_VQUEUE).
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`]. The answer says nothing: [`Client::queue`] shows what the device made of it.
    pub fn set_queue(&mut self, device: DevNum, config: VqueueConfig) -> Result<(), Error> {
        self.ask(device, Message::SetVqueue(config), |answer| {
            matches!(answer, Message::VqueueSet).then_some(())
        })
    }

    /// Resets a single queue (RESET_VQUEUE). Needs RING_RESET.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::Channel`].
    pub fn reset_queue(&mut self, device: DevNum, queue: QueueIndex) -> Result<(), Error> {
        self.ask(device, Message::ResetVqueue(queue), |answer| {
            matches!(answer, Message::VqueueReset).then_some(())
        })
    }

    /// Where shared-memory region `index` is (GET_SHM). `None`: there is no such region.
    ///
    /// # Errors
    /// [`Error::Timeout`], also from devices that do not know this request; [`Error::Channel`].
    pub fn shared_memory(&mut self, device: DevNum, index: u32) -> Result<Option<ShmInfo>, Error> {
        let info = self.ask(device, Message::GetShm { index }, |answer| match answer {
            Message::Shm(info) if info.index == index => Some(*info),
            _ => None,
        })?;
        Ok((info.len != 0).then_some(info))
    }

    /// Asks whether the other side lives (PING), and gives the time until it answered.
    ///
    /// # Errors
    /// [`Error::BadAnswer`] if another number comes back; [`Error::Timeout`], [`Error::Channel`].
    pub fn ping(&mut self, data: u32) -> Result<Duration, Error> {
        let start = self.wait.now();
        self.ask(DevNum(0), Message::Ping { data }, |answer| {
            matches!(answer, Message::Pong { data: d } if *d == data).then_some(())
        })?;
        Ok(self.wait.now().saturating_since(start))
    }

    fn blocks_per_message(&self) -> u32 {
        u32::try_from(self.max.saturating_sub(FEATURES_HEAD) / 4)
            .unwrap_or(u32::MAX)
            .max(1)
    }
}

fn config_error(error: ConfigError, request: &'static str, offset: u32, len: usize) -> Error {
    match error {
        ConfigError::Unstable => Error::ConfigUnstable,
        ConfigError::BadRange => Error::ConfigRange { offset, len },
        _ => Error::BadAnswer { request },
    }
}

/// Blocks of features that a device has and a [`FeatureSet`] holds.
fn blocks(info: &DeviceInfo) -> u32 {
    info.feature_bits.div_ceil(32).min(FeatureSet::BITS / 32)
}
