// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Configuration space through messages of limited size.

use crate::message::{ConfigData, Message};
use crate::types::Generation;
use crate::wire::MIN_MESSAGE_SIZE;
use thiserror::Error;

/// Bytes of GET_CONFIG's response and of SET_CONFIG before the data.
const CONFIG_HEAD: usize = 20;

/// A space that changes so often while it is read is not going to hold still.
const MAX_RESTARTS: u8 = 16;

/// Why the configuration was not read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The device answered something else than it was asked.
    #[error("the device answered another message or another range")]
    BadAnswer,
    /// The space changed each time before it was read to the end.
    #[error("the configuration keeps changing")]
    Unstable,
    /// The write was rejected: the configuration has changed, or cannot be written there. Bytes before were written.
    #[error(
        "the device rejected the write after {written} bytes; the generation is now {generation}"
    )]
    Rejected {
        /// The generation that the device has now.
        generation: Generation,
        /// Bytes written before.
        written: usize,
    },
    /// The range ends beyond what an offset can say.
    #[error("no such range")]
    BadRange,
}

/// What a [`ConfigReader`] or [`ConfigWriter`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigStep<'a> {
    /// Send this request to the device.
    Send(Message<'a>),
    /// The response is awaited.
    Wait,
    /// All is read or written; the generation it has.
    Done(Generation),
    /// It did not work out.
    Failed(ConfigError),
}

fn chunk_of(max_message_size: usize) -> usize {
    max_message_size.clamp(MIN_MESSAGE_SIZE, usize::from(u16::MAX)) - CONFIG_HEAD
}

fn offset_at(base: u32, done: usize) -> Result<u32, ConfigError> {
    u32::try_from(done)
        .ok()
        .and_then(|done| base.checked_add(done))
        .ok_or(ConfigError::BadRange)
}

/// Reads a range such that all its bytes are of one generation: if the generation changes on the way, it starts again.
#[derive(Debug)]
pub struct ConfigReader<'b> {
    buf: &'b mut [u8],
    base: u32,
    done: usize,
    chunk: usize,
    generation: Option<Generation>,
    restarts: u8,
    sent: bool,
    failed: Option<ConfigError>,
}

impl<'b> ConfigReader<'b> {
    /// Fills `buf` from `offset` on, over a bus with this message size. An empty `buf` reads the generation.
    pub fn new(offset: u32, buf: &'b mut [u8], max_message_size: usize) -> ConfigReader<'b> {
        let chunk = chunk_of(max_message_size);
        let failed = offset_at(offset, buf.len()).err();
        ConfigReader {
            buf,
            base: offset,
            done: 0,
            chunk,
            generation: None,
            restarts: 0,
            sent: false,
            failed,
        }
    }

    fn range(&self) -> Option<(u32, u32)> {
        let len = self.chunk.min(self.buf.len() - self.done);
        Some((
            offset_at(self.base, self.done).ok()?,
            u32::try_from(len).ok()?,
        ))
    }

    /// What to do now.
    pub fn step(&mut self) -> ConfigStep<'static> {
        if let Some(error) = self.failed {
            return ConfigStep::Failed(error);
        }
        if self.sent {
            return ConfigStep::Wait;
        }
        match (self.generation, self.range()) {
            (Some(generation), _) if self.done == self.buf.len() => ConfigStep::Done(generation),
            (_, Some((offset, len))) => {
                self.sent = true;
                ConfigStep::Send(Message::GetConfig { offset, len })
            }
            _ => ConfigStep::Failed(ConfigError::BadRange),
        }
    }

    /// Takes the response to the last request in.
    pub fn handle_response(&mut self, message: &Message<'_>) {
        if !self.sent || self.failed.is_some() {
            return;
        }
        self.sent = false;
        let data = match (message, self.range()) {
            (Message::Config(data), Some((offset, len)))
                if data.offset == offset
                    && data.len == len
                    && u32::try_from(data.data.len()) == Ok(len) =>
            {
                data
            }
            _ => {
                self.failed = Some(ConfigError::BadAnswer);
                return;
            }
        };
        if self.generation.is_some_and(|g| g != data.generation) {
            self.generation = None;
            self.done = 0;
            self.restarts += 1;
            if self.restarts > MAX_RESTARTS {
                self.failed = Some(ConfigError::Unstable);
            }
            return;
        }
        self.generation = Some(data.generation);
        let end = self.done + data.data.len();
        if let Some(to) = self.buf.get_mut(self.done..end) {
            to.copy_from_slice(data.data);
            self.done = end;
        }
    }
}

/// Writes a range, with the generation that the driver knows.
#[derive(Debug)]
pub struct ConfigWriter<'d> {
    data: &'d [u8],
    base: u32,
    done: usize,
    chunk: usize,
    generation: Generation,
    sent: bool,
    failed: Option<ConfigError>,
}

impl<'d> ConfigWriter<'d> {
    /// Writes `data` to `offset` and on, over a bus with this message size. `generation` is the last one that the driver has seen.
    pub fn new(
        offset: u32,
        data: &'d [u8],
        generation: Generation,
        max_message_size: usize,
    ) -> ConfigWriter<'d> {
        let chunk = chunk_of(max_message_size);
        let failed = offset_at(offset, data.len()).err();
        ConfigWriter {
            data,
            base: offset,
            done: 0,
            chunk,
            generation,
            sent: false,
            failed,
        }
    }

    fn present(&self) -> Option<(u32, u32, &'d [u8])> {
        let rest = self.data.get(self.done..)?;
        let data = rest.get(..self.chunk).unwrap_or(rest);
        Some((
            offset_at(self.base, self.done).ok()?,
            u32::try_from(data.len()).ok()?,
            data,
        ))
    }

    /// What to do now.
    pub fn step(&mut self) -> ConfigStep<'d> {
        if let Some(error) = self.failed {
            return ConfigStep::Failed(error);
        }
        if self.sent {
            return ConfigStep::Wait;
        }
        match self.present() {
            Some((_, 0, _)) => ConfigStep::Done(self.generation),
            Some((offset, len, data)) => {
                self.sent = true;
                ConfigStep::Send(Message::SetConfig(ConfigData {
                    generation: self.generation,
                    offset,
                    len,
                    data,
                }))
            }
            None => ConfigStep::Failed(ConfigError::BadRange),
        }
    }

    /// Takes the response to the last request in.
    pub fn handle_response(&mut self, message: &Message<'_>) {
        if !self.sent || self.failed.is_some() {
            return;
        }
        self.sent = false;
        match (message, self.present()) {
            (Message::ConfigSet(reply), Some((offset, _, _)))
                if reply.len == 0 && reply.offset == offset =>
            {
                self.failed = Some(ConfigError::Rejected {
                    generation: reply.generation,
                    written: self.done,
                });
            }
            (Message::ConfigSet(reply), Some((offset, len, data)))
                if reply.offset == offset && reply.len == len =>
            {
                self.generation = reply.generation;
                self.done += data.len();
            }
            _ => self.failed = Some(ConfigError::BadAnswer),
        }
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
