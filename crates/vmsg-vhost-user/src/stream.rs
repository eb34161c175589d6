// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connected socket, message by message.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::Fault;
use crate::wire::{HEADER, Header, MAX_BODY};

/// Descriptors with one message that is sent: those of a table of memory.
const FILES_OUT: usize = crate::TABLE_REGIONS;
/// Descriptors that are taken with one message; the kernel closes others.
const FILES_IN: usize = 8;

/// A message to be sent.
#[derive(Debug)]
pub struct Message {
    bytes: Vec<u8>,
    sent: usize,
    /// Go with the first byte.
    files: Vec<Arc<OwnedFd>>,
}

impl Message {
    pub(crate) fn new(bytes: Vec<u8>, files: Vec<Arc<OwnedFd>>) -> Self {
        Self {
            bytes,
            sent: 0,
            files,
        }
    }
}

/// A message that has come.
#[derive(Debug)]
pub struct Incoming {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) files: Vec<OwnedFd>,
}

/// A connected socket.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    out: Option<Message>,
    head: [u8; HEADER],
    /// Bytes of `head` that are there.
    have: usize,
    body: Vec<u8>,
    /// Bytes of `body` that are there.
    filled: usize,
    files: Vec<OwnedFd>,
}

impl Stream {
    /// Takes a connected, non-blocking stream socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            out: None,
            head: [0; HEADER],
            have: 0,
            body: Vec::new(),
            filled: 0,
            files: Vec::new(),
        }
    }

    /// The socket, without what was read and not taken.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Whether the last message given to [`send`](Self::send) is on its way: only then may another one be given.
    pub fn is_ready(&self) -> bool {
        self.out.is_none()
    }

    /// Sends a message, or what there is room for; [`flush`](Self::flush) sends the rest.
    ///
    /// # Errors
    /// [`Fault::Closed`], [`Fault::Os`].
    ///
    /// # Panics
    /// If the last one is not sent yet.
    pub fn send(&mut self, message: Message) -> Result<(), Fault> {
        assert!(self.out.is_none(), "one message at a time");
        self.out = Some(message);
        self.flush()
    }

    /// Goes on sending.
    ///
    /// # Errors
    /// [`Fault::Closed`], [`Fault::Os`].
    pub fn flush(&mut self) -> Result<(), Fault> {
        while let Some(message) = &mut self.out {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_OUT))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            let files: Vec<BorrowedFd<'_>> =
                message.files.iter().map(|file| file.as_fd()).collect();
            if !files.is_empty() {
                let pushed = control.push(SendAncillaryMessage::ScmRights(&files));
                assert!(pushed, "no message has more of them");
            }
            let rest = IoSlice::new(&message.bytes[message.sent..]);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &[rest], &mut control, flags) {
                Ok(n) => {
                    message.sent += n;
                    message.files.clear();
                    if message.sent >= message.bytes.len() {
                        self.out = None;
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Fault::Closed),
                Err(error) => return Err(Fault::Os(error)),
            }
        }
        Ok(())
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// [`Fault::Closed`], [`Fault::TooLong`], [`Fault::Os`].
    pub fn receive(&mut self) -> Result<Option<Incoming>, Fault> {
        while self.have < HEADER {
            match read(&self.socket, &mut self.head[self.have..], &mut self.files)? {
                Some(n) => self.have += n,
                None => return Ok(None),
            }
            if self.have == HEADER {
                let header = Header::read(&self.head);
                let len = usize::try_from(header.len).unwrap_or(usize::MAX);
                if len > MAX_BODY {
                    return Err(Fault::TooLong {
                        id: header.id,
                        len: header.len,
                    });
                }
                self.body = vec![0; len];
                self.filled = 0;
            }
        }
        while self.filled < self.body.len() {
            let into = &mut self.body[self.filled..];
            match read(&self.socket, into, &mut self.files)? {
                Some(n) => self.filled += n,
                None => return Ok(None),
            }
        }
        self.have = 0;
        self.filled = 0;
        Ok(Some(Incoming {
            header: Header::read(&self.head),
            body: std::mem::take(&mut self.body),
            files: std::mem::take(&mut self.files),
        }))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads what is there; `None`: nothing is.
fn read(
    socket: &OwnedFd,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, Fault> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_IN))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(received) => {
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(given) = message {
                        for file in given {
                            // Beyond that they are closed.
                            if files.len() < FILES_IN {
                                files.push(file);
                            }
                        }
                    }
                }
                return match received.bytes {
                    0 => Err(Fault::Closed),
                    n => Ok(Some(n)),
                };
            }
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(Fault::Closed),
            Err(error) => return Err(Fault::Os(error)),
        }
    }
}
