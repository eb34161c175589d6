// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's side of connecting: docs/bus-linux-user.md §4.

use super::door::{Attempts, Dialed, Listening, dial};
use super::program::{self, Program};
use super::queues::Queues;
use super::stream::Stream;
use super::{LinuxUserSpec, Revision, Role, Site};
use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::link::Parts;
use crate::lock::{FileLock, LockError};
use crate::trace::{OpenError, Side};
use crate::translation::Translation;
use crate::unix::connector::GONE;
use crate::unix::{ConnectError, Watch};
use crate::{DriverBus, StaticRam};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long to wait for others who look at the files just now.
const PATIENCE: Duration = Duration::from_millis(500);

/// Connects to the device host, or lets it connect here.
///
/// The first attempt makes this program the driver of the bus, and it stays so until all clones
/// and the connection are gone.
#[derive(Clone, Debug)]
pub struct Connector {
    site: Arc<Site>,
    program: String,
    timeout: Duration,
    shared: Arc<Mutex<Shared>>,
}

/// What outlives a connection.
#[derive(Debug, Default)]
struct Shared {
    listening: Option<Listening>,
    /// Let go of last.
    lock: Option<FileLock>,
}

impl Connector {
    /// For the bus `spec`; `name` is that of this program, for messages to people.
    pub fn new(spec: &LinuxUserSpec, name: &str) -> Self {
        Self {
            site: Arc::new(Site::new(spec, Role::Driver)),
            program: name.to_owned(),
            timeout: Duration::from_secs(5),
            shared: Arc::default(),
        }
    }

    /// How long [`Self::connect`] waits; 5 s otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The socket where both sides meet.
    pub fn path(&self) -> &Path {
        &self.site.socket
    }

    /// The driver's memory, if it is said where that is.
    pub fn static_ram(&self) -> Option<&StaticRam> {
        self.site.ram.as_ref()
    }

    pub(crate) fn open_trace(&self) -> Result<(), OpenError> {
        match &self.site.trace {
            Some(trace) => trace.open().map(drop),
            None => Ok(()),
        }
    }

    pub(crate) fn watch(&self) -> io::Result<crate::Watch> {
        if self.site.server {
            return self
                .listening()
                .map(crate::Watch::Listening)
                .map_err(io::Error::other);
        }
        Watch::new(&self.site.socket).map(crate::Watch::Unix)
    }

