// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's side of connecting: docs/bus-unix.md §2.

use super::address::{BindError, seqpacket};
use super::frame::{Answer, Hello, MAX_FRAME, RefuseReason, VERSION, Welcome};
use super::packet;
use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::link::{Framing, Parts, Queues};
use crate::memory::Part;
use crate::trace::{OpenError, Side, Trace};
use crate::{Capabilities, DriverBus, Peer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{SocketAddrUnix, SocketFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmsg_mem::{Access, Doorbell, MappedSlice, Mapping, check_seals};

/// The descriptors of a WELCOME: queues, the host's doorbell, ours.
const WELCOME_FDS: usize = 3;

/// File system of a memfd without huge pages (linux/magic.h).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Why a driver got no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens on the path. [`Watch`](super::Watch) tells when that changes.
    #[error("no device host listens on `{}`", path.display())]
    NotThere {
        /// The path.
        path: PathBuf,
    },
    /// There is no server of ivshmem where both sides meet.
    #[cfg(feature = "ivshmem")]
    #[error("no ivshmem server listens on `{}`; start one with `vmsg ivshmem server`", path.display())]
    NoServer {
        /// The server's socket.
        path: PathBuf,
    },
    /// This side listens, and no device host has connected yet.
    #[error("no device host has connected to `{}`", path.display())]
    NotYet {
        /// The path.
        path: PathBuf,
    },
    /// Another driver has the bus, and there can be one at a time.
    #[error("{bus} is in use by {holder}, and has one driver at a time; end that process first")]
    Held {
        /// The bus.
        bus: String,
        /// Who has it.
        holder: String,
    },
    /// This side listens, and cannot.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The queues cannot be used.
    #[cfg(feature = "linux-user")]
    #[error(transparent)]
    Queue(#[from] crate::linux_user::QueueError),
    /// The memory of the bus cannot be had.
    #[cfg(feature = "ivshmem")]
    #[error(transparent)]
    Ivshmem(Box<crate::ivshmem::OpenError>),
    /// The host has no time to accept connections.
    #[error("the device host on `{}` is busy", path.display())]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// The host did not answer in time.
    #[error("the device host on `{}` did not answer within {} s", path.display(), after.as_secs_f32())]
    TimedOut {
        /// The path.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// The connection was made, and nobody has taken it.
    #[error("nobody has taken the connection to `{}` within {} s; does the device host serve another driver, or hang?", path.display(), after.as_secs_f32())]
    NotTaken {
        /// The path.
        path: PathBuf,
        /// How long there was.
        after: Duration,
    },
    /// The host does not want this driver.
    #[error("the device host on `{}` refused the connection: {reason} ({text})", path.display())]
    Refused {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: RefuseReason,
        /// The host's own words.
        text: String,
    },
    /// What listens on the path does not keep to the handshake.
    #[error("{}", handshake(path, why))]
    Handshake {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
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
    /// Whether a later attempt may succeed without anybody changing anything
    /// but starting, or ending, a program.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Busy { .. } | Self::TimedOut { .. } => true,
            Self::Refused { reason, .. } => {
                matches!(reason, RefuseReason::TooMany | RefuseReason::ShuttingDown)
            }
            // A host that is killed in mid-handshake.
            Self::Handshake { why, .. } => *why == GONE,
            Self::NotTaken { .. } => true,
            _ => self.is_not_there(),
        }
    }

    /// Whether there is nobody at the other end, and a watch tells when that changes.
    pub fn is_not_there(&self) -> bool {
        #[cfg(feature = "ivshmem")]
        if let Self::NoServer { .. } = self {
            return true;
        }
        matches!(self, Self::NotThere { .. } | Self::NotYet { .. })
    }
}

pub(crate) const GONE: &str = "it closed the connection";

fn handshake(path: &Path, why: &str) -> String {
    let path = path.display();
    if why == GONE {
        // Most likely a device host that is just ending.
        return format!("what listens on `{path}` closed the connection before it was set up");
    }
    format!("what listens on `{path}` is not a device host of this bus: {why}")
}

/// Connects to a device host.
#[derive(Clone, Debug)]
pub struct Connector {
    path: PathBuf,
    name: String,
    message_size: u32,
    observer: bool,
    timeout: Duration,
    trace: Option<Trace>,
}

impl Connector {
    /// For the listener at `path`; `name` is that of this program, for messages to people.
    pub fn new(path: impl Into<PathBuf>, name: &str) -> Self {
        Self {
            path: path.into(),
            name: name.to_owned(),
            message_size: 0,
            observer: false,
            timeout: Duration::from_secs(5),
            trace: None,
        }
    }

    /// Asks for messages of up to `bytes`, at least 48; the host may have less. 0: as the host likes.
    #[must_use]
    pub fn message_size(mut self, bytes: u32) -> Self {
        self.message_size = bytes;
        self
    }

    /// Tells the host that no device will be claimed.
    #[must_use]
    pub fn observer(mut self) -> Self {
        self.observer = true;
        self
    }

    /// How long the host may take to answer; 5 s otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Records the messages of all connections.
    #[must_use]
    pub fn trace(mut self, trace: Option<Trace>) -> Self {
        self.trace = trace;
        self
    }

    /// Opens the file that messages are recorded to, if there is one: otherwise only the first connection does, and
    /// does without if it cannot be opened.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_trace(&self) -> Result<(), OpenError> {
        match &self.trace {
            Some(trace) => trace.open().map(drop),
            None => Ok(()),
        }
    }

    /// Where it connects to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connects, waiting up to the timeout.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self) -> Result<DriverBus, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let socket =
            seqpacket(SocketFlags::empty()).map_err(|e| self.os("make a socket for", e))?;
        // Bounds the wait for a place in the backlog.
        set_socket_timeout(
            &socket,
            Timeout::Send,
            Some(self.timeout.max(Duration::from_millis(1))),
        )
        .map_err(|e| self.os("set up the socket for", e))?;
        let mut connecting = self.greet(socket)?;
        loop {
            if let Some(bus) = connecting.advance()? {
                return Ok(bus);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectError::TimedOut {
                    path: self.path.clone(),
                    after: self.timeout,
                });
            }
            let mut fds = [PollFd::new(&connecting, PollFlags::IN)];
            match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(self.os("wait for", error)),
            }
        }
    }

    /// Begins to connect without ever waiting: call [`Connecting::advance`]
    /// whenever what this returns is readable. The timeout is up to the caller.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn start(&self) -> Result<Connecting, ConnectError> {
        self.greet(seqpacket(SocketFlags::NONBLOCK).map_err(|e| self.os("make a socket for", e))?)
    }

    fn os(&self, what: &'static str, source: impl Into<io::Error>) -> ConnectError {
        ConnectError::Os {
            what,
            path: self.path.clone(),
            source: source.into(),
        }
    }

    /// Connects the socket and says HELLO.
    fn greet(&self, socket: OwnedFd) -> Result<Connecting, ConnectError> {
        let path = || self.path.clone();
        let address = SocketAddrUnix::new(&self.path).map_err(|e| self.os("use the path", e))?;
        rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(|error| {
            match error {
                Errno::NOENT | Errno::CONNREFUSED | Errno::NOTDIR => {
                    ConnectError::NotThere { path: path() }
                }
                Errno::AGAIN => ConnectError::Busy { path: path() },
                Errno::PROTOTYPE => ConnectError::Handshake {
                    path: path(),
                    why: "it has another type of socket",
                },
                other => self.os("connect to", other),
            }
        })?;
        let hello = Hello {
            version_min: VERSION,
            version_max: VERSION,
            message_size: self.message_size,
            observer: self.observer,
            name: self.name.clone(),
        };
        match packet::send(socket.as_fd(), &hello.encode(), &[]) {
            Ok(true) => Ok(Connecting {
                socket: Some(socket),
                path: path(),
                trace: self.trace.clone(),
            }),
            Ok(false) => Err(ConnectError::Busy { path: path() }),
            Err(_) => Err(ConnectError::Handshake {
                path: path(),
                why: GONE,
            }),
        }
    }
}

