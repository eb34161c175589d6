// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device host's side of connecting: docs/bus-unix.md §2.

use super::address::{Address, BindError};
use super::frame::{Hello, MAX_FILE, MAX_FRAME, Refuse, RefuseReason, VERSION, Welcome};
use super::packet;
use crate::bell::Bell;
use crate::carrier::Carrier;
use crate::link::{Framing, Parts, Queues};
use crate::memory::Part;
use crate::trace::{Side, Trace};
use crate::{
    Capabilities, DEFAULT_MESSAGE_SIZE, DEFAULT_SLOTS, DeviceBus, MESSAGE_SIZES, Peer, SLOTS,
};
use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmsg_mem::spsc::Layout;
use vmsg_mem::{Doorbell, MappedSlice, Mapping};

/// Connections in mid-handshake. One more, and the oldest is dropped.
const MAX_PENDING: usize = 64;

/// How long no connection is accepted when the process has run out of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// How often one call of `accept` asks what is ready.
const ROUNDS: usize = 16;

/// Marks the listening socket among the events; connections count from 0.
const LISTENING: u64 = u64::MAX;

/// How a listener treats those who connect.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// Name of this program, at most 64 bytes.
    pub name: String,
    /// What is offered, and the longest message: 48 to 65536 bytes. A driver may ask for less.
    pub capabilities: Capabilities,
    /// Slots in each queue, 2 to 65536.
    pub slots: u32,
    /// Connections at a time; more are refused.
    pub max_connections: usize,
    /// Windows for each connection, to tell the driver; to be enforced by who handles WINDOW_ADD.
    pub max_windows: u32,
    /// How long a driver may take to say HELLO.
    pub handshake_timeout: Duration,
    /// Permissions of the socket file.
    pub mode: u32,
    /// Another number at each start; 0: a random one.
    pub epoch: u64,
    /// Where the messages of all connections are recorded.
    pub trace: Option<Trace>,
}

impl Default for ListenerOptions {
    /// 320-byte messages, 256 slots, 64 connections, 64 windows, 2 seconds, mode 0600, no trace.
    fn default() -> Self {
        Self {
            name: "vmsg".to_owned(),
            capabilities: Capabilities::all(DEFAULT_MESSAGE_SIZE),
            slots: DEFAULT_SLOTS,
            max_connections: 64,
            max_windows: 64,
            handshake_timeout: Duration::from_secs(2),
            mode: 0o600,
            epoch: 0,
            trace: None,
        }
    }
}

/// How many were turned away, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rejected {
    /// Refused with a reason: version, size, too many connections.
    pub refused: u64,
    /// Sent something else than a HELLO.
    pub malformed: u64,
    /// Said nothing in time, or were the oldest of too many that said nothing.
    pub stalled: u64,
    /// Went away in mid-handshake.
    pub gone: u64,
}

struct Pending {
    id: u64,
    socket: OwnedFd,
    deadline: Instant,
}

/// Listens for drivers. All is done in [`accept`](Listener::accept), which never waits.
pub struct Listener {
    /// Holds the listening socket and those in mid-handshake.
    epoll: OwnedFd,
    address: Address,
    options: ListenerOptions,
    /// Oldest first, so also the nearest deadline first.
    pending: VecDeque<Pending>,
    next_id: u64,
    /// One clone is in each connection.
    places: Arc<()>,
    /// Accepting goes on then.
    paused_until: Option<Instant>,
    rejected: Rejected,
}

