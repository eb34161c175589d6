// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames in datagrams.

use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, bind, connect, getsockname,
    recvfrom, send, sendto, sockopt,
};

use super::open::{BoundPath, SocketError, family, new_socket, os};
use super::{LONGEST, OFFLOADS, SHORTEST, SocketCounters, TURN, is_plain};
use crate::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// The system does not tell when the queue of a Unix socket has room again to which this one is
/// not connected; and connected it would not hear a peer that was started again.
const FULL_PAUSE: Duration = Duration::from_millis(1);

/// Datagrams thrown away in one go while there is no driver.
const DISCARDS: usize = 1024;

/// Both ends of a datagram socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DgramConfig {
    /// Unix sockets.
    Unix {
        /// Where this end receives.
        local: PathBuf,
        /// Where the peer receives; it may come, go and come back.
        remote: PathBuf,
    },
    /// UDP with one peer; datagrams of others are not received.
    Udp {
        /// Where this end receives.
        local: SocketAddr,
        /// Where the peer receives and sends from.
        remote: SocketAddr,
    },
    /// UDP with all members of a multicast group.
    Multicast {
        /// The group and its port.
        group: SocketAddrV4,
        /// Address of the interface to use; the system chooses by default.
        interface: Option<Ipv4Addr>,
    },
}

/// Whom datagrams go to.
#[derive(Debug)]
enum Peer {
    Unix {
        remote: SocketAddrUnix,
        /// Removed when the back end goes.
        _path: BoundPath,
    },
    Connected,
    Group {
        /// A socket of its own for sending: by its port our own datagrams are known.
        sender: OwnedFd,
        group: SocketAddrV4,
        own: SocketAddrV4,
    },
}

/// A datagram socket as a back end of one network device.
#[derive(Debug)]
pub struct Dgram {
    socket: OwnedFd,
    peer: Peer,
    epoll: OwnedFd,
    readable: bool,
    /// The frame that waits for room is in the first bytes of `received`; 0: none does.
    waiting: usize,
    received: Box<[u8]>,
    /// Frames are put together here to be sent.
    sending: Vec<u8>,
    timer: Option<Instant>,
    running: bool,
    counters: SocketCounters,
}

impl Dgram {
    /// Opens the socket.
    ///
    /// # Errors
    ///
    /// [`SocketError`]: the local address is taken, or the two do not go together.
    pub fn open(config: &DgramConfig) -> Result<Self, SocketError> {
        let (socket, peer) = match config {
            DgramConfig::Unix { local, remote } => {
                let socket =
                    new_socket(AddressFamily::UNIX, SocketType::DGRAM).map_err(os("a socket"))?;
                let path = BoundPath::bind(&socket, SocketType::DGRAM, local)?;
                let shown = remote.display().to_string();
                let remote = SocketAddrUnix::new(remote).map_err(os(shown))?;
                let _path = path;
                (socket, Peer::Unix { remote, _path })
            }
            DgramConfig::Udp { local, remote } => {
                if local.is_ipv4() != remote.is_ipv4() {
                    let why = "local= and remote= must both be IPv4, or both IPv6";
                    return Err(SocketError::Addresses(why));
                }
                if remote.port() == 0 || remote.ip().is_unspecified() {
                    let why = "remote= must name an address and a port";
                    return Err(SocketError::Addresses(why));
                }
                let socket =
                    new_socket(family(local), SocketType::DGRAM).map_err(os("a socket"))?;
                bind(&socket, local).map_err(os(local.to_string()))?;
                connect(&socket, remote).map_err(os(remote.to_string()))?;
                (socket, Peer::Connected)
            }
            DgramConfig::Multicast { group, interface } => {
                join(*group, interface.unwrap_or(Ipv4Addr::UNSPECIFIED))?
            }
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("an epoll instance"))?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let mut watched = vec![&socket];
        if let Peer::Group { sender, .. } = &peer {
            watched.push(sender);
        }
        for fd in watched {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags)
                .map_err(os("an epoll instance"))?;
        }
        Ok(Self {
            socket,
            peer,
            epoll,
            readable: true,
            waiting: 0,
            // One more than allowed, to notice longer ones.
            received: vec![0; LONGEST + 1].into_boxed_slice(),
            sending: Vec::with_capacity(LONGEST),
            timer: None,
            running: false,
            counters: SocketCounters::default(),
        })
    }

    /// What went through so far.
    pub const fn counters(&self) -> SocketCounters {
        self.counters
    }

    /// Where this end receives, if that is UDP.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        getsockname(&self.socket).ok()?.try_into().ok()
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match &self.peer {
            Peer::Unix { remote, .. } => sendto(&self.socket, bytes, flags, remote),
            Peer::Connected => send(&self.socket, bytes, flags),
            Peer::Group { sender, group, .. } => sendto(sender, bytes, flags, group),
        }
    }

    /// Receives the next frame, unless one waits; false if there is none.
    fn fill(&mut self) -> bool {
        if self.waiting > 0 {
            return true;
        }
        if !self.readable {
            return false;
        }
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        match recvfrom(&self.socket, &mut *self.received, flags) {
            Ok((_, len, from)) => {
                if let Peer::Group { own, .. } = &self.peer
                    && from.and_then(|from| SocketAddrV4::try_from(from).ok()) == Some(*own)
                {
                    return true;
                }
                match len {
                    SHORTEST..=LONGEST => self.waiting = len,
                    _ => self.counters.rx_dropped += 1,
                }
                true
            }
            // What the peer's host says of earlier datagrams.
            Err(Errno::INTR | Errno::CONNREFUSED) => true,
            Err(_) => {
                self.readable = false;
                false
            }
        }
    }

    /// Nobody takes frames: what comes is thrown away.
    fn discard(&mut self, now: Instant) {
        for _ in 0..DISCARDS {
            if !self.fill() {
                return;
            }
            if self.waiting > 0 {
                self.counters.rx_dropped += 1;
                self.waiting = 0;
            }
        }
        self.timer = Some(now);
    }
}

