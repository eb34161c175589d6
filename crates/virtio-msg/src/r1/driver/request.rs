// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests of the driver, from their beginning to their response.

use super::operation::{
    BLOCKS, CHUNK, Next, Op, ReadConfig, WriteConfig, answers, without_features_ok,
};
use super::options::config_size;
use super::{Active, DriverAdapter, HIDDEN, Reply, Stale, Wire};
use crate::message::{
    ConfigData, DeviceInfo, FeatureBlocks, ShmInfo, VqueueConfig, VqueueInfo, decode,
};
use crate::r1::device::{halves, whole};
use crate::r1::{Ignored, MESSAGE_SIZE, Message};
use crate::types::{QueueIndex, QueueSize, Token};
use zerocopy::little_endian::U32;

impl<const QUEUES: usize> DriverAdapter<QUEUES> {
    pub(super) fn is_waiting_for_device(&self) -> bool {
        matches!(
            self.active,
            Some(Active {
                wire: Wire::Awaiting(_),
                ..
            })
        )
    }

    /// Gives up the request that the device owes an answer to, and begins the next.
    pub(super) fn abandon(&mut self) {
        let Some(Active {
            op,
            wire: Wire::Awaiting(request),
            ..
        }) = self.active.take()
        else {
            return;
        };
        self.counters.abandoned = self.counters.abandoned.wrapping_add(1);
        self.stale = match self.stale {
            // The one that was skipped was its own: the device lost the other.
            Some(stale) if stale.request == request && stale.skipped => None,
            Some(stale) if stale.request == request => Some(Stale {
                owed: stale.owed.saturating_add(1),
                ..stale
            }),
            _ => Some(Stale {
                request,
                owed: 1,
                skipped: false,
            }),
        };
        if let (Op::Event, Some(status)) = (op, self.config_changed.take()) {
            self.config_event = Some((status, self.generation));
        }
        self.begin();
    }

    /// Begins requests until one has something to send, or there are none.
    pub(super) fn begin(&mut self) {
        while self.active.is_none() && self.replies.room() > 0 {
            let Some(bytes) = self.waiting.pop() else {
                if self.config_changed.is_some() {
                    self.active = Some(Active {
                        token: Token(0),
                        op: Op::Event,
                        wire: Wire::Send(Message::GetConfigGen),
                    });
                }
                return;
            };
            if let Ok(frame) = decode(&bytes, MESSAGE_SIZE) {
                self.counters.requests = self.counters.requests.wrapping_add(1);
                self.active = self.started(&frame).map(|(op, message)| Active {
                    token: frame.token,
                    op,
                    wire: Wire::Send(message),
                });
            }
        }
    }

    /// The operation for a request, and its first message; `None` if it was answered at once.
    fn started(&mut self, frame: &crate::Frame<'_>) -> Option<(Op, Message)> {
        use crate::Message as From;
        Some(match frame.message {
            From::GetDeviceInfo => (
                Op::Info {
                    info: DeviceInfo::ABSENT,
                    queues: 0,
                },
                Message::GetDeviceInfo,
            ),
            From::GetDeviceFeatures { first, count } if first < 2 && count > 0 => (
                Op::GetFeatures { first, count },
                Message::GetFeatures { index: 0 },
            ),
            From::GetDeviceFeatures { first, count } => {
                self.reply_features(frame, first, count, 0);
                return None;
            }
            From::SetDriverFeatures(blocks) => {
                let mut both = halves(self.features);
                for (number, word) in blocks.iter().take(blocks.words.len()) {
                    match usize::try_from(number).ok().and_then(|n| both.get_mut(n)) {
                        Some(half) => *half = word,
                        None => self.foreign |= word != 0,
                    }
                }
                self.features = whole(both);
                let features = self.features;
                (Op::SetFeatures, Message::SetFeatures { index: 0, features })
            }
            From::GetConfig { offset, len } => {
                let len = u8::try_from(len).ok()?;
                (
                    Op::ReadConfig(ReadConfig::new(offset, len)),
                    Message::GetConfigGen,
                )
            }
            From::SetConfig(data) => (
                Op::WriteConfig(WriteConfig::new(data.generation, data.offset, data.data)?),
                Message::GetConfigGen,
            ),
            From::GetDeviceStatus => (Op::Status { set: false }, Message::GetDeviceStatus),
            From::SetDeviceStatus(status) => {
                let status = if self.foreign {
                    without_features_ok(status)
                } else {
                    status
                };
                (Op::Status { set: true }, Message::SetDeviceStatus(status))
            }
            From::GetVqueue(index) if index.to_usize() < QUEUES => {
                (Op::GetQueue(index), Message::GetVqueue(index))
            }
            From::GetVqueue(index) => {
                self.reply(&frame.response(From::Vqueue(VqueueInfo {
                    index,
                    ..VqueueInfo::default()
                })));
                return None;
            }
            From::SetVqueue(config) if self.is_possible(&config) => {
                (Op::SetQueue, Message::SetVqueue(config))
            }
            From::SetVqueue(_) => {
                self.reply(&frame.response(From::VqueueSet));
                return None;
            }
            From::ResetVqueue(index) if index.to_usize() < QUEUES => {
                (Op::ResetQueue, Message::ResetVqueue(index))
            }
            From::ResetVqueue(_) => {
                self.reply(&frame.response(From::VqueueReset));
                return None;
            }
            From::GetShm { index } => {
                self.reply(&frame.response(From::Shm(ShmInfo {
                    index,
                    ..ShmInfo::default()
                })));
                return None;
            }
            From::Ping { data } => (Op::Ping { data }, Message::GetDeviceStatus),
            _ => return None,
        })
    }

