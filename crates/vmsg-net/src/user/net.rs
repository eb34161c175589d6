// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all protocols of the stack share.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use smoltcp::wire::EthernetAddress;

use super::config::{Addresses, UserConfig, UserError};
use super::packet::{ETHERNET, HEADERS, IPV4, Ipv4Out, emit_ethernet};
use super::resolver::Resolvers;
use super::slab::Key;
use super::timers::Timers;
use crate::{Offloads, sys};

/// Frames that wait for the guest without having a flow: answers to ARP, DHCP, echo requests, and
/// resets. More than this many are dropped, as a full wire would.
const MAX_REPLIES: usize = 256;

/// Who has an event, a timer or something for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Tcp(Key),
    Datagram(Key),
    Forward(u32),
}

impl Source {
    fn to_event(self) -> EventData {
        let (kind, key) = match self {
            Self::Tcp(key) => (0u64, key),
            Self::Datagram(key) => (1, key),
            Self::Forward(slot) => (
                2,
                Key {
                    slot,
                    generation: 0,
                },
            ),
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
    addr: Ipv4Addr,
    mac: EthernetAddress,
    used: u64,
}

/// Shared by all protocols; each gets it as `&mut` beside its own tables.
pub(super) struct Net {
    pub(super) config: UserConfig,
    pub(super) addresses: Addresses,
    pub(super) mac: EthernetAddress,
    /// What the guest has negotiated, within what we can do.
    pub(super) offloads: Offloads,
    pub(super) epoll: OwnedFd,
    pub(super) counters: Counters,
    pub(super) timers: Timers,
    pub(super) resolvers: Resolvers,
    /// Who has something for the guest, in order; each at most once.
    pub(super) ready: VecDeque<Source>,
    pub(super) replies: VecDeque<Vec<u8>>,
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
            epoll,
            counters: Counters::default(),
            timers: Timers::default(),
            resolvers: Resolvers::new(&config),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
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

    pub(super) fn learn(&mut self, addr: Ipv4Addr, mac: EthernetAddress) {
        if !mac.is_unicast() || !self.addresses.is_guest(addr) {
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
    pub(super) fn neighbour(&self, addr: Ipv4Addr) -> Option<EthernetAddress> {
        self.neighbours
            .iter()
            .find(|known| known.addr == addr)
            .map(|known| known.mac)
    }

    /// Queues a frame that belongs to no flow.
    pub(super) fn reply(&mut self, frame: Vec<u8>) {
        if self.replies.len() >= MAX_REPLIES {
            self.counters.limited += 1;
            return;
        }
        self.replies.push_back(frame);
    }

    /// Writes both headers of an IPv4 packet to a guest.
    pub(super) fn emit_headers(&self, out: &mut [u8], ip: &Ipv4Out, payload: usize) {
        let mac = self.neighbour(ip.dst).unwrap_or(EthernetAddress::BROADCAST);
        emit_ethernet(out, self.mac, mac, 0x0800);
        ip.emit(&mut out[ETHERNET..], payload);
    }

    /// Queues an IPv4 packet that belongs to no flow.
    pub(super) fn reply_ipv4(
        &mut self,
        src: Ipv4Addr,
        dst: Ipv4Addr,
        protocol: u8,
        payload: &[u8],
    ) {
        let room = usize::from(self.config.mtu) - IPV4;
        if payload.len() > room {
            self.counters.limited += 1;
            return;
        }
        let mut frame = vec![0; HEADERS + payload.len()];
        let ip = Ipv4Out {
            src,
            dst,
            protocol,
            ident: (self.random() & 0xffff) as u16,
            fragment: 0,
        };
        self.emit_headers(&mut frame, &ip, payload.len());
        frame[HEADERS..].copy_from_slice(payload);
        self.reply(frame);
    }

    /// Where on the host, or beyond, a destination of the guest lies; `None` if the guest must
    /// not go there.
    pub(super) fn outside(&self, to: SocketAddrV4) -> Option<SocketAddr> {
        let ip = *to.ip();
        if self.config.restrict || to.port() == 0 {
            return None;
        }
        if ip == self.addresses.host {
            return self
                .config
                .host_loopback
                .then(|| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), to.port()));
        }
        // The host's own loopback network must be reachable by the gateway's address only.
        if self.addresses.contains(ip)
            || ip.is_loopback()
            || ip.is_multicast()
            || ip.octets()[0] == 0
            || ip.octets()[0] >= 240
        {
            return None;
        }
        Some(SocketAddr::V4(to))
    }

    /// How the guest sees a client of a forwarded port.
    pub(super) fn inside(&self, client: SocketAddr) -> SocketAddrV4 {
        let ip = match client.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(ip) => ip.to_ipv4_mapped(),
        };
        let ip = ip
            .filter(|ip| !ip.is_loopback() && !self.addresses.contains(*ip) && !ip.is_unspecified())
            .unwrap_or(self.addresses.host);
        SocketAddrV4::new(ip, client.port())
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
