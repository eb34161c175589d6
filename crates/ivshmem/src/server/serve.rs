// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server's sockets and its time.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SocketFlags, accept_with};

use super::connection::{Connection, Heard, is_hung_up};
use super::core::{Core, Key, Refusal};
use super::ids::Ids;
use super::ledger::{Ledger, LedgerError};
use super::listen::{ListenError, Listening, peer};
use super::log_limit::LogLimit;
use super::memory::{self, MemoryError};
use super::options::{Options, OptionsError, Port};
use super::stats::{PortStats, Stats};
use crate::PeerId;

/// Events and connections looked at in one go.
const AT_A_TIME: usize = 64;

/// Pause in accepting connections after descriptors or memory ran out. Nothing tells when there are some again.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a second client of a port that has an id waits for the first one's end, which may be on its way: a process
/// that was killed keeps its connection until its memory is unmapped.
const HANDOVER: Duration = Duration::from_secs(2);

/// How many wait like that at a port.
const MAX_WAITING: usize = 8;

/// What an event of a client is told from one of a port by.
const CLIENT: u64 = 1 << 63;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// No server can do this.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// It cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// It has no memory to hand out.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It does not know which ids are free.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The system said no.
    #[error("cannot serve: {0}")]
    Os(#[from] io::Error),
}

/// How a server goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has, or may have, clients.
    Serving,
    /// Nobody has been there for as long as [`Options::linger`] says: it is to end.
    Deserted,
}

/// A server: sockets on which memory and doorbells are handed out. It belongs to one thread, waits for nobody, and
/// never touches the memory.
///
/// Dropping it ends it: the sockets' files are removed; its clients go on with what they have.
#[derive(Debug)]
pub struct Server {
    core: Core<Arc<OwnedFd>>,
    epoll: OwnedFd,
    ports: Vec<Listener>,
    connections: BTreeMap<Key, Connection>,
    waiting: Vec<Waiting>,
    next_key: u64,
    max_clients: usize,
    stall: Duration,
    linger: Option<Duration>,
    /// Since when nobody is there.
    deserted: Option<Instant>,
    ledger: Option<Ledger>,
    /// Memory to be removed at the end.
    unlink: Option<PathBuf>,
    log: LogLimit,
}

#[derive(Debug)]
struct Listener {
    port: Port,
    listening: Listening,
    paused: Option<Instant>,
    stats: PortStats,
}

/// A connection to a port whose client is still there.
#[derive(Debug)]
struct Waiting {
    socket: OwnedFd,
    port: usize,
    until: Instant,
}

