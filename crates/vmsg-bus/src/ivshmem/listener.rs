// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host's side: one driver after another.

use super::open::{self, Keep, OpenError, Opened, describe};
use super::port::{Joined, Outcome, Port};
use super::spec::Ram;
use super::{IvshmemSpec, Site, card, common};
use crate::taken::Taken;
use crate::trace::Side as Seen;
use crate::unix::BindError;
use crate::{CommonRam, DeviceBus, StaticRam};
use ivshmem::client::{self, Advance};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmsg_mem::amp::Side;

/// How long it may take to see whether another host has the place.
const PATIENCE: Duration = Duration::from_secs(4);

/// After trouble, and how often a server that is gone is looked for.
const PAUSE: Duration = Duration::from_millis(200);
const SEEK: Duration = Duration::from_secs(1);

/// Waits for a driver, and for the next one when that is gone. All is done in [`accept`](Listener::accept), which never waits.
#[derive(Debug)]
pub struct Listener {
    site: Site,
    /// The same for all connections: what a driver does to devices ends with its connection.
    epoch: u32,
    common: Option<Arc<CommonRam>>,
    port: Arc<Port>,
    /// Holds the bell, and the port while there is no connection.
    epoll: OwnedFd,
    taken: Taken,
    connected: bool,
    /// The place is another host's, which was told: its end is waited for.
    ousted: bool,
    paused_until: Option<Instant>,
    /// Memory that was gone is looked for then.
    seek_at: Option<Instant>,
    /// A server that is there again, and has until then to let this end in.
    seeking: Option<(Box<client::Connecting>, Instant)>,
}

impl Listener {
    /// Takes the bus for a program called `name`, and begins to wait for drivers. A block of another host in the memory is watched first,
    /// up to two seconds, whether it is alive; the common memory is opened.
    ///
    /// # Errors
    /// [`BindError`]: another device host has the place, or the memory cannot be had.
    pub fn bind(
        spec: &IvshmemSpec,
        name: &str,
        keep: Option<&Keep<'_>>,
    ) -> Result<Self, BindError> {
        let site = Site::new(spec, name);
        if let Some(trace) = &site.trace {
            trace.open()?;
        }
        let opened = open::open(spec, keep);
        Self::on(
            site,
            opened.map_err(|error| BindError::Ivshmem(Box::new(error)))?,
        )
    }

