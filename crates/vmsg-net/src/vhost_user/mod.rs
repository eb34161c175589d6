// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A port of a vhost-user back end, as Open vSwitch with DPDK has them (`dpdkvhostuserclient`, `dpdkvhostuser`): this side is what
//! QEMU is for a virtual machine, the front end, with a driver of the network device that the back end is.
//!
//! What the back end is lent is memory of its own (`rings.rs`); frames are copied into it and out of it. So it never gets to see
//! the memory of a guest, nor guests each other's, and a back end that is gone or has gone mad takes nothing along. Offloads that
//! only one of the sides takes are made good in that copy: checksums completed, large segments cut.
//!
//! Nothing here blocks, the handshake included. The peer is not trusted: an impossible message, index or length is a [`Trouble`],
//! which ends the connection; after a pause there may be another one.

mod handshake;
mod rings;
mod wire;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, listen,
};
use vmsg_mem::{Doorbell, RingError};
use vmsg_queue::QueueError;

use self::handshake::Handshake;
use self::rings::{Received, Rings};
use crate::events;
use crate::socket::SocketError;
use crate::socket::chatter::Chatter;
use crate::socket::open::{BoundPath, new_socket, os};
use crate::socket::watch::PathWatch;
use crate::{Backend, Guest, Offloads, RxSink, TxFrame};

/// First pause after something went wrong; it doubles up to [`VhostUserConfig::reconnect`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The pauses begin anew after a connection that lasted as long.
const LASTING: Duration = Duration::from_secs(5);
/// A back end that has not answered by then is none. Open vSwitch takes its time when memory is registered with devices.
const PATIENCE: Duration = Duration::from_secs(10);
/// Frames handed to the guest in one go.
const TURN: u64 = 256;

/// Events: data of the epoll entries.
const LISTENER: u64 = 0;
const CONNECTION: u64 = 1;
const WATCH: u64 = 2;
const RECEIVED: u64 = 3;
const SENT: u64 = 4;

/// Which back end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserConfig {
    /// Its socket.
    pub path: PathBuf,
    /// Listen there, and let the back end connect (`dpdkvhostuserclient`); one at a time. Otherwise it listens.
    pub server: bool,
    /// The longest pause between two connections. The port lives whether the back end is there or not.
    pub reconnect: Duration,
    /// Whether frames may be large or lack a checksum, if the back end can do it.
    pub offloads: bool,
}

impl VhostUserConfig {
    /// A back end that connects to `path` (with `server`), or listens there; again within a second when it is gone.
    pub const fn new(path: PathBuf, server: bool) -> Self {
        Self {
            path,
            server,
            reconnect: Duration::from_secs(1),
            offloads: true,
        }
    }
}

/// What went through the port so far, and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VhostUserCounters {
    /// Frames that the back end was given.
    pub sent: u64,
    /// Frames of the guest while there was no back end.
    pub sent_to_nobody: u64,
    /// Frames of the guest that were no good.
    pub bad: u64,
    /// Frames of the guest of which the back end got some pieces only.
    pub cut_off: u64,
    /// Frames that the guest got.
    pub received: u64,
    /// Frames of the back end that were no good, or too large for the guest.
    pub received_bad: u64,
    /// Frames of the back end of which the guest had room for some pieces only.
    pub received_cut_off: u64,
    /// Connections that came to be used.
    pub connections: u64,
    /// Connections that ended by a fault of the back end.
    pub faults: u64,
}

