// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ports of the host that lead into the guest (`hostfwd=`).

use std::io;
use std::net::{SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::ioctl_fionread;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use super::arp;
use super::config::{HostForward, Protocol, UserError};
use super::net::{Net, Source};
use super::packet::{Ipv4Out, MAX_PACKET, UDP};
use super::tcp::Tcp;
use super::{Turn, udp};
use crate::{RxSink, Target};

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
    seen: SocketAddrV4,
    last: Instant,
}

/// One forwarding.
#[derive(Debug)]
struct Forward {
    socket: Socket,
    guest: SocketAddrV4,
    queued: bool,
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
            queued: false,
            timer: None,
        };
        net.watch(
            forward.fd(),
            Source::Forward(index),
            EventFlags::IN | EventFlags::ET,
        )?;
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
        match &forward.socket {
            Socket::Udp { .. } => {
                if !forward.queued {
                    forward.queued = true;
                    net.ready.push_back(source);
                }
            }
            Socket::Tcp(socket) => {
                for _ in 0..ACCEPTS {
                    match socket.accept() {
                        Ok((stream, client)) => {
                            // One that cannot be served is closed here.
                            if stream.set_nonblocking(true).is_ok() {
                                tcp.call(net, now, stream.into(), client, forward.guest);
                            }
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                        // Interrupted, the client has gone, or descriptors are short.
                        Err(_) => break,
                    }
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
    pub(super) fn send(
        &mut self,
        now: Instant,
        guest: SocketAddrV4,
        peer: SocketAddrV4,
        payload: &[u8],
    ) -> bool {
        for forward in &mut self.all {
            if forward.guest != guest {
                continue;
            }
            if let Socket::Udp { socket, clients } = &mut forward.socket
                && let Some(client) = clients.iter_mut().find(|client| client.seen == peer)
            {
                client.last = now;
                // What the host cannot deliver is lost, as datagrams are.
                let _ = socket.send_to(payload, client.real);
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
        index: u32,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let Some(forward) = self.all.get_mut(index as usize) else {
            return Turn::Done;
        };
        let guest = forward.guest;
        let Socket::Udp { socket, clients } = &mut forward.socket else {
            return Turn::Done;
        };
        if net.neighbour(*guest.ip()).is_none() {
            arp::ask(net, *guest.ip());
        }
        for _ in 0..TURN_DATAGRAMS {
            let waiting = ioctl_fionread(&*socket).unwrap_or(0);
            let waiting = usize::try_from(waiting).unwrap_or(0).min(MAX_PACKET);
            if sink
                .offer(Target::Pair(0), udp::first_frame(net, waiting))
                .is_none()
            {
                return Turn::NoRoom;
            }
            let mut scratch = std::mem::take(&mut net.scratch);
            scratch.resize(MAX_PACKET, 0);
            let received = socket.recv_from(&mut scratch[udp::HEADER..]);
            if let Ok((n, real)) = received {
                let peer = remember(net, clients, real, now);
                let message = &mut scratch[..udp::HEADER + n];
                udp::seal(message, peer, guest);
                let ip = Ipv4Out {
                    src: *peer.ip(),
                    dst: *guest.ip(),
                    protocol: UDP,
                    ident: 0,
                    fragment: 0,
                };
                udp::send(net, sink, ip, message);
            }
            net.scratch = scratch;
            if received.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                forward.queued = false;
                return Turn::Done;
            }
        }
        Turn::Again
    }

    pub(super) fn shutdown(&mut self, net: &mut Net) {
        for (index, mut forward) in (0u32..).zip(self.all.drain(..)) {
            net.unwatch(forward.fd());
            net.timers.clear(Source::Forward(index), &mut forward.timer);
        }
    }
}

impl Forward {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Udp { socket, .. } => socket.as_fd(),
        }
    }
}

/// How the guest sees a client. Clients that would look alike get other ports.
fn remember(
    net: &mut Net,
    clients: &mut Vec<Client>,
    real: SocketAddr,
    now: Instant,
) -> SocketAddrV4 {
    if let Some(client) = clients.iter_mut().find(|client| client.real == real) {
        client.last = now;
        return client.seen;
    }
    if clients.len() >= MAX_CLIENTS
        && let Some(oldest) = (0..clients.len()).min_by_key(|index| clients[*index].last)
    {
        clients.swap_remove(oldest);
    }
    let mut seen = net.inside(real);
    while clients.iter().any(|client| client.seen == seen) {
        seen.set_port(49152 | (net.random() & 0x3fff) as u16);
    }
    clients.push(Client {
        real,
        seen,
        last: now,
    });
    seen
}
