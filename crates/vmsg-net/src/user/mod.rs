// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The user-mode stack: a guest reaches the network through sockets of this process, without any
//! privilege. It behaves like QEMU's `-netdev user`.
//!
//! The guest sees a network of its own (10.0.2.0/24) with a gateway at 10.0.2.2, which stands for
//! the host's loopback address, and a name server at 10.0.2.3, which passes on to those of the
//! host. DHCP gives it 10.0.2.15. The same in IPv6 is fd00:10:0:2::/64 with ::2 and ::3 in it;
//! router advertisements tell the prefix, from which the guest makes its address, and the name
//! server, which stateless DHCPv6 tells, too. Programs prefer IPv4 where both lead, as the prefix
//! is a local one (RFC 6724). TCP and UDP end here and go on in sockets of the host; echo requests
//! go on if the host lets this process send them.
//!
//! A guest may send what it likes: every length and number is checked, tables are bounded
//! ([`Limits`]), flows take turns (deficit round robin, newcomers first), and nothing blocks. No
//! payload is kept but fragments: what a guest does not take stays in the host's sockets, and so
//! with their senders. TCP connections can outlive the process: see [`FlowStore`].

mod arp;
mod config;
mod datagram;
mod dhcp;
mod dhcp6;
mod forward;
mod fragments;
mod icmp;
mod line;
mod lru;
mod ndp;
mod net;
mod packet;
mod packet6;
mod resolver;
mod slab;
mod tcp;
mod timers;
mod udp;

use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll;
use smoltcp::wire::EthernetAddress;

pub use self::config::{HostForward, Limits, Protocol, UserConfig, UserError};
pub use self::net::Counters;
pub use self::tcp::{FlowStore, RECORD_LEN, RestoreError};

use self::datagram::Datagrams;
use self::dhcp::Leases;
use self::forward::Forwards;
use self::fragments::Fragments;
use self::icmp::{Message, Quoted, Unreachable};
use self::line::Slot;
use self::ndp::Router;
use self::net::{Net, Source};
use self::packet::{
    ETHERNET, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMP6, IpIn, TCP, UDP, Unfit,
};
use self::tcp::Tcp;
use self::udp::Datagram;
use crate::{Backend, Guest, Offloads, RxSink, TxFrame, VnetHeader};

const DNS_PORT: u16 = 53;

/// Queue pairs of a guest: what it sends of a flow on one of them comes back on the same.
const QUEUE_PAIRS: u16 = 64;

/// All DHCPv6 servers (RFC 8415, 7.1).
const DHCP6_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Events and timers looked at in one [`Backend::poll`].
const POLL_BATCHES: usize = 8;
const EVENTS: usize = 64;

/// Turns in one [`Backend::receive`]: then others should have theirs.
const RECEIVE_TURNS: usize = 64;

/// Places in line of flows that are gone, tolerated beside as many as there are flows.
const STALE: usize = 64;

/// How somebody's turn to send to the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// There is nothing more.
    Done,
    /// There is more, but others wait.
    Again,
    /// The guest has no buffer.
    NoRoom,
}

/// The user-mode stack as a back end of one network device.
pub struct User {
    net: Net,
    tcp: Tcp,
    datagrams: Datagrams,
    forwards: Forwards,
    leases: Leases,
    fragments: Fragments,
    router: Router,
    /// Those that found no room, during a call; here for its memory.
    blocked: Vec<Slot>,
    /// Bad frames have been spoken of.
    complained: bool,
}

impl User {
    /// Sets the stack up and opens the forwarded ports of the host.
    ///
    /// # Errors
    ///
    /// [`UserError`], if the settings make no sense or a port of the host is taken.
    pub fn new(config: UserConfig) -> Result<Self, UserError> {
        let net = Net::new(config)?;
        let limits = net.config.limits;
        Ok(Self {
            forwards: Forwards::new(&net)?,
            tcp: Tcp::new(&limits),
            datagrams: Datagrams::new(limits.datagram_flows.max(1)),
            leases: Leases::default(),
            fragments: Fragments::default(),
            router: Router::default(),
            blocked: Vec::new(),
            complained: false,
            net,
        })
    }

    /// Where connections are kept that shall outlive this process; to be set before the first
    /// frame.
    pub fn set_flow_store(&mut self, store: Box<dyn FlowStore>) {
        self.tcp.set_store(store);
    }

    /// Takes up a connection that an earlier process had put into its [`FlowStore`]; it stays
    /// there under the same key. To be called before the first frame and first client.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]; the connection is lost then and should be removed from the store.
    pub fn restore(&mut self, record: &[u8], fd: OwnedFd) -> Result<(), RestoreError> {
        self.tcp.restore(&mut self.net, Instant::now(), record, fd)
    }

