// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Conversations by datagrams: UDP, DNS, echo requests. Each has a connected socket of the host.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send,
    socket_with,
};

use super::icmp::{self, ECHO, Echo, Unreachable};
use super::net::{Net, Source};
use super::packet::{ICMP, Ipv4Out, MAX_PACKET, UDP};
use super::resolver::MAX_SERVERS;
use super::slab::{Key, Slab};
use super::{DNS_PORT, Turn, udp};
use crate::{RxSink, Target};

/// Datagrams that one conversation sends to the guest in a turn.
const TURN_DATAGRAMS: usize = 32;
/// A name server that has said nothing for so long is not asked again: guests repeat a question
/// after seconds.
const SILENT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Udp,
    /// The identifier stands for the guest's port.
    Echo,
}

/// Both ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ends {
    kind: Kind,
    guest: SocketAddrV4,
    peer: SocketAddrV4,
}

#[derive(Debug)]
struct Conversation {
    ends: Ends,
    socket: OwnedFd,
    /// Where on the host its socket leads.
    to: SocketAddr,
    query: bool,
    /// Since when there is no answer.
    unanswered: Option<Instant>,
    queued: bool,
    last: Instant,
    timer: Option<Instant>,
}

impl Conversation {
    fn deadline(&self, net: &Net) -> Instant {
        self.last
            + if self.query {
                net.config.limits.query_idle
            } else {
                net.config.limits.udp_idle
            }
    }
}

/// All conversations.
#[derive(Debug)]
pub(super) struct Datagrams {
    all: Slab<Conversation>,
    by_ends: HashMap<Ends, Key>,
}