/// A connection in mid-handshake, from [`Connector::start`].
#[derive(Debug)]
pub struct Connecting {
    /// Until it becomes that of the bus.
    socket: Option<OwnedFd>,
    path: PathBuf,
    trace: Option<Trace>,
}

impl Connecting {
    /// The connection, once the host has answered; `None` before. Never waits.
    ///
    /// # Errors
    /// [`ConnectError`]; there is nothing to wait for after that.
    pub fn advance(&mut self) -> Result<Option<DriverBus>, ConnectError> {
        let broken = |why| ConnectError::Handshake {
            path: self.path.clone(),
            why,
        };
        let Some(socket) = &self.socket else {
            return Err(broken("it has been answered already"));
        };
        let mut frame = [0; MAX_FRAME];
        let mut fds = Vec::new();
        let received = match packet::recv(socket.as_fd(), &mut frame, &mut fds, WELCOME_FDS) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(None),
            Err(_) => return Err(broken(GONE)),
        };
        if received.len == 0 {
            return Err(broken(GONE));
        }
        if received.truncated {
            return Err(broken("a frame that is too long"));
        }
        let welcome = match Answer::decode(&frame[..received.len]).map_err(broken)? {
            Answer::Welcome(welcome) => welcome,
            Answer::Refuse(refuse) => {
                return Err(ConnectError::Refused {
                    path: self.path.clone(),
                    reason: refuse.reason,
                    text: refuse.text,
                });
            }
        };
        let Ok([file, theirs, ours]) = <[OwnedFd; WELCOME_FDS]>::try_from(fds) else {
            return Err(broken("a WELCOME without its three descriptors"));
        };
        if received.fds_lost {
            return Err(broken("a WELCOME with more than three descriptors"));
        }
        let (outgoing, incoming) = queues(&welcome, &file).map_err(broken)?;
        let bell = |fd| {
            Doorbell::from_fd(fd)
                .map(Bell::Fd)
                .map_err(|_| broken("a doorbell that is not an eventfd"))
        };
        let (theirs, ours) = (bell(theirs)?, bell(ours)?);
        let (pid, uid) = packet::credentials(socket.as_fd());
        let socket = self.socket.take().ok_or_else(|| ConnectError::NotThere {
            path: self.path.clone(),
        })?;
        let parts = Parts {
            queues: Queues::Fresh {
                outgoing,
                incoming,
                slot_size: welcome.slot_size,
            },
            framing: Framing::Sized,
            theirs,
            ours,
            carrier: Carrier::Socket(socket),
            capabilities: Capabilities::from_bits(welcome.capabilities, welcome.message_size),
            peer: Peer {
                name: welcome.name,
                pid,
                uid,
                observer: false,
            },
            epoch: welcome.epoch,
        };
        let mut bus = DriverBus::new(parts, None).map_err(|_| ConnectError::Handshake {
            path: self.path.clone(),
            why: "queues that cannot be used",
        })?;
        if let Some(trace) = &self.trace {
            bus.set_trace(trace.interface(Side::Driver, bus.peer(), bus.capabilities()));
        }
        Ok(Some(bus))
    }
}

