// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk.

use std::io;
use std::mem;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use vmsg_mem::{Held, Pieces, WindowTable};

use super::connect::{self, Target, Targets};
use super::jobs::{Jobs, What};
use super::link::Link;
use super::negotiate::{Export, Negotiation, Refusal};
use super::stream::{Lost, Moved, Stream};
use super::wire::{self, RequestHeader};
use super::{NbdConfig, NbdOpenError};
use crate::{Completion, Disk, Facts, Failure, Request, Submitted};

/// Between the first two attempts to connect; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// A connection and its negotiation take no longer, if the timeout is longer.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(10);
/// As many bytes count as a sign of life, without an answer being complete.
const SIGN_OF_LIFE: usize = 64 << 10;
/// Lines of the log about a connection that comes and goes are at least so far from each other.
const QUIET: Duration = Duration::from_secs(10);
/// What a server may still send when its connection was given up.
const LAST_WORDS: usize = 64 << 20;

/// A disk that an NBD server has.
///
/// All of its work is done in the calls of its user: no thread waits for the server. While there is none, requests wait; what
/// was sent to a server that has gone away is sent to the next one, after all that it had answered and not been told to
/// flush. Where the server is asked for by name, a thread does that.
///
/// A server that gives no sign of life for [`NbdConfig::timeout`] while something is wanted from it is as good as none. Requests
/// that have waited as long fail, and as long as there is no server from then on, all do.
///
/// No change that was given up or canceled is done by the server after one that was submitted later: what is on the wire is
/// answered first, or its connection is at its end. Only a server that does not take notice of the end of its connection for
/// [`NbdConfig::timeout`] can get that wrong.
pub struct NbdDisk {
    config: NbdConfig,
    jobs: Jobs,
    link: Link,
    /// What the export was like when it was last seen.
    export: Export,
    facts: Facts,
    changed: bool,
    /// Since when nothing is between us and the server, and why.
    lost: Option<(Instant, String)>,
    /// For so long that requests fail at once: why.
    gone: Option<String>,
    /// When the server last gave a sign of life.
    alive: Instant,
    /// Bytes since then.
    bytes: usize,
    pause: Duration,
    /// When jobs are looked at that may have waited too long.
    look: Option<Instant>,
    spoken: Option<Instant>,
    epoll: OwnedFd,
    /// In `epoll`: written to when there is something to do that no socket tells.
    wake: Arc<OwnedFd>,
    awake: bool,
    /// What the socket is watched for.
    watched: EventFlags,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    connections: u64,
    violations: u64,
    timeouts: u64,
}

/// What ended an attempt to get a connection.
enum Attempt {
    /// It may go better next time.
    Failed(String),
    /// It may not.
    Refused(NbdOpenError),
}

impl NbdDisk {
    /// Connects to the server, and waits for it up to [`NbdConfig::timeout`].
    ///
    /// # Errors
    ///
    /// [`NbdOpenError`]: at once if there is a server that says no or does not speak the protocol.
    pub fn open(config: &NbdConfig) -> Result<Self, NbdOpenError> {
        let now = Instant::now();
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        epoll::add(&epoll, &wake, EventData::new_u64(0), EventFlags::IN)
            .map_err(io::Error::from)?;
        let export = Export {
            size: 0,
            flags: 0,
            minimum: 1,
            preferred: 512,
            maximum: 512,
            structured: false,
        };
        let mut disk = Self {
            config: config.clone(),
            jobs: Jobs::new(),
            link: Link::Down { retry: now },
            facts: facts(&export, config.read_only),
            export,
            changed: false,
            lost: Some((now, "nobody was asked yet".to_owned())),
            gone: None,
            alive: now,
            bytes: 0,
            pause: FIRST_PAUSE,
            look: None,
            spoken: None,
            epoll,
            wake: Arc::new(wake),
            awake: false,
            watched: EventFlags::empty(),
            counts: Counts::default(),
        };
        disk.wait_for_server(now + config.timeout)?;
        Ok(disk)
    }