/// Why a connection ended, or came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Trouble {
    /// The other side has closed it.
    #[error("the back end has closed the connection")]
    Closed,
    /// The socket's buffer is full of requests.
    #[error("the back end does not read its requests")]
    Deaf,
    /// There was no answer in time.
    #[error("the back end does not answer")]
    Silent,
    /// Something else than the answer.
    #[error("message {request} with flags {flags:#x} and {len} bytes is not the answer")]
    Answer {
        /// Its number.
        request: u32,
        /// Its flags.
        flags: u32,
        /// Bytes of its body.
        len: u32,
    },
    /// A message that was not asked for.
    #[error("the back end says something that it was not asked")]
    Unasked,
    /// A device of the time before virtio 1.
    #[error("the back end has no VIRTIO_F_VERSION_1 among its features {features:#x}")]
    Legacy {
        /// What it offers.
        features: u64,
    },
    /// It has put something impossible into a queue.
    #[error("the back end's queue: {0}")]
    Queue(#[from] QueueError),
    /// A frame without a header.
    #[error("a frame of {len} bytes, less than its header")]
    Short {
        /// Bytes.
        len: usize,
    },
    /// A frame that cannot be.
    #[error("a frame in {count} buffers")]
    Buffers {
        /// How many it is said to take.
        count: usize,
    },
    /// It has made one of the eventfds useless.
    #[error(transparent)]
    Doorbell(#[from] RingError),
    /// There is no memory to be had.
    #[error(transparent)]
    Memory(#[from] vmsg_mem::Error),
    /// There are no descriptors to be had.
    #[error(transparent)]
    Descriptors(#[from] io::Error),
    /// The system refuses something.
    #[error("{0}")]
    Os(Errno),
    /// The queues were given up after an error.
    #[error("the queues are lost")]
    Lost,
}

impl Trouble {
    /// It is the back end's doing, and no ordinary end.
    const fn is_fault(&self) -> bool {
        !matches!(
            self,
            Self::Closed | Self::Memory(_) | Self::Descriptors(_) | Self::Os(_) | Self::Lost
        )
    }
}

/// Whose turn it is to come.
#[derive(Debug)]
enum Way {
    Listen { listener: OwnedFd, _path: BoundPath },
    Connect(SocketAddrUnix),
}

/// Where the connection stands.
#[derive(Debug)]
enum Link {
    /// Nobody is there; at the time, if there is one, the next attempt or guest is let in.
    Down {
        until: Option<Instant>,
    },
    Greeting {
        socket: OwnedFd,
        handshake: Box<Handshake>,
        deadline: Instant,
    },
    Up(Box<Up>),
    /// There will be no other.
    Over,
}

#[derive(Debug)]
struct Up {
    socket: OwnedFd,
    rings: Rings,
    takes: Offloads,
    since: Instant,
    /// There may be frames.
    ready: bool,
}

/// A port of a vhost-user back end.
#[derive(Debug)]
pub struct VhostUser {
    config: VhostUserConfig,
    way: Way,
    link: Link,
    epoll: OwnedFd,
    path_watch: Option<PathWatch>,
    pause: Duration,
    guest: Guest,
    counters: VhostUserCounters,
    chatter: Chatter,
    /// That nobody is there has been said.
    complained: bool,
}

impl VhostUser {
    /// Opens the port; the back end may come later.
    ///
    /// # Errors
    ///
    /// [`SocketError`]: the path makes no sense, or is taken.
    pub fn open(config: &VhostUserConfig) -> Result<Self, SocketError> {
        let shown = || config.path.display().to_string();
        let way = if config.server {
            let listener =
                new_socket(AddressFamily::UNIX, SocketType::STREAM).map_err(os(shown()))?;
            let path = BoundPath::bind(&listener, SocketType::STREAM, &config.path)?;
            listen(&listener, 1).map_err(os(shown()))?;
            Way::Listen {
                listener,
                _path: path,
            }
        } else {
            Way::Connect(SocketAddrUnix::new(&config.path).map_err(os(shown()))?)
        };
        let mut this = Self {
            config: config.clone(),
            way,
            link: Link::Down { until: None },
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("an epoll instance"))?,
            path_watch: None,
            pause: FIRST_PAUSE,
            guest: Guest::NONE,
            counters: VhostUserCounters::default(),
            chatter: Chatter::default(),
            complained: false,
        };
        if let Way::Connect(_) = this.way
            && let Some(watch) = PathWatch::new(&config.path)
        {
            // Before the first attempt, so that nothing happens between the two.
            this.watch(watch.fd(), WATCH)
                .map_err(os("an epoll instance"))?;
            this.path_watch = Some(watch);
        }
        this.let_in(Instant::now());
        Ok(this)
    }

    /// What went through so far.
    pub const fn counters(&self) -> VhostUserCounters {
        self.counters
    }

    fn watch(&self, fd: impl AsFd, data: u64) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(data);
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)
    }

    /// Watches what the back end rings, which it may do as often as it likes: each time counts once.
    fn watch_bell(&self, bell: &Doorbell, data: u64) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(data);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, bell, data, flags)
    }

    /// Forgets the connection. The back end has the doorbells, too, so the system would go on watching them.
    fn let_go(&mut self, next: Link) {
        if let Link::Up(up) = std::mem::replace(&mut self.link, next) {
            for end in up.rings.ends() {
                // Not watched: then all is well.
                let _ = epoll::delete(&self.epoll, &end.call);
            }
        }
    }

    /// The time has come for another connection.
    fn let_in(&mut self, now: Instant) {
        self.link = Link::Down { until: None };
        let result = match &self.way {
            // Until then nobody was looked for.
            Way::Listen { listener, .. } => self.watch(listener, LISTENER).map_err(Trouble::Os),
            Way::Connect(address) => match Self::reach(address) {
                Ok(socket) => self.greet(now, socket),
                Err(error) => Err(Trouble::Os(error)),
            },
        };
        if let Err(trouble) = result {
            self.end(now, &trouble);
        }
    }

    fn reach(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
        let socket = new_socket(AddressFamily::UNIX, SocketType::STREAM)?;
        connect(&socket, address)?;
        Ok(socket)
    }

    /// Somebody may be at the door.
    fn answer_the_door(&mut self, now: Instant) {
        let (Way::Listen { listener, .. }, Link::Down { until: None }) = (&self.way, &self.link)
        else {
            return;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // Others wait.
        let _ = epoll::delete(&self.epoll, listener);
        let result = accept_with(listener, flags).map_err(Trouble::Os);
        if let Err(trouble) = result.and_then(|socket| self.greet(now, socket)) {
            self.end(now, &trouble);
        }
    }

    fn greet(&mut self, now: Instant, socket: OwnedFd) -> Result<(), Trouble> {
        self.watch(&socket, CONNECTION).map_err(Trouble::Os)?;
        let handshake = Handshake::begin(socket.as_fd(), self.config.offloads)?;
        self.link = Link::Greeting {
            socket,
            handshake: Box::new(handshake),
            deadline: now + PATIENCE,
        };
        Ok(())
    }

    /// The connection can be read.
    fn hear(&mut self, now: Instant) -> Result<(), Trouble> {
        match &mut self.link {
            Link::Down { .. } | Link::Over => Ok(()),
            Link::Up(up) => wire::listen_for_the_end(up.socket.as_fd()),
            Link::Greeting {
                socket, handshake, ..
            } => {
                let Some((rings, features)) = handshake.go_on(socket.as_fd())? else {
                    return Ok(());
                };
                self.up(now, rings, features)
            }
        }
    }

    fn up(&mut self, now: Instant, rings: Rings, features: u64) -> Result<(), Trouble> {
        let [rx, tx] = rings.ends();
        let rang = self.watch_bell(&rx.call, RECEIVED);
        let rang = rang.and_then(|()| self.watch_bell(&tx.call, SENT));
        let link = std::mem::replace(&mut self.link, Link::Down { until: None });
        let Link::Greeting { socket, .. } = link else {
            return Err(Trouble::Lost);
        };
        self.counters.connections += 1;
        self.complained = false;
        if self.chatter.admit(now) {
            let path = self.config.path.display();
            tracing::info!(%path, features = format_args!("{features:#x}"), "the back end is there");
        }
        self.link = Link::Up(Box::new(Up {
            socket,
            rings,
            takes: handshake::takes(features),
            since: now,
            ready: true,
        }));
        rang.map_err(Trouble::Os)
    }

    /// The connection, if there was one, is no more.
    fn end(&mut self, now: Instant, trouble: &Trouble) {
        if trouble.is_fault() {
            self.counters.faults += 1;
        }
        let first = !std::mem::replace(&mut self.complained, true);
        let was_up = match &self.link {
            Link::Up(up) => {
                if !trouble.is_fault() && now.saturating_duration_since(up.since) >= LASTING {
                    self.pause = FIRST_PAUSE;
                }
                true
            }
            _ => false,
        };
        let path = self.config.path.display();
        if (first || was_up || trouble.is_fault()) && self.chatter.admit(now) {
            if trouble.is_fault() {
                tracing::warn!(%path, %trouble, "the back end is not to be used");
            } else {
                tracing::info!(%path, %trouble, "no back end");
            }
        }
        self.let_go(Link::Down {
            until: Some(now + self.pause),
        });
        let longest = self.config.reconnect.max(FIRST_PAUSE);
        self.pause = (self.pause * 2).min(longest);
    }

    fn on_time(&mut self, now: Instant) {
        match &self.link {
            Link::Down { until: Some(until) } if *until <= now => self.let_in(now),
            Link::Greeting { deadline, .. } if *deadline <= now => self.end(now, &Trouble::Silent),
            _ => {}
        }
    }
}

