// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk.

use std::io;
use std::mem;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::net::SendFlags;
use vmsg_mem::{Held, Pieces, WindowTable};

use crate::nbd::jobs::{Jobs, What};
use crate::nbd::link::Link;
use crate::nbd::negotiate::Export;
use crate::nbd::wire::{self, RequestHeader};
use crate::nbd::{NbdConfig, NbdOpenError};
use crate::{Completion, Disk, Facts, Failure, Request, Submitted};

mod connection;

/// Between the first two attempts to connect; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

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
            self.advance(now)?;
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

    fn details(&self) -> Vec<(&'static str, String)> {
        vec![("path", self.config.uri.to_string())]
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
        if let Link::Up { socket, stream } = &self.link
            && !stream.has_unsent()
        {
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
