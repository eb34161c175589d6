// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all protocols of the stack share.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use smoltcp::wire::EthernetAddress;

use super::config::{Addresses, UserConfig, UserError};
use super::line::{Line, Share};
use super::packet::{
    ETHERNET, Fragment, IpOut, MAX_PACKET, emit_ethernet, ip_header, multicast_mac,
};
use super::resolver::Resolvers;
use super::slab::Key;
use super::timers::Timers;
use crate::{Guest, Offloads, Target, sys};

/// Frames, and bytes of them, that wait for the guest without having a flow: answers to ARP, DHCP,
/// echo requests, and resets. More than that is dropped, as a full wire would.
const MAX_REPLIES: usize = 256;
const MAX_REPLY_BYTES: usize = 512 << 10;

/// Who has an event, a timer or something for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Tcp(Key),
    Datagram(Key),
    Forward(u32),
    /// The router that tells of itself.
    Router,
}

impl Source {
    fn to_event(self) -> EventData {
        let number = |slot| Key {
            slot,
            generation: 0,
        };
        let (kind, key) = match self {
            Self::Tcp(key) => (0u64, key),
            Self::Datagram(key) => (1, key),
            Self::Forward(slot) => (2, number(slot)),
            Self::Router => (3, number(0)),
        };
        EventData::new_u64(kind << 60 | u64::from(key.generation) << 32 | u64::from(key.slot))
    }

    pub(super) fn from_event(data: EventData) -> Option<Self> {
        let data = data.u64();
        let key = Key {
            slot: (data & 0xffff_ffff) as u32,
            generation: (data >> 32 & 0xfff_ffff) as u32,
        };
        match data >> 60 {
            0 => Some(Self::Tcp(key)),
            1 => Some(Self::Datagram(key)),
            2 => Some(Self::Forward(key.slot)),
            3 => Some(Self::Router),
            _ => None,
        }
    }
}

/// What has happened so far, in frames unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// From the guest, good and bad.
    pub frames_from_guest: u64,
    /// To the guest.
    pub frames_to_guest: u64,
    /// From the guest: too short, wrong lengths or checksums, impossible flags.
    pub malformed: u64,
    /// From the guest: with a source address that cannot be a guest's.
    pub spoofed: u64,
    /// From the guest: a protocol or message that is not for us.
    pub unsupported: u64,
    /// From the guest: not allowed by `restrict=` or to a destination that must not be reached.
    pub refused: u64,
    /// Either way: dropped since a limit was reached.
    pub limited: u64,
    /// TCP connections begun.
    pub tcp_flows: u64,
    /// TCP segments sent again.
    pub tcp_retransmits: u64,
    /// UDP and ICMP conversations begun.
    pub datagram_flows: u64,
}

/// A neighbour whose hardware address is known.
#[derive(Clone, Copy, Debug)]
struct Neighbour {
    addr: IpAddr,
    mac: EthernetAddress,
    used: u64,
}

/// A frame that belongs to no flow.
#[derive(Debug)]
pub(super) struct Reply {
    /// The guest's queue pair that it answers.
    pub(super) pair: u16,
    pub(super) frame: Vec<u8>,
}

/// Shared by all protocols; each gets it as `&mut` beside its own tables.
pub(super) struct Net {
    pub(super) config: UserConfig,
    pub(super) addresses: Addresses,
    pub(super) mac: EthernetAddress,
    /// What the guest has negotiated, within what we can do.
    pub(super) offloads: Offloads,
    /// The guest's queue pairs in use.
    pub(super) pairs: u16,
    /// The device chooses the pair of each frame by its beginning.
    pub(super) heads: bool,
    /// The pair that the frames come from that are being looked at: the guest wants to hear of a
    /// flow where it speaks of it.
    pub(super) pair: u16,
    pub(super) epoll: OwnedFd,
    pub(super) counters: Counters,
    pub(super) timers: Timers,
    pub(super) resolvers: Resolvers,
    /// Who has something for the guest, in order; each at most once.
    pub(super) line: Line,
    replies: VecDeque<Reply>,
    reply_bytes: usize,
    /// The kernel has `SO_PEEK_OFF` for TCP.
    pub(super) peek_offsets: bool,
    /// For copies that cannot be avoided.
    pub(super) scratch: Vec<u8>,
    neighbours: Vec<Neighbour>,
    ticks: u64,
    random: RandomState,
}

