// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Becoming a client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::known::{Known, memory_size};
use super::receive::{Next, Receiver};
use super::{Broken, Client, MESSAGES_AT_A_TIME};
use crate::protocol::{Decoder, ProtocolError};

/// Silence after the client's first own vector that is taken for the end of its vectors.
const SETTLE: Duration = Duration::from_millis(50);

/// The same where there was none: a server may have clients without vectors.
const SETTLE_WITHOUT: Duration = Duration::from_millis(500);

/// The same where it is known how many there should be, and they are not there: the server has its own idea.
const SETTLE_KNOWN: Duration = Duration::from_secs(1);

/// Pause before a server is asked again whose queue of connections is full. There is nothing to wait for.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Why there is no connection to a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens on the path.
    #[error("no ivshmem server listens on `{}`", path.display())]
    NotThere {
        /// The path.
        path: PathBuf,
    },
    /// The server does not come to accepting connections.
    #[error("the ivshmem server on `{}` is busy", path.display())]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// The server did not send all that a client needs.
    #[error("the ivshmem server on `{}` did not answer within {} s", path.display(), after.as_secs_f32())]
    TimedOut {
        /// The path.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// The server has closed the connection: it has as many clients as it wants, or is ending.
    #[error("the ivshmem server on `{}` closed the connection; it may have a client already and want no other, or be ending", path.display())]
    Closed {
        /// The path.
        path: PathBuf,
    },
    /// The server does not keep to the protocol.
    #[error("what listens on `{}` is no ivshmem server: {source}", path.display())]
    Protocol {
        /// The path.
        path: PathBuf,
        /// What it did.
        source: ProtocolError,
    },
    /// The memory cannot be used.
    #[error("the memory of the ivshmem server on `{}` cannot be used: {why}", path.display())]
    Memory {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The system said no.
    #[error("cannot {what} `{}`: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

impl ConnectError {
    /// Whether a later attempt may succeed without anybody changing anything but starting, or ending, a program.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::NotThere { .. } | Self::Busy { .. } | Self::TimedOut { .. } | Self::Closed { .. }
        )
    }
}

/// What a client takes from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Doorbells of peers, each a descriptor; 512 by default. Peers beyond are not known.
    pub max_bells: usize,
    /// How many vectors the server is known to give this client: with them it is connected at once. By default that is
    /// not known, and it takes 50 ms more. With fewer it is connected after a second without more.
    pub vectors: Option<u16>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bells: 512,
            vectors: None,
        }
    }
}

/// A client that is not connected yet.
#[derive(Debug)]
pub struct Connecting {
    path: PathBuf,
    vectors: Option<u16>,
    receiver: Receiver,
    decoder: Decoder,
    known: Known,
    /// When the last message came.
    heard: Instant,
}

/// How far a client is.
#[derive(Debug)]
pub enum Advance {
    /// Go on when it is readable, or [`due`](Connecting::due).
    Pending(Box<Connecting>),
    /// Connected.
    Done(Box<Client>),
}

