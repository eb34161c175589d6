// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket of a client.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use super::core::Message;
use crate::protocol::encode;

/// Pause before something is sent again for which there is no room in the whole system: nothing tells when there is.
const RETRY: Duration = Duration::from_millis(100);

/// What a client has to do with its socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing.
    Silence,
    /// It has sent something, which clients do not.
    Words,
    /// It has closed the connection.
    End,
}

/// The socket of a client.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    /// Which port it came to.
    pub(super) port: usize,
    /// Bytes of the first message in the queue that are sent.
    sent: usize,
    /// Since when nothing could be sent although something waits.
    stuck: Option<Instant>,
    /// The socket is full: it becomes writable when there is room.
    pub(super) full: bool,
    /// When to try again, where the socket does not tell.
    pub(super) retry: Option<Instant>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, port: usize) -> Self {
        Self {
            socket,
            port,
            sent: 0,
            stuck: None,
            full: false,
            retry: None,
        }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(
        &mut self,
        queue: &mut VecDeque<Message<Arc<OwnedFd>>>,
        now: Instant,
    ) -> io::Result<()> {
        (self.full, self.retry) = (false, None);
        while let Some(message) = queue.front() {
            let bytes = encode(message.number);
            let rest = &bytes[self.sent..];
            // A descriptor goes with the first byte.
            let fd = message.fd.as_ref().filter(|_| self.sent == 0);
            match send(self.socket.as_fd(), rest, fd.map(|fd| fd.as_fd())) {
                Ok(count) if count < rest.len() => {
                    self.sent += count;
                    self.stuck = None;
                }
                Ok(_) => {
                    self.sent = 0;
                    self.stuck = None;
                    queue.pop_front();
                }
                Err(error) => {
                    match error {
                        Errno::AGAIN => self.full = true,
                        // So many descriptors are on their way that the user has reached a limit.
                        Errno::NOBUFS | Errno::TOOMANYREFS | Errno::NOMEM => {
                            self.retry = Some(now + RETRY);
                        }
                        error => return Err(error.into()),
                    }
                    self.stuck.get_or_insert(now);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// When the client will have left unread for `stall` what waits for it.
    pub(super) fn stalls(&self, stall: Duration) -> Option<Instant> {
        self.stuck?.checked_add(stall)
    }

    /// What the client says.
    pub(super) fn hear(&self) -> Heard {
        let mut byte = [0; 1];
        match recv(&self.socket, &mut byte[..], RecvFlags::DONTWAIT) {
            Ok((1.., _)) => Heard::Words,
            Err(Errno::AGAIN | Errno::INTR) => Heard::Silence,
            Ok(_) | Err(_) => Heard::End,
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.unwrap_or(socket)];
    if fd.is_some() {
        let fits = control.push(SendAncillaryMessage::ScmRights(&fds));
        debug_assert!(fits);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags))
}

/// Whether the other side has ended the connection.
pub(super) fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    match retry_on_intr(|| poll(&mut fds, Some(&Timespec::default()))) {
        Ok(_) => fds[0].revents().intersects(gone),
        // Out of memory in the kernel: it will be heard.
        Err(_) => false,
    }
}
