// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ports of the host that lead into the guest (`hostfwd=`).

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::ioctl_fionread;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::arp;
use super::config::{HostForward, Protocol, UserError};
use super::line::{Budget, Share, Slot};
use super::net::{Net, Source};
use super::packet::{IpOut, MAX_PACKET, UDP, ip_header};
use super::tcp::Tcp;
use super::udp::Datagram;
use super::{Turn, udp};
use crate::{RxSink, Target};

const EVENTS: EventFlags = EventFlags::IN.union(EventFlags::ET);
/// Clients taken at one go.
const ACCEPTS: usize = 16;
/// Datagrams that one forwarding sends to the guest in a turn.
const TURN_DATAGRAMS: usize = 32;
/// UDP clients remembered for each forwarding; the one that rested longest makes way.
const MAX_CLIENTS: usize = 64;
/// When to try again after the host was short of something.
const RETRY: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Udp {
        socket: UdpSocket,
        clients: Vec<Client>,
    },
}

/// Who sent something to a forwarded UDP port, and how the guest sees it.
#[derive(Clone, Copy, Debug)]
struct Client {
    real: SocketAddr,
    seen: SocketAddr,
    /// The guest's queue pair that it answers on.
    pair: u16,
    last: Instant,
}

/// One forwarding.
#[derive(Debug)]
struct Forward {
    socket: Socket,
    /// An address of `::` is that of whichever guest spoke IPv6 last.
    guest: SocketAddr,
    /// The guest that the last client was led to.
    led_to: Option<SocketAddr>,
    share: Share,
    timer: Option<Instant>,
}

/// All forwardings; their number does not change.
#[derive(Debug, Default)]
pub(super) struct Forwards {
    all: Vec<Forward>,
}