impl Connecting {
    /// Begins to connect to the server on `path`. Never waits.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn begin(path: impl AsRef<Path>, limits: Limits) -> Result<Self, ConnectError> {
        let path = path.as_ref();
        let os = |what| {
            move |source: Errno| ConnectError::Os {
                what,
                path: path.to_owned(),
                source: source.into(),
            }
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(os("make a socket for"))?;
        let address = SocketAddrUnix::new(path).map_err(os("use the path"))?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Self::over(socket, path, limits)),
            Err(Errno::NOENT | Errno::CONNREFUSED) => Err(ConnectError::NotThere {
                path: path.to_owned(),
            }),
            Err(Errno::AGAIN) => Err(ConnectError::Busy {
                path: path.to_owned(),
            }),
            Err(error) => Err(os("connect to")(error)),
        }
    }

    /// Goes on with a stream socket that is connected to a server; `path` is for messages.
    pub fn over(socket: OwnedFd, path: &Path, limits: Limits) -> Self {
        Self {
            path: path.to_owned(),
            vectors: limits.vectors,
            receiver: Receiver::new(socket),
            decoder: Decoder::new(),
            known: Known::new(limits.max_bells),
            heard: Instant::now(),
        }
    }

    /// Takes what has come until `now`. Never waits. How long it may take in all is for the caller to decide.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn advance(mut self: Box<Self>, now: Instant) -> Result<Advance, ConnectError> {
        for _ in 0..MESSAGES_AT_A_TIME {
            match self.receiver.next(&mut self.decoder) {
                Ok(Next::Message { number, fd, lost }) => {
                    self.heard = now;
                    self.known
                        .take(&mut self.decoder, number, fd, lost)
                        .map_err(|broken| broken.during(&self.path))?;
                    if self.vectors.is_some() && self.is_complete(now) {
                        return self.done();
                    }
                }
                Ok(Next::Nothing) if self.is_complete(now) => return self.done(),
                Ok(Next::Nothing) => break,
                Ok(Next::Closed) => return Err(ConnectError::Closed { path: self.path }),
                Err(broken) => return Err(broken.during(&self.path)),
            }
        }
        Ok(Advance::Pending(self))
    }

    /// When to go on although nothing has come.
    pub fn due(&self) -> Option<Instant> {
        self.known.has_memory().then(|| self.heard + self.settle())
    }

    fn own_vectors(&self) -> u16 {
        self.known.id().map_or(0, |id| self.known.vectors_of(id))
    }

    fn settle(&self) -> Duration {
        if self.vectors.is_some() {
            SETTLE_KNOWN
        } else if self.own_vectors() == 0 {
            SETTLE_WITHOUT
        } else {
            SETTLE
        }
    }

    fn is_complete(&self, now: Instant) -> bool {
        let all = self
            .vectors
            .is_some_and(|wanted| self.own_vectors() >= wanted);
        self.known.has_memory() && (all || now >= self.heard + self.settle())
    }

    fn done(mut self) -> Result<Advance, ConnectError> {
        let id = self.known.id().expect("it comes before the memory");
        let memory = self.known.take_memory().expect("it has come");
        let size = memory_size(&memory).map_err(|why| ConnectError::Memory {
            path: self.path.clone(),
            why,
        })?;
        Ok(Advance::Done(Box::new(Client {
            path: self.path,
            receiver: Some(self.receiver),
            silence: None,
            decoder: self.decoder,
            known: self.known,
            id,
            memory,
            size,
        })))
    }
}

impl AsFd for Connecting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.receiver.as_fd()
    }
}

impl Broken {
    fn during(self, path: &Path) -> ConnectError {
        let path = path.to_owned();
        match self {
            Self::Protocol(source) => ConnectError::Protocol { path, source },
            Self::Os(source) => ConnectError::Os {
                what: "be a client of",
                path,
                source,
            },
        }
    }
}

/// Connects, waiting for at most `timeout`.
pub(super) fn wait(path: &Path, limits: Limits, timeout: Duration) -> Result<Client, ConnectError> {
    let deadline = Instant::now() + timeout;
    let mut connecting = loop {
        match Connecting::begin(path, limits.clone()) {
            Err(ConnectError::Busy { .. }) if Instant::now() < deadline => {
                std::thread::sleep(BUSY_PAUSE);
            }
            result => break Box::new(result?),
        }
    };
    loop {
        let now = Instant::now();
        connecting = match connecting.advance(now)? {
            Advance::Done(client) => return Ok(*client),
            Advance::Pending(connecting) => connecting,
        };
        if now >= deadline {
            return Err(ConnectError::TimedOut {
                path: path.to_owned(),
                after: timeout,
            });
        }
        let until = connecting.due().map_or(deadline, |due| due.min(deadline));
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&*connecting, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                return Err(ConnectError::Os {
                    what: "wait for",
                    path: path.to_owned(),
                    source: error.into(),
                });
            }
        }
    }
}