impl Backend for VhostUser {
    fn offloads(&self) -> Offloads {
        Offloads {
            ufo: false,
            guest_ufo: false,
            ..Offloads::ALL
        }
    }

    fn set_guest(&mut self, guest: &Guest) {
        self.guest = *guest;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        match &self.link {
            Link::Down { until } => *until,
            Link::Greeting { deadline, .. } => Some(*deadline),
            Link::Up(_) | Link::Over => None,
        }
    }

    fn poll(&mut self, now: Instant) {
        let mut room = [MaybeUninit::uninit(); 8];
        let mut appeared = false;
        for event in events::waiting(&self.epoll, &mut room) {
            let result = match event.data.u64() {
                LISTENER => {
                    self.answer_the_door(now);
                    Ok(())
                }
                CONNECTION => self.hear(now),
                WATCH => {
                    appeared |= self.path_watch.as_ref().is_some_and(PathWatch::appeared);
                    Ok(())
                }
                RECEIVED => {
                    if let Link::Up(up) = &mut self.link {
                        up.ready = true;
                    }
                    Ok(())
                }
                SENT => match &mut self.link {
                    Link::Up(up) => up.rings.reap(),
                    _ => Ok(()),
                },
                _ => Ok(()),
            };
            if let Err(trouble) = result {
                self.end(now, &trouble);
                // What else was seen belonged to that connection.
                break;
            }
        }
        if appeared && matches!(self.link, Link::Down { .. }) {
            // It may be a moment from being there to being listened at.
            self.pause = FIRST_PAUSE;
            self.let_in(now);
        }
        self.on_time(now);
    }

