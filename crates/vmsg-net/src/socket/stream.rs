// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames over a stream socket.

use std::fmt;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, getsockname,
    listen, sockopt,
};

use super::chatter::Chatter;
use super::input::{Input, Next, Received};
use super::open::{BoundPath, SocketError, family, listen_tcp, new_socket, os, resolve};
use super::output::{Output, Push};
use super::watch::PathWatch;
use super::{OFFLOADS, SocketCounters, TURN, is_plain};
use crate::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// First pause before another attempt to connect; it doubles up to [`StreamConfig::reconnect`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// After so long without a word the peer's host is asked whether it lives, and as often again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Milliseconds that what was sent may remain unacknowledged by the peer's host.
const UNACKNOWLEDGED: u32 = 30_000;

/// Receptions thrown away in one go while there is no driver.
const DISCARDS: usize = 64;

const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const WATCH: u64 = 2;

/// Where the peers meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamAddress {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// A name or address, and a TCP port.
    Tcp(String, u16),
}

impl fmt::Display for StreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// How to meet the peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamConfig {
    /// Where.
    pub address: StreamAddress,
    /// Listen, instead of connecting. One peer at a time is served; others wait.
    pub server: bool,
    /// The longest pause between two attempts to connect, to a peer that is not there yet or not
    /// any more; `None`: it must be there, and when it goes that is the end.
    pub reconnect: Option<Duration>,
}

impl StreamConfig {
    /// Connects to `address`, and again within a second when the peer is gone.
    pub const fn client(address: StreamAddress) -> Self {
        Self {
            address,
            server: false,
            reconnect: Some(Duration::from_secs(1)),
        }
    }

    /// Listens at `address`.
    pub const fn server(address: StreamAddress) -> Self {
        Self {
            address,
            server: true,
            reconnect: None,
        }
    }
}

/// The way to the peer.
#[derive(Debug)]
enum Link {
    Down,
    Connecting(OwnedFd),
    Up(OwnedFd),
}

/// How there comes to be a connection.
#[derive(Debug)]
enum Way {
    Listen {
        listener: OwnedFd,
        /// Removed when the back end goes.
        _path: Option<BoundPath>,
    },
    ConnectUnix(SocketAddrUnix),
    /// All addresses of the name, one after the other.
    ConnectTcp(Vec<SocketAddr>),
}

/// A stream socket as a back end of one network device.
#[derive(Debug)]
pub struct Stream {
    address: StreamAddress,
    reconnect: Option<Duration>,
    way: Way,
    link: Link,
    epoll: OwnedFd,
    /// Tells when the peer's socket appears.
    path_watch: Option<PathWatch>,
    /// There may be something to receive.
    readable: bool,
    /// The peer will send nothing more than what is on its way.
    ended: bool,
    input: Input,
    output: Output,
    /// When to try again, or to go on with throwing away.
    timer: Option<Instant>,
    pause: Duration,
    attempts: usize,
    running: bool,
    counters: SocketCounters,
    chatter: Chatter,
}

