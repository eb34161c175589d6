// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way beside the queues: messages with file descriptors, and the end of the connection.

#[cfg(feature = "unix")]
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};

#[cfg(feature = "loopback")]
use crate::loopback::Side;
#[cfg(feature = "unix")]
use crate::unix::packet;

pub(crate) enum Carrier {
    /// Within one process.
    #[cfg(feature = "loopback")]
    Local(Side),
    /// A SOCK_SEQPACKET socket.
    #[cfg(feature = "unix")]
    Socket(OwnedFd),
    /// None but the doorbell's stream.
    #[cfg(feature = "linux-user")]
    Stream(std::sync::Arc<crate::linux_user::Stream>),
    /// None but words in shared memory.
    #[cfg(feature = "ivshmem")]
    Port(std::sync::Arc<crate::ivshmem::Port>),
}

/// A message that came with descriptors.
pub(crate) struct Packet {
    /// Its length.
    pub(crate) len: usize,
    /// Some descriptors did not arrive.
    pub(crate) fds_lost: bool,
}

impl Carrier {
    /// Sends a packet; false if it must wait.
    pub(crate) fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<bool> {
        match self {
            #[cfg(feature = "loopback")]
            Self::Local(side) => side.send(message, fds),
            #[cfg(feature = "unix")]
            Self::Socket(socket) => packet::send(socket.as_fd(), message, fds),
            #[cfg(feature = "linux-user")]
            Self::Stream(_) => Err(std::io::ErrorKind::Unsupported.into()),
            #[cfg(feature = "ivshmem")]
            Self::Port(_) => Err(std::io::ErrorKind::Unsupported.into()),
        }
    }

    /// Receives a packet, if one is there; its descriptors are appended to `fds`.
    pub(crate) fn recv(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Packet>, &'static str> {
        match self {
            #[cfg(feature = "loopback")]
            Self::Local(side) => side.recv(buf, fds),
            #[cfg(feature = "unix")]
            Self::Socket(socket) => match packet::recv(socket.as_fd(), buf, fds, crate::MAX_FDS) {
                Ok(Some(packet)) if packet.truncated => Err("a message longer than agreed"),
                Ok(Some(packet)) => Ok(Some(Packet {
                    len: packet.len,
                    fds_lost: packet.fds_lost,
                })),
                Ok(None) => Ok(None),
                Err(_) => Err("the socket broke"),
            },
            #[cfg(feature = "linux-user")]
            Self::Stream(_) => Ok(None),
            #[cfg(feature = "ivshmem")]
            Self::Port(_) => Ok(None),
        }
    }

    /// Whether the other side has ended the connection.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            #[cfg(feature = "loopback")]
            Self::Local(side) => side.peer_is_gone(),
            #[cfg(feature = "unix")]
            Self::Socket(socket) => packet::is_hung_up(socket.as_fd()),
            #[cfg(feature = "linux-user")]
            Self::Stream(stream) => stream.is_over(),
            #[cfg(feature = "ivshmem")]
            Self::Port(port) => port.is_over(),
        }
    }

    /// Ends the connection, as the other side will see.
    pub(crate) fn close(&self) {
        match self {
            #[cfg(feature = "loopback")]
            Self::Local(side) => side.close(),
            #[cfg(feature = "unix")]
            Self::Socket(socket) => {
                // Fails only if the other side was first.
                let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
            }
            #[cfg(feature = "linux-user")]
            Self::Stream(stream) => stream.close(),
            #[cfg(feature = "ivshmem")]
            Self::Port(port) => port.let_go(),
        }
    }

    /// What tells a poller that the other side is gone; `None` where the doorbell does.
    pub(crate) fn hangup_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            #[cfg(feature = "loopback")]
            Self::Local(_) => None,
            #[cfg(feature = "unix")]
            Self::Socket(socket) => Some(socket.as_fd()),
            #[cfg(feature = "linux-user")]
            Self::Stream(_) => None,
            #[cfg(feature = "ivshmem")]
            Self::Port(_) => None,
        }
    }
}
