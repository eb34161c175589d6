// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's side.

use super::open::{self, OpenError, Opened, describe};
use super::port::{Joined, Outcome, Port};
use super::spec::Place;
use super::{IvshmemSpec, Site, card, common};
use crate::trace::{OpenError as TraceError, Side as Seen};
use crate::unix::connector::GONE;
use crate::unix::{ConnectError, Watch};
use crate::{CommonRam, DriverBus, StaticRam};
use ivshmem::client::{self, Advance, Client, Limits};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmsg_mem::amp::Side;

/// Comes to the memory as the driver. Clones share the memory and the driver's place in it, which this program has from the first
/// attempt until all of them and the connection are gone.
#[derive(Clone, Debug)]
pub struct Connector {
    site: Arc<Site>,
    path: PathBuf,
    timeout: Duration,
    shared: Arc<Mutex<Shared>>,
}

/// What outlives a connection.
#[derive(Debug, Default)]
struct Shared {
    port: Option<Arc<Port>>,
    common: Option<Arc<CommonRam>>,
}

impl Connector {
    /// For the bus `spec`; `name` is that of this program, for messages to people.
    pub fn new(spec: &IvshmemSpec, name: &str) -> Self {
        let path = match spec.place() {
            Ok(Place::Socket(path) | Place::Listen(path) | Place::File(path)) => path,
            Ok(Place::Shm(name)) => Path::new("/dev/shm").join(name.trim_start_matches('/')),
            Ok(Place::Pci(address)) => Path::new("/sys/bus/pci/devices").join(address),
            // Told when it is used.
            Err(_) => PathBuf::from("ivshmem"),
        };
        Self {
            site: Arc::new(Site::new(spec, name)),
            path,
            timeout: Duration::from_secs(5),
            shared: Arc::default(),
        }
    }

    /// The same where it is open already.
    #[cfg(test)]
    pub(super) fn on(spec: &IvshmemSpec, name: &str, opened: Opened) -> Self {
        let connector = Self::new(spec, name);
        let mut shared = connector.lock();
        connector.open(&mut shared, opened).expect("a port");
        drop(shared);
        connector
    }

    /// How long [`Self::connect`] waits; 5 s otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Where both sides meet: the server's socket, the file, the PCI function in sysfs.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The driver's memory, with `memory=known`.
    pub fn static_ram(&self) -> Option<&StaticRam> {
        self.site.ram.as_ref()
    }

    pub(crate) fn open_trace(&self) -> Result<(), TraceError> {
        match &self.site.trace {
            Some(trace) => trace.open().map(drop),
            None => Ok(()),
        }
    }

    pub(crate) fn watch(&self) -> io::Result<crate::Watch> {
        Watch::new(&self.path).map(crate::Watch::Unix)
    }