    fn link_is_up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    fn transmit(&mut self, now: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        let Link::Up(up) = &mut self.link else {
            self.counters.sent_to_nobody += frames.len() as u64;
            return frames.len();
        };
        match up.rings.transmit(frames, &up.takes) {
            Ok(sent) => {
                let lost = sent.bad + sent.cut_off;
                self.counters.sent += sent.taken as u64 - lost;
                self.counters.bad += sent.bad;
                self.counters.cut_off += sent.cut_off;
                sent.taken
            }
            Err(trouble) => {
                self.end(now, &trouble);
                self.counters.sent_to_nobody += frames.len() as u64;
                frames.len()
            }
        }
    }

    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize {
        let Link::Up(up) = &mut self.link else {
            return 0;
        };
        let mut told = Received::default();
        let result = up
            .rings
            .receive(&self.guest.offloads, sink, TURN, &mut told);
        self.counters.received += told.frames;
        self.counters.received_bad += told.bad;
        self.counters.received_cut_off += told.cut_off;
        match result {
            Ok(empty) => up.ready = !empty,
            Err(trouble) => self.end(now, &trouble),
        }
        // Those that were no good, too: it has got on, and there may be others behind them of which it will not be told.
        let taken = told.frames + told.bad + told.cut_off;
        usize::try_from(taken).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        match &self.link {
            Link::Up(up) => up.ready || up.rings.has_frame(),
            _ => false,
        }
    }

    fn shutdown(&mut self) {
        self.let_go(Link::Over);
    }
}