    /// Whether the device would take this; QEMU looks at no index.
    fn is_possible(&self, config: &VqueueConfig) -> bool {
        config.size.to_u16().is_some()
            && self
                .queues
                .get(config.index.to_usize())
                .is_some_and(|q| q.max.is_none_or(|max| config.size <= max))
    }

    pub(super) fn reply(&mut self, frame: &crate::Frame<'_>) {
        let mut bytes = [0; MESSAGE_SIZE];
        if let Ok(size) = frame.encode(&mut bytes) {
            self.counters.responses = self.counters.responses.wrapping_add(1);
            // There is room: nothing is begun without.
            self.replies.push(Reply { bytes, size });
        }
    }

    fn reply_features(&mut self, frame: &crate::Frame<'_>, first: u32, count: u32, bits: u64) {
        let known = halves(bits);
        let mut words = [U32::ZERO; BLOCKS as usize];
        for (i, word) in (0..count).zip(words.iter_mut()) {
            let block = first.checked_add(i).and_then(|n| usize::try_from(n).ok());
            *word = block
                .and_then(|n| known.get(n))
                .copied()
                .unwrap_or(0)
                .into();
        }
        let used = usize::try_from(count).map_or(words.len(), |n| n.min(words.len()));
        self.reply(
            &frame.response(crate::Message::DeviceFeatures(FeatureBlocks {
                first,
                count,
                words: &words[..used],
            })),
        );
    }

    pub(super) fn response(&mut self, response: &Message) -> Result<(), Ignored> {
        let stale = self
            .stale
            .filter(|s| s.owed > 0 && answers(&s.request, response));
        let Some(Active {
            token,
            op,
            wire: Wire::Awaiting(request),
        }) = self
            .active
            .filter(|a| matches!(a.wire, Wire::Awaiting(r) if answers(&r, response)))
        else {
            if stale.is_some_and(|s| s.owed == 1) {
                self.stale = None;
            } else if let Some(stale) = stale {
                self.stale = Some(Stale {
                    owed: stale.owed - 1,
                    ..stale
                });
            }
            return Err(Ignored::Unexpected);
        };
        if let Some(stale) = stale {
            self.stale = Some(Stale {
                owed: stale.owed - 1,
                skipped: true,
                ..stale
            });
            return Err(Ignored::Unexpected);
        }
        if self.stale.is_some_and(|s| s.request == request) {
            self.stale = None;
        }
        self.active = self
            .advanced(token, op, response)
            .map(|(op, message)| Active {
                token,
                op,
                wire: Wire::Send(message),
            });
        self.begin();
        Ok(())
    }