    /// Connects, waiting up to the timeout.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self) -> Result<DriverBus, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let wait = |fd: BorrowedFd<'_>| {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => Ok(true),
                Err(error) => Err(self.os("wait for", error)),
            }
        };
        let mut connecting = loop {
            match self.start() {
                Err(ConnectError::NotYet { path }) => {
                    let listening = self.listening()?;
                    if !wait(listening.as_fd())? {
                        return Err(ConnectError::NotYet { path });
                    }
                }
                result => break result?,
            }
        };
        loop {
            if let Some(bus) = connecting.advance()? {
                return Ok(bus);
            }
            if !wait(connecting.as_fd())? {
                return Err(ConnectError::NotTaken {
                    path: self.site.socket.clone(),
                    after: self.timeout,
                });
            }
        }
    }

    /// Begins to connect without ever waiting: call [`Connecting::advance`] at once and whenever
    /// what this returns is readable. The timeout is up to the caller.
    /// Only who has the role already and is being killed is waited for, up to two seconds.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn start(&self) -> Result<Connecting, ConnectError> {
        self.take_role()?;
        let mut connecting = Connecting {
            connector: self.clone(),
            step: Step::Over,
        };
        if self.site.server {
            let joined = self.listening()?.accept();
            let socket = joined
                .map_err(|source| self.os("accept on", source))?
                .ok_or_else(|| ConnectError::NotYet {
                    path: self.site.socket.clone(),
                })?;
            connecting.step = self.meet(socket)?;
        } else {
            let timer = timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )
            .map_err(|error| self.os("make a timer for", error))?;
            connecting.step = self.dial(timer, Attempts::default())?;
        }
        Ok(connecting)
    }

    fn os(&self, what: &'static str, source: impl Into<io::Error>) -> ConnectError {
        ConnectError::Os {
            what,
            path: self.site.socket.clone(),
            source: source.into(),
        }
    }

    /// Makes this program the driver.
    fn take_role(&self) -> Result<(), ConnectError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.lock.is_some() {
            return Ok(());
        }
        let this = Program::this(&self.program, None);
        let lock = program::take_role(&self.site, Role::Driver, &this, PATIENCE);
        shared.lock = Some(lock.map_err(|error| match error {
            LockError::Held(text) => ConnectError::Held {
                bus: self.site.to_string(),
                holder: Program::shown(&text),
            },
            LockError::Os { what, path, source } => ConnectError::Os { what, path, source },
        })?);
        Ok(())
    }

    /// Listens, if it does not yet.
    fn listening(&self) -> Result<Listening, ConnectError> {
        self.take_role()?;
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listening) = &shared.listening {
            return Ok(listening.clone());
        }
        let listening = Listening::bind(&self.site.socket)?;
        Ok(shared.listening.insert(listening).clone())
    }

    /// Tries to connect.
    fn dial(&self, timer: OwnedFd, mut attempts: Attempts) -> Result<Step, ConnectError> {
        let path = || self.site.socket.clone();
        let dialed = dial(&self.site.socket).map_err(|source| self.os("connect to", source))?;
        let pause = match dialed {
            Dialed::Connected(socket) => return self.meet(socket),
            Dialed::Busy => return Err(ConnectError::Busy { path: path() }),
            other => attempts
                .pause_after(&other)
                .ok_or_else(|| ConnectError::NotThere { path: path() })?,
        };
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(pause).unwrap_or_default(),
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &value)
            .map_err(|error| self.os("wait for", error))?;
        Ok(Step::Again { timer, attempts })
    }

    /// There is a connection; now the host must take it.
    fn meet(&self, socket: OwnedFd) -> Result<Step, ConnectError> {
        let queues = Queues::open(&self.site, PATIENCE)?;
        let host = program::at(&self.site, Role::Device, socket.as_fd(), PATIENCE)?;
        let stream =
            Stream::new(socket).map_err(|source| self.os("watch the doorbell at", source))?;
        if host.is_none() {
            // What was there to be told before is not told again.
            let events = stream.take_events();
            events.map_err(|source| self.os("watch the doorbell at", source))?;
            stream.ring();
        }
        Ok(Step::Meet {
            stream: Arc::new(stream),
            queues,
            host,
            met: false,
        })
    }
}

/// A connection that comes about, from [`Connector::start`].
#[derive(Debug)]
pub struct Connecting {
    connector: Connector,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// Nobody listens on the socket yet.
    Again {
        timer: OwnedFd,
        attempts: Attempts,
    },
    /// Until the host has taken the connection: one of ours rings, QEMU reads what we rang.
    Meet {
        stream: Arc<Stream>,
        queues: Queues,
        /// A host of ours; `None` for QEMU.
        host: Option<Program>,
        met: bool,
    },
    Over,
}