impl AsFd for Connecting {
    /// Readable when there is something to do for [`Connecting::advance`].
    ///
    /// # Panics
    /// After `advance` has returned the connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket
            .as_ref()
            .expect("not after the handshake")
            .as_fd()
    }
}

/// Maps the queues: *to device* and *to driver*.
fn queues(welcome: &Welcome, file: &OwnedFd) -> Result<(Part, Part), &'static str> {
    // On a file that can shrink, or one on FUSE, a load may kill or hang this process.
    if !check_seals(file.as_fd()).unwrap_or(false) {
        return Err("the file of the queues is not sealed against shrinking");
    }
    // Huge pages can be sealed as well, and where none are left a load kills this process.
    if !rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC) {
        return Err("the file of the queues is not ordinary memory");
    }
    let size = rustix::fs::fstat(file)
        .map_err(|_| "the file of the queues cannot be looked at")?
        .st_size;
    if u64::try_from(size) != Ok(welcome.file_len) {
        return Err("the file of the queues has another length than was said");
    }
    let mapping = Mapping::of_fd(file.as_fd(), 0, welcome.file_len, Access::ReadWrite)
        .map_err(|_| "the file of the queues cannot be mapped")?;
    let mapping = Arc::new(mapping);
    let part = |offset| {
        MappedSlice::new(Arc::clone(&mapping), offset, welcome.queue_len)
            .map(Part::Mapped)
            .ok_or("queues that do not lie in their file")
    };
    Ok((part(welcome.to_device)?, part(welcome.to_driver)?))
}
