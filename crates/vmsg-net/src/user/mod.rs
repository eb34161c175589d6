// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The user-mode stack: a guest reaches the network through sockets of this process, without any
//! privilege. It behaves like QEMU's `-netdev user`.
//!
//! The guest sees a network of its own (10.0.2.0/24) with a gateway at 10.0.2.2, which stands for
//! the host's loopback address, and a name server at 10.0.2.3, which passes on to those of the
//! host. DHCP gives it 10.0.2.15. TCP and UDP end here and go on in sockets of the host; echo
//! requests go on if the host lets this process send them. IPv6 is not there yet.
//!
//! A guest may send what it likes: every length and number is checked, tables are bounded
//! ([`Limits`]), flows take turns, and nothing blocks. TCP connections can outlive the process:
//! see [`FlowStore`].

mod arp;
mod config;
mod datagram;
mod dhcp;
mod forward;
mod fragments;
mod icmp;
mod net;
mod packet;
mod resolver;
mod slab;
mod tcp;
mod timers;
mod udp;

use std::mem::MaybeUninit;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll;
use smoltcp::wire::EthernetAddress;
use vmsg_mem::Pieces;

pub use self::config::{HostForward, Limits, Protocol, UserConfig, UserError};
pub use self::net::Counters;
pub use self::tcp::{FlowStore, RECORD_LEN, RestoreError};

use self::datagram::Datagrams;
use self::dhcp::Leases;
use self::forward::Forwards;
use self::fragments::Fragments;
use self::net::{Net, Source};
use self::packet::{ETHERNET, ICMP, Ipv4In, TCP, UDP};
use self::tcp::Tcp;
use self::udp::Datagram;
use crate::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

const DNS_PORT: u16 = 53;

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
            0x0806 => {
                arp::receive(&mut self.net, packet);
                if let Some(guest) = packet.skip(14).read_array::<4>() {
                    self.tcp.neighbour_found(&mut self.net, guest.into());
                }
            }
            0x0800 => self.ipv4(now, packet, &frame.header, mac),
            _ => self.net.counters.unsupported += 1,
        }
    }

    fn ipv4(&mut self, now: Instant, packet: Pieces<'_>, vnet: &VnetHeader, mac: EthernetAddress) {
        let Some(packet) = Ipv4In::parse(packet) else {
            self.net.counters.malformed += 1;
            return;
        };
        let dhcp = packet.src.is_unspecified() && packet.protocol == UDP;
        if !dhcp {
            if !self.net.addresses.is_guest(packet.src) {
                self.net.counters.spoofed += 1;
                return;
            }
            self.net.learn(packet.src, mac);
        }
        let whole = !packet.is_fragment();
        match packet.protocol {
            TCP if whole => self.tcp.receive(&mut self.net, now, &packet, vnet, mac),
            ICMP if whole => self.icmp(now, &packet),
            UDP => {
                let verify = !vnet.needs_csum();
                if whole {
                    let mut bytes = vec![0; packet.payload.len()];
                    packet.payload.read(&mut bytes);
                    self.udp(now, &packet, &bytes, verify);
                } else if let Some(bytes) = self.fragments.receive(&mut self.net, now, &packet) {
                    self.udp(now, &packet, &bytes, true);
                }
            }
            _ => self.net.counters.unsupported += 1,
        }
    }

    fn icmp(&mut self, now: Instant, packet: &Ipv4In<'_>) {
        if let Some(echo) = icmp::receive(&mut self.net, packet) {
            self.datagrams
                .send_echo(&mut self.net, now, packet.src, packet.dst, &echo);
        }
    }

    fn udp(&mut self, now: Instant, packet: &Ipv4In<'_>, bytes: &[u8], verify: bool) {
        let Some(datagram) = Datagram::parse(packet.src, packet.dst, bytes, verify) else {
            self.net.counters.malformed += 1;
            return;
        };
        let addresses = self.net.addresses;
        let for_us = packet.dst == addresses.host
            || packet.dst.is_broadcast()
            || packet.dst == addresses.broadcast();
        if datagram.dst_port == dhcp::SERVER_PORT && for_us {
            self.leases.receive(&mut self.net, datagram.payload);
            return;
        }
        if packet.src.is_unspecified() {
            self.net.counters.spoofed += 1;
            return;
        }
        let guest = SocketAddrV4::new(packet.src, datagram.src_port);
        let peer = SocketAddrV4::new(packet.dst, datagram.dst_port);
        if !self.forwards.send(now, guest, peer, datagram.payload) {
            self.datagrams
                .send_udp(&mut self.net, now, guest, peer, datagram.payload);
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
        if net.ready.len() > 2 * live + STALE {
            net.ready.retain(|source| match *source {
                Source::Tcp(key) => tcp.waits(key),
                Source::Datagram(key) => datagrams.waits(key),
                Source::Forward(_) => true,
            });
        }
    }

    /// Frames that belong to no flow; false if the guest has no buffer.
    fn send_replies(&mut self, sink: &mut dyn RxSink) -> bool {
        while let Some(frame) = self.net.replies.front() {
            let head = &frame[..frame.len().min(Target::HEAD)];
            let Some(room) = sink.offer(Target::Head(head), frame.len()) else {
                return false;
            };
            room.write(frame);
            sink.commit(&VnetHeader::default(), frame.len());
            self.net.counters.frames_to_guest += 1;
            self.net.replies.pop_front();
        }
        true
    }
}

