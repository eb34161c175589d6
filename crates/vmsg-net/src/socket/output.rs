// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames into a byte stream.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vmsg_mem::Pieces;

use super::LONGEST;
use super::input::LENGTH;

/// Frames up to this size are gathered: a copy costs less than a system call for each.
const SMALL: usize = 4096;

/// With so much in hand nothing more is taken until the peer reads.
const FULL: usize = 64 << 10;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Push {
    /// It is on its way, or will be.
    Taken,
    /// The peer must read first.
    Full,
}

/// What the guest has sent and the system has not taken yet: less than [`FULL`] and one frame.
#[derive(Debug)]
pub(super) struct Output {
    bytes: Vec<u8>,
    start: usize,
}

impl Output {
    pub(super) fn new() -> Self {
        Self {
            bytes: Vec::with_capacity(FULL + LENGTH + LONGEST),
            start: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Appends one frame; what is gathered goes out with [`flush`](Self::flush).
    pub(super) fn push(&mut self, fd: BorrowedFd<'_>, frame: Pieces<'_>) -> Result<Push, Errno> {
        if self.bytes.len() >= FULL {
            self.flush(fd)?;
            if !self.is_empty() {
                return Ok(Push::Full);
            }
        }
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes();
        if frame.len() <= SMALL {
            self.append(&length, frame);
            return Ok(Push::Taken);
        }
        self.flush(fd)?;
        if !self.is_empty() {
            return Ok(Push::Full);
        }
        let sent = match frame.send_from(fd, &length, SendFlags::DONTWAIT) {
            Ok(sent) => sent,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN) => return Ok(Push::Full),
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        };
        // The rest must follow: the guest's memory is its own again after this.
        match sent.checked_sub(LENGTH) {
            Some(done) => self.append(&[], frame.skip(done)),
            None => self.append(&length[sent..], frame),
        }
        Ok(Push::Taken)
    }

    fn append(&mut self, head: &[u8], frame: Pieces<'_>) {
        self.bytes.extend_from_slice(head);
        let at = self.bytes.len();
        self.bytes.resize(at + frame.len(), 0);
        frame.read(&mut self.bytes[at..]);
    }

    /// Sends what the system takes.
    pub(super) fn flush(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        while let Some(rest @ [_, ..]) = self.bytes.get(self.start..) {
            match send(fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => self.start += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.clear();
        Ok(())
    }
}
