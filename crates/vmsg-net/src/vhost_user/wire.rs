// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of vhost-user, front-end side, as far as a network port needs them (QEMU, docs/interop/vhost-user.rst). Numbers are
//! in the byte order of the machine.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use super::Trouble;

/// Ids of the requests.
pub(super) mod id {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
}

/// Version of all messages.
const VERSION: u32 = 1;
/// Set in answers.
const REPLY: u32 = 1 << 2;
/// Bytes of a header: request, flags, bytes of what follows.
const HEADER: usize = 12;
/// Bytes of an answer that is a number.
const ANSWER: usize = HEADER + 8;
/// Bytes of the longest request here: a table of one region.
const LONGEST: usize = HEADER + 40;

/// A request, and what belongs to it.
#[derive(Debug)]
pub(super) struct Request {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Request {
    /// Without a body so far.
    pub(super) fn new(id: u32) -> Self {
        let mut this = Self {
            bytes: [0; LONGEST],
            len: 0,
        };
        this.put(&id.to_ne_bytes());
        this.put(&VERSION.to_ne_bytes());
        this.put(&0u32.to_ne_bytes());
        this
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        let body = u32::try_from(self.len.saturating_sub(HEADER)).unwrap_or(0);
        self.bytes[8..HEADER].copy_from_slice(&body.to_ne_bytes());
    }

    #[must_use]
    pub(super) fn word(mut self, word: u32) -> Self {
        self.put(&word.to_ne_bytes());
        self
    }

    #[must_use]
    pub(super) fn long(mut self, long: u64) -> Self {
        self.put(&long.to_ne_bytes());
        self
    }

    /// Sends it. The few requests of a connection fit into any socket's buffer: a peer that lets it run full reads nothing.
    pub(super) fn send(
        &self,
        socket: BorrowedFd<'_>,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Trouble> {
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if let Some(fd) = &fd {
            let pushed = control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
            assert!(pushed, "there is room for one");
        }
        let bytes = &self.bytes[..self.len];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) | Err(Errno::AGAIN) => Err(Trouble::Deaf),
            Err(Errno::PIPE | Errno::CONNRESET) => Err(Trouble::Closed),
            Err(error) => Err(Trouble::Os(error)),
        }
    }
}

/// Answers as they come in.
#[derive(Debug)]
pub(super) struct Answers {
    bytes: [u8; ANSWER],
    have: usize,
}

impl Answers {
    pub(super) const fn new() -> Self {
        Self {
            bytes: [0; ANSWER],
            have: 0,
        }
    }

    /// The number that answers request `id`, when it is there. Descriptors that come along are closed by the kernel.
    pub(super) fn read(&mut self, socket: BorrowedFd<'_>, id: u32) -> Result<Option<u64>, Trouble> {
        while self.have < ANSWER {
            match recv(socket, &mut self.bytes[self.have..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(Trouble::Closed),
                Ok((_, n)) => self.have += n.min(ANSWER - self.have),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(Trouble::Closed),
                Err(error) => return Err(Trouble::Os(error)),
            }
            self.check(id)?;
        }
        self.have = 0;
        let mut value = [0; 8];
        value.copy_from_slice(&self.bytes[HEADER..]);
        Ok(Some(u64::from_ne_bytes(value)))
    }

    /// What is there of the header so far can be that of the answer.
    fn check(&self, id: u32) -> Result<(), Trouble> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&self.bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        if self.have < HEADER {
            return Ok(());
        }
        let (request, flags, len) = (word(0), word(4), word(8));
        // The third bit of the version is the mark of answers.
        if request != id || flags & 3 != VERSION || flags & REPLY == 0 || len != 8 {
            return Err(Trouble::Answer {
                request,
                flags,
                len,
            });
        }
        Ok(())
    }
}

/// A peer that was not asked has nothing to say.
pub(super) fn listen_for_the_end(socket: BorrowedFd<'_>) -> Result<(), Trouble> {
    let mut bytes = [0; HEADER];
    match recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((_, 0)) | Err(Errno::CONNRESET) => Err(Trouble::Closed),
        Ok(_) => Err(Trouble::Unasked),
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(error) => Err(Trouble::Os(error)),
    }
}
