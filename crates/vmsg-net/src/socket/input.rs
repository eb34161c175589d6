// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames out of a byte stream.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::{LONGEST, SHORTEST};

/// Bytes of the length before a frame.
pub(super) const LENGTH: usize = 4;

/// Bytes kept of the stream: two of the longest frames, so that there is always room to receive
/// while one waits to be complete.
const CAPACITY: usize = 2 * (LENGTH + LONGEST);

/// A length that no frame has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer announces a frame of {0} bytes (1 to {LONGEST} are possible)")]
pub(super) struct BadLength(u32);

/// What is first in the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    /// A frame.
    Frame(&'a [u8]),
    /// One too short to be a frame.
    Runt,
    /// Not all of it is there yet.
    Incomplete,
}

/// How receiving went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// There is something new.
    Some,
    /// There was nothing.
    Empty,
    /// The peer has closed the connection.
    Closed,
}

/// What was received and not yet handed on.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// The length of what is first, with the 4 bytes before it, if that much is known.
    fn first(&self) -> Result<Option<usize>, BadLength> {
        let held = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some(length) = held.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        match usize::try_from(length) {
            Ok(len @ 1..=LONGEST) => Ok(Some(LENGTH + len)),
            _ => Err(BadLength(length)),
        }
    }

    /// True if [`next`](Self::next) has something to say.
    pub(super) fn has_next(&self) -> bool {
        match self.first() {
            Ok(Some(len)) => self.end - self.start >= len,
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// What is first. A bad length spoils the whole stream.
    pub(super) fn next(&self) -> Result<Next<'_>, BadLength> {
        let Some(len) = self.first()? else {
            return Ok(Next::Incomplete);
        };
        let held = self.bytes.get(self.start..self.end).unwrap_or_default();
        Ok(match held.get(LENGTH..len) {
            None => Next::Incomplete,
            Some(frame) if frame.len() < SHORTEST => Next::Runt,
            Some(frame) => Next::Frame(frame),
        })
    }

    /// Goes on behind the complete frame that is first.
    pub(super) fn consume(&mut self) {
        if let Ok(Some(len)) = self.first() {
            self.start = (self.start + len).min(self.end);
        }
        if self.start == self.end {
            self.clear();
        }
    }

    /// Receives as much as there is room for; to be called when what is first is incomplete.
    pub(super) fn receive(&mut self, fd: BorrowedFd<'_>) -> Result<Received, Errno> {
        if self.bytes.len() - self.end < LENGTH + LONGEST {
            // Less than one frame is held, so this copies less than one.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or_default();
        match recv(fd, room, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Ok(Received::Closed),
            Ok((_, len)) => {
                self.end += len;
                Ok(Received::Some)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Received::Empty),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
#[path = "input_test.rs"]
mod tests;
