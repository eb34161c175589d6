// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One revision-1 request as a sequence of r1 requests.

use crate::feature_set::MAX_BLOCKS;
use crate::message::DeviceInfo;
use crate::r1::Message;
use crate::status::DeviceStatus;
use crate::types::{Generation, QueueIndex};

/// Bytes of configuration in one revision-1 message of 48 bytes.
pub(super) const CHUNK: usize = 28;

/// r1 offsets have 24 bits.
const CONFIG_END: u32 = 1 << 24;

/// How often configuration that changes while it is read is read.
const READ_TRIES: u8 = 3;

/// What is being done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// DEVICE_INFO, then GET_VQUEUE from 0 until there is none.
    Info { info: DeviceInfo, queues: u32 },
    /// GET_FEATURES.
    GetFeatures { first: u32, count: u32 },
    /// SET_FEATURES.
    SetFeatures,
    /// GET_CONFIG_GEN around any number of GET_CONFIG.
    ReadConfig(ReadConfig),
    /// GET_CONFIG_GEN around any number of SET_CONFIG.
    WriteConfig(WriteConfig),
    /// GET_DEVICE_STATUS. With `set`, after SET_DEVICE_STATUS.
    Status { set: bool },
    /// GET_VQUEUE.
    GetQueue(QueueIndex),
    /// SET_VQUEUE.
    SetQueue,
    /// RESET_VQUEUE, then GET_DEVICE_STATUS: once that is answered, the device has seen both.
    ResetQueue,
    /// GET_DEVICE_STATUS, to see whether anybody is there.
    Ping { data: u32 },
    /// GET_CONFIG_GEN, for an EVENT_CONFIG that came without generation.
    Event,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct ReadConfig {
    pub(super) offset: u32,
    pub(super) len: u8,
    pub(super) data: [u8; CHUNK],
    pub(super) before: Generation,
    stage: Stage,
    done: u8,
    tries: u8,
    /// Up to here in steps of `grain` bytes: see [`ReadConfig::took`].
    grain_end: u8,
    grain: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Before,
    Bytes,
    After,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct WriteConfig {
    pub(super) generation: Generation,
    pub(super) offset: u32,
    pub(super) len: u8,
    pub(super) data: [u8; CHUNK],
    stage: Stage,
    done: u8,
}

/// How it goes on.
pub(super) enum Next {
    Send(Message),
    Done,
    /// Done, and the write is rejected.
    Rejected,
}

/// The largest of 4, 2 and 1 bytes that is left and naturally aligned: QEMU ends itself on other sizes.
fn natural(offset: u32, left: u8, grain: u8) -> u8 {
    [4, 2]
        .into_iter()
        .find(|&size: &u8| size <= left && size <= grain && offset % u32::from(size) == 0)
        .unwrap_or(1)
}

impl ReadConfig {
    pub(super) fn new(offset: u32, len: u8) -> ReadConfig {
        ReadConfig {
            offset,
            len,
            data: [0; CHUNK],
            before: Generation(0),
            stage: Stage::Before,
            done: 0,
            tries: 1,
            grain_end: 0,
            grain: 4,
        }
    }

    fn size(&self) -> u8 {
        let grain = if self.done < self.grain_end {
            self.grain
        } else {
            4
        };
        natural(
            self.offset.saturating_add(u32::from(self.done)),
            self.len.saturating_sub(self.done),
            grain,
        )
    }

    /// Starts over where there is something to read; what r1 cannot address reads as zeros.
    fn restart(&mut self) {
        let reachable = self
            .offset
            .checked_add(self.len.into())
            .is_some_and(|end| end <= CONFIG_END);
        self.done = if reachable { 0 } else { self.len };
        self.grain_end = 0;
        self.stage = Stage::Bytes;
    }

    fn send(&mut self) -> Next {
        if self.stage == Stage::Bytes && self.done >= self.len {
            if self.len == 0 || self.offset >= CONFIG_END {
                return Next::Done;
            }
            self.stage = Stage::After;
        }
        Next::Send(match self.stage {
            Stage::Before | Stage::After => Message::GetConfigGen,
            Stage::Bytes => Message::GetConfig {
                offset: self.offset.saturating_add(u32::from(self.done)),
                size: self.size(),
            },
        })
    }

    pub(super) fn step(&mut self, answer: &Message) -> Next {
        match (self.stage, *answer) {
            (Stage::Before, Message::ConfigGen(generation)) => {
                self.before = generation;
                self.restart();
            }
            (Stage::Bytes, Message::Config { data, size, .. }) => self.took(data, size),
            // Still changing after the last try: the older generation makes the next look notice.
            (Stage::After, Message::ConfigGen(generation)) => {
                if generation == self.before || self.tries >= READ_TRIES {
                    return Next::Done;
                }
                self.before = generation;
                self.tries += 1;
                self.restart();
            }
            _ => {}
        }
        self.send()
    }

    /// A read that reaches beyond the configuration space is all ones in QEMU, also where there are bytes: halves tell more.
    fn took(&mut self, data: u64, size: u8) {
        let bytes = data.to_le_bytes();
        let from = usize::from(self.done);
        let Some(new) = bytes.get(..usize::from(size)) else {
            return;
        };
        if size > 1 && new.iter().all(|&b| b == 0xff) {
            self.grain = size / 2;
            self.grain_end = self.done.saturating_add(size);
            return;
        }
        if let Some(to) = self.data.get_mut(from..from + new.len()) {
            to.copy_from_slice(new);
        }
        self.done = self.done.saturating_add(size);
    }
}

impl WriteConfig {
    /// `None` if it is longer than a message.
    pub(super) fn new(generation: Generation, offset: u32, bytes: &[u8]) -> Option<WriteConfig> {
        let mut data = [0; CHUNK];
        data.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(WriteConfig {
            generation,
            offset,
            len: u8::try_from(bytes.len()).ok()?,
            data,
            stage: Stage::Before,
            done: 0,
        })
    }

    fn send(&mut self) -> Next {
        if self.stage == Stage::Bytes && self.done >= self.len {
            self.stage = Stage::After;
        }
        if self.stage != Stage::Bytes {
            return Next::Send(Message::GetConfigGen);
        }
        let offset = self.offset.saturating_add(u32::from(self.done));
        let size = natural(offset, self.len.saturating_sub(self.done), 4);
        let mut bytes = [0; 8];
        let from = usize::from(self.done);
        for (to, byte) in bytes
            .iter_mut()
            .zip(self.data.iter().skip(from))
            .take(usize::from(size))
        {
            *to = *byte;
        }
        Next::Send(Message::SetConfig {
            offset,
            size,
            data: u64::from_le_bytes(bytes),
        })
    }

    pub(super) fn step(&mut self, answer: &Message) -> Next {
        match (self.stage, *answer) {
            (Stage::Before, Message::ConfigGen(generation)) => {
                let stale = generation != self.generation;
                self.generation = generation;
                let reachable = self
                    .offset
                    .checked_add(self.len.into())
                    .is_some_and(|end| end <= CONFIG_END);
                if stale || !reachable || self.len == 0 {
                    return Next::Rejected;
                }
                self.stage = Stage::Bytes;
            }
            (Stage::Bytes, Message::ConfigSet { size, .. }) => {
                self.done = self.done.saturating_add(size);
            }
            (Stage::After, Message::ConfigGen(generation)) => {
                self.generation = generation;
                return Next::Done;
            }
            _ => {}
        }
        self.send()
    }
}

/// Whether this is the response of that request: the id, and what the response repeats of the request.
pub(super) fn answers(request: &Message, response: &Message) -> bool {
    match (*request, *response) {
        (Message::GetDeviceInfo, Message::DeviceInfo { .. })
        | (Message::GetConfigGen, Message::ConfigGen(_))
        | (Message::GetDeviceStatus, Message::DeviceStatus(_)) => true,
        (Message::GetFeatures { index: a }, Message::Features { index: b, .. }) => a == b,
        (
            Message::SetFeatures {
                index: a,
                features: x,
            },
            Message::FeaturesSet {
                index: b,
                features: y,
            },
        ) => a == b && x == y,
        (
            Message::GetConfig { offset: a, size: m },
            Message::Config {
                offset: b, size: n, ..
            },
        )
        | (
            Message::SetConfig {
                offset: a, size: m, ..
            },
            Message::ConfigSet {
                offset: b, size: n, ..
            },
        ) => a == b && m == n,
        (Message::GetVqueue(a), Message::Vqueue { index: b, .. }) => a == b,
        _ => false,
    }
}

/// The most blocks of features that a revision-1 message of 48 bytes has.
pub(super) const BLOCKS: u32 = 8;
const _: () = assert!(BLOCKS as usize <= MAX_BLOCKS);

/// What SET_DEVICE_STATUS is sent when the driver has set feature bits that r1 cannot carry: not FEATURES_OK, so that the driver sees it refused.
pub(super) fn without_features_ok(status: DeviceStatus) -> DeviceStatus {
    status & !(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK)
}
