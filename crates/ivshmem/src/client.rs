// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of the server, on the host.

mod connect;
mod known;
mod receive;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::EventfdFlags;
use vmsg_mem::Doorbell;

use crate::protocol::{Decoder, ProtocolError};
use crate::{Event, PeerId, RingError};

pub use connect::{Advance, ConnectError, Connecting, Limits};
use known::Known;
use receive::{Next, Receiver};

/// Messages that one [`Client::poll`] looks at, at most: a server that never stops must not keep its client.
const MESSAGES_AT_A_TIME: usize = 1024;

/// A client of an ivshmem server: the shared memory, an id, doorbells of others and of its own.
///
/// It only ever reads, and never waits after it is connected. What the server sends is checked and bounded
/// ([`Limits`]); a server that breaks the protocol is left, which is told as [`Event::ServerGone`].
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    /// `None` once the server is gone.
    receiver: Option<Receiver>,
    /// What is waited for after that: it never becomes readable.
    silence: Option<OwnedFd>,
    decoder: Decoder,
    known: Known,
    id: PeerId,
    memory: OwnedFd,
    size: u64,
}

impl Client {
    /// Connects to the server that listens on `path`, with the usual [`Limits`], and waits for at most `timeout` until
    /// it has sent what a client needs. [`Connecting`] does the same without waiting.
    ///
    /// Nothing in the protocol marks the last of the client's own vectors: when the first has come, and no other
    /// message within 50 ms, it is taken for done. A vector that comes later is told as [`Event::Joined`] of the
    /// client itself.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Self, ConnectError> {
        Self::connect_with(path, Limits::default(), timeout)
    }

    /// As [`connect`](Self::connect), with limits of one's own.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_with(
        path: impl AsRef<Path>,
        limits: Limits,
        timeout: Duration,
    ) -> Result<Self, ConnectError> {
        connect::wait(path.as_ref(), limits, timeout)
    }

    /// Where the server listened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id by which others ring this client.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// The shared memory: a regular file that the kernel serves, or a memfd.
    pub fn memory_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Bytes of shared memory; not 0. Whether the file can be truncated, `vmsg_mem::check_seals` tells.
    pub fn memory_size(&self) -> u64 {
        self.size
    }

    /// How many vectors this client has.
    pub fn vectors(&self) -> u16 {
        self.known.vectors_of(self.id)
    }

    /// The eventfd that is rung for a vector of this client. It is to be waited for edge-triggered and never read, as
    /// whoever rings it can also make a read block.
    pub fn vector_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.known.bell(self.id, vector).ok()?.eventfd()
    }

    /// The peers and how many vectors each has, this client not included; in the order of their ids.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, u16)> {
        let id = self.id;
        self.known.list().filter(move |(peer, _)| *peer != id)
    }

    /// Rings a vector of a peer, or of this client itself. From any thread.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn ring(&self, peer: PeerId, vector: u16) -> Result<(), RingError> {
        Ok(self.known.bell(peer, vector)?.ring()?)
    }

    /// A handle of a doorbell, for another thread. It stays when its peer has left, and then wakes nobody.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn bell(&self, peer: PeerId, vector: u16) -> Result<Doorbell, RingError> {
        let bell = self.known.bell(peer, vector)?.try_clone();
        Ok(bell.map_err(vmsg_mem::RingError::Os)?)
    }

    /// Readable (level-triggered) when [`poll`](Self::poll) has something to do. After [`Event::ServerGone`] it is
    /// another descriptor, which never is.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        match (&self.receiver, &self.silence) {
            (Some(receiver), _) => receiver.as_fd(),
            (None, Some(silence)) => silence.as_fd(),
            // Out of descriptors at that moment: a regular file is never waited for.
            (None, None) => self.memory.as_fd(),
        }
    }

    /// The next thing that the server has told, if there is one. Never waits.
    pub fn poll(&mut self) -> Option<Event> {
        for _ in 0..MESSAGES_AT_A_TIME {
            let receiver = self.receiver.as_mut()?;
            let why = match receiver.next(&mut self.decoder) {
                Ok(Next::Nothing) => return None,
                Ok(Next::Closed) => {
                    tracing::info!(server = %self.path.display(), "the ivshmem server is gone");
                    return Some(self.end());
                }
                Ok(Next::Message { number, fd, lost }) => {
                    match self.known.take(&mut self.decoder, number, fd, lost) {
                        Ok(Some(event)) => return Some(event),
                        Ok(None) => continue,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            tracing::warn!(server = %self.path.display(), %why, "the ivshmem server is left");
            return Some(self.end());
        }
        None
    }

    /// Whether the server is still there.
    pub fn has_server(&self) -> bool {
        self.receiver.is_some()
    }

    /// Messages about which nothing was done: vectors beyond the [`Limits`], or for which this process had no
    /// descriptor left, and news of peers that nobody knows.
    pub fn ignored(&self) -> u64 {
        self.known.ignored()
    }

    fn end(&mut self) -> Event {
        self.receiver = None;
        self.silence = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).ok();
        Event::ServerGone
    }
}

/// Why the server is not listened to any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("cannot read from the server: {0}")]
    Os(#[from] std::io::Error),
}

#[cfg(test)]
#[path = "client_test.rs"]
mod tests;
