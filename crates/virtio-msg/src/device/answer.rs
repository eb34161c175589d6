// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device machine sends.

use super::DeviceMachine;
use super::machine::{ConfigChange, Reply, Stage};
use super::queues::QueueSlot;
use crate::feature_set::MAX_BLOCKS;
use crate::message::{
    ConfigData, ConfigEvent, DeviceInfo, EncodeError, FeatureBlocks, Frame, Message, ShmInfo,
};
use crate::status::DeviceStatus;
use crate::types::Token;
use zerocopy::little_endian::U32;

/// Bytes of an EVENT_CONFIG before its data.
const CONFIG_EVENT_HEAD: usize = 24;

impl<Q, C> DeviceMachine<Q, C>
where
    Q: AsRef<[QueueSlot]> + AsMut<[QueueSlot]>,
    C: AsRef<[u8]> + AsMut<[u8]> + Clone,
{
    /// Writes the next message for the driver to `out` and gives its size. `out` has room for the message size of the bus; with less
    /// room a message may stay where it is. Call until `None`.
    pub fn poll_transmit(&mut self, out: &mut [u8]) -> Option<usize> {
        if let Stage::Answering { token, reply } = self.stage {
            let size = self.encode_reply(token, reply, out).ok()?;
            self.stage = Stage::Idle;
            self.counters.responses = self.counters.responses.wrapping_add(1);
            return Some(size);
        }
        if !self.status.contains(DeviceStatus::DRIVER_OK) {
            return None;
        }
        if self.config_event != ConfigChange::None {
            let size = self.encode_config_event(out).ok()?;
            self.config_event = ConfigChange::None;
            self.counters.config_events = self.counters.config_events.wrapping_add(1);
            return Some(size);
        }
        let message = |queue| Frame::new(self.dev_num, Token(0), Message::EventUsed { queue });
        let size = message(crate::QueueIndex(0)).encode(out).ok()?;
        let queue = self.queues.pop_used()?;
        message(queue).encode(out).ok()?;
        self.counters.used_events = self.counters.used_events.wrapping_add(1);
        Some(size)
    }

    /// What GET_DEVICE_INFO tells.
    pub fn info(&self) -> DeviceInfo {
        // Linux of 2025 wants 64 feature bits even if fewer are offered.
        let feature_bits = (self.offered.used_blocks() * 32).max(64);
        DeviceInfo {
            device_id: self.identity.device_id,
            vendor_id: self.identity.vendor_id,
            feature_bits,
            config_size: u32::try_from(self.config.as_ref().len()).unwrap_or(u32::MAX),
            max_queues: self
                .queues
                .len()
                .saturating_sub(self.identity.admin_count.into()),
            admin_first: self.identity.admin_first,
            admin_count: self.identity.admin_count,
        }
    }

    fn encode_reply(
        &self,
        token: Token,
        reply: Reply,
        out: &mut [u8],
    ) -> Result<usize, EncodeError> {
        let mut words = [U32::ZERO; MAX_BLOCKS];
        let message = match reply {
            Reply::Info => Message::DeviceInfo(self.info()),
            Reply::Features { first, count } => {
                let mut used = 0;
                for (i, word) in (0..count).zip(words.iter_mut()) {
                    *word = first
                        .checked_add(i)
                        .map_or(0, |n| self.offered.block(n))
                        .into();
                    used += 1;
                }
                Message::DeviceFeatures(FeatureBlocks {
                    first,
                    count,
                    words: &words[..used],
                })
            }
            Reply::FeaturesSet => Message::DriverFeaturesSet,
            Reply::Config { offset, len } => Message::Config(ConfigData {
                generation: self.generation,
                offset,
                len,
                data: self.config_at(offset, len),
            }),
            Reply::ConfigSet { offset, len } => Message::ConfigSet(ConfigData {
                generation: self.generation,
                offset,
                len,
                data: self.config_at(offset, len),
            }),
            Reply::Status => Message::DeviceStatus(self.status),
            Reply::StatusSet => Message::DeviceStatusSet(self.status),
            Reply::Vqueue(queue) => Message::Vqueue(self.queues.info(queue)),
            Reply::VqueueSet => Message::VqueueSet,
            Reply::VqueueReset => Message::VqueueReset,
            Reply::Shm(index) => {
                let none = ShmInfo {
                    index,
                    ..ShmInfo::default()
                };
                let mut regions = self.regions.iter();
                let region = regions.find(|region| region.len != 0 && region.index == index);
                Message::Shm(region.copied().unwrap_or(none))
            }
        };
        Frame::new(self.dev_num, token, message).encode(out)
    }

    /// As many of these bytes as there are in the configuration space.
    fn config_at(&self, offset: u32, len: u32) -> &[u8] {
        let config = self.config.as_ref();
        let at = |n: u32| usize::try_from(n).unwrap_or(usize::MAX).min(config.len());
        let end = at(offset).saturating_add(at(len)).min(config.len());
        config.get(at(offset)..end).unwrap_or(&[])
    }

    fn encode_config_event(&self, out: &mut [u8]) -> Result<usize, EncodeError> {
        let (offset, data) = match self.config_event {
            ConfigChange::Bytes { start, end } => {
                (start, self.config_at(start, end.saturating_sub(start)))
            }
            _ => (0, &[][..]),
        };
        let max = self.options.max_message_size.min(usize::from(u16::MAX));
        // Linux wants exactly as many bytes as the length says. What does not fit is for the driver to read.
        let (offset, data) = if CONFIG_EVENT_HEAD + data.len() <= max {
            (offset, data)
        } else {
            (0, &[][..])
        };
        let len = u32::try_from(data.len()).unwrap_or(0);
        let event = ConfigEvent {
            status: self.status,
            generation: self.generation,
            offset,
            len,
            data,
        };
        Frame::new(self.dev_num, Token(0), Message::EventConfig(event)).encode(out)
    }
}

/// The answer for a device number without a device: only GET_DEVICE_INFO has one, all zero. Writes it to `out` and gives its size.
pub fn answer_absent(frame: &Frame<'_>, out: &mut [u8]) -> Option<usize> {
    match frame.message {
        Message::GetDeviceInfo => frame
            .response(Message::DeviceInfo(DeviceInfo::ABSENT))
            .encode(out)
            .ok(),
        _ => None,
    }
}