fn open(kind: Kind, to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let protocol = match kind {
        Kind::Udp => ipproto::UDP,
        Kind::Echo => ipproto::ICMP,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    connect(&socket, &to)?;
    Ok(socket)
}

impl Datagrams {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            all: Slab::new(limit),
            by_ends: HashMap::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// True if the conversation is there and in line for the guest.
    pub(super) fn waits(&mut self, key: Key) -> bool {
        self.all
            .get_mut(key)
            .is_some_and(|conversation| conversation.queued)
    }

    /// A UDP datagram of a guest that is for nobody nearer.
    pub(super) fn send_udp(
        &mut self,
        net: &mut Net,
        now: Instant,
        guest: SocketAddrV4,
        peer: SocketAddrV4,
        payload: &[u8],
    ) {
        let dns = *peer.ip() == net.addresses.dns && peer.port() == DNS_PORT;
        let ends = Ends {
            kind: Kind::Udp,
            guest,
            peer,
        };
        let to = if dns && !net.config.restrict {
            self.leave_silent(net, now, ends);
            Some(net.resolvers.current(now))
        } else {
            net.outside(peer)
        };
        self.send(net, now, ends, to, dns, payload);
    }

    /// A guest asks once more: not the server that did not answer, if there is another.
    fn leave_silent(&mut self, net: &mut Net, now: Instant, ends: Ends) {
        let Some(key) = self.by_ends.get(&ends).copied() else {
            return;
        };
        let Some(conversation) = self.all.get_mut(key) else {
            return;
        };
        let silent = conversation
            .unanswered
            .is_some_and(|since| now.saturating_duration_since(since) >= SILENT);
        if silent {
            let server = conversation.to;
            conversation.unanswered = None;
            net.resolvers.fail(server);
            if net.resolvers.current(now) != server {
                self.close(net, key);
            }
        }
    }

    /// An echo request of a guest for somebody else than the gateway.
    pub(super) fn send_echo(
        &mut self,
        net: &mut Net,
        now: Instant,
        guest: Ipv4Addr,
        peer: Ipv4Addr,
        echo: &Echo,
    ) {
        // Port 7 stands for echo: a port of 0 would not be let through.
        let to = net.outside(SocketAddrV4::new(peer, 7));
        let ends = Ends {
            kind: Kind::Echo,
            guest: SocketAddrV4::new(guest, echo.ident),
            peer: SocketAddrV4::new(peer, 0),
        };
        self.send(net, now, ends, to, true, &echo.message);
    }

    fn send(
        &mut self,
        net: &mut Net,
        now: Instant,
        ends: Ends,
        to: Option<SocketAddr>,
        query: bool,
        payload: &[u8],
    ) {
        let Some(to) = to else {
            net.counters.refused += 1;
            return;
        };
        let known = self.by_ends.get(&ends).copied();
        let Some(key) = known.or_else(|| self.begin(net, now, ends, to, query)) else {
            return;
        };
        let Some(conversation) = self.all.get_mut(key) else {
            return;
        };
        conversation.last = now;
        conversation.unanswered.get_or_insert(now);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut result = send(&conversation.socket, payload, flags);
        if matches!(
            result,
            Err(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH)
        ) {
            // That was the answer to an earlier one.
            self.failed(net, key, result);
            let Some(conversation) = self.all.get_mut(key) else {
                return;
            };
            result = send(&conversation.socket, payload, flags);
        }
        match result {
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::NOBUFS) => net.counters.limited += 1,
            Err(_) => self.failed(net, key, result),
        }
    }

    fn begin(
        &mut self,
        net: &mut Net,
        now: Instant,
        ends: Ends,
        mut to: SocketAddr,
        query: bool,
    ) -> Option<Key> {
        if self.all.is_full()
            && let Some(oldest) = self
                .all
                .iter()
                .min_by_key(|(_, conversation)| conversation.last)
                .map(|(key, _)| key)
        {
            self.close(net, oldest);
        }
        let mut opened = open(ends.kind, to);
        if query && ends.kind == Kind::Udp {
            // Such as a server with an IPv6 address while the host has none.
            for _ in 1..MAX_SERVERS {
                if matches!(
                    opened,
                    Ok(_) | Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
                ) {
                    break;
                }
                net.resolvers.fail(to);
                to = net.resolvers.current(now);
                opened = open(ends.kind, to);
            }
        }
        let socket = match opened {
            Ok(socket) => socket,
            Err(Errno::ACCESS | Errno::PERM) if ends.kind == Kind::Echo => {
                // The host does not let us (net.ipv4.ping_group_range).
                net.counters.unsupported += 1;
                return None;
            }
            Err(error @ (Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS)) => {
                tell(net, ends, error);
                return None;
            }
            Err(_) => {
                net.counters.limited += 1;
                return None;
            }
        };
        let key = self.all.insert_with(|_| Conversation {
            ends,
            socket,
            to,
            query,
            unanswered: None,
            queued: false,
            last: now,
            timer: None,
        })?;
        let conversation = self.all.get_mut(key)?;
        let flags = EventFlags::IN | EventFlags::ET;
        if net
            .watch(conversation.socket.as_fd(), Source::Datagram(key), flags)
            .is_err()
        {
            self.all.remove(key);
            net.counters.limited += 1;
            return None;
        }
        let at = conversation.deadline(net);
        net.timers
            .set(Source::Datagram(key), &mut conversation.timer, at);
        self.by_ends.insert(ends, key);
        net.counters.datagram_flows += 1;
        Some(key)
    }

    /// The host could not deliver something.
    fn failed(&mut self, net: &mut Net, key: Key, result: Result<usize, Errno>) {
        let (Some(conversation), Err(error)) = (self.all.get_mut(key), result) else {
            return;
        };
        let ends = conversation.ends;
        if conversation.query && ends.kind == Kind::Udp {
            net.resolvers.fail(conversation.to);
            self.close(net, key);
        }
        tell(net, ends, error);
    }

    fn close(&mut self, net: &mut Net, key: Key) {
        if let Some(mut conversation) = self.all.remove(key) {
            net.unwatch(conversation.socket.as_fd());
            net.timers
                .clear(Source::Datagram(key), &mut conversation.timer);
            self.by_ends.remove(&conversation.ends);
        }
    }

    pub(super) fn event(&mut self, net: &mut Net, key: Key) {
        if let Some(conversation) = self.all.get_mut(key)
            && !conversation.queued
        {
            conversation.queued = true;
            net.ready.push_back(Source::Datagram(key));
        }
    }

    pub(super) fn expire(&mut self, net: &mut Net, now: Instant, key: Key) {
        let Some(conversation) = self.all.get_mut(key) else {
            return;
        };
        conversation.timer = None;
        let at = conversation.deadline(net);
        if at > now {
            net.timers
                .set(Source::Datagram(key), &mut conversation.timer, at);
        } else {
            if conversation.unanswered.is_some() {
                // Of use only to those that asked a name server.
                net.resolvers.fail(conversation.to);
            }
            self.close(net, key);
        }
    }

    /// A conversation's turn to send to the guest.
    pub(super) fn turn(
        &mut self,
        net: &mut Net,
        now: Instant,
        key: Key,
        sink: &mut dyn RxSink,
    ) -> Turn {
        for _ in 0..TURN_DATAGRAMS {
            let Some(conversation) = self.all.get_mut(key) else {
                return Turn::Done;
            };
            conversation.queued = true;
            let ends = conversation.ends;
            // The length of the next one; an error or an empty datagram has none.
            let waiting = ioctl_fionread(&conversation.socket).unwrap_or(0);
            let waiting = usize::try_from(waiting).unwrap_or(0).min(MAX_PACKET);
            if sink
                .offer(Target::Pair(0), udp::first_frame(net, waiting))
                .is_none()
            {
                return Turn::NoRoom;
            }
            let head = match ends.kind {
                Kind::Udp => udp::HEADER,
                Kind::Echo => 0,
            };
            let mut scratch = std::mem::take(&mut net.scratch);
            scratch.resize(MAX_PACKET, 0);
            let result = recv(
                &conversation.socket,
                &mut scratch[head..],
                RecvFlags::DONTWAIT,
            );
            let again = match result {
                Ok((n, _)) => {
                    conversation.last = now;
                    conversation.unanswered = None;
                    let message = &mut scratch[..head + n];
                    deliver(net, sink, ends, message);
                    true
                }
                Err(Errno::AGAIN) => {
                    conversation.queued = false;
                    false
                }
                Err(error) => {
                    conversation.queued = false;
                    self.failed(net, key, Err(error));
                    // The error is gone; there may be datagrams.
                    true
                }
            };
            net.scratch = scratch;
            if !again {
                return Turn::Done;
            }
        }
        Turn::Again
    }
}

