// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How ends of a bus come about, whichever bus it is.

use crate::unix::ConnectError;
use crate::{DeviceBus, DriverBus, unix};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

#[cfg(feature = "ivshmem")]
use crate::ivshmem;
#[cfg(feature = "linux-user")]
use crate::linux_user;

/// Waits for drivers, for a device host. All is done in [`accept`](Listener::accept), which never waits.
#[derive(Debug)]
#[non_exhaustive]
// A process has a few of them.
#[allow(clippy::large_enum_variant)]
pub enum Listener {
    /// Any number of drivers.
    Unix(unix::Listener),
    /// One driver after another.
    #[cfg(feature = "linux-user")]
    LinuxUser(linux_user::Listener),
    /// One driver after another.
    #[cfg(feature = "ivshmem")]
    Ivshmem(Box<ivshmem::Listener>),
}

impl Listener {
    /// When [`Self::accept`] must be called even if nothing is readable.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self {
            Self::Unix(listener) => listener.next_deadline(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(listener) => listener.next_deadline(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(listener) => listener.next_deadline(),
        }
    }

    /// A connection that has come about. Call it when the listener is readable ([`AsFd`];
    /// level-triggered) and at [`Self::next_deadline`], until it returns `None`.
    ///
    /// # Errors
    /// Local trouble only; the listener can be used on.
    pub fn accept(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        match self {
            Self::Unix(listener) => listener.accept(now),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(listener) => listener.accept(now),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(listener) => listener.accept(now),
        }
    }
}

impl AsFd for Listener {
    /// Readable when there is something to do for [`Listener::accept`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(listener) => listener.as_fd(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(listener) => listener.as_fd(),
        }
    }
}

impl From<unix::Listener> for Listener {
    fn from(listener: unix::Listener) -> Self {
        Self::Unix(listener)
    }
}

/// Connects to a device host, for a driver. Clones share what a connection needs, so that one of
/// them at a time is of use.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Connector {
    /// The host listens.
    Unix(unix::Connector),
    /// The host listens, or this side does.
    #[cfg(feature = "linux-user")]
    LinuxUser(linux_user::Connector),
    /// Both come to the same memory.
    #[cfg(feature = "ivshmem")]
    Ivshmem(ivshmem::Connector),
}

impl Connector {
    /// Tells the host that no device will be claimed, where hosts can be told.
    #[must_use]
    pub fn observer(self) -> Self {
        match self {
            Self::Unix(connector) => Self::Unix(connector.observer()),
            #[cfg(feature = "linux-user")]
            other @ Self::LinuxUser(_) => other,
            #[cfg(feature = "ivshmem")]
            other @ Self::Ivshmem(_) => other,
        }
    }

    /// How long [`Self::connect`] waits; 5 s otherwise.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        match self {
            Self::Unix(connector) => Self::Unix(connector.timeout(timeout)),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => Self::LinuxUser(connector.timeout(timeout)),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => Self::Ivshmem(connector.timeout(timeout)),
        }
    }

    /// Opens the file that messages are recorded to, if there is one: otherwise only the first
    /// connection does, and does without if it cannot be opened.
    ///
    /// # Errors
    /// [`OpenError`](crate::trace::OpenError).
    pub fn open_trace(&self) -> Result<(), crate::trace::OpenError> {
        match self {
            Self::Unix(connector) => connector.open_trace(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => connector.open_trace(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => connector.open_trace(),
        }
    }

    /// The socket where both sides meet.
    pub fn path(&self) -> &Path {
        match self {
            Self::Unix(connector) => connector.path(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => connector.path(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => connector.path(),
        }
    }

    /// What tells when it is worth calling [`Self::start`] (again) after
    /// [`ConnectError::is_not_there`]. Make it before the first attempt.
    ///
    /// # Errors
    /// Of `inotify_init1` and `inotify_add_watch`; [`BindError`](crate::BindError), as `Other`, where this side listens.
    pub fn watch(&self) -> io::Result<Watch> {
        match self {
            Self::Unix(connector) => unix::Watch::new(connector.path()).map(Watch::Unix),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => connector.watch(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => connector.watch(),
        }
    }

    /// Connects, waiting up to the timeout.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self) -> Result<DriverBus, ConnectError> {
        match self {
            Self::Unix(connector) => connector.connect(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => connector.connect(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => connector.connect(),
        }
    }

    /// Begins to connect without ever waiting: call [`Connecting::advance`] at once and whenever
    /// what this returns is readable. The timeout is up to the caller.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn start(&self) -> Result<Connecting, ConnectError> {
        match self {
            Self::Unix(connector) => connector.start().map(Connecting::Unix),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connector) => connector.start().map(Connecting::LinuxUser),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connector) => connector.start().map(Connecting::Ivshmem),
        }
    }
}

impl From<unix::Connector> for Connector {
    fn from(connector: unix::Connector) -> Self {
        Self::Unix(connector)
    }
}

/// A connection that comes about, from [`Connector::start`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Connecting {
    /// In the handshake.
    Unix(unix::Connecting),
    /// Until the other side has taken the connection.
    #[cfg(feature = "linux-user")]
    LinuxUser(linux_user::Connecting),
    /// Until both have found each other.
    #[cfg(feature = "ivshmem")]
    Ivshmem(ivshmem::Connecting),
}

impl Connecting {
    /// The connection, once it is there; `None` before. Never waits.
    ///
    /// # Errors
    /// [`ConnectError`]; there is nothing to wait for after that.
    pub fn advance(&mut self) -> Result<Option<DriverBus>, ConnectError> {
        match self {
            Self::Unix(connecting) => connecting.advance(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connecting) => connecting.advance(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connecting) => connecting.advance(),
        }
    }
}

impl AsFd for Connecting {
    /// Readable when there is something to do for [`Connecting::advance`].
    ///
    /// # Panics
    /// After `advance` has returned the connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(connecting) => connecting.as_fd(),
            #[cfg(feature = "linux-user")]
            Self::LinuxUser(connecting) => connecting.as_fd(),
            #[cfg(feature = "ivshmem")]
            Self::Ivshmem(connecting) => connecting.as_fd(),
        }
    }
}

/// Tells when it is worth connecting, without a timer; from [`Connector::watch`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Watch {
    /// For the path of a socket.
    Unix(unix::Watch),
    /// For somebody who connects here.
    #[cfg(feature = "linux-user")]
    Listening(linux_user::Listening),
}

impl Watch {
    /// Takes the events that are there. True: call [`Connector::start`]. Never waits.
    ///
    /// # Errors
    /// Those of inotify.
    pub fn ready(&mut self) -> io::Result<bool> {
        match self {
            Self::Unix(watch) => watch.ready(),
            #[cfg(feature = "linux-user")]
            Self::Listening(listening) => Ok(listening.is_ready()),
        }
    }
}

impl AsFd for Watch {
    /// Readable when there is something to do for [`Watch::ready`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(watch) => watch.as_fd(),
            #[cfg(feature = "linux-user")]
            Self::Listening(listening) => listening.as_fd(),
        }
    }
}
