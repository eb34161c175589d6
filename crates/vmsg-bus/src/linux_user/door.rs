// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the two sides meet: one listens on the doorbell's socket, the other one connects.

use crate::unix::Watch;
use crate::unix::address::{Address, BindError, socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often in a row, and how long after the first time, somebody who has a socket file but does
/// not listen is tried again: between `bind` and `listen` a server makes no event.
const ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// How long after a server that has no time.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// The listening socket of the doorbell; clones are the same one.
#[derive(Clone, Debug)]
pub struct Listening(Arc<Address>);

impl Listening {
    pub(super) fn bind(path: &Path) -> Result<Self, BindError> {
        Ok(Self(Arc::new(Address::bind(
            path,
            0o600,
            SocketType::STREAM,
        )?)))
    }

    /// Whether somebody has connected.
    pub fn is_ready(&self) -> bool {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&Timespec::default()))).is_ok_and(|ready| ready > 0)
    }

    /// Who has connected, if somebody has.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match rustix::net::accept_with(&*self.0, flags) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Listening {
    /// Readable when somebody has connected.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What became of an attempt to connect.
#[derive(Debug)]
pub(super) enum Dialed {
    Connected(OwnedFd),
    /// There is no socket.
    NotThere,
    /// There is one on which nobody listens, perhaps not yet.
    NotYet,
    /// Nobody takes connections from there now.
    Busy,
}

/// Connects without waiting.
pub(super) fn dial(path: &Path) -> io::Result<Dialed> {
    let socket = socket(SocketType::STREAM, SocketFlags::NONBLOCK)?;
    let address = SocketAddrUnix::new(path)?;
    match retry_on_intr(|| rustix::net::connect(&socket, &address)) {
        Ok(()) => Ok(Dialed::Connected(socket)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(Dialed::NotThere),
        Err(Errno::CONNREFUSED) => Ok(Dialed::NotYet),
        Err(Errno::AGAIN) => Ok(Dialed::Busy),
        Err(error) => Err(error.into()),
    }
}

/// The pauses between attempts that end [`Dialed::NotYet`] or [`Dialed::Busy`].
#[derive(Debug, Default)]
pub(super) struct Attempts(u32);

impl Attempts {
    /// How long to wait after `dialed`; `None`: until the socket changes.
    pub(super) fn pause_after(&mut self, dialed: &Dialed) -> Option<Duration> {
        match dialed {
            Dialed::NotYet if self.0 < ATTEMPTS => {
                self.0 += 1;
                Some(FIRST_PAUSE * (1 << (self.0 - 1)))
            }
            Dialed::Busy => Some(BUSY_PAUSE),
            _ => None,
        }
    }
}

/// Either side of the socket, for a device host: it waits for drivers for ever.
#[derive(Debug)]
pub(super) enum Door {
    Listen(Listening),
    Dial {
        path: PathBuf,
        watch: Watch,
        attempts: Attempts,
        /// When to try; `None`: when the watch says so.
        at: Option<Instant>,
    },
}

impl Door {
    pub(super) fn new(path: &Path, server: bool) -> Result<Self, BindError> {
        if server {
            return Listening::bind(path).map(Self::Listen);
        }
        let watch = Watch::new(path).map_err(|source| BindError::Os {
            what: "watch for the socket",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::Dial {
            path: path.to_owned(),
            watch,
            attempts: Attempts::default(),
            at: Some(Instant::now()),
        })
    }

    /// When [`Self::join`] must be called even if nothing is readable.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match self {
            Self::Listen(_) => None,
            Self::Dial { at, .. } => *at,
        }
    }

    /// A connection, if there is one now.
    pub(super) fn join(&mut self, now: Instant) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Listen(listening) => listening.accept(),
            Self::Dial {
                path,
                watch,
                attempts,
                at,
            } => {
                if watch.ready()? {
                    *attempts = Attempts::default();
                    *at = Some(now);
                }
                if at.is_none_or(|at| at > now) {
                    return Ok(None);
                }
                *at = None;
                match dial(path)? {
                    Dialed::Connected(socket) => Ok(Some(socket)),
                    other => {
                        *at = attempts.pause_after(&other).map(|pause| now + pause);
                        Ok(None)
                    }
                }
            }
        }
    }

    /// Who has connected though there is a connection.
    pub(super) fn visitor(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Listen(listening) => listening.accept(),
            Self::Dial { .. } => Ok(None),
        }
    }

    /// While there is a connection: takes what the watch says, which nobody wants to know now, so that the door
    /// does not stay readable. Things come and go in the directory all the time; the driver's memory is one.
    pub(super) fn hush(&mut self) -> io::Result<()> {
        match self {
            Self::Listen(_) => Ok(()),
            Self::Dial { watch, .. } => watch.ready().map(drop),
        }
    }

    /// A connection has ended: looks for the next one from `at` on.
    pub(super) fn again(&mut self, from: Instant) {
        if let Self::Dial { attempts, at, .. } = self {
            *attempts = Attempts::default();
            *at = Some(from);
        }
    }
}

impl AsFd for Door {
    /// Readable when there is something to do for [`Door::join`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Listen(listening) => listening.as_fd(),
            Self::Dial { watch, .. } => watch.as_fd(),
        }
    }
}