impl Listener {
    /// Takes the path and begins to listen. A socket file that nobody answers
    /// on is replaced; one that somebody does is left alone.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(path: impl AsRef<Path>, mut options: ListenerOptions) -> Result<Self, BindError> {
        let path = path.as_ref();
        if !MESSAGE_SIZES.contains(&options.capabilities.max_message_size) {
            return Err(BindError::BadOption(
                "the message size must be 48 to 65536 bytes",
            ));
        }
        if !SLOTS.contains(&options.slots) {
            return Err(BindError::BadOption("a queue must have 2 to 65536 slots"));
        }
        let queues = Layout::armed(crate::slot_size(options.capabilities.max_message_size))
            .bytes_for(options.slots);
        if queues.is_none_or(|bytes| bytes.next_multiple_of(4096) as u64 * 2 > MAX_FILE) {
            return Err(BindError::BadOption(
                "the queues of a connection would be larger than 64 MiB; use fewer slots",
            ));
        }
        let os = |what: &'static str| {
            move |source: Errno| BindError::Os {
                what,
                path: path.to_owned(),
                source: source.into(),
            }
        };
        if options.epoch == 0 {
            let mut random = [0u8; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(os("draw an epoch for"))?;
            options.epoch = u64::from_ne_bytes(random);
        }
        let address = Address::bind(path, options.mode, SocketType::SEQPACKET)?;
        // A trace that cannot be written is told before anybody is let in.
        if let Some(trace) = &options.trace {
            trace.open()?;
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("watch"))?;
        epoll::add(
            &epoll,
            &address,
            epoll::EventData::new_u64(LISTENING),
            epoll::EventFlags::IN,
        )
        .map_err(os("watch"))?;
        Ok(Self {
            epoll,
            address,
            options,
            pending: VecDeque::new(),
            next_id: 0,
            places: Arc::new(()),
            paused_until: None,
            rejected: Rejected::default(),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.address.path()
    }

    /// What drivers see as [`DriverBus::epoch`](crate::DriverBus::epoch).
    pub fn epoch(&self) -> u64 {
        self.options.epoch
    }

    /// Connections now open.
    pub fn connections(&self) -> usize {
        Arc::strong_count(&self.places) - 1
    }

    /// Who did not get in.
    pub fn rejected(&self) -> &Rejected {
        &self.rejected
    }

    /// When [`Self::accept`] must be called even if nothing is readable.
    pub fn next_deadline(&self) -> Option<Instant> {
        let pending = self.pending.front().map(|p| p.deadline);
        match (pending, self.paused_until) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Goes on with all connections that are in mid-handshake and returns one
    /// that is through. Call it when the listener is readable
    /// ([`AsFd`]; level-triggered) and at [`Self::next_deadline`], until it returns `None`.
    ///
    /// # Errors
    /// Local trouble only; the listener can be used on.
    pub fn accept(&mut self, now: Instant) -> io::Result<Option<DeviceBus>> {
        self.expire(now)?;
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; 32];
        // Bounded: whoever connects all the time must not keep the caller here. The listener stays readable.
        for _ in 0..ROUNDS {
            let (ready, _) = match epoll::wait(&self.epoll, &mut events, Some(&Timespec::default()))
            {
                Ok(ready) => ready,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let ready: Vec<u64> = ready.iter().map(|event| event.data.u64()).collect();
            if ready.is_empty() {
                return Ok(None);
            }
            for id in ready {
                if id == LISTENING {
                    self.take_in(now)?;
                } else if let Some(bus) = self.proceed(id)? {
                    return Ok(Some(bus));
                }
            }
            if self.paused_until.is_some() {
                break;
            }
        }
        Ok(None)
    }

    /// Drops who has taken too long, and listens again after a pause.
    fn expire(&mut self, now: Instant) -> io::Result<()> {
        while self.pending.front().is_some_and(|p| p.deadline <= now) {
            self.pending.pop_front();
            self.rejected.stalled += 1;
        }
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            epoll::add(
                &self.epoll,
                &self.address,
                epoll::EventData::new_u64(LISTENING),
                epoll::EventFlags::IN,
            )?;
        }
        Ok(())
    }

    /// Accepts one connection.
    fn take_in(&mut self, now: Instant) -> io::Result<()> {
        let socket = match rustix::net::accept_with(
            &self.address,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        ) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(()),
            Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)) => {
                // The socket stays readable: look away, or this would be a busy loop.
                tracing::warn!(%error, "no more connections for a moment");
                epoll::delete(&self.epoll, &self.address)?;
                self.paused_until = Some(now + PAUSE);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        if self.pending.len() >= MAX_PENDING {
            self.pending.pop_front();
            self.rejected.stalled += 1;
        }
        let id = self.next_id;
        self.next_id += 1;
        epoll::add(
            &self.epoll,
            &socket,
            epoll::EventData::new_u64(id),
            epoll::EventFlags::IN,
        )?;
        self.pending.push_back(Pending {
            id,
            socket,
            deadline: now + self.options.handshake_timeout,
        });
        Ok(())
    }

    /// Reads the HELLO of a connection and answers it.
    fn proceed(&mut self, id: u64) -> io::Result<Option<DeviceBus>> {
        let Some(at) = self.pending.iter().position(|p| p.id == id) else {
            return Ok(None);
        };
        let mut frame = [0; MAX_FRAME];
        let mut fds = Vec::new();
        let received = match packet::recv(self.pending[at].socket.as_fd(), &mut frame, &mut fds, 0)
        {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(None),
            Err(_) => {
                self.pending.remove(at);
                self.rejected.gone += 1;
                return Ok(None);
            }
        };
        let Some(pending) = self.pending.remove(at) else {
            return Ok(None);
        };
        let socket = pending.socket;
        // From now on what comes over it is the connection's business, and would only keep the caller of `accept` awake.
        epoll::delete(&self.epoll, &socket)?;
        if received.len == 0 {
            self.rejected.gone += 1;
            return Ok(None);
        }
        let hello = if received.truncated {
            Err("a frame that is too long")
        } else {
            Hello::decode(&frame[..received.len])
        };
        let refuse = match self.judge(hello) {
            Ok((hello, message_size)) => match self.welcome(&socket, &hello, message_size) {
                Ok(Some(parts)) => return self.open(parts(socket)).map(Some),
                Ok(None) => {
                    self.rejected.gone += 1;
                    return Ok(None);
                }
                Err(error) => {
                    tracing::warn!(%error, "no means for another connection");
                    Refuse::new(
                        RefuseReason::TooMany,
                        "the device host has no means for another one",
                    )
                }
            },
            Err(refuse) => refuse,
        };
        if refuse.reason == RefuseReason::BadHello {
            self.rejected.malformed += 1;
        } else {
            self.rejected.refused += 1;
        }
        tracing::debug!(reason = %refuse.reason, text = refuse.text, "refusing a connection");
        // If it does not even take this, it is gone.
        let _ = packet::send(socket.as_fd(), &refuse.encode(), &[]);
        Ok(None)
    }

    /// Makes the connection an end of the bus.
    fn open(&self, parts: Parts) -> io::Result<DeviceBus> {
        let place = Box::new(Arc::clone(&self.places));
        let mut bus = DeviceBus::new(parts, Some(place)).map_err(io::Error::other)?;
        if let Some(trace) = &self.options.trace {
            bus.set_trace(trace.interface(Side::Device, bus.peer(), bus.capabilities()));
        }
        Ok(bus)
    }

    /// Whether this driver is let in, and with which message size.
    fn judge(&self, hello: Result<Hello, &'static str>) -> Result<(Hello, usize), Refuse> {
        let hello = hello.map_err(|why| Refuse::new(RefuseReason::BadHello, why))?;
        if !(hello.version_min..=hello.version_max).contains(&VERSION) {
            let text = format!(
                "version {VERSION} here, {} to {} there",
                hello.version_min, hello.version_max
            );
            return Err(Refuse::new(RefuseReason::Version, text));
        }
        let most = self.options.capabilities.max_message_size;
        let size = match hello.message_size {
            0 => most,
            wanted => usize::try_from(wanted).unwrap_or(most).min(most),
        };
        if !MESSAGE_SIZES.contains(&size) {
            let text = format!(
                "{size} bytes were asked for, at least {} are needed",
                MESSAGE_SIZES.start()
            );
            return Err(Refuse::new(RefuseReason::MessageSize, text));
        }
        if self.connections() >= self.options.max_connections {
            let text = format!("{} are open already", self.connections());
            return Err(Refuse::new(RefuseReason::TooMany, text));
        }
        Ok((hello, size))
    }

    /// Makes the queues of a connection and hands them over; `None` if the driver is gone. What is
    /// returned makes the connection of its socket.
    fn welcome(
        &self,
        socket: &OwnedFd,
        hello: &Hello,
        message_size: usize,
    ) -> io::Result<Option<impl FnOnce(OwnedFd) -> Parts + use<>>> {
        let slot_size = crate::slot_size(message_size);
        let queue_len = Layout::armed(slot_size)
            .bytes_for(self.options.slots)
            .ok_or(io::ErrorKind::InvalidInput)?;
        // Each queue on pages of its own: they are used by different sides.
        let to_driver = queue_len.next_multiple_of(4096);
        let file_len = (to_driver * 2) as u64;
        let (mapping, file) =
            Mapping::memfd("vmsg-queues", file_len, true).map_err(io::Error::other)?;
        let mapping = Arc::new(mapping);
        let part = |offset| {
            MappedSlice::new(Arc::clone(&mapping), offset, queue_len)
                .map(Part::Mapped)
                .ok_or(io::ErrorKind::InvalidInput)
        };
        let (device_bell, driver_bell) = (Doorbell::new()?, Doorbell::new()?);
        let mut capabilities = self.options.capabilities;
        capabilities.max_message_size = message_size;
        let welcome = Welcome {
            message_size,
            slot_size,
            slots: self.options.slots,
            capabilities: capabilities.bits(),
            epoch: self.options.epoch,
            max_windows: self.options.max_windows,
            to_device: 0,
            to_driver,
            queue_len,
            file_len,
            name: self.options.name.clone(),
        };
        let (pid, uid) = packet::credentials(socket.as_fd());
        let fds = [file.as_fd(), device_bell.as_fd(), driver_bell.as_fd()];
        let (outgoing, incoming) = (part(to_driver)?, part(0)?);
        let peer = Peer {
            name: hello.name.clone(),
            pid,
            uid,
            observer: hello.observer,
        };
        let epoch = self.options.epoch;
        // The socket is fresh: if there is no room, the other side made it so.
        if !matches!(
            packet::send(socket.as_fd(), &welcome.encode(), &fds),
            Ok(true)
        ) {
            return Ok(None);
        }
        // The driver may use its words of the queues already; ours it does not touch.
        Ok(Some(move |socket| Parts {
            queues: Queues::Fresh {
                outgoing,
                incoming,
                slot_size,
            },
            framing: Framing::Sized,
            theirs: Bell::Fd(driver_bell),
            ours: Bell::Fd(device_bell),
            carrier: Carrier::Socket(socket),
            capabilities,
            peer,
            epoch,
        }))
    }
}

impl AsFd for Listener {
    /// Readable when there is something to do for [`Listener::accept`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("path", &self.path())
            .field("connections", &self.connections())
            .field("rejected", &self.rejected)
            .finish_non_exhaustive()
    }
}