impl Server {
    /// Finds or makes the memory and listens.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(options: Options) -> Result<Self, ServerError> {
        options.check()?;
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let mut ports = Vec::new();
        for (number, port) in options.ports.iter().enumerate() {
            let listening = Listening::bind(&port.path, port.mode)?;
            let data = EventData::new_u64(number as u64);
            epoll::add(&epoll, &listening, data, EventFlags::IN).map_err(io::Error::from)?;
            ports.push(Listener {
                listening,
                paused: None,
                stats: PortStats {
                    path: port.path.clone(),
                    id: port.id,
                    ..PortStats::default()
                },
                port: port.clone(),
            });
        }
        let fixed: BTreeSet<PeerId> = options.ports.iter().filter_map(|port| port.id).collect();
        let path = memory::path_of(&options.source);
        let (memory, ids, ledger) = match &path {
            None => (
                memory::anonymous(options.size)?,
                Ids::new(0, false, fixed),
                None,
            ),
            Some(path) => {
                let mut ledger = Ledger::take(path)?;
                let memory = memory::named(path, options.size)?;
                let start = ledger.start(&memory, &fixed)?;
                if options.unlink {
                    ledger.remove_at_end();
                }
                let ids = Ids::new(start.next, start.elders, start.fixed);
                (memory, ids, Some(ledger))
            }
        };
        let mut core = Core::new(Arc::new(memory), ids);
        for port in &options.ports {
            if let Some(id) = port.id {
                core.add_permanent(id, bells(port.vectors)?);
            }
        }
        Ok(Self {
            core,
            epoll,
            ports,
            connections: BTreeMap::new(),
            waiting: Vec::new(),
            next_key: 0,
            max_clients: options.max_clients,
            stall: options.stall,
            linger: options.linger,
            deserted: Some(Instant::now()),
            ledger,
            unlink: path.filter(|_| options.unlink),
            log: LogLimit::new(Instant::now()),
        })
    }

    /// What it has done so far.
    pub fn stats(&self) -> Stats {
        Stats {
            ports: self.ports.iter().map(|port| port.stats.clone()).collect(),
        }
    }

    /// Serves until `stop` is readable, or nobody has been there for long enough.
    ///
    /// # Errors
    /// Those of the system, with which no server can go on.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> io::Result<Turn> {
        loop {
            if self.turn()? == Turn::Deserted {
                return Ok(Turn::Deserted);
            }
            let left = self
                .due()
                .map(|due| due.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [
                PollFd::new(&self.epoll, PollFlags::IN),
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
            ];
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[1].revents().is_empty() {
                return Ok(Turn::Serving);
            }
        }
    }

    /// When [`turn`](Self::turn) is needed although the server is not readable.
    pub fn due(&self) -> Option<Instant> {
        let connections = self.connections.values();
        let stalls = connections
            .clone()
            .filter_map(|connection| connection.stalls(self.stall));
        let retries = connections.filter_map(|connection| connection.retry);
        let pauses = self.ports.iter().filter_map(|port| port.paused);
        let waiting = self.waiting.iter().map(|waiting| waiting.until);
        let deserted = self.deserted_until();
        stalls
            .chain(retries)
            .chain(pauses)
            .chain(waiting)
            .chain(deserted)
            .min()
    }

    fn deserted_until(&self) -> Option<Instant> {
        self.deserted?.checked_add(self.linger?)
    }

    /// Does what there is to be done. Never waits.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn turn(&mut self) -> io::Result<Turn> {
        let now = Instant::now();
        let none = Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        };
        let mut events = [none; AT_A_TIME];
        let timeout = Timespec::default();
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&timeout)) {
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let events = &events[..count];
        // First those that leave: their places may be what others come for.
        for event in events.iter().filter(|event| event.data.u64() & CLIENT != 0) {
            let key = Key(event.data.u64() & !CLIENT);
            self.hear(key);
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.full = false;
            }
        }
        for event in events.iter().filter(|event| event.data.u64() & CLIENT == 0) {
            let port = usize::try_from(event.data.u64()).expect("it was one");
            self.accept(port, now)?;
        }
        self.pass_time(now)?;
        self.flush(now)?;
        let deserted = self.connections.is_empty() && self.waiting.is_empty();
        if !deserted {
            self.deserted = None;
        } else if self.deserted.is_none() {
            self.deserted = Some(now);
        }
        // A connection that came in this very moment is still to be accepted.
        if count == 0 && self.deserted_until().is_some_and(|until| until <= now) {
            return Ok(Turn::Deserted);
        }
        Ok(Turn::Serving)
    }

    /// What takes its time.
    fn pass_time(&mut self, now: Instant) -> io::Result<()> {
        for (number, port) in self.ports.iter_mut().enumerate() {
            if port.paused.is_some_and(|until| until <= now) {
                port.paused = None;
                let data = EventData::new_u64(number as u64);
                epoll::add(&self.epoll, &port.listening, data, EventFlags::IN)?;
            }
        }
        for connection in self.connections.values_mut() {
            if connection.retry.is_some_and(|at| at <= now) {
                connection.retry = None;
            }
        }
        let (ports, log) = (&mut self.ports, &mut self.log);
        self.waiting.retain(|waiting| {
            let stays = waiting.until > now && !is_hung_up(waiting.socket.as_fd());
            if !stays && waiting.until <= now {
                ports[waiting.port].refuse("its port has a client", log.admit(now));
            }
            stays
        });
        let stalled: Vec<Key> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.stalls(self.stall).is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in stalled {
            self.drop_stalled(key);
        }
        Ok(())
    }

    /// Sends what waits. Who cannot be served goes, which is news for the others.
    fn flush(&mut self, now: Instant) -> io::Result<()> {
        loop {
            loop {
                let overrun = self.core.take_overrun();
                if overrun.is_empty() {
                    break;
                }
                for key in overrun {
                    self.drop_stalled(key);
                }
            }
            let mut gone = Vec::new();
            for (key, connection) in &mut self.connections {
                let queue = self.core.queue(*key).expect("a client's");
                if queue.is_empty() || connection.full || connection.retry.is_some() {
                    continue;
                }
                if connection.flush(queue, now).is_err() {
                    gone.push(*key);
                    continue;
                }
                let mut flags = EventFlags::IN | EventFlags::RDHUP;
                if connection.full {
                    flags |= EventFlags::OUT;
                }
                let data = EventData::new_u64(key.0 | CLIENT);
                epoll::modify(&self.epoll, &*connection, data, flags)?;
            }
            if gone.is_empty() {
                return Ok(());
            }
            for key in gone {
                self.remove(key, "has gone");
            }
        }
    }

    fn hear(&mut self, key: Key) {
        let Some(connection) = self.connections.get(&key) else {
            return;
        };
        match connection.hear() {
            Heard::Silence => {}
            Heard::End => self.remove(key, "has left"),
            Heard::Words => {
                self.ports[connection.port].stats.spoke += 1;
                self.remove(key, "is dropped, as clients send nothing and it did");
            }
        }
    }

    fn drop_stalled(&mut self, key: Key) {
        if let Some(connection) = self.connections.get(&key) {
            self.ports[connection.port].stats.stalled += 1;
            self.remove(key, "is dropped, as it does not read");
        }
    }

    fn remove(&mut self, key: Key, why: &'static str) {
        let Some(connection) = self.connections.remove(&key) else {
            return;
        };
        let port = connection.port;
        let stats = &mut self.ports[port].stats;
        stats.clients -= 1;
        if self.log.admit(Instant::now()) {
            tracing::info!(socket = %stats.path.display(), client = key.0, "a client {why}");
        }
        drop(connection);
        self.core.leave(key);
        // Who has waited for that.
        if self.ports[port].port.id.is_some() {
            if let Some(place) = self.waiting.iter().position(|other| other.port == port) {
                let waiting = self.waiting.remove(place);
                self.admit(waiting.socket, port, Instant::now());
            }
        }
    }

    fn accept(&mut self, number: usize, now: Instant) -> io::Result<()> {
        for _ in 0..AT_A_TIME {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.ports[number].listening, flags) {
                Ok(socket) => self.admit(socket, number, now),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    let port = &mut self.ports[number];
                    if self.log.admit(now) {
                        tracing::warn!(socket = %port.port.path.display(), %error, "cannot accept clients at the moment");
                    }
                    epoll::delete(&self.epoll, &port.listening)?;
                    port.paused = Some(now + PAUSE);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes a connection a client, if it can be one.
    fn admit(&mut self, socket: OwnedFd, number: usize, now: Instant) {
        // It costs no id to look whether somebody is there.
        if is_hung_up(socket.as_fd()) {
            return;
        }
        let fixed = self.ports[number].port.id;
        if let Some(key) = fixed.and_then(|id| self.core.client_of(id)) {
            let connection = &self.connections[&key];
            if is_hung_up(connection.as_fd()) {
                self.remove(key, "has left");
            }
        }
        if fixed.is_some_and(|id| self.core.client_of(id).is_some()) {
            let others = self.waiting.iter().filter(|other| other.port == number);
            if others.count() >= MAX_WAITING {
                self.refuse(number, "its port has a client, for which others wait", now);
                return;
            }
            self.waiting.push(Waiting {
                socket,
                port: number,
                until: now + HANDOVER,
            });
            return;
        }
        if self.connections.len() >= self.max_clients {
            self.refuse(number, "there are as many as there may be", now);
            return;
        }
        let key = Key(self.next_key);
        self.next_key += 1;
        if let Err(why) = self.join(key, number) {
            self.refuse(number, &why, now);
            return;
        }
        let flags = EventFlags::IN | EventFlags::RDHUP;
        let data = EventData::new_u64(key.0 | CLIENT);
        if let Err(error) = epoll::add(&self.epoll, &socket, data, flags) {
            self.core.leave(key);
            self.refuse(number, &error.to_string(), now);
            return;
        }
        let stats = &mut self.ports[number].stats;
        stats.joined += 1;
        stats.clients += 1;
        if self.log.admit(now) {
            let pid = peer(socket.as_fd());
            tracing::info!(socket = %stats.path.display(), client = key.0, pid, "a client is there");
        }
        self.connections
            .insert(key, Connection::new(socket, number));
    }

    fn refuse(&mut self, number: usize, why: &str, now: Instant) {
        let is_logged = self.log.admit(now);
        self.ports[number].refuse(why, is_logged);
    }

    fn join(&mut self, key: Key, number: usize) -> Result<(), String> {
        let port = &self.ports[number].port;
        let refusal = |refusal| match refusal {
            Refusal::Busy => "its port has a client".to_owned(),
            Refusal::NoId => "no id is free".to_owned(),
        };
        if let Some(id) = port.id {
            return self.core.join_permanent(key, id).map_err(refusal);
        }
        let bells = bells(port.vectors).map_err(|error| error.to_string())?;
        let before = self.core.next_id();
        let id = self.core.join(key, bells).map_err(refusal)?;
        let next = self.core.next_id();
        if let (Some(ledger), true) = (&self.ledger, next != before) {
            // Before anybody is told of the id: the next server must know.
            if let Err(error) = ledger.note(next) {
                self.core.leave(key);
                return Err(format!("the id {id} cannot be noted: {error}"));
            }
        }
        Ok(())
    }
}

impl Listener {
    fn refuse(&mut self, why: &str, is_logged: bool) {
        self.stats.refused += 1;
        if is_logged {
            tracing::warn!(socket = %self.port.path.display(), why, "a client is refused");
        }
    }
}

/// Eventfds for a client's vectors.
fn bells(vectors: u16) -> io::Result<Vec<Arc<OwnedFd>>> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    (0..vectors)
        .map(|_| Ok(Arc::new(retry_on_intr(|| eventfd(0, flags))?)))
        .collect()
}

impl AsFd for Server {
    /// Readable when there is a [`turn`](Self::turn) to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for port in &self.ports {
            port.listening.announce_end();
        }
        if let Some(path) = &self.unlink {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "the memory is not removed");
            }
        }
    }
}