fn listener(addr: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = match addr {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, kind, flags, None)?;
    if kind == SocketType::STREAM {
        // Connections of the process before this one may be closing still.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &addr)?;
    if kind == SocketType::STREAM {
        listen(&socket, 128)?;
    }
    Ok(socket)
}

impl Forwards {
    pub(super) fn new(net: &Net) -> Result<Self, UserError> {
        let mut all = Vec::new();
        for (index, config) in (0u32..).zip(&net.config.forwards) {
            let forward = Self::open(net, index, config).map_err(|source| UserError::Forward {
                addr: config.host,
                source,
            })?;
            all.push(forward);
        }
        Ok(Self { all })
    }

    fn open(net: &Net, index: u32, config: &HostForward) -> io::Result<Forward> {
        let socket = match config.protocol {
            Protocol::Tcp => Socket::Tcp(listener(config.host, SocketType::STREAM)?.into()),
            Protocol::Udp => Socket::Udp {
                socket: listener(config.host, SocketType::DGRAM)?.into(),
                clients: Vec::new(),
            },
        };
        let forward = Forward {
            socket,
            guest: net.addresses.forward_guest(config),
            led_to: None,
            share: Share::default(),
            timer: None,
        };
        net.watch(forward.fd(), Source::Forward(index), EVENTS)?;
        Ok(forward)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Where the host listens, in the order of the settings.
    pub(super) fn addresses(&self) -> Vec<Option<SocketAddr>> {
        self.all
            .iter()
            .map(|forward| match &forward.socket {
                Socket::Tcp(socket) => socket.local_addr().ok(),
                Socket::Udp { socket, .. } => socket.local_addr().ok(),
            })
            .collect()
    }

    /// Somebody knocks.
    pub(super) fn event(&mut self, net: &mut Net, now: Instant, index: u32, tcp: &mut Tcp) {
        let Some(forward) = self.all.get_mut(index as usize) else {
            return;
        };
        let source = Source::Forward(index);
        let guest = forward.guest(net);
        match &forward.socket {
            Socket::Udp { .. } => net.join(source, &mut forward.share),
            Socket::Tcp(socket) => {
                let mut taken = 0;
                while taken < ACCEPTS {
                    match socket.accept() {
                        Ok((stream, client)) => {
                            taken += 1;
                            // One that cannot be served is closed here.
                            if let Some(guest) = guest
                                && stream.set_nonblocking(true).is_ok()
                            {
                                tcp.call(net, now, stream.into(), client, guest);
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                        // Interrupted, the client has gone, or descriptors are short.
                        Err(_) => break,
                    }
                }
                if taken == ACCEPTS {
                    // Others first; the listener has its event once more.
                    net.watch_again(forward.fd(), source, EVENTS);
                    return;
                }
                let mut noted = forward.timer;
                net.timers.set(source, &mut noted, now + RETRY);
                forward.timer = noted;
            }
        }
    }

    pub(super) fn expire(&mut self, net: &mut Net, now: Instant, index: u32, tcp: &mut Tcp) {
        if let Some(forward) = self.all.get_mut(index as usize) {
            forward.timer = None;
        }
        self.event(net, now, index, tcp);
    }

    /// A UDP datagram of a guest: true if it answers a client of a forwarding.
    pub(super) fn send(&mut self, net: &mut Net, now: Instant, datagram: &Datagram<'_>) -> bool {
        for forward in &mut self.all {
            if forward.led_to != Some(datagram.guest) {
                continue;
            }
            if let Socket::Udp { socket, clients } = &mut forward.socket
                && let Some(client) = clients
                    .iter_mut()
                    .find(|client| client.seen == datagram.peer)
            {
                client.last = now;
                client.pair = net.pair;
                let mut scratch = std::mem::take(&mut net.scratch);
                for payload in datagram.payloads() {
                    scratch.resize(scratch.len().max(payload.len()), 0);
                    let n = payload.read(&mut scratch);
                    // What the host cannot deliver is lost, as datagrams are.
                    let _ = socket.send_to(&scratch[..n.min(payload.len())], client.real);
                }
                net.scratch = scratch;
                return true;
            }
        }
        false
    }

    /// A forwarding's turn to send to the guest.
    pub(super) fn turn(
        &mut self,
        net: &mut Net,
        now: Instant,
        slot: Slot,
        index: u32,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let Some(forward) = self.all.get_mut(index as usize) else {
            return Turn::Done;
        };
        let full = net.config.limits.turn_bytes;
        let Some(mut budget) = net.line.begin(slot, &mut forward.share, full) else {
            return Turn::Done;
        };
        let turn = forward.send_to_guest(net, now, &mut budget, sink);
        net.line.end(slot, &mut forward.share, turn, budget);
        turn
    }

    pub(super) fn shutdown(&mut self, net: &mut Net) {
        for (index, mut forward) in (0u32..).zip(self.all.drain(..)) {
            net.unwatch(forward.fd());
            net.timers.clear(Source::Forward(index), &mut forward.timer);
        }
    }
}

impl Forward {
    /// Hands on what clients have sent.
    fn send_to_guest(
        &mut self,
        net: &mut Net,
        now: Instant,
        budget: &mut Budget,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let guest = self.guest(net);
        if self.led_to != guest {
            self.led_to = guest;
            if let Socket::Udp { clients, .. } = &mut self.socket {
                clients.clear();
            }
        }
        let Socket::Udp { socket, clients } = &mut self.socket else {
            return Turn::Done;
        };
        if let Some(guest) = guest
            && net.neighbour(guest.ip()).is_none()
        {
            arp::ask(net, guest.ip());
        }
        for _ in 0..TURN_DATAGRAMS {
            if budget.is_spent() {
                return Turn::Again;
            }
            if let Some(guest) = guest
                && !has_room(net, socket, clients, guest, now, sink)
            {
                return Turn::NoRoom;
            }
            let mut scratch = std::mem::take(&mut net.scratch);
            scratch.resize(scratch.len().max(MAX_PACKET), 0);
            let received = socket.recv_from(&mut scratch[udp::HEADER..MAX_PACKET]);
            if let (Ok((n, real)), Some(guest)) = (&received, guest) {
                let seen = remember(net, clients, *real, guest.ip(), now);
                let message = &mut scratch[..udp::HEADER + n];
                if message.len() <= MAX_PACKET - ip_header(guest.ip()) {
                    udp::seal(message, seen.addr, guest);
                    let ip = IpOut::new(seen.addr.ip(), guest.ip(), UDP);
                    budget.spend(udp::send(net, sink, seen.pair, ip, message));
                } else {
                    net.counters.limited += 1;
                }
            }
            net.scratch = scratch;
            if received.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return Turn::Done;
            }
        }
        Turn::Again
    }

    /// Where it leads now.
    fn guest(&self, net: &Net) -> Option<SocketAddr> {
        let addr = match self.guest.ip() {
            IpAddr::V6(addr) if addr.is_unspecified() => net.last_guest6()?,
            addr => addr,
        };
        Some(SocketAddr::new(addr, self.guest.port()))
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Udp { socket, .. } => socket.as_fd(),
        }
    }
}

/// True if the guest has a buffer for the first frame of the next datagram. Where it is to lie may
/// depend on whom it comes from.
fn has_room(
    net: &mut Net,
    socket: &UdpSocket,
    clients: &mut Vec<Client>,
    guest: SocketAddr,
    now: Instant,
    sink: &mut dyn RxSink,
) -> bool {
    let waiting = ioctl_fionread(socket).unwrap_or(0);
    let waiting = usize::try_from(waiting).unwrap_or(0).min(MAX_PACKET);
    let len = udp::first_frame(net, guest.ip(), udp::HEADER + waiting);
    if !net.heads && net.pairs == 1 {
        return sink.offer(Target::Pair(0), len).is_some();
    }
    // Without a datagram there is an error, or nothing, which takes no room.
    let Ok((_, real)) = socket.peek_from(&mut []) else {
        return true;
    };
    let seen = remember(net, clients, real, guest.ip(), now);
    let ip = IpOut::new(seen.addr.ip(), guest.ip(), UDP);
    let head = udp::head(net, &ip, [seen.addr.port(), guest.port()]);
    let to = net.target(seen.pair, &head[..udp::head_len(guest.ip())]);
    sink.offer(to, len).is_some()
}

/// How the guest sees a client, and where it speaks of it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    addr: SocketAddr,
    pair: u16,
}

/// How the guest sees a client. Clients that would look alike get other ports.
fn remember(
    net: &mut Net,
    clients: &mut Vec<Client>,
    real: SocketAddr,
    guest: IpAddr,
    now: Instant,
) -> Seen {
    if let Some(client) = clients.iter_mut().find(|client| client.real == real) {
        client.last = now;
        return Seen {
            addr: client.seen,
            pair: client.pair,
        };
    }
    if clients.len() >= MAX_CLIENTS
        && let Some(oldest) = (0..clients.len()).min_by_key(|index| clients[*index].last)
    {
        clients.swap_remove(oldest);
    }
    let mut seen = net.inside(real, guest);
    while clients.iter().any(|client| client.seen == seen) {
        seen.set_port(49152 | (net.random() & 0x3fff) as u16);
    }
    clients.push(Client {
        real,
        seen,
        pair: 0,
        last: now,
    });
    Seen {
        addr: seen,
        pair: 0,
    }
}
