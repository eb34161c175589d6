// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Somebody who reads a console's output and types its input.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

/// Bytes that wait for a client that does not read; what comes on top is lost to it.
pub(super) const WAITING: usize = 256 * 1024;

/// Bytes read from a client at a time.
const CHUNK: usize = 1024;

/// One end of a stream that does not block: a socket, or the master of a pseudoterminal.
#[derive(Debug)]
pub(super) struct Client {
    fd: OwnedFd,
    out: VecDeque<u8>,
    /// Bytes that it has lost and has not been told of.
    lost: u64,
    /// It may still send.
    pub(super) sends: bool,
    /// It may still receive.
    pub(super) receives: bool,
    /// What it is watched for; `None` when it is not.
    pub(super) watched: Option<EventFlags>,
}

impl Client {
    /// `fd` must not block.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            out: VecDeque::new(),
            lost: 0,
            sends: true,
            receives: true,
            watched: None,
        }
    }

    /// Whether nothing can come from it or go to it any more.
    pub(super) fn is_gone(&self) -> bool {
        !self.sends && !self.receives
    }

    /// What there is to wait for; `room`: what it sends can be taken.
    pub(super) fn interest(&self, room: bool) -> EventFlags {
        let mut flags = EventFlags::empty();
        if self.sends && room {
            flags |= EventFlags::IN;
        }
        if self.receives && !self.out.is_empty() {
            flags |= EventFlags::OUT;
        }
        flags
    }

    /// Puts bytes before it that were there before it came.
    pub(super) fn replay(&mut self, bytes: impl Iterator<Item = u8>) {
        self.out.extend(bytes);
        self.flush();
    }

    /// Sends it `bytes`, now or later; returns how many of them it has lost.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> usize {
        if !self.receives {
            return 0;
        }
        if self.lost > 0 || self.out.len() + bytes.len() > WAITING {
            self.lost += bytes.len() as u64;
            return bytes.len();
        }
        let mut rest = bytes;
        if self.out.is_empty() {
            match rustix::io::write(&self.fd, rest) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => {
                    self.stop_receiving();
                    return 0;
                }
            }
        }
        self.out.extend(rest);
        0
    }

    /// Sends what waits, as far as that goes. One that has caught up is told what it has missed.
    pub(super) fn flush(&mut self) {
        while self.receives {
            if self.out.is_empty() {
                if self.lost == 0 {
                    return;
                }
                let lost = std::mem::take(&mut self.lost);
                self.out
                    .extend(format!("\r\n[vmsg: {lost} bytes lost]\r\n").bytes());
            }
            match rustix::io::write(&self.fd, self.out.as_slices().0) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.stop_receiving(),
            }
        }
    }

    /// Forgets what waits: nobody is there to read it.
    pub(super) fn forget(&mut self) {
        self.out.clear();
        self.lost = 0;
    }

    pub(super) fn stop_receiving(&mut self) {
        self.receives = false;
        self.forget();
    }

    /// Takes what it has sent, as far as `input` has room up to `limit` bytes; returns how much.
    pub(super) fn read(&mut self, input: &mut VecDeque<u8>, limit: usize) -> usize {
        let mut chunk = [0; CHUNK];
        let mut taken = 0;
        while self.sends && input.len() < limit {
            let room = CHUNK.min(limit - input.len());
            match rustix::io::read(&self.fd, &mut chunk[..room]) {
                Ok(0) => self.sends = false,
                Ok(count) => {
                    input.extend(&chunk[..count]);
                    taken += count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.sends = false,
            }
        }
        taken
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