    /// Connects, waiting up to the timeout.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect(&self) -> Result<DriverBus, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let mut connecting = self.start()?;
        loop {
            if let Some(bus) = connecting.advance()? {
                return Ok(bus);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectError::NotYet {
                    path: self.path.clone(),
                });
            }
            let mut fds = [PollFd::new(&connecting, PollFlags::IN)];
            match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(self.os("wait for", error)),
            }
        }
    }

    /// Begins to connect without ever waiting: call [`Connecting::advance`] at once and whenever what this returns is
    /// readable. The timeout is up to the caller.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn start(&self) -> Result<Connecting, ConnectError> {
        self.site
            .spec
            .check()
            .map_err(|error| cannot(error.into()))?;
        let mut shared = self.lock();
        let connecting = |step| Connecting {
            connector: self.clone(),
            step,
        };
        // Of a file that was truncated there may be a new one.
        if shared.port.as_ref().is_some_and(|port| port.is_lost()) {
            shared.port = None;
        }
        if let Some(port) = &shared.port
            && (port.has_server() || !self.path.exists())
        {
            let port = Arc::clone(port);
            port.begin_anew(self.epoch()?);
            return Ok(connecting(Step::Meet(port)));
        }
        if let Ok(Place::Socket(path)) = self.site.spec.place() {
            return match client::Connecting::begin(&path, Limits::default()) {
                Ok(begun) => {
                    let dialing = Dialing::new(begun).map_err(|source| self.os("watch", source))?;
                    Ok(connecting(Step::Dial(dialing)))
                }
                // What was shared before goes on without its server.
                Err(_) if shared.port.is_some() => self.meet(&mut shared).map(connecting),
                Err(error) => Err(self.client_error(error)),
            };
        }
        let opened = open::open(&self.site.spec, None).map_err(|error| match error {
            OpenError::Plain(ivshmem::PlainError::Missing(_)) => ConnectError::NotThere {
                path: self.path.clone(),
            },
            error => cannot(error),
        })?;
        self.open(&mut shared, opened)?;
        self.meet(&mut shared).map(connecting)
    }

    /// A server that has begun anew while the device host is waited for: that one goes there as well.
    fn redial(&self, port: &Port) -> Result<Option<Dialing>, ConnectError> {
        let Ok(Place::Socket(path)) = self.site.spec.place() else {
            return Ok(None);
        };
        if port.has_server() {
            return Ok(None);
        }
        // Nobody listens yet: the port wakes this side again soon enough.
        let begun = client::Connecting::begin(&path, Limits::default()).ok();
        let dialing = begun.map(Dialing::new).transpose();
        dialing.map_err(|source| self.os("watch", source))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn epoch(&self) -> Result<u32, ConnectError> {
        super::random().map_err(|source| self.os("draw an epoch for", source))
    }

    fn os(&self, what: &'static str, source: impl Into<io::Error>) -> ConnectError {
        ConnectError::Os {
            what,
            path: self.path.clone(),
            source: source.into(),
        }
    }

    fn client_error(&self, error: client::ConnectError) -> ConnectError {
        match error {
            client::ConnectError::NotThere { path } => ConnectError::NoServer { path },
            client::ConnectError::Busy { path } => ConnectError::Busy { path },
            client::ConnectError::TimedOut { path, after } => {
                ConnectError::TimedOut { path, after }
            }
            client::ConnectError::Closed { path } => ConnectError::Handshake { path, why: GONE },
            error => cannot(error.into()),
        }
    }

    /// Comes into memory.
    fn open(&self, shared: &mut Shared, opened: Opened) -> Result<(), ConnectError> {
        let spec = &self.site.spec;
        let common = common::open(spec, &opened.device).map_err(|error| cannot(error.into()))?;
        let size = common.as_ref().map_or(0, |common| common.len);
        let card = card(spec, &opened, &self.site.name, true, size);
        let port = Port::new(opened, Side::Driver, card, self.epoch()?);
        let port = port.map_err(|source| {
            let place = describe(spec);
            cannot(OpenError::Os { place, source })
        })?;
        shared.port = Some(Arc::new(port));
        shared.common = common.map(Arc::new);
        Ok(())
    }

    fn meet(&self, shared: &mut Shared) -> Result<Step, ConnectError> {
        let port = shared.port.as_ref().map(Arc::clone);
        port.map(Step::Meet).ok_or(ConnectError::NotYet {
            path: self.path.clone(),
        })
    }

    fn finish(&self, port: &Arc<Port>, joined: Joined) -> Result<DriverBus, ConnectError> {
        let os = |source| self.os("use the memory of", source);
        let common = self.lock().common.clone();
        // Of a device host that says nothing of itself it is not known whether it is the one that was there before.
        let epoch = super::random().map_err(os)?;
        let parts = self
            .site
            .parts(port, joined, true, common.as_deref(), epoch.into());
        let (parts, vectors) = parts.map_err(os)?;
        let views = parts.capabilities.views;
        let place = Box::new(Arc::clone(&self.shared));
        let bus = DriverBus::new(parts, Some(place));
        let mut bus = bus.map_err(|error| self.os("use the queues of", io::Error::other(error)))?;
        bus.set_static_ram(self.site.ram.clone());
        bus.share(common.filter(|_| views), vectors.map(Arc::new));
        if let Some(trace) = &self.site.trace {
            bus.set_trace(trace.interface(Seen::Driver, bus.peer(), bus.capabilities()));
        }
        Ok(bus)
    }
}