    /// The same where it is open already.
    pub(super) fn on(site: Site, opened: Opened) -> Result<Self, BindError> {
        let cannot = |error: OpenError| BindError::Ivshmem(Box::new(error));
        let (spec, name) = (&site.spec.clone(), &site.name.clone());
        let os = |source: io::Error| {
            let place = describe(spec);
            cannot(OpenError::Os { place, source })
        };
        let common = common::open(spec, &opened.device).map_err(|error| cannot(error.into()))?;
        let epoch = super::random().map_err(os)?;
        let card = card(
            spec,
            &opened,
            name,
            false,
            common.as_ref().map_or(0, |common| common.len),
        );
        let port = Arc::new(Port::new(opened, Side::Device, card, epoch).map_err(os)?);
        let taken = Taken::new().map_err(os)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| os(error.into()))?;
        for fd in [taken.as_fd(), port.as_fd()] {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)
                .map_err(|error| os(error.into()))?;
        }
        let listener = Self {
            site,
            epoch,
            common: common.map(Arc::new),
            port,
            epoll,
            taken,
            connected: false,
            ousted: false,
            paused_until: None,
            seek_at: None,
            seeking: None,
        };
        listener.take_place(os)?;
        Ok(listener)
    }

    /// Waits until it is seen that the place is free.
    fn take_place(&self, os: impl Fn(io::Error) -> BindError) -> Result<(), BindError> {
        let deadline = Instant::now() + PATIENCE;
        while self.port.is_looking() && Instant::now() < deadline {
            if let Some(Outcome::Taken(holder)) = self.port.look_only().map_err(&os)? {
                let spec = &self.site.spec;
                return Err(BindError::Ivshmem(Box::new(OpenError::Held {
                    place: describe(spec),
                    offset: spec.layout_offset(),
                    holder,
                })));
            }
            if !self.port.is_looking() {
                break;
            }
            let pause = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            match poll(&mut [PollFd::new(&*self.port, PollFlags::IN)], Some(&pause)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(os(error.into())),
            }
        }
        Ok(())
    }

    /// What the bus was told.
    pub fn spec(&self) -> &IvshmemSpec {
        &self.site.spec
    }

    /// The driver's memory, with `memory=known`.
    pub fn static_ram(&self) -> Option<&StaticRam> {
        self.site.ram.as_ref()
    }

    /// When [`Self::accept`] must be called even if nothing is readable.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.connected {
            true => None,
            false => {
                let seeking = self.seeking.as_ref();
                let until = seeking.map(|(seeking, until)| match seeking.due() {
                    Some(due) => due.min(*until),
                    None => *until,
                });
                self.paused_until.or(until).or(self.seek_at)
            }
        }
    }

    /// The connection of a driver. Call it when the listener is readable ([`AsFd`]; level-triggered) and at
    /// [`Self::next_deadline`], until it returns `None`.
    ///
    /// # Errors
    /// Local trouble only; the listener can be used on, and pauses for a moment.
    pub fn accept(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        if self.taken.has_ended() {
            self.connected = false;
            self.port.again();
            self.watch_port(EventFlags::IN)?;
        }
        if self.connected || self.paused_until.is_some_and(|until| until > now) {
            return Ok(None);
        }
        if self.paused_until.take().is_some() {
            self.watch_port(EventFlags::IN)?;
        }
        self.seek_memory(now);
        let result = self.take_in(now);
        if result.is_err() {
            self.paused_until.get_or_insert(now + PAUSE);
        }
        if self.paused_until.is_some() {
            // Nobody must spin on it meanwhile.
            self.seeking = None;
            self.watch_port(EventFlags::empty())?;
        }
        result
    }

    fn watch_port(&self, flags: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(0);
        Ok(epoll::modify(&self.epoll, self.port.as_fd(), data, flags)?)
    }

    /// A server that has begun anew has other doorbells, and perhaps other memory; a file that was truncated may have been made
    /// anew.
    fn seek_memory(&mut self, now: Instant) {
        let lost = self.port.is_lost();
        if self.port.has_server() && !lost {
            (self.seek_at, self.seeking) = (None, None);
            return;
        }
        if let Some((seeking, until)) = self.seeking.take() {
            let moved = self.go_on_to_seek(seeking, until, now);
            return self.tell(moved);
        }
        if self.seek_at.is_some_and(|at| at > now) {
            return;
        }
        self.seek_at = Some(now + SEEK);
        let moved = match self.port.server_path() {
            Some(path) => self.begin_to_seek(&path, now),
            None if lost => open::open(&self.site.spec, None)
                .map_err(Into::into)
                .and_then(|opened| self.move_to(opened)),
            None => return,
        };
        self.tell(moved);
    }

    fn tell(&self, moved: Result<(), Box<dyn std::error::Error>>) {
        if let Err(error) = moved {
            tracing::debug!(%error, "the memory is not there again");
        }
    }

    fn begin_to_seek(
        &mut self,
        path: &std::path::Path,
        now: Instant,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let seeking = client::Connecting::begin(path, client::Limits::default())?;
        epoll::add(&self.epoll, &seeking, EventData::new_u64(0), EventFlags::IN)?;
        self.go_on_to_seek(Box::new(seeking), now + SEEK, now)
    }

    fn go_on_to_seek(
        &mut self,
        seeking: Box<client::Connecting>,
        until: Instant,
        now: Instant,
    ) -> Result<(), Box<dyn std::error::Error>> {
        match seeking.advance(now)? {
            Advance::Done(client) => {
                // It is the port's to watch from here on.
                epoll::delete(&self.epoll, client.poll_fd())?;
                self.move_to(open::with_client(&self.site.spec, *client)?)
            }
            Advance::Pending(seeking) if now < until => {
                self.seeking = Some((seeking, until));
                Ok(())
            }
            Advance::Pending(_) => Err("the server does not let this end in".into()),
        }
    }

    fn move_to(&mut self, opened: Opened) -> Result<(), Box<dyn std::error::Error>> {
        let spec = &self.site.spec;
        let common = match spec.ram {
            // It may be other memory than before.
            Some(Ram::Bar) => common::open(spec, &opened.device)?.map(Arc::new),
            _ => self.common.clone(),
        };
        let size = common.as_ref().map_or(0, |common| common.len);
        let card = card(spec, &opened, &self.site.name, false, size);
        let epoch = super::random()?;
        let port = Arc::new(Port::new(opened, Side::Device, card, epoch)?);
        epoll::add(
            &self.epoll,
            port.as_fd(),
            EventData::new_u64(0),
            EventFlags::IN,
        )?;
        self.port.leave();
        self.port = port;
        self.common = common;
        let place = describe(&self.site.spec);
        tracing::info!(place, "the memory is there again");
        Ok(())
    }

    fn take_in(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        let outcome = self.port.turn().inspect_err(|_| {
            // Such as indices out of range, with which no queue goes on: somebody else may come.
            self.port.let_go();
            self.port.again();
        })?;
        let joined = match outcome {
            None => {
                self.ousted &= self.port.is_looking();
                return Ok(None);
            }
            Some(Outcome::Taken(holder)) => {
                // Until that one ends; or somebody has just written over the block, and nobody is there.
                self.port.again();
                self.paused_until = Some(now + SEEK);
                if std::mem::replace(&mut self.ousted, true) {
                    return Ok(None);
                }
                let bus = describe(&self.site.spec);
                return Err(io::Error::other(format!(
                    "{bus} was taken by another device host, `{holder}`"
                )));
            }
            Some(Outcome::Joined(joined)) => joined,
        };
        match self.open(*joined) {
            Ok(bus) => {
                self.connected = true;
                self.seeking = None;
                self.watch_port(EventFlags::empty())?;
                Ok(Some(bus))
            }
            Err(error) => {
                self.port.let_go();
                self.port.again();
                Err(error)
            }
        }
    }

    /// Makes the connection an end of the bus.
    fn open(&self, joined: Joined) -> io::Result<DeviceBus> {
        let common = self.common.as_deref();
        let (parts, vectors) =
            self.site
                .parts(&self.port, joined, false, common, self.epoch.into())?;
        let views = parts.capabilities.views;
        let place = self.taken.place();
        let mut bus = DeviceBus::new(parts, Some(place)).map_err(io::Error::other)?;
        bus.set_static_ram(self.site.ram.clone());
        bus.share(self.common.clone().filter(|_| views), vectors.map(Arc::new));
        if let Some(trace) = &self.site.trace {
            bus.set_trace(trace.interface(Seen::Device, bus.peer(), bus.capabilities()));
        }
        Ok(bus)
    }
}

impl AsFd for Listener {
    /// Readable when there is something to do for [`Listener::accept`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