/// Hands what the host received to the guest.
fn deliver(net: &mut Net, sink: &mut dyn RxSink, ends: Ends, message: &mut [u8]) {
    let protocol = match ends.kind {
        Kind::Udp => {
            udp::seal(message, ends.peer, ends.guest);
            UDP
        }
        Kind::Echo => {
            if message.len() < ECHO {
                return;
            }
            // The host has put its own identifier in.
            message[4..6].copy_from_slice(&ends.guest.port().to_be_bytes());
            icmp::seal(message);
            ICMP
        }
    };
    let ip = Ipv4Out {
        src: *ends.peer.ip(),
        dst: *ends.guest.ip(),
        protocol,
        ident: 0,
        fragment: 0,
    };
    udp::send(net, sink, ip, message);
}

/// Tells the guest that the peer does not get what it sends.
fn tell(net: &mut Net, ends: Ends, error: Errno) {
    let why = match error {
        Errno::CONNREFUSED => Unreachable::Port,
        Errno::NETUNREACH | Errno::NETDOWN => Unreachable::Net,
        Errno::HOSTUNREACH | Errno::HOSTDOWN => Unreachable::Host,
        Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
        _ => {
            net.counters.limited += 1;
            return;
        }
    };
    let (protocol, first) = match ends.kind {
        Kind::Udp => (UDP, icmp::first_eight(ends.guest, ends.peer, 8 << 16)),
        Kind::Echo => {
            let [a, b] = ends.guest.port().to_be_bytes();
            (ICMP, [8, 0, 0, 0, a, b, 0, 0])
        }
    };
    icmp::unreachable(net, why, *ends.guest.ip(), *ends.peer.ip(), protocol, first);
}