    /// Where the host listens for [`UserConfig::forwards`], in their order.
    pub fn forward_addresses(&self) -> Vec<Option<SocketAddr>> {
        self.forwards.addresses()
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.net.counters
    }

    /// TCP connections, and conversations by datagrams, that there are now.
    pub fn flows(&self) -> (usize, usize) {
        (self.tcp.len(), self.datagrams.len())
    }

    fn frame(&mut self, now: Instant, frame: &TxFrame<'_>) {
        self.net.counters.frames_from_guest += 1;
        let Some(header) = frame.payload.read_array::<ETHERNET>() else {
            self.net.counters.malformed += 1;
            return;
        };
        let mac = EthernetAddress::from_bytes(&header[6..12]);
        let to = EthernetAddress::from_bytes(&header[..6]);
        if !mac.is_unicast() || mac == self.net.mac {
            self.net.counters.spoofed += 1;
            return;
        }
        if to != self.net.mac && to.is_unicast() {
            // For somebody else on the wire.
            self.net.counters.unsupported += 1;
            return;
        }
        let packet = frame.payload.skip(ETHERNET);
        match u16::from_be_bytes([header[12], header[13]]) {
            ETHERTYPE_ARP => {
                arp::receive(&mut self.net, packet);
                if let Some(guest) = packet.skip(14).read_array::<4>() {
                    self.tcp.neighbour_found(&mut self.net, guest.into());
                }
            }
            ETHERTYPE_IPV4 => self.ip(now, IpIn::parse4(packet), &frame.header, mac),
            ETHERTYPE_IPV6 if self.net.addresses.v6.is_some() => {
                self.router.wake(&mut self.net, now);
                self.ip(now, IpIn::parse6(packet), &frame.header, mac);
            }
            _ => self.net.counters.unsupported += 1,
        }
    }

    fn ip(
        &mut self,
        now: Instant,
        packet: Result<IpIn<'_>, Unfit>,
        vnet: &VnetHeader,
        mac: EthernetAddress,
    ) {
        let packet = match packet {
            Ok(packet) => packet,
            Err(unfit) => return self.unfit(unfit),
        };
        // Whoever asks for an address has none.
        let nameless = packet.src.is_unspecified()
            && packet.protocol == if packet.src.is_ipv4() { UDP } else { ICMP6 };
        if !nameless {
            if !self.net.addresses.is_neighbour(packet.src) {
                self.net.counters.spoofed += 1;
                return;
            }
            self.net.learn(packet.src, mac);
        }
        if packet.fragment.is_none() {
            return self.whole(now, &packet, vnet, mac, false);
        }
        if nameless {
            self.net.counters.spoofed += 1;
            return;
        }
        if let Some(partial) = self.fragments.receive(&mut self.net, now, &packet) {
            let memory = partial.memory();
            let packet = partial.packet(&memory);
            let packet = match packet.src {
                IpAddr::V4(_) => Ok(packet),
                IpAddr::V6(_) => packet6::extensions(packet),
            };
            match packet {
                Ok(packet) if packet.fragment.is_none() => {
                    self.whole(now, &packet, &VnetHeader::default(), mac, true);
                }
                Ok(_) => self.unfit(Unfit::Malformed),
                Err(unfit) => self.unfit(unfit),
            }
        }
    }

    fn unfit(&mut self, unfit: Unfit) {
        match unfit {
            Unfit::Malformed => self.net.counters.malformed += 1,
            Unfit::Unsupported => self.net.counters.unsupported += 1,
        }
    }

    /// Takes a packet that is no fragment, or no longer one.
    fn whole(
        &mut self,
        now: Instant,
        packet: &IpIn<'_>,
        vnet: &VnetHeader,
        mac: EthernetAddress,
        reassembled: bool,
    ) {
        if self.runs_out(packet) {
            icmp::unreachable(&mut self.net, Unreachable::HopLimit, &Quoted::of(packet));
            return;
        }
        match (packet.protocol, packet.src) {
            (TCP, src) => {
                if self.net.addresses.is_guest(src) {
                    self.tcp.receive(&mut self.net, now, packet, vnet, mac);
                } else {
                    self.net.counters.refused += 1;
                }
            }
            (UDP, _) => self.udp(now, packet, vnet),
            (ICMP, IpAddr::V4(_)) | (ICMP6, IpAddr::V6(_)) => {
                self.icmp(now, packet, mac, reassembled);
            }
            _ => self.net.counters.unsupported += 1,
        }
    }

