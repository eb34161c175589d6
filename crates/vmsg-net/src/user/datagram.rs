// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Conversations by datagrams: UDP, DNS, echo requests. Each has a connected socket of the host.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send,
    socket_with, sockopt,
};

use super::icmp::{self, ECHO, Echo, Quoted, Unreachable};
use super::line::{Budget, Share, Slot};
use super::lru::Lru;
use super::net::{Net, Source};
use super::packet::{IpOut, MAX_PACKET, UDP, ip_header};
use super::resolver::MAX_SERVERS;
use super::slab::{Key, Slab};
use super::udp::Datagram;
use super::{DNS_PORT, Turn, udp};
use crate::{RxSink, sys};

/// Datagrams that one conversation sends to the guest in a turn.
const TURN_DATAGRAMS: usize = 32;
/// Told to a guest whose datagram is too long for a way that does not say how long one may be:
/// what every way of IPv6 takes.
const SMALL_MTU: u16 = 1280;
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
    guest: SocketAddr,
    peer: SocketAddr,
}

/// What a guest sends.
#[derive(Clone, Copy)]
enum Payload<'a> {
    Udp(&'a Datagram<'a>),
    Echo(&'a [u8]),
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
    share: Share,
    /// The guest's queue pair that it is on.
    pair: u16,
    /// `UDP_SEGMENT` of the socket; 0: none.
    segment: u16,
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
    /// In the order of use.
    lru: Lru,
}