impl Stream {
    /// Listens, or begins to connect.
    ///
    /// # Errors
    ///
    /// [`SocketError`]: the address is taken or makes no sense; without
    /// [`reconnect`](StreamConfig::reconnect) also if there is no peer.
    pub fn open(config: &StreamConfig) -> Result<Self, SocketError> {
        let way = match (&config.address, config.server) {
            (StreamAddress::Unix(path), true) => {
                let listener =
                    new_socket(AddressFamily::UNIX, SocketType::STREAM).map_err(os("a socket"))?;
                let path = BoundPath::bind(&listener, SocketType::STREAM, path)?;
                listen(&listener, 8).map_err(os(config.address.to_string()))?;
                Way::Listen {
                    listener,
                    _path: Some(path),
                }
            }
            (StreamAddress::Unix(path), false) => {
                Way::ConnectUnix(SocketAddrUnix::new(path).map_err(os(config.address.to_string()))?)
            }
            (StreamAddress::Tcp(host, port), server) => {
                let addresses = resolve(host, *port)?;
                if server {
                    Way::Listen {
                        listener: listen_tcp(&addresses, &config.address.to_string())?,
                        _path: None,
                    }
                } else {
                    Way::ConnectTcp(addresses)
                }
            }
        };
        let mut stream = Self {
            address: config.address.clone(),
            reconnect: config.reconnect,
            way,
            link: Link::Down,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("an epoll instance"))?,
            path_watch: None,
            readable: false,
            ended: false,
            input: Input::new(),
            output: Output::new(),
            timer: None,
            pause: FIRST_PAUSE,
            attempts: 0,
            running: false,
            counters: SocketCounters::default(),
            chatter: Chatter::default(),
        };
        if let Way::Listen { listener, .. } = &stream.way {
            stream
                .watch(listener, LISTENER, epoll::EventFlags::IN)
                .map_err(os("an epoll instance"))?;
        } else {
            // Before the first attempt, so that nothing happens between the two.
            stream.watch_path();
            let result = stream.connect(Instant::now());
            if let (Err(error), None) = (result, config.reconnect) {
                return Err(SocketError::NoPeer {
                    address: stream.address.to_string(),
                    source: error.into(),
                });
            }
        }
        Ok(stream)
    }

    /// What went through so far.
    pub const fn counters(&self) -> SocketCounters {
        self.counters
    }

    /// Where a TCP server listens.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.way {
            Way::Listen { listener, .. } => getsockname(listener).ok()?.try_into().ok(),
            _ => None,
        }
    }

    fn watch(&self, fd: &OwnedFd, data: u64, flags: epoll::EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(data), flags)
    }

    fn watch_path(&mut self) {
        if let (StreamAddress::Unix(path), Some(_)) = (&self.address, self.reconnect)
            && let Some(watch) = PathWatch::new(path)
            && self.watch(watch.fd(), WATCH, epoll::EventFlags::IN).is_ok()
        {
            self.path_watch = Some(watch);
        }
    }

    /// Tries to connect; on failure it is tried again later, if that is wanted.
    fn connect(&mut self, now: Instant) -> Result<(), Errno> {
        let result = self.try_connect();
        if let Err(error) = result {
            self.try_later(now, error);
        }
        result
    }

    fn try_connect(&mut self) -> Result<(), Errno> {
        self.timer = None;
        let (socket, result) = match &self.way {
            Way::Listen { .. } => return Ok(()),
            Way::ConnectUnix(address) => {
                let socket = new_socket(AddressFamily::UNIX, SocketType::STREAM)?;
                let result = connect(&socket, address);
                (socket, result)
            }
            Way::ConnectTcp(addresses) => {
                let address = addresses
                    .get(self.attempts % addresses.len().max(1))
                    .ok_or(Errno::ADDRNOTAVAIL)?;
                self.attempts = self.attempts.wrapping_add(1);
                let socket = new_socket(family(address), SocketType::STREAM)?;
                let result = connect(&socket, address);
                (socket, result)
            }
        };
        match result {
            Ok(()) => self.established(socket),
            Err(Errno::INPROGRESS) => {
                self.watch(&socket, CONNECTION, edges())?;
                self.link = Link::Connecting(socket);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The attempt has come to its end.
    fn connected(&mut self, now: Instant) {
        let Link::Connecting(socket) = &self.link else {
            return;
        };
        let error = match sockopt::socket_error(socket) {
            // Still under way, or there: only a peer has a name.
            Ok(Ok(())) => match rustix::net::getpeername(socket) {
                Ok(_) => None,
                Err(_) => return,
            },
            Ok(Err(error)) | Err(error) => Some(error),
        };
        let Link::Connecting(socket) = std::mem::replace(&mut self.link, Link::Down) else {
            return;
        };
        match error {
            None => self.up(socket),
            Some(error) => self.try_later(now, error),
        }
    }

    fn try_later(&mut self, now: Instant, error: Errno) {
        let Some(longest) = self.reconnect else {
            return;
        };
        if self.pause == FIRST_PAUSE && self.chatter.admit(now) {
            tracing::info!(address = %self.address, %error, "no peer yet");
        }
        self.timer = Some(now + self.pause);
        self.pause = (self.pause * 2).min(longest.max(FIRST_PAUSE));
    }

    /// Takes over a socket that has not been watched so far.
    fn established(&mut self, socket: OwnedFd) -> Result<(), Errno> {
        self.watch(&socket, CONNECTION, edges())?;
        self.up(socket);
        Ok(())
    }

    fn up(&mut self, socket: OwnedFd) {
        if matches!(self.address, StreamAddress::Tcp(..)) {
            // Frames are gathered here; waiting for more would only delay them. A host that
            // vanishes without a word is noticed.
            let _ = sockopt::set_tcp_nodelay(&socket, true)
                .and_then(|()| sockopt::set_tcp_keepidle(&socket, KEEP_ALIVE))
                .and_then(|()| sockopt::set_tcp_keepintvl(&socket, KEEP_ALIVE))
                .and_then(|()| sockopt::set_tcp_keepcnt(&socket, 3))
                .and_then(|()| sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED))
                .and_then(|()| sockopt::set_socket_keepalive(&socket, true));
        }
        if self.chatter.admit(Instant::now()) {
            tracing::info!(address = %self.address, "the peer is there");
        }
        self.link = Link::Up(socket);
        self.timer = None;
        self.readable = true;
        self.ended = false;
        self.input.clear();
        self.output.clear();
    }

    fn accept(&mut self, now: Instant) {
        let Way::Listen { listener, .. } = &self.way else {
            return;
        };
        if !matches!(self.link, Link::Down) {
            return;
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // A peer that went again before it was accepted is none.
        if let Ok(socket) = accept_with(listener, flags) {
            // Others wait until this one goes.
            let _ = epoll::delete(&self.epoll, listener);
            if let Err(error) = self.established(socket) {
                self.hang_up(now, &error);
            }
        }
    }

    /// The connection is over.
    fn hang_up(&mut self, now: Instant, why: &dyn fmt::Display) {
        if self.chatter.admit(now) {
            tracing::info!(address = %self.address, why = %why, "the peer is gone");
        }
        self.link = Link::Down;
        self.readable = false;
        self.ended = false;
        self.input.clear();
        self.output.clear();
        // The guest hears of it at the next poll.
        self.timer = Some(now);
        match &self.way {
            Way::Listen { listener, .. } => {
                let watched = self.watch(listener, LISTENER, epoll::EventFlags::IN);
                if let Err(error) = watched.or_else(|error| match error {
                    Errno::EXIST => Ok(()),
                    error => Err(error),
                }) {
                    tracing::error!(address = %self.address, %error, "no more peers can come");
                }
            }
            Way::ConnectUnix(_) | Way::ConnectTcp(_) => {
                if let Some(longest) = self.reconnect {
                    self.timer = Some(now + self.pause);
                    self.pause = (self.pause * 2).min(longest.max(FIRST_PAUSE));
                }
            }
        }
    }

    /// Receives more; false if there is nothing.
    fn fill(&mut self, now: Instant) -> bool {
        let Link::Up(socket) = &self.link else {
            return false;
        };
        if !self.readable {
            return false;
        }
        match self.input.receive(socket.as_fd()) {
            Ok(Received::Some) => return true,
            Ok(Received::Empty) => self.readable = false,
            Ok(Received::Closed) => self.hang_up(now, &"it has closed the connection"),
            Err(error) => self.hang_up(now, &error),
        }
        false
    }

    /// Hands one frame over, or throws one away; false if that is not possible.
    fn receive_one(&mut self, now: Instant, sink: Option<&mut dyn RxSink>) -> bool {
        match self.input.next() {
            Ok(Next::Frame(frame)) => {
                let Some(sink) = sink else {
                    self.counters.rx_dropped += 1;
                    self.input.consume();
                    return true;
                };
                let head = &frame[..frame.len().min(Target::HEAD)];
                let Some(room) = sink.offer(Target::Head(head), frame.len()) else {
                    return false;
                };
                room.write(frame);
                sink.commit(&VnetHeader::default(), frame.len());
                self.counters.received += 1;
                self.pause = FIRST_PAUSE;
                self.input.consume();
                true
            }
            Ok(Next::Runt) => {
                self.counters.rx_dropped += 1;
                self.input.consume();
                true
            }
            Ok(Next::Incomplete) => self.fill(now),
            Err(error) => {
                self.counters.bad_lengths += 1;
                self.hang_up(now, &error);
                false
            }
        }
    }

    /// Nobody takes frames: what comes is thrown away, so that the peer is not held up.
    fn discard(&mut self, now: Instant) {
        let mut fills = 0;
        while fills < DISCARDS {
            if !self.input.has_next() {
                fills += 1;
            }
            if !self.receive_one(now, None) {
                return;
            }
        }
        self.timer = Some(now);
    }

    fn flush(&mut self, now: Instant) {
        if let Link::Up(socket) = &self.link
            && let Err(error) = self.output.flush(socket.as_fd())
        {
            self.hang_up(now, &error);
        }
    }
}

fn edges() -> epoll::EventFlags {
    use epoll::EventFlags;
    EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
}

impl Backend for Stream {
    /// The device chooses among them.
    fn queue_pairs(&self) -> u16 {
        u16::MAX
    }

    fn offloads(&self) -> Offloads {
        OFFLOADS
    }

    fn set_guest(&mut self, guest: &Guest) {
        self.running = guest.running;
        if !guest.running {
            self.discard(Instant::now());
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.timer
    }

    fn poll(&mut self, now: Instant) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
        for event in crate::events::waiting(&self.epoll, &mut events) {
            match event.data.u64() {
                LISTENER => {
                    self.accept(now);
                    continue;
                }
                WATCH => {
                    let watch = self.path_watch.as_ref();
                    if watch.is_some_and(PathWatch::appeared) && matches!(self.link, Link::Down) {
                        // Bound, and listening in a moment.
                        self.timer = Some(now);
                        self.pause = FIRST_PAUSE;
                    }
                    continue;
                }
                _ => {}
            }
            self.connected(now);
            use epoll::EventFlags;
            let over = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
            if matches!(self.link, Link::Up(_)) {
                self.readable = true;
                let flags = event.flags;
                self.ended |= flags.intersects(over);
                self.flush(now);
            }
        }
        if self.timer.is_some_and(|at| at <= now) {
            self.timer = None;
            if matches!(self.link, Link::Down) && self.reconnect.is_some() {
                // Told and tried again by itself.
                let _ = self.connect(now);
            }
        }
        if !self.running {
            self.discard(now);
        }
    }

    fn link_is_up(&self) -> bool {
        matches!(self.link, Link::Up(_)) && !self.ended
    }

    fn transmit(&mut self, now: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut taken = 0;
        for frame in frames {
            let Link::Up(socket) = &self.link else {
                self.counters.tx_no_peer += 1;
                taken += 1;
                continue;
            };
            if !is_plain(frame) {
                self.counters.refuse();
                taken += 1;
                continue;
            }
            match self.output.push(socket.as_fd(), frame.payload) {
                Ok(Push::Taken) => {
                    self.counters.sent += 1;
                    taken += 1;
                }
                Ok(Push::Full) => break,
                Err(error) => self.hang_up(now, &error),
            }
        }
        self.flush(now);
        taken
    }

    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize {
        let before = self.counters.received;
        for _ in 0..TURN {
            if !self.receive_one(now, Some(&mut *sink)) {
                break;
            }
        }
        usize::try_from(self.counters.received - before).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        self.input.has_next() || (self.readable && matches!(self.link, Link::Up(_)))
    }

    fn shutdown(&mut self) {
        self.flush(Instant::now());
        self.link = Link::Down;
        self.timer = None;
        self.reconnect = None;
        self.input.clear();
        self.output.clear();
    }
}