    /// True if the gateway would have to pass the packet on, and may not.
    fn runs_out(&self, packet: &IpIn<'_>) -> bool {
        let group = match packet.dst {
            IpAddr::V4(dst) => dst.is_broadcast() || dst.is_multicast(),
            IpAddr::V6(dst) => dst.is_multicast() || dst.is_unicast_link_local(),
        };
        packet.hop_limit <= 1
            && !group
            && !self.net.addresses.contains(packet.dst)
            && self.net.addresses.is_guest(packet.src)
    }

    fn icmp(&mut self, now: Instant, packet: &IpIn<'_>, mac: EthernetAddress, reassembled: bool) {
        let mut message = vec![0; packet.payload.len()];
        packet.payload.read(&mut message);
        if !icmp::is_valid(packet.src, packet.dst, &message) {
            self.net.counters.malformed += 1;
            return;
        }
        if packet.src.is_ipv6() && ndp::is_for(&message) {
            // Not in fragments (RFC 6980).
            if reassembled {
                self.net.counters.malformed += 1;
                return;
            }
            let net = &mut self.net;
            if let ndp::Found::Neighbour(addr) =
                self.router.receive(net, now, packet, &message, mac)
            {
                self.tcp.neighbour_found(net, addr);
            }
            return;
        }
        if packet.src.is_unspecified() && !icmp::is_of_listener(&message) {
            self.net.counters.spoofed += 1;
            return;
        }
        match icmp::receive(&mut self.net, packet, message) {
            Some(Message::Echo(echo)) if self.net.addresses.is_guest(packet.src) => {
                self.datagrams
                    .send_echo(&mut self.net, now, packet.src, packet.dst, &echo);
            }
            Some(Message::Echo(_)) => self.net.counters.refused += 1,
            Some(Message::TooBig(too_big)) if too_big.guest.ip() == packet.src => {
                self.tcp.too_big(&mut self.net, &too_big);
            }
            // A router behind the guest speaks for itself.
            Some(Message::TooBig(too_big)) => self.tcp.too_big(&mut self.net, &too_big),
            None => {}
        }
    }

    fn udp(&mut self, now: Instant, packet: &IpIn<'_>, vnet: &VnetHeader) {
        let Some(datagram) = Datagram::parse(packet, vnet) else {
            self.net.counters.malformed += 1;
            return;
        };
        if self.is_dhcp(packet.dst, datagram.peer.port()) {
            if packet.dst.is_ipv6() {
                dhcp6::receive(&mut self.net, packet, &datagram);
            } else {
                let mut message = vec![0; datagram.payload.len()];
                datagram.payload.read(&mut message);
                self.leases.receive(&mut self.net, message);
            }
            return;
        }
        if !self.net.addresses.is_guest(packet.src) {
            if packet.src.is_unspecified() {
                self.net.counters.spoofed += 1;
            } else {
                self.net.counters.refused += 1;
            }
            return;
        }
        if !self.forwards.send(&mut self.net, now, &datagram) {
            self.datagrams.send_udp(&mut self.net, now, &datagram);
        }
    }

    /// True for what the DHCP servers of either version listen to.
    fn is_dhcp(&self, dst: IpAddr, port: u16) -> bool {
        let addresses = &self.net.addresses;
        match dst {
            IpAddr::V4(dst) => {
                port == dhcp::SERVER_PORT
                    && (dst == addresses.host || dst.is_broadcast() || dst == addresses.broadcast())
            }
            IpAddr::V6(dst) => {
                port == dhcp6::SERVER_PORT
                    && (dst == DHCP6_SERVERS || addresses.is_ours(dst.into()))
            }
        }
    }

    /// Flows that ended while they waited for the guest leave their places behind. A guest that
    /// takes nothing must not make these pile up.
    fn forget_stale(&mut self) {
        let Self {
            net,
            tcp,
            datagrams,
            forwards,
            ..
        } = self;
        let live = tcp.len() + datagrams.len() + forwards.len();
        if net.line.len() > 4 * live + STALE {
            net.line.retain(|source| match source {
                Source::Tcp(key) => tcp.waits(key),
                Source::Datagram(key) => datagrams.waits(key),
                Source::Forward(_) => true,
                Source::Router => false,
            });
        }
    }

    /// Frames that belong to no flow; false if the guest has no buffer.
    fn send_replies(&mut self, sink: &mut dyn RxSink) -> bool {
        while let Some(reply) = self.net.first_reply() {
            let len = reply.frame.len();
            let Some(room) = sink.offer(self.net.target(reply.pair, &reply.frame), len) else {
                return false;
            };
            room.write(&reply.frame);
            sink.commit(&VnetHeader::default(), len);
            self.net.counters.frames_to_guest += 1;
            self.net.pop_reply();
        }
        true
    }