fn cannot(error: OpenError) -> ConnectError {
    ConnectError::Ivshmem(Box::new(error))
}

/// A connection that comes about, from [`Connector::start`].
#[derive(Debug)]
pub struct Connecting {
    connector: Connector,
    step: Step,
}

#[derive(Debug)]
enum Step {
    /// Until the server has let this side in.
    Dial(Dialing),
    /// Until the device host is there.
    Meet(Arc<Port>),
    Over,
}

/// A client of a server that is not one yet.
#[derive(Debug)]
struct Dialing {
    connecting: Box<client::Connecting>,
    timer: OwnedFd,
    epoll: OwnedFd,
}

impl Dialing {
    fn new(connecting: client::Connecting) -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [connecting.as_fd(), timer.as_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)?;
        }
        Ok(Self {
            connecting: Box::new(connecting),
            timer,
            epoll,
        })
    }

    /// The client, or what is to be waited for.
    fn advance(self, now: Instant) -> Result<Result<Client, Self>, client::ConnectError> {
        let Self {
            connecting,
            timer,
            epoll,
        } = self;
        match connecting.advance(now)? {
            Advance::Done(client) => Ok(Ok(*client)),
            Advance::Pending(connecting) => {
                let zero = Timespec::default();
                let wait = connecting
                    .due()
                    .map(|due| due.saturating_duration_since(now));
                let wait = wait.map(|wait| wait.max(Duration::from_nanos(1)));
                let value = Itimerspec {
                    it_interval: zero,
                    it_value: wait
                        .and_then(|wait| Timespec::try_from(wait).ok())
                        .unwrap_or(zero),
                };
                // Fails only for times that are none. It also makes the timer unreadable.
                let _ = timerfd_settime(&timer, TimerfdTimerFlags::empty(), &value);
                Ok(Err(Self {
                    connecting,
                    timer,
                    epoll,
                }))
            }
        }
    }
}

impl Connecting {
    /// The connection, once the device host is there; `None` before. Never waits.
    ///
    /// # Errors
    /// [`ConnectError`]; there is nothing to wait for after that.
    pub fn advance(&mut self) -> Result<Option<DriverBus>, ConnectError> {
        let connector = &self.connector;
        if let Step::Dial(_) = self.step {
            let Step::Dial(dialing) = std::mem::replace(&mut self.step, Step::Over) else {
                return Ok(None);
            };
            let advanced = dialing.advance(Instant::now());
            match advanced.map_err(|error| connector.client_error(error))? {
                Err(dialing) => {
                    self.step = Step::Dial(dialing);
                    return Ok(None);
                }
                Ok(client) => {
                    let opened = open::with_client(&connector.site.spec, client).map_err(cannot)?;
                    let mut shared = connector.lock();
                    connector.open(&mut shared, opened)?;
                    self.step = connector.meet(&mut shared)?;
                }
            }
        }
        let Step::Meet(port) = &self.step else {
            return Err(ConnectError::Handshake {
                path: connector.path.clone(),
                why: "the connection has been given out already",
            });
        };
        let outcome = port
            .turn()
            .map_err(|source| connector.os("watch", source))?;
        match outcome {
            None => {
                if let Some(dialing) = connector.redial(port)? {
                    self.step = Step::Dial(dialing);
                    return self.advance();
                }
                Ok(None)
            }
            Some(Outcome::Taken(holder)) => {
                self.step = Step::Over;
                Err(ConnectError::Held {
                    bus: describe(&connector.site.spec),
                    holder: format!("`{holder}`"),
                })
            }
            Some(Outcome::Joined(joined)) => {
                let bus = connector.finish(port, *joined);
                self.step = Step::Over;
                bus.map(Some)
            }
        }
    }
}

impl AsFd for Connecting {
    /// Readable when there is something to do for [`Connecting::advance`].
    ///
    /// # Panics
    /// After `advance` has returned the connection or an error.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.step {
            Step::Dial(dialing) => dialing.epoll.as_fd(),
            Step::Meet(port) => port.as_fd(),
            Step::Over => panic!("there is nothing to wait for any more"),
        }
    }
}