    /// The operation after a response, and its next message; `None` if it is done.
    fn advanced(&mut self, token: Token, op: Op, response: &Message) -> Option<(Op, Message)> {
        use crate::Message as To;
        if let Message::ConfigGen(generation) = *response {
            self.generation = generation;
        }
        let done = match (op, *response) {
            (
                Op::Info { .. },
                Message::DeviceInfo {
                    device_id,
                    vendor_id,
                    ..
                },
            ) => {
                let info = DeviceInfo {
                    device_id,
                    vendor_id,
                    feature_bits: 64,
                    config_size: self
                        .options
                        .config_size
                        .unwrap_or_else(|| config_size(device_id)),
                    ..DeviceInfo::ABSENT
                };
                if device_id != 0 && QUEUES > 0 {
                    let op = Op::Info { info, queues: 0 };
                    return Some((op, Message::GetVqueue(QueueIndex(0))));
                }
                To::DeviceInfo(if device_id == 0 {
                    DeviceInfo::ABSENT
                } else {
                    info
                })
            }
            (Op::Info { info, queues }, Message::Vqueue { max_size, .. }) => {
                if let Some(queue) = self.queues.get_mut(QueueIndex(queues).to_usize()) {
                    queue.max = Some(max_size);
                }
                let next = QueueIndex(queues + 1);
                if max_size.0 != 0 && next.to_usize() < QUEUES {
                    let op = Op::Info {
                        info,
                        queues: next.0,
                    };
                    return Some((op, Message::GetVqueue(next)));
                }
                To::DeviceInfo(DeviceInfo {
                    max_queues: queues + u32::from(max_size.0 != 0),
                    ..info
                })
            }
            (Op::GetFeatures { first, count }, Message::Features { features, .. }) => {
                let frame = self.frame(token, To::GetDeviceFeatures { first, count });
                self.reply_features(&frame, first, count, features & !HIDDEN);
                return None;
            }
            (Op::SetFeatures, _) => To::DriverFeaturesSet,
            (Op::ReadConfig(mut read), _) => match read.step(response) {
                Next::Send(message) => return Some((Op::ReadConfig(read), message)),
                Next::Done | Next::Rejected => {
                    let reply = To::Config(ConfigData {
                        generation: read.before,
                        offset: read.offset,
                        len: read.len.into(),
                        data: &read.data[..usize::from(read.len).min(CHUNK)],
                    });
                    self.reply(&self.frame(token, reply));
                    return None;
                }
            },
            (Op::WriteConfig(mut write), _) => {
                let len = match write.step(response) {
                    Next::Send(message) => return Some((Op::WriteConfig(write), message)),
                    Next::Done => write.len,
                    Next::Rejected => 0,
                };
                let reply = To::ConfigSet(ConfigData {
                    generation: write.generation,
                    offset: write.offset,
                    len: len.into(),
                    data: &write.data[..usize::from(len).min(CHUNK)],
                });
                self.reply(&self.frame(token, reply));
                return None;
            }
            (Op::Status { set: false }, Message::DeviceStatus(status)) => To::DeviceStatus(status),
            (Op::Status { set: true }, Message::DeviceStatus(status)) => {
                To::DeviceStatusSet(status)
            }
            (Op::GetQueue(index), Message::Vqueue { max_size, .. }) => {
                To::Vqueue(self.queue_info(index, max_size))
            }
            (Op::ResetQueue, _) => To::VqueueReset,
            (Op::Ping { data }, _) => To::Pong { data },
            (Op::Event, _) => {
                let status = self.config_changed.take()?;
                self.config_event = Some((status, self.generation));
                return None;
            }
            _ => return None,
        };
        self.reply(&self.frame(token, done));
        None
    }

    fn queue_info(&mut self, index: QueueIndex, max_size: QueueSize) -> VqueueInfo {
        let none = VqueueInfo {
            index,
            ..VqueueInfo::default()
        };
        let Some(queue) = self.queues.get_mut(index.to_usize()) else {
            return none;
        };
        queue.max = Some(max_size);
        if max_size.0 == 0 {
            return none;
        }
        let VqueueConfig {
            index: _,
            size,
            descriptor,
            driver,
            device,
        } = queue.config;
        VqueueInfo {
            index,
            max_size,
            size,
            descriptor,
            driver,
            device,
        }
    }
}