    fn turn(&mut self, now: Instant, slot: Slot, sink: &mut dyn RxSink) -> Turn {
        let net = &mut self.net;
        match slot.source {
            Source::Tcp(key) => self.tcp.turn(net, now, slot, key, sink),
            Source::Datagram(key) => self.datagrams.turn(net, now, slot, key, sink),
            Source::Forward(index) => self.forwards.turn(net, now, slot, index, sink),
            Source::Router => Turn::Done,
        }
    }
}

impl Backend for User {
    fn queue_pairs(&self) -> u16 {
        QUEUE_PAIRS
    }

    fn offloads(&self) -> Offloads {
        let v6 = self.net.addresses.v6.is_some();
        Offloads {
            csum: true,
            tso4: true,
            tso6: v6,
            ecn: true,
            ufo: true,
            uso: true,
            guest_csum: true,
            guest_tso4: true,
            guest_tso6: v6,
            mtu: self.net.config.mtu,
            ..Offloads::NONE
        }
    }

    fn set_guest(&mut self, guest: &Guest) {
        let offered = self.offloads();
        self.net.set_guest(guest, offered);
        if guest.running {
            // A guest whose device host was restarted may say nothing, and believes for half an
            // hour only that there is a router.
            self.router.wake(&mut self.net, Instant::now());
        } else {
            self.router.shutdown(&mut self.net);
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.net.epoll_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.net.timers.next()
    }

    fn poll(&mut self, now: Instant) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        for _ in 0..POLL_BATCHES {
            let events = crate::events::waiting(&self.net.epoll, &mut events);
            for event in events {
                match Source::from_event(event.data) {
                    Some(Source::Tcp(key)) => {
                        self.tcp.event(&mut self.net, now, key, event.flags);
                    }
                    Some(Source::Datagram(key)) => self.datagrams.event(&mut self.net, key),
                    Some(Source::Forward(index)) => {
                        self.forwards
                            .event(&mut self.net, now, index, &mut self.tcp);
                    }
                    Some(Source::Router) | None => {}
                }
            }
            if events.len() < EVENTS {
                break;
            }
        }
        // Each timer is set to a later time when it has come up: this ends.
        while let Some(source) = self.net.timers.pop(now) {
            match source {
                Source::Tcp(key) => self.tcp.expire(&mut self.net, now, key),
                Source::Datagram(key) => self.datagrams.expire(&mut self.net, now, key),
                Source::Forward(index) => {
                    self.forwards
                        .expire(&mut self.net, now, index, &mut self.tcp);
                }
                Source::Router => self.router.expire(&mut self.net, now),
            }
        }
        self.forget_stale();
    }

    fn transmit(&mut self, now: Instant, pair: u16, frames: &[TxFrame<'_>]) -> usize {
        self.net.pair = pair;
        for frame in frames {
            self.frame(now, frame);
        }
        self.forget_stale();
        let counters = &self.net.counters;
        if !self.complained && counters.malformed + counters.spoofed > 0 {
            self.complained = true;
            tracing::warn!(
                malformed = counters.malformed,
                spoofed = counters.spoofed,
                "the guest sends bad frames; they are dropped and counted from now on"
            );
        }
        frames.len()
    }

    fn receive(&mut self, now: Instant, sink: &mut dyn RxSink) -> usize {
        let before = self.net.counters.frames_to_guest;
        // Without room for one flow there may be some for another, on another pair.
        let many = self.net.pairs > 1;
        let mut blocked = std::mem::take(&mut self.blocked);
        let mut turns = 0;
        let mut replies = self.send_replies(sink);
        while turns < RECEIVE_TURNS && (replies || many) {
            let Some(slot) = self.net.line.next() else {
                break;
            };
            match self.turn(now, slot, sink) {
                // Or out of turn: not for ever, as each time pays some of a debt.
                Turn::Done => {}
                Turn::Again => turns += 1,
                Turn::NoRoom if many => blocked.push(slot),
                Turn::NoRoom => {
                    self.net.line.back(slot);
                    break;
                }
            }
            replies = replies && self.send_replies(sink);
        }
        while let Some(slot) = blocked.pop() {
            self.net.line.back(slot);
        }
        self.blocked = blocked;
        usize::try_from(self.net.counters.frames_to_guest - before).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        self.net.first_reply().is_some() || !self.net.line.is_empty()
    }

    fn shutdown(&mut self) {
        self.tcp.shutdown(&mut self.net, Instant::now());
        self.forwards.shutdown(&mut self.net);
        self.router.shutdown(&mut self.net);
    }
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User")
            .field("net", &self.net.addresses.net)
            .field("flows", &self.flows())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "ready_test.rs"]
mod ready_test;