/// A socket that receives what is sent to a group, and one to send.
fn join(group: SocketAddrV4, interface: Ipv4Addr) -> Result<(OwnedFd, Peer), SocketError> {
    if !group.ip().is_multicast() || group.port() == 0 {
        let why = "mcast= must be a multicast address (224.0.0.0 to 239.255.255.255) and a port";
        return Err(SocketError::Addresses(why));
    }
    let failed = || os(group.to_string());
    let inet = || new_socket(AddressFamily::INET, SocketType::DGRAM);
    let socket = inet().map_err(failed())?;
    // The other members on this host do the same.
    sockopt::set_socket_reuseaddr(&socket, true).map_err(failed())?;
    bind(&socket, &group).map_err(failed())?;
    sockopt::set_ip_add_membership(&socket, group.ip(), &interface).map_err(failed())?;
    let sender = inet().map_err(failed())?;
    sockopt::set_ip_multicast_loop(&sender, true).map_err(failed())?;
    if !interface.is_unspecified() {
        sockopt::set_ip_multicast_if(&sender, &interface).map_err(failed())?;
    }
    // Connected, it has the address from which its datagrams come.
    connect(&sender, &group).map_err(failed())?;
    let own = getsockname(&sender)
        .and_then(SocketAddrV4::try_from)
        .map_err(failed())?;
    Ok((socket, Peer::Group { sender, group, own }))
}

impl Backend for Dgram {
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
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 2];
        self.readable |= !crate::events::waiting(&self.epoll, &mut events).is_empty();
        if self.timer.is_some_and(|at| at <= now) {
            self.timer = None;
        }
        if !self.running {
            self.discard(now);
        }
    }

    fn transmit(&mut self, now: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        for (index, frame) in frames.iter().enumerate() {
            if !is_plain(frame) {
                self.counters.refuse();
                continue;
            }
            let mut bytes = std::mem::take(&mut self.sending);
            bytes.resize(frame.payload.len(), 0);
            frame.payload.read(&mut bytes);
            let result = match self.send(&bytes) {
                // What the peer's host had to say of an earlier datagram comes instead of this one.
                Err(Errno::CONNREFUSED) => self.send(&bytes),
                result => result,
            };
            self.sending = bytes;
            match result {
                Ok(_) => self.counters.sent += 1,
                Err(Errno::AGAIN | Errno::NOBUFS) => {
                    self.timer = Some(now + FULL_PAUSE);
                    return index;
                }
                // Longer than a datagram can be.
                Err(Errno::MSGSIZE) => self.counters.refuse(),
                Err(_) => self.counters.tx_no_peer += 1,
            }
        }
        frames.len()
    }

    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let before = self.counters.received;
        for _ in 0..TURN {
            if !self.fill() {
                break;
            }
            let frame = self.received.get(..self.waiting).unwrap_or_default();
            if frame.is_empty() {
                continue;
            }
            let head = &frame[..frame.len().min(Target::HEAD)];
            let Some(room) = sink.offer(Target::Head(head), frame.len()) else {
                break;
            };
            room.write(frame);
            sink.commit(&VnetHeader::default(), frame.len());
            self.counters.received += 1;
            self.waiting = 0;
        }
        usize::try_from(self.counters.received - before).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        self.waiting > 0 || self.readable
    }

    fn shutdown(&mut self) {
        self.waiting = 0;
        self.readable = false;
    }
}