impl Net {
    pub(super) fn new(config: UserConfig) -> Result<Self, UserError> {
        let addresses = Addresses::new(&config)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| UserError::Os {
            what: "epoll_create1",
            source: error.into(),
        })?;
        Ok(Self {
            addresses,
            mac: EthernetAddress(config.mac),
            offloads: Offloads {
                mtu: config.mtu,
                ..Offloads::NONE
            },
            pairs: 1,
            heads: false,
            pair: 0,
            epoll,
            counters: Counters::default(),
            timers: Timers::default(),
            resolvers: Resolvers::new(&config),
            line: Line::default(),
            replies: VecDeque::new(),
            reply_bytes: 0,
            peek_offsets: has_peek_offsets(),
            scratch: Vec::new(),
            neighbours: Vec::new(),
            ticks: 0,
            random: RandomState::new(),
            config,
        })
    }

    /// A number that a guest cannot guess.
    pub(super) fn random(&mut self) -> u32 {
        self.ticks += 1;
        (self.random.hash_one(self.ticks) & 0xffff_ffff) as u32
    }

    pub(super) fn watch(
        &self,
        fd: BorrowedFd<'_>,
        source: Source,
        flags: EventFlags,
    ) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, source.to_event(), flags)
    }

    /// Asks once more for the state of an fd that is watched for edges.
    pub(super) fn watch_again(&self, fd: BorrowedFd<'_>, source: Source, flags: EventFlags) {
        // The fd was added, so that the only failure would be lack of memory: then the guest's
        // own probes have to find out.
        let _ = epoll::modify(&self.epoll, fd, source.to_event(), flags);
    }

    /// Must precede closing: another process may keep the socket open, and with it our interest.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Notes what the guest has negotiated.
    pub(super) fn set_guest(&mut self, guest: &Guest, offered: Offloads) {
        self.offloads = offered.intersection(guest.offloads);
        self.offloads.mtu = self.offloads.mtu.max(576);
        self.pairs = guest.pairs.max(1);
        self.heads = guest.heads;
    }

    /// Where a frame of a flow that the guest speaks of on `pair` goes.
    pub(super) fn target<'h>(&self, pair: u16, head: &'h [u8]) -> Target<'h> {
        if self.heads {
            Target::Head(&head[..head.len().min(Target::HEAD)])
        } else {
            Target::Pair(pair)
        }
    }

    /// Largest packet for `addr` in one frame. IPv6 has a least one (RFC 8200, 5), which the
    /// settings allow.
    pub(super) fn mtu(&self, addr: IpAddr) -> usize {
        let mtu = usize::from(self.offloads.mtu);
        match addr {
            IpAddr::V4(_) => mtu,
            IpAddr::V6(_) => mtu.max(1280),
        }
    }

    /// Gets in line for the guest.
    pub(super) fn join(&mut self, source: Source, share: &mut Share) {
        self.line.join(source, share);
    }

    /// Notes who has `addr`.
    pub(super) fn learn(&mut self, addr: IpAddr, mac: EthernetAddress) {
        if !mac.is_unicast() || !self.addresses.is_neighbour(addr) {
            return;
        }
        self.ticks += 1;
        let used = self.ticks;
        if let Some(known) = self.neighbours.iter_mut().find(|known| known.addr == addr) {
            *known = Neighbour { addr, mac, used };
            return;
        }
        if self.neighbours.len() >= self.config.limits.neighbours.max(1)
            && let Some(oldest) =
                (0..self.neighbours.len()).min_by_key(|i| self.neighbours[*i].used)
        {
            self.neighbours.swap_remove(oldest);
        }
        self.neighbours.push(Neighbour { addr, mac, used });
    }

    /// The hardware address of a guest.
    pub(super) fn neighbour(&self, addr: IpAddr) -> Option<EthernetAddress> {
        self.neighbours
            .iter()
            .find(|known| known.addr == addr)
            .map(|known| known.mac)
    }

    /// The IPv6 address that a guest used last, of those that reach further than its wire.
    pub(super) fn last_guest6(&self) -> Option<IpAddr> {
        self.neighbours
            .iter()
            .filter(|known| known.addr.is_ipv6() && self.addresses.is_guest(known.addr))
            .max_by_key(|known| known.used)
            .map(|known| known.addr)
    }

    /// Queues a frame that belongs to no flow.
    pub(super) fn reply(&mut self, frame: Vec<u8>) {
        if self.replies.len() >= MAX_REPLIES || self.reply_bytes + frame.len() > MAX_REPLY_BYTES {
            self.counters.limited += 1;
            return;
        }
        self.reply_bytes += frame.len();
        self.replies.push_back(Reply {
            pair: self.pair,
            frame,
        });
    }

    /// The oldest frame that belongs to no flow.
    pub(super) fn first_reply(&self) -> Option<&Reply> {
        self.replies.front()
    }

    pub(super) fn pop_reply(&mut self) {
        if let Some(reply) = self.replies.pop_front() {
            self.reply_bytes -= reply.frame.len();
        }
    }

    /// Whose interface a packet to `dst` goes to. Who is not known may still listen.
    fn mac_of(&self, dst: IpAddr) -> EthernetAddress {
        match dst {
            IpAddr::V6(group) if group.is_multicast() => multicast_mac(group),
            _ => self.neighbour(dst).unwrap_or(EthernetAddress::BROADCAST),
        }
    }

    /// Writes both headers of a packet to a guest; returns their length.
    pub(super) fn emit_headers(&self, out: &mut [u8], ip: &IpOut, payload: usize) -> usize {
        self.emit_headers_to(self.mac_of(ip.dst), out, ip, payload)
    }

    fn emit_headers_to(
        &self,
        mac: EthernetAddress,
        out: &mut [u8],
        ip: &IpOut,
        payload: usize,
    ) -> usize {
        emit_ethernet(out, self.mac, mac, ip.ethertype());
        ip.emit(&mut out[ETHERNET..], payload);
        ETHERNET + ip.len()
    }

    /// Hands the parts of a packet, which fit the MTU, to `each`: one if it fits as it is.
    /// `each` says whether to go on.
    pub(super) fn in_parts(
        &mut self,
        mut ip: IpOut,
        payload: &[u8],
        mut each: impl FnMut(&mut Self, &IpOut, &[u8]) -> bool,
    ) {
        let room = self.mtu(ip.dst) - ip_header(ip.dst);
        if payload.len() <= room {
            each(self, &ip, payload);
            return;
        }
        let ident = self.random();
        ip.fragment = Some(Fragment {
            ident,
            offset: 0,
            more: true,
        });
        // Offsets count in units of eight bytes.
        let room = (self.mtu(ip.dst) - ip.len()) / 8 * 8;
        let mut offset = 0;
        while offset < payload.len() {
            let len = room.min(payload.len() - offset);
            ip.fragment = Some(Fragment {
                ident,
                offset,
                more: offset + len < payload.len(),
            });
            if !each(self, &ip, &payload[offset..offset + len]) {
                return;
            }
            offset += len;
        }
    }

    /// Queues a packet that belongs to no flow, in fragments if need be.
    pub(super) fn reply_ip(&mut self, ip: IpOut, payload: &[u8]) {
        let mac = self.mac_of(ip.dst);
        self.reply_ip_to(mac, ip, payload);
    }

    /// The same for whoever has the hardware address.
    pub(super) fn reply_ip_to(&mut self, mac: EthernetAddress, ip: IpOut, payload: &[u8]) {
        if payload.len() > MAX_PACKET - ip_header(ip.dst) {
            self.counters.limited += 1;
            return;
        }
        self.in_parts(ip, payload, |net, ip, part| {
            let mut frame = vec![0; ETHERNET + ip.len() + part.len()];
            let at = net.emit_headers_to(mac, &mut frame, ip, part.len());
            frame[at..].copy_from_slice(part);
            net.reply(frame);
            true
        });
    }

    /// Where on the host, or beyond, a destination of the guest lies; `None` if the guest must
    /// not go there.
    pub(super) fn outside(&self, to: SocketAddr) -> Option<SocketAddr> {
        let ip = to.ip();
        if self.config.restrict || to.port() == 0 {
            return None;
        }
        if self.addresses.is_gateway(ip) {
            let loopback: IpAddr = match ip {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            return self
                .config
                .host_loopback
                .then(|| SocketAddr::new(loopback, to.port()));
        }
        if self.addresses.contains(ip) {
            return None;
        }
        // The host's own loopback network must be reachable by the gateway's address only, its
        // wires not at all but by their routers.
        let closed = match ip {
            IpAddr::V4(ip) => {
                ip.is_loopback()
                    || ip.is_multicast()
                    || ip.octets()[0] == 0
                    || ip.octets()[0] >= 240
            }
            IpAddr::V6(ip) => {
                // With all zeros before it, an address of IPv4 would come back as one.
                ip.is_loopback()
                    || ip.is_multicast()
                    || ip.is_unicast_link_local()
                    || ip.to_ipv4().is_some()
            }
        };
        (!closed).then_some(to)
    }

    /// How a guest with the address `guest` sees a client of a forwarded port.
    pub(super) fn inside(&self, client: SocketAddr, guest: IpAddr) -> SocketAddr {
        let ip = match (client.ip().to_canonical(), guest) {
            (IpAddr::V4(ip), IpAddr::V4(_)) if !ip.is_loopback() && !ip.is_unspecified() => {
                Some(IpAddr::V4(ip))
            }
            (IpAddr::V6(ip), IpAddr::V6(_))
                if !ip.is_loopback()
                    && !ip.is_unspecified()
                    && !ip.is_multicast()
                    && !ip.is_unicast_link_local() =>
            {
                Some(IpAddr::V6(ip))
            }
            _ => None,
        };
        let ip = ip
            .filter(|ip| !self.addresses.contains(*ip))
            .unwrap_or_else(|| self.addresses.gateway(guest));
        SocketAddr::new(ip, client.port())
    }

    pub(super) fn epoll_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Whether TCP sockets take `SO_PEEK_OFF` (Linux 6.9).
fn has_peek_offsets() -> bool {
    rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .is_ok_and(|socket| sys::set_peek_offset(socket.as_fd(), 0).is_ok())
}