    fn wait_for_server(&mut self, until: Instant) -> Result<(), NbdOpenError> {
        loop {
            let now = Instant::now();
            if let Err(error) = self.advance(now) {
                return Err(error);
            }
            if matches!(self.link, Link::Up { .. }) {
                self.changed = false;
                return Ok(());
            }
            if now >= until {
                let why = self.lost.take().map_or(String::new(), |(_, why)| why);
                return Err(NbdOpenError::Unreachable {
                    uri: self.config.uri.clone(),
                    source: io::Error::new(io::ErrorKind::TimedOut, why),
                });
            }
            let next = self.next_timeout().map_or(until, |next| next.min(until));
            let left = next
                .saturating_duration_since(now)
                .max(Duration::from_millis(1));
            let left = Timespec::try_from(left)
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let mut fds = [PollFd::new(&self.epoll, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }

    /// Does what can be done. An error only if a server says no; it was dealt with if there was a server before.
    fn advance(&mut self, now: Instant) -> Result<(), NbdOpenError> {
        self.sleep_again();
        let mut refused = None;
        // Each round comes nearer to requests that go, or waits for something.
        for _ in 0..64 {
            match self.step(now) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Attempt::Failed(why)) => self.attempt_failed(why, now),
                Err(Attempt::Refused(error)) => {
                    self.attempt_failed(error.to_string(), now);
                    refused = Some(error);
                }
            }
        }
        self.expire(now);
        self.watch();
        match refused {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// One step; true if another one may follow at once.
    fn step(&mut self, now: Instant) -> Result<bool, Attempt> {
        match mem::replace(&mut self.link, Link::Down { retry: now }) {
            Link::Down { retry } if retry > now => {
                self.link = Link::Down { retry };
                Ok(false)
            }
            Link::Down { .. } => {
                let until = now + self.config.timeout.min(LONGEST_ATTEMPT);
                match connect::resolve(&self.config.uri.address, &self.wake).map_err(failed)? {
                    Targets::Known(targets) => self.connect(targets, until)?,
                    Targets::Asked(answer) => self.link = Link::Asking { answer, until },
                }
                Ok(true)
            }
            Link::Asking { answer, until } => match answer.try_recv() {
                Ok(addresses) => {
                    let addresses = addresses.map_err(failed)?;
                    let targets = addresses.into_iter().map(Target::Inet).collect();
                    self.connect(targets, until)?;
                    Ok(true)
                }
                Err(std::sync::mpsc::TryRecvError::Empty) if now < until => {
                    self.link = Link::Asking { answer, until };
                    Ok(false)
                }
                Err(_) => Err(Attempt::Failed(
                    "its name was not resolved in time".to_owned(),
                )),
            },
            Link::Connecting {
                socket,
                others,
                until,
            } => self.connecting(socket, others, until, now),
            Link::Negotiating {
                socket,
                negotiation,
                until,
            } => self.negotiating(socket, negotiation, until, now),
            Link::Up { socket, stream } => Ok(self.up(socket, stream, now)),
            Link::Ending {
                socket,
                until,
                left,
            } => Ok(self.ending(socket, until, left, now)),
        }
    }

    /// Tries the targets, the first one that does not fail at once.
    fn connect(&mut self, mut targets: Vec<Target>, until: Instant) -> Result<(), Attempt> {
        let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
        while !targets.is_empty() {
            let target = targets.remove(0);
            match connect::begin(&target) {
                Ok(socket) => {
                    self.watch_new(&socket, EventFlags::OUT).map_err(failed)?;
                    self.link = Link::Connecting {
                        socket,
                        others: targets,
                        until,
                    };
                    return Ok(());
                }
                Err(why) => error = why,
            }
        }
        Err(failed(error))
    }

    fn connecting(
        &mut self,
        socket: OwnedFd,
        others: Vec<Target>,
        until: Instant,
        now: Instant,
    ) -> Result<bool, Attempt> {
        let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
        let ready = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        if !ready.is_ok_and(|ready| ready > 0) {
            if now >= until {
                return Err(Attempt::Failed(
                    "it does not take the connection".to_owned(),
                ));
            }
            self.link = Link::Connecting {
                socket,
                others,
                until,
            };
            return Ok(false);
        }
        match connect::outcome(&socket) {
            Ok(()) => {
                let negotiation = Negotiation::new(&self.config.uri);
                self.link = Link::Negotiating {
                    socket,
                    negotiation,
                    until,
                };
            }
            Err(error) if others.is_empty() => return Err(failed(error)),
            Err(_) => {
                drop(socket);
                self.connect(others, until)?;
            }
        }
        Ok(true)
    }

    fn negotiating(
        &mut self,
        socket: OwnedFd,
        mut negotiation: Negotiation,
        until: Instant,
        now: Instant,
    ) -> Result<bool, Attempt> {
        let uri = || self.config.uri.clone();
        loop {
            while !negotiation.output().is_empty() {
                match Pieces::EMPTY.send_from(&socket, negotiation.output(), SendFlags::DONTWAIT) {
                    Ok(sent) => negotiation.sent(sent),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(failed(error)),
                }
            }
            let mut input = [0; 4096];
            let received = match Pieces::EMPTY.recv_into(&socket, &mut input, RecvFlags::DONTWAIT) {
                Ok(0) => {
                    let why = "it closes the connection instead of saying what it has";
                    return Err(Attempt::Failed(why.to_owned()));
                }
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(failed(error)),
            };
            let mut bytes = &input[..received];
            match negotiation.input(&mut bytes) {
                Ok(None) => {}
                // Nothing was asked yet.
                Ok(Some(_)) if !bytes.is_empty() => {
                    self.counts.violations += 1;
                    let source = super::ProtocolError::Form("first");
                    return Err(Attempt::Refused(NbdOpenError::Protocol {
                        uri: uri(),
                        source,
                    }));
                }
                Ok(Some(export)) => {
                    self.connected(socket, export, now)?;
                    return Ok(true);
                }
                Err(Refusal::Protocol(source)) => {
                    self.counts.violations += 1;
                    return Err(Attempt::Refused(NbdOpenError::Protocol {
                        uri: uri(),
                        source,
                    }));
                }
                Err(Refusal::No(reason)) => {
                    return Err(Attempt::Refused(NbdOpenError::Refused {
                        uri: uri(),
                        reason,
                    }));
                }
                Err(Refusal::Shutdown(reason)) => return Err(Attempt::Failed(reason)),
            }
        }
        if now >= until {
            return Err(Attempt::Failed("it does not say what it has".to_owned()));
        }
        self.link = Link::Negotiating {
            socket,
            negotiation,
            until,
        };
        Ok(false)
    }

    /// The server has the export: takes it if it can still be the same disk.
    fn connected(&mut self, socket: OwnedFd, export: Export, now: Instant) -> Result<(), Attempt> {
        let uri = self.config.uri.clone();
        let facts = facts(&export, self.config.read_only);
        let first = self.counts.connections == 0;
        if i64::try_from(export.size).is_err() {
            let reason = format!("{} bytes are more than there can be", export.size);
            return Err(Attempt::Refused(NbdOpenError::Unusable { uri, reason }));
        }
        if facts.read_only && !self.config.read_only {
            // Whoever has a disk to write on cannot do with one that cannot be written on.
            return Err(Attempt::Refused(NbdOpenError::ReadOnly(uri)));
        }
        if !first && facts.block_size > self.facts.block_size {
            let reason = format!(
                "its blocks have {} bytes now instead of {}",
                facts.block_size, self.facts.block_size
            );
            return Err(Attempt::Refused(NbdOpenError::Unusable { uri, reason }));
        }
        self.counts.connections += 1;
        if !first {
            // What is best, and what is possible, is not told anew while the disk is in use.
            let size = round_down(export.size, self.facts.block_size);
            self.changed |= size != self.facts.size;
            self.facts.size = size;
        } else {
            self.facts = facts;
        }
        self.export = export;
        self.jobs.connected();
        if let Some((since, _)) = self.lost.take().filter(|_| !first) {
            let time = now.saturating_duration_since(since);
            if self.gone.is_some() || self.may_speak(now) {
                tracing::info!("{}: connected again after {time:.1?}", self.config.uri);
            }
        }
        self.gone = None;
        self.alive = now;
        self.bytes = 0;
        self.link = Link::Up {
            socket,
            stream: Box::new(Stream::new(export)),
        };
        Ok(())
    }

    /// Requests go: true if they do not any more.
    fn up(&mut self, socket: OwnedFd, mut stream: Box<Stream>, now: Instant) -> bool {
        let due = self.look.is_some_and(|look| look <= now);
        let late = due && self.jobs.overdue(self.alive, self.config.timeout, now);
        let result = stream
            .send(socket.as_fd(), &mut self.jobs, now)
            .and_then(|sent| {
                let received = stream.receive(socket.as_fd(), &mut self.jobs, now)?;
                // Answers make room for requests.
                let more = if received.answers > 0 {
                    stream.send(socket.as_fd(), &mut self.jobs, now)?
                } else {
                    Moved::default()
                };
                Ok((sent.bytes + received.bytes + more.bytes, received))
            });
        match result {
            Ok((bytes, received)) => {
                self.bytes += bytes;
                if received.answers > 0 || self.bytes >= SIGN_OF_LIFE {
                    self.alive = now;
                    self.bytes = 0;
                    self.pause = FIRST_PAUSE;
                }
                if received.more {
                    self.rouse();
                }
                if late && self.jobs.overdue(self.alive, self.config.timeout, now) {
                    self.counts.timeouts += 1;
                    self.lose(socket, &Lost::Silent(self.config.timeout), now);
                    return true;
                }
                self.link = Link::Up { socket, stream };
                false
            }
            Err(why) => {
                self.lose(socket, &why, now);
                true
            }
        }
    }

    /// Gives a connection up.
    fn lose(&mut self, socket: OwnedFd, why: &Lost, now: Instant) {
        if matches!(why, Lost::Protocol(_)) {
            self.counts.violations += 1;
        }
        if self.may_speak(now) {
            tracing::warn!(
                "{}: connection lost: {why}; trying again, requests wait for {:?}",
                self.config.uri,
                self.config.timeout
            );
        }
        self.lost = Some((now, why.to_string()));
        // The other side has come to its end already, or does not change anything.
        let over = matches!(why, Lost::Closed | Lost::Io(_)) || !self.jobs.is_changing();
        self.jobs.lost_connection();
        if over {
            self.retry(now);
        } else {
            let _ = rustix::net::shutdown(&socket, Shutdown::Write);
            self.link = Link::Ending {
                socket,
                until: now + self.config.timeout,
                left: LAST_WORDS,
            };
        }
    }

    fn ending(&mut self, socket: OwnedFd, until: Instant, mut left: usize, now: Instant) -> bool {
        let mut sink = [0; 16 << 10];
        for _ in 0..16 {
            match Pieces::EMPTY.recv_into(&socket, &mut sink, RecvFlags::DONTWAIT) {
                Ok(received) if received > 0 && received <= left => left -= received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => {
                    self.retry(now);
                    return true;
                }
            }
        }
        if now >= until {
            self.retry(now);
            return true;
        }
        self.link = Link::Ending {
            socket,
            until,
            left,
        };
        false
    }

    fn attempt_failed(&mut self, why: String, now: Instant) {
        if self.counts.connections == 0 && self.lost.as_ref().is_none_or(|(_, old)| *old != why) {
            tracing::info!("waiting for {}: {why}", self.config.uri);
        }
        match &mut self.lost {
            Some((_, old)) => *old = why,
            None => self.lost = Some((now, why)),
        }
        self.retry(now);
    }

    fn retry(&mut self, now: Instant) {
        self.link = Link::Down {
            retry: now + self.pause,
        };
        self.pause = (self.pause * 2).min(LONGEST_PAUSE).min(self.config.timeout);
    }

    /// Makes requests fail that have waited too long.
    fn expire(&mut self, now: Instant) {
        let timeout = self.config.timeout;
        if let Some((since, why)) = &self.lost {
            let long = now.saturating_duration_since(*since) >= timeout;
            if self.gone.is_none() && long && self.counts.connections > 0 {
                let reason = format!("no NBD server for {timeout:?}: {why}");
                tracing::error!(
                    "{}: {reason}; requests fail until it is back",
                    self.config.uri
                );
                self.gone = Some(reason);
            }
        }
        if self.gone.is_none() && self.look.is_some_and(|look| look > now) {
            return;
        }
        if !matches!(self.link, Link::Up { .. }) && !self.jobs.is_empty() {
            let reason = match (&self.gone, &self.lost) {
                (Some(reason), _) => reason.clone(),
                (None, Some((_, why))) => {
                    format!("no answer of the NBD server in {timeout:?}: {why}")
                }
                (None, None) => format!("no answer of the NBD server in {timeout:?}"),
            };
            let patience = if self.gone.is_some() {
                Duration::ZERO
            } else {
                timeout
            };
            self.jobs.expire(self.alive, patience, &reason, now);
        }
        self.look =
            (!self.jobs.is_empty()).then(|| now + (timeout / 8).max(Duration::from_millis(10)));
    }

    /// A line for the log is due, not one too many.
    fn may_speak(&mut self, now: Instant) -> bool {
        let due = self
            .spoken
            .is_none_or(|last| now.saturating_duration_since(last) >= QUIET);
        if due {
            self.spoken = Some(now);
        }
        due
    }

    fn watch_new(&mut self, socket: &OwnedFd, flags: EventFlags) -> io::Result<()> {
        self.watched = flags;
        Ok(epoll::add(
            &self.epoll,
            socket,
            EventData::new_u64(1),
            flags,
        )?)
    }

    /// Watches the socket for what matters now. A closed one is not watched any more by itself.
    fn watch(&mut self) {
        let Some(socket) = self.link.socket() else {
            return;
        };
        let mut wanted = match self.link {
            Link::Connecting { .. } => EventFlags::empty(),
            _ => EventFlags::IN,
        };
        if self.link.wants_to_send() {
            wanted |= EventFlags::OUT;
        }
        if wanted != self.watched {
            let changed = epoll::modify(&self.epoll, socket, EventData::new_u64(1), wanted);
            debug_assert!(changed.is_ok(), "a socket that was added");
            self.watched = wanted;
        }
    }

    /// Makes [`Disk::event_fd`] readable.
    fn rouse(&mut self) {
        if !self.awake {
            let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
            self.awake = true;
        }
    }

    fn sleep_again(&mut self) {
        // Others write to it as well.
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        self.awake = false;
    }

    /// Advances; what comes of it is told by [`Disk::completed`].
    fn go_on(&mut self, now: Instant) {
        // A server that says no was there before, and may again.
        let _ = self.advance(now);
    }
}

fn failed(error: io::Error) -> Attempt {
    Attempt::Failed(error.to_string())
}

fn round_down(size: u64, block: u32) -> u64 {
    size & !(u64::from(block) - 1)
}

fn facts(export: &Export, read_only: bool) -> Facts {
    let block_size = export.minimum.max(512);
    let has = |flag: u16| export.flags & flag != 0;
    let read_only = read_only || has(wire::FLAG_READ_ONLY);
    Facts {
        size: round_down(export.size, block_size),
        block_size,
        physical_block_size: export.preferred.max(block_size),
        alignment_offset: 0,
        optimal_io_size: 0,
        read_only,
        discard: !read_only && has(wire::FLAG_SEND_TRIM),
        discard_granularity: export.preferred.max(block_size),
        write_zeroes: !read_only && has(wire::FLAG_SEND_WRITE_ZEROES),
    }
}

impl Disk for NbdDisk {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted {
        let now = Instant::now();
        let hold = |pieces: Pieces<'_>| {
            Held::new(pieces, memory).map_err(|error| Failure::Io(io::Error::other(error)))
        };
        let (what, offset, len, data) = match request {
            Request::Read { offset, to } => match hold(to) {
                Ok(data) => (What::Read, offset, data.len() as u64, Some(data)),
                Err(failure) => return Submitted::Done(Err(failure)),
            },
            Request::Write { offset, from } => match hold(from) {
                Ok(data) => (What::Write, offset, data.len() as u64, Some(data)),
                Err(failure) => return Submitted::Done(Err(failure)),
            },
            Request::Flush => (What::Flush, 0, 0, None),
            Request::Discard { offset, len } => (What::Trim, offset, len, None),
            Request::WriteZeroes { offset, len, unmap } => {
                (What::Zeroes { hole: unmap }, offset, len, None)
            }
        };
        if let Some(reason) = &self.gone {
            return Submitted::Done(Err(Failure::Gone(reason.clone())));
        }
        match what {
            What::Read => {}
            What::Flush => {
                if self.config.read_only || self.export.flags & wire::FLAG_SEND_FLUSH == 0 {
                    return Submitted::Done(Ok(()));
                }
            }
            What::Write | What::Trim | What::Zeroes { .. } if self.facts.read_only => {
                return Submitted::Done(Err(Failure::ReadOnly));
            }
            What::Trim if !self.facts.discard => return Submitted::Done(Err(Failure::Unsupported)),
            What::Zeroes { .. } if !self.facts.write_zeroes => {
                return Submitted::Done(Err(Failure::Unsupported));
            }
            What::Write | What::Trim | What::Zeroes { .. } => {}
        }
        if what != What::Flush {
            if len == 0 {
                return Submitted::Done(Ok(()));
            }
            let aligned = (offset | len) & (u64::from(self.facts.block_size) - 1) == 0;
            let inside = offset
                .checked_add(len)
                .is_some_and(|end| end <= self.facts.size);
            if !aligned || !inside {
                let error = io::Error::from(io::ErrorKind::InvalidInput);
                return Submitted::Done(Err(error.into()));
            }
        }
        if self.jobs.is_full() {
            return Submitted::Full;
        }
        if self.jobs.is_empty() {
            // The server was not asked anything; its silence meant nothing.
            self.alive = now;
            self.bytes = 0;
        }
        self.jobs.begin(tag, what, (offset, len), data, now);
        if self.look.is_none() {
            self.look = Some(now + (self.config.timeout / 8).max(Duration::from_millis(10)));
        }
        Submitted::Pending
    }

    fn commit(&mut self) {
        let now = Instant::now();
        let Link::Up { socket, stream } = &mut self.link else {
            return;
        };
        if stream.has_unsent() {
            // The socket has no room, and says when it has.
            return;
        }
        match stream.send(socket.as_fd(), &mut self.jobs, now) {
            Ok(sent) => {
                self.bytes += sent.bytes;
                self.watch();
            }
            Err(why) => {
                let link = mem::replace(&mut self.link, Link::Down { retry: now });
                if let Link::Up { socket, .. } = link {
                    self.lose(socket, &why, now);
                }
                self.rouse();
            }
        }
        if !self.jobs.done.is_empty() {
            self.rouse();
        }
    }

    fn completed(&mut self, done: &mut Vec<Completion>) {
        self.go_on(Instant::now());
        done.append(&mut self.jobs.done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        let gone = match &self.lost {
            Some((since, _)) if self.gone.is_none() && self.counts.connections > 0 => {
                Some(*since + self.config.timeout)
            }
            _ => None,
        };
        [self.link.until(), self.look, gone]
            .into_iter()
            .flatten()
            .min()
    }

    fn poll(&mut self, now: Instant) -> bool {
        self.go_on(now);
        if !self.jobs.done.is_empty() {
            self.rouse();
        }
        mem::take(&mut self.changed)
    }

    fn cancel(&mut self) {
        let sending = match &self.link {
            Link::Up { stream, .. } => stream.sending(),
            _ => None,
        };
        self.jobs.cancel(sending);
        if !self.jobs.done.is_empty() {
            self.rouse();
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.waiting() + self.jobs.done.len()
    }

    /// None: memory is touched in calls of this alone.
    fn touching_memory(&self) -> usize {
        0
    }

    fn set_write_back(&mut self, on: bool) {
        self.jobs.write_back = on;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("nbd_connections", self.counts.connections),
            ("nbd_violations", self.counts.violations),
            ("nbd_timeouts", self.counts.timeouts),
            ("nbd_resent", self.jobs.resent),
            ("nbd_rewritten", self.jobs.rewritten),
        ]
    }
}

impl std::fmt::Debug for NbdDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdDisk")
            .field("uri", &self.config.uri)
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

/// Says goodbye, if that can be said at once.
impl Drop for NbdDisk {
    fn drop(&mut self) {
        if let Link::Up { socket, stream } = &self.link {
            if !stream.has_unsent() {
                let goodbye = RequestHeader {
                    flags: 0,
                    command: wire::CMD_DISC,
                    cookie: u64::MAX,
                    offset: 0,
                    len: 0,
                };
                let _ = Pieces::EMPTY.send_from(socket, &goodbye.to_bytes(), SendFlags::DONTWAIT);
            }
        }
    }
}
