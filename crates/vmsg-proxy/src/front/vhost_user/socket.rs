// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket to a front end: whole requests in, replies out, never waiting for a peer that stalls.

use super::wire::{HEADER, Header, MAX_FDS, Request, WireError, message};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use thiserror::Error;

/// Replies that may wait for a front end that does not read them, in bytes.
const MAX_OUT: usize = 64 * 1024;

/// Why a connection ends.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The front end closed it.
    #[error("closed")]
    Closed,
    /// It ended in the middle of a message.
    #[error("closed in the middle of a message")]
    Cut,
    /// The bytes are no vhost-user.
    #[error("malformed: {0}")]
    Wire(#[from] WireError),
    /// The front end does not read its replies.
    #[error("the front end does not read")]
    Stalled,
    /// The system said no.
    #[error("{0}")]
    Os(#[from] io::Error),
}

/// A request with what came along.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) id: u32,
    pub(super) wants_ack: bool,
    pub(super) request: Request,
    pub(super) fds: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    /// What has come of the next message.
    buf: Vec<u8>,
    fds: Vec<OwnedFd>,
    header: Option<Header>,
    out: Vec<u8>,
    /// Goes with the first byte of `out`.
    out_fd: Option<Arc<OwnedFd>>,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> io::Result<Connection> {
        socket.set_nonblocking(true)?;
        Ok(Connection {
            socket,
            buf: Vec::new(),
            fds: Vec::new(),
            header: None,
            out: Vec::new(),
            out_fd: None,
        })
    }

    /// The next whole request, `None` if it is not there yet.
    pub(super) fn receive(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            let want = HEADER + self.header.map_or(0, |header| header.payload());
            if self.buf.len() < want {
                if !self.read(want)? {
                    return Ok(None);
                }
                continue;
            }
            let Some(header) = self.header else {
                let bytes = self.buf.first_chunk().ok_or(ConnectionError::Cut)?;
                self.header = Some(Header::parse(bytes)?);
                continue;
            };
            self.header = None;
            let fds = std::mem::take(&mut self.fds);
            let request = Request::parse(header.request, &self.buf[HEADER..], fds.len());
            self.buf.clear();
            return Ok(Some(Incoming {
                id: header.request,
                wants_ack: header.wants_ack(),
                request: request?,
                fds,
            }));
        }
    }

    /// Reads up to the end of what makes `want` bytes: never into the next message, whose descriptors would be mixed up with these.
    fn read(&mut self, want: usize) -> Result<bool, ConnectionError> {
        let have = self.buf.len();
        self.buf.resize(want, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut self.buf[have..])];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let result =
            rustix::io::retry_on_intr(|| recvmsg(&self.socket, &mut iov, &mut ancillary, flags));
        let received = match result {
            Ok(received) => received,
            Err(Errno::AGAIN) => {
                self.buf.truncate(have);
                return Ok(false);
            }
            Err(Errno::CONNRESET) => return Err(ConnectionError::Closed),
            Err(error) => return Err(io::Error::from(error).into()),
        };
        self.buf.truncate(have + received.bytes);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX_FDS || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(WireError::TooManyDescriptors.into());
        }
        match (received.bytes, have) {
            (0, 0) => Err(ConnectionError::Closed),
            (0, _) => Err(ConnectionError::Cut),
            _ => Ok(true),
        }
    }

    /// Answers a request.
    pub(super) fn reply(&mut self, id: u32, payload: &[u8]) -> Result<(), ConnectionError> {
        self.out.extend_from_slice(&message(id, true, payload));
        if self.out.len() > MAX_OUT {
            return Err(ConnectionError::Stalled);
        }
        self.flush()
    }

    /// Answers a request with a descriptor. Nothing else may be waiting to be sent: requests are not received while something is.
    pub(super) fn reply_with_fd(
        &mut self,
        id: u32,
        payload: &[u8],
        fd: Arc<OwnedFd>,
    ) -> Result<(), ConnectionError> {
        debug_assert!(!self.is_backed_up());
        self.out_fd = Some(fd);
        self.reply(id, payload)
    }

    fn send(&self) -> rustix::io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let Some(fd) = &self.out_fd else {
            return send(&self.socket, &self.out, flags);
        };
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS);
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&self.out)],
            &mut ancillary,
            flags,
        )
    }

    /// Sends what waits, as far as it goes.
    pub(super) fn flush(&mut self) -> Result<(), ConnectionError> {
        while !self.out.is_empty() {
            match self.send() {
                Ok(sent) => {
                    self.out_fd = None;
                    self.out.drain(..sent);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(())
    }

    /// Whether replies wait for the front end to read.
    pub(super) fn is_backed_up(&self) -> bool {
        !self.out.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