impl Backend for User {
    fn offloads(&self) -> Offloads {
        Offloads {
            csum: true,
            tso4: true,
            ecn: true,
            guest_csum: true,
            guest_tso4: true,
            mtu: self.net.config.mtu,
            ..Offloads::NONE
        }
    }

    fn set_guest(&mut self, guest: &Guest) {
        let mut offloads = self.offloads().intersection(guest.offloads);
        offloads.mtu = offloads.mtu.max(576);
        self.net.offloads = offloads;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.net.epoll_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.net.timers.next()
    }

    fn poll(&mut self, now: Instant) {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        for _ in 0..POLL_BATCHES {
            let Ok((events, _)) = epoll::wait(&self.net.epoll, &mut events, Some(&at_once)) else {
                break;
            };
            for event in events.iter() {
                match Source::from_event(event.data) {
                    Some(Source::Tcp(key)) => {
                        self.tcp.event(&mut self.net, now, key, event.flags);
                    }
                    Some(Source::Datagram(key)) => self.datagrams.event(&mut self.net, key),
                    Some(Source::Forward(index)) => {
                        self.forwards
                            .event(&mut self.net, now, index, &mut self.tcp);
                    }
                    None => {}
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
            }
        }
        self.forget_stale();
    }

    fn transmit(&mut self, now: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
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
        let mut turns = 0;
        while self.send_replies(sink) && turns < RECEIVE_TURNS {
            let Some(source) = self.net.ready.pop_front() else {
                break;
            };
            turns += 1;
            let turn = match source {
                Source::Tcp(key) => self.tcp.turn(&mut self.net, now, key, sink),
                Source::Datagram(key) => self.datagrams.turn(&mut self.net, now, key, sink),
                Source::Forward(index) => self.forwards.turn(&mut self.net, now, index, sink),
            };
            match turn {
                Turn::Done => {}
                Turn::Again => self.net.ready.push_back(source),
                Turn::NoRoom => {
                    self.net.ready.push_front(source);
                    break;
                }
            }
        }
        usize::try_from(self.net.counters.frames_to_guest - before).unwrap_or(usize::MAX)
    }

    fn has_frames(&self) -> bool {
        !self.net.replies.is_empty() || !self.net.ready.is_empty()
    }

    fn shutdown(&mut self) {
        self.tcp.shutdown(&mut self.net, Instant::now());
        self.forwards.shutdown(&mut self.net);
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