fn open(kind: Kind, to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let protocol = match (kind, to) {
        (Kind::Udp, _) => ipproto::UDP,
        (Kind::Echo, SocketAddr::V4(_)) => ipproto::ICMP,
        (Kind::Echo, SocketAddr::V6(_)) => ipproto::ICMPV6,
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
            lru: Lru::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// True if the conversation is there and in line for the guest.
    pub(super) fn waits(&mut self, key: Key) -> bool {
        self.all
            .get_mut(key)
            .is_some_and(|conversation| conversation.share.is_in_line())
    }

    /// A UDP datagram of a guest that is for nobody nearer.
    pub(super) fn send_udp(&mut self, net: &mut Net, now: Instant, datagram: &Datagram<'_>) {
        let (guest, peer) = (datagram.guest, datagram.peer);
        let dns = net.addresses.is_dns(peer.ip()) && peer.port() == DNS_PORT;
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
        self.send(net, now, ends, to, dns, Payload::Udp(datagram));
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
        guest: IpAddr,
        peer: IpAddr,
        echo: &Echo,
    ) {
        // Port 7 stands for echo: a port of 0 would not be let through.
        let to = net.outside(SocketAddr::new(peer, 7));
        let ends = Ends {
            kind: Kind::Echo,
            guest: SocketAddr::new(guest, echo.ident),
            peer: SocketAddr::new(peer, 0),
        };
        self.send(net, now, ends, to, true, Payload::Echo(&echo.message));
    }

    fn send(
        &mut self,
        net: &mut Net,
        now: Instant,
        ends: Ends,
        to: Option<SocketAddr>,
        query: bool,
        payload: Payload<'_>,
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
        conversation.pair = net.pair;
        self.lru.touch(key.slot);
        conversation.unanswered.get_or_insert(now);
        let mut result = conversation.send(payload);
        if matches!(
            result,
            Err(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH)
        ) {
            // That was the answer to an earlier one.
            self.failed(net, key, result);
            let Some(conversation) = self.all.get_mut(key) else {
                return;
            };
            result = conversation.send(payload);
        }
        match result {
            Ok(()) => {}
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
            && let Some(oldest) = self.lru.oldest().and_then(|slot| self.all.key_at(slot))
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
            share: Share::default(),
            pair: net.pair,
            segment: 0,
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
        self.lru.touch(key.slot);
        net.counters.datagram_flows += 1;
        Some(key)
    }

    /// The host could not deliver something.
    fn failed(&mut self, net: &mut Net, key: Key, result: Result<(), Errno>) {
        let (Some(conversation), Err(error)) = (self.all.get_mut(key), result) else {
            return;
        };
        let ends = conversation.ends;
        if error == Errno::MSGSIZE {
            let mtu = conversation.mtu();
            icmp::unreachable(net, Unreachable::TooBig(mtu), &ends.quoted());
            return;
        }
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
            self.lru.remove(key.slot);
        }
    }

    pub(super) fn event(&mut self, net: &mut Net, key: Key) {
        if let Some(conversation) = self.all.get_mut(key) {
            net.join(Source::Datagram(key), &mut conversation.share);
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
        slot: Slot,
        key: Key,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let Some(conversation) = self.all.get_mut(key) else {
            return Turn::Done;
        };
        let full = net.config.limits.turn_bytes;
        let Some(mut budget) = net.line.begin(slot, &mut conversation.share, full) else {
            return Turn::Done;
        };
        let turn = self.send_to_guest(net, now, key, &mut budget, sink);
        if let Some(conversation) = self.all.get_mut(key) {
            net.line.end(slot, &mut conversation.share, turn, budget);
        }
        turn
    }

    fn send_to_guest(
        &mut self,
        net: &mut Net,
        now: Instant,
        key: Key,
        budget: &mut Budget,
        sink: &mut dyn RxSink,
    ) -> Turn {
        for _ in 0..TURN_DATAGRAMS {
            let Some(conversation) = self.all.get_mut(key) else {
                return Turn::Done;
            };
            if budget.is_spent() {
                return Turn::Again;
            }
            let (ends, pair) = (conversation.ends, conversation.pair);
            // The length of the next one; an error or an empty datagram has none.
            let waiting = ioctl_fionread(&conversation.socket).unwrap_or(0);
            let waiting = usize::try_from(waiting).unwrap_or(0).min(MAX_PACKET);
            if !ends.has_room(net, pair, waiting, sink) {
                return Turn::NoRoom;
            }
            let head = match ends.kind {
                Kind::Udp => udp::HEADER,
                Kind::Echo => 0,
            };
            let mut scratch = std::mem::take(&mut net.scratch);
            scratch.resize(scratch.len().max(MAX_PACKET), 0);
            let result = recv(
                &conversation.socket,
                &mut scratch[head..MAX_PACKET],
                RecvFlags::DONTWAIT,
            );
            let mut again = true;
            match result {
                Ok((n, _)) => {
                    conversation.last = now;
                    conversation.unanswered = None;
                    self.lru.touch(key.slot);
                    let message = &mut scratch[..head + n];
                    budget.spend(deliver(net, sink, ends, pair, message));
                }
                Err(Errno::AGAIN) => again = false,
                // The error is gone then; there may be datagrams.
                Err(error) => self.failed(net, key, Err(error)),
            }
            net.scratch = scratch;
            if !again {
                return Turn::Done;
            }
        }
        Turn::Again
    }
}

impl Conversation {
    /// Sends to the host.
    fn send(&mut self, payload: Payload<'_>) -> Result<(), Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let datagram = match payload {
            Payload::Echo(message) => return send(&self.socket, message, flags).map(drop),
            Payload::Udp(datagram) => datagram,
        };
        if let Some(segment) = datagram.segment
            && self.set_segment(segment)
        {
            match crate::io::send(self.socket.as_fd(), datagram.payload) {
                Ok(_) => return Ok(()),
                // The way takes no such segments, or not so many: one by one.
                Err(Errno::INVAL | Errno::MSGSIZE | Errno::IO | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
        for payload in datagram.payloads() {
            // A segment size is no matter to what is not longer.
            if payload.len() > usize::from(self.segment) {
                self.set_segment(0);
            }
            crate::io::send(self.socket.as_fd(), payload)?;
        }
        Ok(())
    }

    /// Has the kernel cut what is sent into datagrams of this length, or not with 0.
    fn set_segment(&mut self, segment: u16) -> bool {
        let set =
            segment == self.segment || sys::set_udp_segment(self.socket.as_fd(), segment).is_ok();
        if set {
            self.segment = segment;
        }
        set
    }

    /// The longest packet that goes where the socket leads.
    fn mtu(&self) -> u16 {
        let mtu = match self.to {
            SocketAddr::V4(_) => sockopt::ip_mtu(&self.socket),
            SocketAddr::V6(_) => sockopt::ipv6_mtu(&self.socket),
        };
        mtu.ok()
            .and_then(|mtu| u16::try_from(mtu).ok())
            .unwrap_or(SMALL_MTU)
    }
}

impl Ends {
    /// A packet of the guest, as errors quote it.
    fn quoted(&self) -> Quoted {
        match self.kind {
            Kind::Udp => Quoted::ports(self.guest, self.peer, None),
            Kind::Echo => Quoted::echo(self.guest.ip(), self.peer.ip(), self.guest.port()),
        }
    }

    const fn ip(&self) -> IpOut {
        let protocol = match self.kind {
            Kind::Udp => UDP,
            Kind::Echo => icmp::protocol(self.guest.ip()),
        };
        IpOut::new(self.peer.ip(), self.guest.ip(), protocol)
    }

    /// True if the guest has a buffer for the first frame of a message of `len` bytes.
    fn has_room(&self, net: &Net, pair: u16, len: usize, sink: &mut dyn RxSink) -> bool {
        let (head, len) = match self.kind {
            Kind::Udp => {
                let ports = [self.peer.port(), self.guest.port()];
                (udp::head(net, &self.ip(), ports), len + udp::HEADER)
            }
            Kind::Echo => (udp::head(net, &self.ip(), [0, 0]), len),
        };
        let head = &head[..udp::head_len(self.guest.ip())];
        let len = udp::first_frame(net, self.guest.ip(), len);
        sink.offer(net.target(pair, head), len).is_some()
    }
}

/// Hands what the host received to the guest; returns the bytes of its frames.
fn deliver(
    net: &mut Net,
    sink: &mut dyn RxSink,
    ends: Ends,
    pair: u16,
    message: &mut [u8],
) -> usize {
    let ip = ends.ip();
    if message.len() > MAX_PACKET - ip_header(ip.dst) {
        // Longer than what the guest's version of IP can say.
        net.counters.limited += 1;
        return message.len();
    }
    match ends.kind {
        Kind::Udp => udp::seal(message, ends.peer, ends.guest),
        Kind::Echo => {
            if message.len() < ECHO {
                return 0;
            }
            // The host has put its own identifier in.
            icmp::seal_echo_reply(ip.src, ip.dst, ends.guest.port(), message);
        }
    }
    udp::send(net, sink, pair, ip, message)
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
    icmp::unreachable(net, why, &ends.quoted());
}
