// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host's side: one driver after another.

use super::door::Door;
use super::program::{self, Program};
use super::queues::Queues;
use super::stream::Stream;
use super::{LinuxUserSpec, Revision, Role, Site};
use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::link::Parts;
use crate::lock::{FileLock, LockError};
use crate::taken::Taken;
use crate::trace::Side;
use crate::translation::Translation;
use crate::unix::{BindError, packet};
use crate::{DeviceBus, StaticRam};
use rustix::event::epoll::{self, EventData, EventFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// From the end of a connection to the next attempt to connect, and after trouble with files.
const PAUSE: Duration = Duration::from_millis(200);

/// How long it waits at the start for who looks at the files just now, and how long while others are served.
const PATIENCE: Duration = Duration::from_secs(2);
const SHORT_PATIENCE: Duration = Duration::from_millis(50);

/// Waits for a driver, and for the next one when that is gone. All is done in
/// [`accept`](Listener::accept), which never waits.
#[derive(Debug)]
pub struct Listener {
    site: Site,
    /// The same for all connections: what a driver does to devices ends with its connection.
    epoch: u64,
    /// Holds the bell, and the door: level-triggered while there is no connection, edge-triggered to turn others away.
    epoll: OwnedFd,
    door: Door,
    /// Ready for a driver, and open while waiting for one: then nobody else begins them anew.
    queues: Option<Queues>,
    taken: Taken,
    /// A connection was given out, and its end was not seen yet.
    connected: bool,
    /// That connection.
    stream: Weak<Stream>,
    /// When it was last told that somebody was turned away.
    turned_away: Option<Instant>,
    /// Nothing is tried before that, after trouble.
    paused_until: Option<Instant>,
    /// Let go of last.
    _lock: FileLock,
}

/// How many are turned away in one go: more than wait in the backlog.
const TURNED_AWAY: usize = 256;

/// From one line of log about that to the next.
const TELL: Duration = Duration::from_secs(10);

impl Listener {
    /// Takes the bus for a program called `name`, and begins to listen or to look for who does.
    ///
    /// # Errors
    /// [`BindError`]: another device host has it, somebody else listens on the socket, or the
    /// files cannot be used.
    pub fn bind(spec: &LinuxUserSpec, name: &str) -> Result<Self, BindError> {
        let site = Site::new(spec, Role::Device);
        let os = |what| {
            let path = site.socket.clone();
            move |source: io::Error| BindError::Os { what, path, source }
        };
        let epoch = super::random().map_err(os("draw an epoch for"))?;
        let this = Program::this(name, Some(epoch));
        let lock =
            program::take_role(&site, Role::Device, &this, PATIENCE).map_err(
                |error| match error {
                    LockError::Held(text) => BindError::Held {
                        bus: site.to_string(),
                        holder: Program::shown(&text),
                    },
                    LockError::Os { what, path, source } => BindError::Os { what, path, source },
                },
            )?;
        if let Some(trace) = &site.trace {
            trace.open()?;
        }
        let queues = Queues::open(&site, PATIENCE)?;
        let door = Door::new(&site.socket, site.server)?;
        let taken = Taken::new().map_err(os("make a doorbell for"))?;
        let watch = |epoll: &OwnedFd, fd: BorrowedFd<'_>| {
            epoll::add(epoll, fd, EventData::new_u64(0), EventFlags::IN)
                .map_err(|error| os("watch")(error.into()))
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| os("watch")(error.into()))?;
        watch(&epoll, taken.as_fd())?;
        watch(&epoll, door.as_fd())?;
        Ok(Self {
            site,
            epoch,
            epoll,
            door,
            queues: Some(queues),
            taken,
            connected: false,
            stream: Weak::new(),
            turned_away: None,
            paused_until: None,
            _lock: lock,
        })
    }

    /// The socket where both sides meet.
    pub fn path(&self) -> &Path {
        &self.site.socket
    }

    /// The driver's memory, if it is said where that is.
    pub fn static_ram(&self) -> Option<&StaticRam> {
        self.site.ram.as_ref()
    }

    /// When [`Self::accept`] must be called even if nothing is readable.
    pub fn next_deadline(&self) -> Option<Instant> {
        if self.connected {
            return None;
        }
        self.paused_until.or_else(|| self.door.next_deadline())
    }

    /// The connection of a driver. Call it when the listener is readable ([`AsFd`];
    /// level-triggered) and at [`Self::next_deadline`], until it returns `None`.
    ///
    /// # Errors
    /// Local trouble only; the listener can be used on, and pauses for a moment.
    pub fn accept(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        if self.taken.has_ended() {
            self.connected = false;
            self.door.again(now + PAUSE);
            self.watch_door(EventFlags::IN)?;
        }
        if self.connected {
            self.door.hush()?;
            self.turn_away(now)?;
            return Ok(None);
        }
        if self.paused_until.is_some_and(|until| until > now) {
            return Ok(None);
        }
        self.paused_until = None;
        let result = self.take_in(now);
        if result.is_err() {
            self.paused_until = Some(now + PAUSE);
        }
        result
    }

    fn watch_door(&self, flags: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(0);
        Ok(epoll::modify(&self.epoll, self.door.as_fd(), data, flags)?)
    }

    /// There is one driver at a time. Who comes after its end, which may not have been seen yet, waits for that.
    fn turn_away(&mut self, now: Instant) -> io::Result<()> {
        for _ in 0..TURNED_AWAY {
            let lives = |stream: Arc<Stream>| !packet::is_hung_up(stream.socket());
            if !self.stream.upgrade().is_some_and(lives) {
                break;
            }
            let Some(socket) = self.door.visitor()? else {
                break;
            };
            // Whoever comes and goes without end must not fill the disk with it.
            if self.turned_away.is_none_or(|told| told + TELL <= now) {
                self.turned_away = Some(now);
                let visitor = program::peer(socket.as_fd(), None);
                tracing::warn!(%visitor, bus = %self.site, "turned away: there is one driver at a time");
            }
        }
        Ok(())
    }

    fn take_in(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        // At once after the end of a connection: the next driver may come without a word and find
        // what the last one has left.
        if !self.queues.as_ref().is_some_and(Queues::are_current) {
            self.queues = None;
            let queues = Queues::open(&self.site, SHORT_PATIENCE).map_err(io::Error::other)?;
            self.queues = Some(queues);
        }
        let Some(socket) = self.door.join(now)? else {
            return Ok(None);
        };
        let bus = match self.open(socket) {
            Ok(bus) => bus,
            Err(error) => {
                self.door.again(now + PAUSE);
                return Err(io::Error::other(error));
            }
        };
        self.connected = true;
        self.watch_door(EventFlags::IN | EventFlags::ET)?;
        Ok(Some(bus))
    }

    /// Makes the connection an end of the bus.
    fn open(
        &mut self,
        socket: OwnedFd,
    ) -> Result<DeviceBus, Box<dyn std::error::Error + Send + Sync>> {
        let queues = match self.queues.take() {
            // The files may have been removed since, as is advised before QEMU is started.
            Some(queues) if queues.are_current() => queues,
            old => {
                drop(old);
                Queues::open(&self.site, SHORT_PATIENCE)?
            }
        };
        let driver = program::at(&self.site, Role::Driver, socket.as_fd(), SHORT_PATIENCE)?;
        let rx = match driver {
            // A driver of ours is silent until the bell rings: what is there was said by another one.
            Some(_) => queues.emptied(Role::Device)?.0,
            // QEMU may have asked already.
            None => queues.consumer(Role::Device)?,
        };
        let tx = queues.producer(Role::Device)?;
        let stream = Arc::new(Stream::new(socket)?);
        stream.ignore_reads()?;
        let peer = program::peer(stream.socket(), driver.as_ref());
        let parts = Parts {
            queues: crate::link::Queues::Resumed {
                tx,
                rx,
                files: queues.mappings(),
            },
            framing: self.site.framing(),
            theirs: Bell::Stream(Arc::clone(&stream)),
            ours: Bell::Stream(Arc::clone(&stream)),
            carrier: Carrier::Stream(Arc::clone(&stream)),
            capabilities: self.site.capabilities(),
            peer,
            epoch: self.epoch,
        };
        let place = self.taken.place();
        let mut bus = DeviceBus::new(parts, Some(place))?;
        bus.set_static_ram(self.site.ram.clone());
        if self.site.revision == Revision::R1 {
            bus.translate(Translation::for_device());
        }
        if let Some(trace) = &self.site.trace {
            bus.set_trace(trace.interface(Side::Device, bus.peer(), bus.capabilities()));
        }
        self.stream = Arc::downgrade(&stream);
        // Tells a driver of ours that it may begin.
        stream.ring();
        Ok(bus)
    }
}

impl AsFd for Listener {
    /// Readable when there is something to do for [`Listener::accept`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