impl Connecting {
    /// The connection, once the host has taken it; `None` before. Never waits.
    ///
    /// # Errors
    /// [`ConnectError`]; there is nothing to wait for after that.
    pub fn advance(&mut self) -> Result<Option<DriverBus>, ConnectError> {
        let connector = &self.connector;
        match std::mem::replace(&mut self.step, Step::Over) {
            Step::Over => Err(ConnectError::Handshake {
                path: connector.site.socket.clone(),
                why: "the connection has been given out already",
            }),
            Step::Again { timer, attempts } => {
                let mut times = [0; 8];
                if rustix::io::read(&timer, &mut times).is_err() {
                    self.step = Step::Again { timer, attempts };
                    return Ok(None);
                }
                self.step = connector.dial(timer, attempts)?;
                Ok(None)
            }
            Step::Meet {
                stream,
                queues,
                host,
                met,
            } => {
                let told = stream
                    .take_events()
                    .map_err(|source| connector.os("watch the doorbell at", source))?;
                let rung = stream.drain() > 0;
                if stream.is_over() {
                    return Err(connector.not_taken(host.as_ref(), &stream));
                }
                let met = met || rung || host.is_none() && told;
                // QEMU answers what another driver has left before it answers us.
                let ready = met && (host.is_some() || queues.is_drained(Role::Driver)?);
                if ready {
                    stream.room_found();
                    return connector.finish(&stream, &queues, host.as_ref()).map(Some);
                }
                if met {
                    // It may never take what another driver left: it is looked for less and less often.
                    stream.wait_for_room();
                }
                self.step = Step::Meet {
                    stream,
                    queues,
                    host,
                    met,
                };
                Ok(None)
            }
        }
    }
}

impl Connector {
    /// Why `host` has ended a connection that it never took.
    fn not_taken(&self, host: Option<&Program>, stream: &Stream) -> ConnectError {
        let still_there = || program::at(&self.site, Role::Device, stream.socket(), PATIENCE);
        if host.is_some() && still_there().is_ok_and(|host| host.is_some()) {
            // Not one of ours: that would have the driver's lock.
            return ConnectError::Held {
                bus: self.site.to_string(),
                holder: "another driver (QEMU, perhaps)".to_owned(),
            };
        }
        ConnectError::Handshake {
            path: self.site.socket.clone(),
            why: GONE,
        }
    }

    fn finish(
        &self,
        stream: &Arc<Stream>,
        queues: &Queues,
        host: Option<&Program>,
    ) -> Result<DriverBus, ConnectError> {
        let os = |source| self.os("watch the doorbell at", source);
        stream.ignore_reads().map_err(os)?;
        // What the host had to say to another driver.
        let (rx, dropped) = queues.emptied(Role::Driver)?;
        if dropped > 0 {
            tracing::debug!(dropped, "messages to another driver");
        }
        // QEMU does not say whether it is the one that was there before.
        let epoch = match host.and_then(|host| host.epoch) {
            Some(epoch) => epoch,
            None => super::random().map_err(os)?,
        };
        let peer = program::peer(stream.socket(), host);
        let parts = Parts {
            queues: crate::link::Queues::Resumed {
                tx: queues.producer(Role::Driver)?,
                rx,
                files: queues.mappings(),
            },
            framing: self.site.framing(),
            theirs: Bell::Stream(Arc::clone(stream)),
            ours: Bell::Stream(Arc::clone(stream)),
            carrier: Carrier::Stream(Arc::clone(stream)),
            capabilities: self.site.capabilities(),
            peer,
            epoch,
        };
        let place = Box::new(Arc::clone(&self.shared));
        let mut bus = DriverBus::new(parts, Some(place)).map_err(|_| ConnectError::Handshake {
            path: self.site.socket.clone(),
            why: "queues that cannot be used",
        })?;
        bus.set_static_ram(self.site.ram.clone());
        if self.site.revision == Revision::R1 {
            bus.translate(Translation::for_driver());
        }
        if let Some(trace) = &self.site.trace {
            bus.set_trace(trace.interface(Side::Driver, bus.peer(), bus.capabilities()));
        }
        Ok(bus)
    }
}

impl AsFd for Connecting {
    /// Readable when there is something to do for [`Connecting::advance`].
    ///
    /// # Panics
    /// After `advance` has returned the connection or an error.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.step {
            Step::Again { timer, .. } => timer.as_fd(),
            Step::Meet { stream, .. } => stream.as_fd(),
            Step::Over => panic!("not after the handshake"),
        }
    }
}
