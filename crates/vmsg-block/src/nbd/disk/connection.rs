// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a connection comes to be, is used, and ends.

use std::io;
use std::mem;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use vmsg_mem::Pieces;

use super::{FIRST_PAUSE, NbdDisk, facts, round_down};
use crate::nbd::connect::{self, Target, Targets};
use crate::nbd::link::Link;
use crate::nbd::negotiate::{Export, Negotiation, Refusal};
use crate::nbd::stream::{Lost, Moved, Stream};
use crate::nbd::{NbdOpenError, ProtocolError};

const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// A connection and its negotiation take no longer, if the timeout is longer.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(10);
/// As many bytes count as a sign of life, without an answer being complete.
const SIGN_OF_LIFE: usize = 64 << 10;
/// Lines of the log about a connection that comes and goes are at least so far from each other.
const QUIET: Duration = Duration::from_secs(10);
/// What a server may still send when its connection was given up.
const LAST_WORDS: usize = 64 << 20;

/// What ended an attempt to get a connection.
enum Attempt {
    /// It may go better next time.
    Failed(String),
    /// It may not.
    Refused(NbdOpenError),
}

impl NbdDisk {
    /// Does what can be done. An error only if a server says no; it was dealt with if there was a server before.
    pub(super) fn advance(&mut self, now: Instant) -> Result<(), NbdOpenError> {
        self.sleep_again();
        let mut refused = None;
        // Each round comes nearer to requests that go, or waits for something.
        for _ in 0..64 {
            match self.step(now) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Attempt::Failed(why)) => {
                    self.say_waiting(&why);
                    self.attempt_failed(why, now);
                }
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
                    let source = ProtocolError::Form("first");
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
        if first && facts.size == 0 {
            let reason = format!(
                "it has {} bytes, less than a block of {}",
                export.size, facts.block_size
            );
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
    pub(super) fn lose(&mut self, socket: OwnedFd, why: &Lost, now: Instant) {
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

    /// Tells once what a disk that is being opened waits for.
    fn say_waiting(&self, why: &str) {
        if self.counts.connections == 0 && self.lost.as_ref().is_none_or(|(_, old)| old != why) {
            tracing::info!("waiting for {}: {why}", self.config.uri);
        }
    }

    fn attempt_failed(&mut self, why: String, now: Instant) {
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

    pub(super) fn watch_new(&mut self, socket: &OwnedFd, flags: EventFlags) -> io::Result<()> {
        self.watched = flags;
        Ok(epoll::add(
            &self.epoll,
            socket,
            EventData::new_u64(1),
            flags,
        )?)
    }

    /// Watches the socket for what matters now. A closed one is not watched any more by itself.
    pub(super) fn watch(&mut self) {
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
}

fn failed(error: io::Error) -> Attempt {
    Attempt::Failed(error.to_string())
}
