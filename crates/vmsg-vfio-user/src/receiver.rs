// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Puts messages together from what a stream socket gives: bytes in any pieces, and descriptors that came with some of them.

use crate::socket::Received;
use crate::wire::{HEADER, Header, HeaderError};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

/// How much is read ahead: a burst of small messages costs one system call.
const READ_AHEAD: usize = 4096;
/// The most that is read at once of a message that is longer.
const READ_MOST: usize = 64 * 1024;

/// The next thing there is.
#[derive(Debug)]
pub(crate) enum Next<'a> {
    /// A whole message.
    Message(Incoming<'a>),
    /// The beginning of a message that is too long to be kept. Its bytes are dropped as they come.
    TooLong(Header),
    /// Nothing: read more.
    Nothing,
}

/// A message with what came along.
#[derive(Debug)]
pub(crate) struct Incoming<'a> {
    pub(crate) header: Header,
    pub(crate) payload: &'a [u8],
    pub(crate) fds: Vec<OwnedFd>,
    /// More descriptors came than may, or than this process had room for; those above the limit are closed.
    pub(crate) lost_fds: bool,
}

/// Descriptors, and where in the stream they came.
#[derive(Debug)]
struct Arrived {
    at: u64,
    fds: Vec<OwnedFd>,
    lost: bool,
}

/// The incoming half of a connection, without the socket.
#[derive(Debug)]
pub(crate) struct Receiver {
    buf: Vec<u8>,
    /// What has come and is not handled is `buf[head..tail]`.
    head: usize,
    tail: usize,
    /// Position in the stream of `buf[head]`.
    position: u64,
    /// Bytes of a message too long that are still to come.
    skip: usize,
    arrived: VecDeque<Arrived>,
    max_message: usize,
    max_fds: usize,
}

impl Receiver {
    /// Keeps messages of up to `max_message` bytes with up to `max_fds` descriptors each.
    pub(crate) fn new(max_message: usize, max_fds: usize) -> Receiver {
        Receiver {
            buf: Vec::new(),
            head: 0,
            tail: 0,
            position: 0,
            skip: 0,
            arrived: VecDeque::new(),
            max_message,
            max_fds,
        }
    }

    /// Where to read to. Only to be filled after [`Receiver::next`] gave nothing.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.head == self.tail {
            self.head = 0;
            self.tail = 0;
            if self.buf.len() > READ_MOST {
                self.buf = Vec::new();
            }
        } else if self.head > 0 {
            self.buf.copy_within(self.head..self.tail, 0);
            self.tail -= self.head;
            self.head = 0;
        }
        // Room comes with the bytes, not with what a header claims.
        let missing = match self.header() {
            Some(Ok(header)) => header.len().min(self.max_message).saturating_sub(self.tail),
            _ => 0,
        };
        let end = self.tail + missing.clamp(READ_AHEAD, READ_MOST);
        if self.buf.len() < end {
            self.buf.resize(end, 0);
        }
        &mut self.buf[self.tail..end]
    }

    /// Bytes were read to [`Receiver::space`].
    ///
    /// The kernel does not read past bytes that carry descriptors: these belong to the message that has the last byte read.
    pub(crate) fn received(&mut self, received: Received) {
        let Received {
            bytes,
            mut fds,
            lost_fds,
        } = received;
        self.tail += bytes;
        if bytes == 0 || (fds.is_empty() && !lost_fds) {
            return;
        }
        let before: usize = self.arrived.iter().map(|arrived| arrived.fds.len()).sum();
        let room = self.max_fds.saturating_sub(before);
        let lost = lost_fds || fds.len() > room;
        fds.truncate(room);
        let at = self.position + position(self.tail - self.head) - 1;
        let message = match self.header() {
            Some(Ok(header)) => header.len().min(self.tail - self.head),
            _ => HEADER,
        };
        let in_this_message = at < self.position + position(message);
        match self.arrived.back_mut() {
            // A message that comes byte by byte, each with too many descriptors, leaves one note.
            Some(last) if lost && last.lost && fds.is_empty() && in_this_message => last.at = at,
            _ => self.arrived.push_back(Arrived { at, fds, lost }),
        }
    }

    fn header(&self) -> Option<Result<Header, HeaderError>> {
        let bytes = self
            .buf
            .get(self.head..self.tail)?
            .first_chunk::<HEADER>()?;
        Some(Header::parse(bytes))
    }

    /// Whether a message has begun and not ended.
    pub(crate) fn is_partial(&self) -> bool {
        self.skip > 0 || self.head < self.tail
    }

    fn advance(&mut self, len: usize) {
        self.head += len;
        self.position += position(len);
    }

    /// Takes the descriptors that came before the present position.
    fn take_fds(&mut self) -> (Vec<OwnedFd>, bool) {
        let mut taken = (Vec::new(), false);
        while let Some(arrived) = self
            .arrived
            .pop_front_if(|arrived| arrived.at < self.position)
        {
            taken.0.extend(arrived.fds);
            taken.1 |= arrived.lost;
        }
        taken
    }

    /// The next message. An error leaves a stream of which nothing more can be made.
    pub(crate) fn next(&mut self) -> Result<Next<'_>, HeaderError> {
        if self.skip > 0 {
            let len = self.skip.min(self.tail - self.head);
            self.skip -= len;
            self.advance(len);
            self.take_fds();
            if self.skip > 0 {
                return Ok(Next::Nothing);
            }
        }
        let Some(header) = self.header() else {
            return Ok(Next::Nothing);
        };
        let header = header?;
        let len = header.len();
        if len > self.max_message {
            self.skip = len;
            return Ok(Next::TooLong(header));
        }
        if self.tail - self.head < len {
            return Ok(Next::Nothing);
        }
        let start = self.head;
        self.advance(len);
        let (fds, lost_fds) = self.take_fds();
        Ok(Next::Message(Incoming {
            header,
            payload: &self.buf[start + HEADER..start + len],
            fds,
            lost_fds,
        }))
    }
}

fn position(len: usize) -> u64 {
    u64::try_from(len).expect("a usize fits")
}

#[cfg(test)]
#[path = "receiver_test.rs"]
mod tests;
