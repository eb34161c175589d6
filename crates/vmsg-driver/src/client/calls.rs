// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A call for each request of virtio-msg.

use core::time::Duration;

use virtio_msg::{
    Channel, ConfigData, DevNum, DeviceInfo, DeviceStatus, FeatureBlocks, FeatureSet, Generation,
    MAX_BLOCKS, Message, QueueIndex, ShmInfo, U32, VqueueConfig, VqueueInfo,
};

use super::Client;
use crate::error::Error;
use crate::wait::Wait;

/// Bytes of a message that carries feature blocks, without them.
const FEATURES_HEAD: usize = 16;
/// Bytes of a message that carries configuration, without it.
const CONFIG_HEAD: usize = 20;
/// How often a configuration space is read again because it changed meanwhile.
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
        self.read_config_part(device, 0, &mut [])
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
        let end = u32::try_from(into.len())
            .ok()
            .and_then(|len| offset.checked_add(len));
        let Some(end) = end else {
            return Err(Error::ConfigRange {
                offset,
                len: into.len(),
            });
        };
        let step = self.config_per_message();
        for _ in 0..CONFIG_RETRIES {
            let mut first = None;
            let mut stable = true;
            for (at, part) in (offset..=end).step_by(step).zip(into.chunks_mut(step)) {
                let generation = self.read_config_part(device, at, part)?;
                stable &= *first.get_or_insert(generation) == generation;
            }
            match first {
                None => return self.config_generation(device),
                Some(generation) if stable => return Ok(generation),
                Some(_) => {}
            }
        }
        Err(Error::ConfigUnstable)
    }

    /// Writes configuration bytes (SET_CONFIG), in as many messages as the bus makes necessary, each on top of the generation that
    /// the one before resulted in.
    ///
    /// # Errors
    /// [`Error::ConfigRefused`] if the device did not take them, or they changed under us each time; then a part may be written.
    /// [`Error::ConfigRange`], [`Error::BadAnswer`], [`Error::Timeout`], [`Error::Channel`].
    pub fn write_config(
        &mut self,
        device: DevNum,
        offset: u32,
        data: &[u8],
    ) -> Result<Generation, Error> {
        let end = u32::try_from(data.len())
            .ok()
            .and_then(|len| offset.checked_add(len));
        let Some(end) = end else {
            return Err(Error::ConfigRange {
                offset,
                len: data.len(),
            });
        };
        let step = self.config_per_message();
        let mut generation = self.config_generation(device)?;
        for (at, part) in (offset..=end).step_by(step).zip(data.chunks(step)) {
            generation = self.write_config_part(device, generation, at, part)?;
        }
        Ok(generation)
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

    fn config_per_message(&self) -> usize {
        self.max.saturating_sub(CONFIG_HEAD).max(1)
    }

    fn read_config_part(
        &mut self,
        device: DevNum,
        offset: u32,
        into: &mut [u8],
    ) -> Result<Generation, Error> {
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        self.ask(
            device,
            Message::GetConfig { offset, len },
            |answer| match answer {
                Message::Config(part) if part.offset == offset && part.data.len() == into.len() => {
                    into.copy_from_slice(part.data);
                    Some(part.generation)
                }
                _ => None,
            },
        )
    }

    fn write_config_part(
        &mut self,
        device: DevNum,
        generation: Generation,
        offset: u32,
        data: &[u8],
    ) -> Result<Generation, Error> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut generation = generation;
        for _ in 0..CONFIG_RETRIES {
            let request = Message::SetConfig(ConfigData {
                generation,
                offset,
                len,
                data,
            });
            let (now, taken) = self.ask(device, request, |answer| match answer {
                Message::ConfigSet(part)
                    if part.offset == offset && (part.len == 0 || part.len == len) =>
                {
                    Some((part.generation, part.len))
                }
                _ => None,
            })?;
            if taken == len {
                return Ok(now);
            }
            // Refused because it has changed meanwhile, or for good: only the former is worth another try.
            if now == generation {
                return Err(Error::ConfigRefused);
            }
            generation = now;
        }
        Err(Error::ConfigRefused)
    }
}

/// Blocks of features that a device has and a [`FeatureSet`] holds.
fn blocks(info: &DeviceInfo) -> u32 {
    info.feature_bits.div_ceil(32).min(FeatureSet::BITS / 32)
}
