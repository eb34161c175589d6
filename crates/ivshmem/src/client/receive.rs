// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages from the socket.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::Broken;
use crate::protocol::{Decoder, ProtocolError};

/// What is there to be read.
#[derive(Debug)]
pub(super) enum Next {
    /// A message, and its descriptor.
    Message {
        number: i64,
        fd: Option<OwnedFd>,
        /// It had a descriptor that this process could not have.
        lost: bool,
    },
    /// Nothing at the moment.
    Nothing,
    /// The server has closed the connection.
    Closed,
}

/// The socket, with what came with the beginning of a message.
#[derive(Debug)]
pub(super) struct Receiver {
    socket: OwnedFd,
    /// Descriptor of a message that is not whole, and whether one was lost.
    begun: (Option<OwnedFd>, bool),
}

impl Receiver {
    /// `socket` must not block.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            begun: Default::default(),
        }
    }

    /// Reads one message, and not a byte more: a descriptor belongs to the message that it comes with.
    pub(super) fn next(&mut self, decoder: &mut Decoder) -> Result<Next, Broken> {
        let begun = &mut self.begun;
        loop {
            // Room for two, to tell one from several.
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let mut room = [IoSliceMut::new(decoder.room())];
            let received =
                match retry_on_intr(|| recvmsg(&self.socket, &mut room, &mut control, flags)) {
                    Ok(received) => received,
                    Err(Errno::AGAIN) => return Ok(Next::Nothing),
                    // What a server leaves behind that is killed while it sends.
                    Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Next::Closed),
                    Err(error) => return Err(Broken::Os(error.into())),
                };
            let mut several = false;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    for fd in fds {
                        several |= begun.0.replace(fd).is_some();
                    }
                }
            }
            if several {
                return Err(ProtocolError::TooManyDescriptors.into());
            }
            begun.1 |= received.flags.contains(ReturnFlags::CTRUNC);
            if received.bytes == 0 {
                return Ok(Next::Closed);
            }
            if let Some(number) = decoder.filled(received.bytes) {
                let (fd, lost) = std::mem::take(begun);
                return Ok(Next::Message { number, fd, lost });
            }
        }
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
