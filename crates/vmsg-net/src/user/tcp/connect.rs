// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How connections begin: from the guest, from a client of the host, and again after a restart.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use smoltcp::wire::EthernetAddress;

use super::super::icmp::{self, Quoted, Unreachable};
use super::super::net::{Net, Source};
use super::super::slab::Key;
use super::super::{DNS_PORT, arp};
use super::Tcp;
use super::flow::{
    Fixed, Flow, MSS_DEFAULT, MSS_DEFAULT6, MSS_MIN, OUR_SCALE, Phase, Tuple, Verdict,
};
use super::record::{Positions, Record, RestoreError};
use super::rx::DUP_ACKS;
use super::segment::{Flags, Out, Segment, Seq, largest_mss, refuse};
use crate::sys;

/// Ports tried for a client of the host whose own is taken.
const PORT_TRIES: usize = 16;

/// A socket that connects without blocking; whether it has already.
fn begin(to: SocketAddr) -> Result<(OwnedFd, bool), Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    prepare(&socket)?;
    match connect(&socket, &to) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS) => Ok((socket, false)),
        Err(error) => Err(error),
    }
}

/// The guest has its own Nagle, and urgent bytes are bytes.
fn prepare(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_oobinline(socket, true)
}

/// What the host counts before the first byte is written: its SYN, if it sent one.
fn acked_base(socket: &OwnedFd) -> u8 {
    sys::tcp_info(socket.as_fd()).map_or(0, |info| u8::from(info.bytes_acked > 0))
}

/// The largest payload for a guest that told `mss`.
fn clamp_mss(net: &Net, guest: IpAddr, mss: Option<u16>) -> u16 {
    let default = if guest.is_ipv6() {
        MSS_DEFAULT6
    } else {
        MSS_DEFAULT
    };
    mss.unwrap_or(default)
        .clamp(MSS_MIN, largest_mss(net, guest))
}

/// Tells the guest that its SYN leads nowhere.
fn fail(net: &mut Net, tuple: Tuple, irs: Seq, error: Errno) {
    let why = match error {
        Errno::NETUNREACH | Errno::NETDOWN => Unreachable::Net,
        Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT => Unreachable::Host,
        Errno::ACCESS | Errno::PERM => Unreachable::Prohibited,
        _ => {
            return Out {
                tuple,
                seq: Seq(0),
                ack: irs.plus(1),
                flags: Flags {
                    rst: true,
                    ..Flags::ACK
                },
                window: 0,
                options: None,
                mss: 0,
                pair: net.pair,
            }
            .queue(net);
        }
    };
    let quoted = Quoted::ports(tuple.guest, tuple.peer, Some(irs.0));
    icmp::unreachable(net, why, &quoted);
}

/// Where the socket of a connection stands that has not broken.
fn positions(socket: &OwnedFd, acked_base: u8) -> std::io::Result<Positions> {
    let at = Positions::of(socket.as_fd(), acked_base)?;
    if at.over {
        sockopt::socket_error(socket)??;
    }
    Ok(at)
}

/// Has a guest say where a connection stands that is no more: it answers a number from the past,
/// and that answer is refused with a reset that it believes.
fn doubt(net: &mut Net, fixed: Fixed) {
    Out {
        tuple: fixed.tuple,
        seq: fixed.iss,
        ack: fixed.irs.plus(1),
        flags: Flags::ACK,
        window: 0,
        options: None,
        mss: 0,
        pair: 0,
    }
    .queue(net);
}

impl Tcp {
    /// Puts a flow in; the socket is lost if there is no room.
    fn insert(
        &mut self,
        net: &mut Net,
        now: Instant,
        fixed: Fixed,
        phase: Phase,
        socket: OwnedFd,
    ) -> Option<Key> {
        let limits = net.config.limits;
        let key = self
            .flows
            .insert_with(|key| Flow::new(Source::Tcp(key), fixed, phase, socket, &limits, now))?;
        let flow = self.flows.get_mut(key)?;
        let watched = flow
            .fd()
            .is_some_and(|fd| net.watch(fd, flow.source, Flow::EVENTS).is_ok());
        if !watched {
            self.flows.remove(key);
            return None;
        }
        self.by_tuple.insert(fixed.tuple, key);
        net.counters.tcp_flows += 1;
        if phase != Phase::Open {
            self.half_open += 1;
        }
        flow.arm(net);
        Some(key)
    }

    /// A SYN of the guest.
    pub(super) fn open(&mut self, net: &mut Net, now: Instant, syn: &Segment<'_>) {
        let peer = syn.tuple.peer;
        let to = if net.addresses.is_dns(peer.ip()) && peer.port() == DNS_PORT {
            (!net.config.restrict).then(|| net.resolvers.current(now))
        } else {
            net.outside(peer)
        };
        let Some(to) = to else {
            net.counters.refused += 1;
            refuse(net, syn);
            return;
        };
        if self.half_open >= net.config.limits.tcp_half_open || !self.make_room(net) {
            // The guest tries again.
            net.counters.limited += 1;
            return;
        }
        let (socket, connected) = match begin(to) {
            Ok(begun) => begun,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                net.counters.limited += 1;
                return;
            }
            Err(error) => {
                if net.addresses.is_dns(peer.ip()) {
                    net.resolvers.fail(to);
                }
                fail(net, syn.tuple, syn.seq, error);
                return;
            }
        };
        let fixed = Fixed {
            tuple: syn.tuple,
            iss: Seq(net.random()),
            irs: syn.seq,
            our_scale: if syn.scale.is_some() { OUR_SCALE } else { 0 },
            guest_scale: syn.scale.unwrap_or(0),
            mss: clamp_mss(net, syn.tuple.guest.ip(), syn.mss),
            acked_base: 0,
        };
        let Some(key) = self.insert(net, now, fixed, Phase::Connecting, socket) else {
            net.counters.limited += 1;
            return;
        };
        if let Some(flow) = self.flows.get_mut(key) {
            // A window in a SYN is not scaled.
            flow.snd_wnd = u32::from(syn.window);
            flow.pair = net.pair;
            if connected {
                flow.connected(net);
            }
        }
    }

    /// The host's socket of a connection that the guest wanted can be written, or has failed.
    pub(super) fn try_connected(
        &mut self,
        net: &mut Net,
        now: Instant,
        key: Key,
        flags: EventFlags,
    ) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        let Some(socket) = &flow.socket else { return };
        match sockopt::socket_error(socket) {
            Ok(Ok(())) => {
                if flags.contains(EventFlags::OUT) && !flags.contains(EventFlags::HUP) {
                    flow.connected(net);
                }
            }
            Ok(Err(error)) | Err(error) => {
                let (tuple, irs) = (flow.fixed.tuple, flow.fixed.irs);
                if net.addresses.is_dns(tuple.peer.ip()) {
                    let server = net.resolvers.current(now);
                    net.resolvers.fail(server);
                }
                self.close(net, key);
                fail(net, tuple, irs, error);
            }
        }
    }

    /// A client of the host wants to talk to the guest. False: nobody is there.
    pub(in super::super) fn call(
        &mut self,
        net: &mut Net,
        now: Instant,
        socket: OwnedFd,
        client: SocketAddr,
        guest: SocketAddr,
    ) -> bool {
        let mut tuple = Tuple {
            guest,
            peer: net.inside(client, guest.ip()),
        };
        let mut tries = 0;
        while self.by_tuple.contains_key(&tuple) {
            tries += 1;
            if tries > PORT_TRIES {
                return false;
            }
            let port = 49152 | (net.random() & 0x3fff) as u16;
            tuple.peer.set_port(port);
        }
        if self.half_open >= net.config.limits.tcp_half_open
            || !self.make_room(net)
            || prepare(&socket).is_err()
        {
            net.counters.limited += 1;
            return false;
        }
        let fixed = Fixed {
            tuple,
            iss: Seq(net.random()),
            irs: Seq(0),
            our_scale: 0,
            guest_scale: 0,
            mss: MSS_DEFAULT,
            acked_base: acked_base(&socket),
        };
        let Some(key) = self.insert(net, now, fixed, Phase::Calling, socket) else {
            net.counters.limited += 1;
            return false;
        };
        if net.neighbour(guest.ip()).is_none() {
            arp::ask(net, guest.ip());
        }
        // Those that have been answered are no longer of interest.
        if self.calling.len() > 2 * self.half_open {
            let flows = &mut self.flows;
            self.calling.retain(|key| {
                flows
                    .get_mut(*key)
                    .is_some_and(|flow| flow.phase == Phase::Calling)
            });
        }
        self.calling.push(key);
        if let Some(flow) = self.flows.get_mut(key) {
            flow.syn_due = true;
            flow.enqueue(net);
        }
        true
    }

    /// Takes a connection up where it stood when the process before this one ended.
    pub(in super::super) fn restore(
        &mut self,
        net: &mut Net,
        now: Instant,
        record: &[u8],
        socket: OwnedFd,
    ) -> Result<(), RestoreError> {
        let record = Record::parse(record).ok_or(RestoreError::Record)?;
        let fixed = record.fixed;
        let tuple = fixed.tuple;
        if !net.addresses.is_guest(tuple.guest.ip()) {
            return Err(RestoreError::Guest(tuple.guest.ip()));
        }
        if self.by_tuple.contains_key(&tuple) {
            return Err(RestoreError::Taken {
                guest: tuple.guest,
                peer: tuple.peer,
            });
        }
        net.learn(tuple.guest.ip(), record.mac);
        let at = match positions(&socket, fixed.acked_base) {
            Ok(at) => at,
            Err(error) => {
                doubt(net, fixed);
                return Err(RestoreError::Socket(error));
            }
        };
        // Both descriptors share the flag; a fresh process does not know what the last one did.
        rustix::io::ioctl_fionbio(&socket, true).map_err(std::io::Error::from)?;
        let key = self
            .insert(net, now, fixed, Phase::Open, socket)
            .ok_or(RestoreError::Limit)?;
        self.next_key = self.next_key.max(record.key.saturating_add(1));
        let Some(flow) = self.flows.get_mut(key) else {
            return Err(RestoreError::Limit);
        };
        flow.key = record.key;
        // Sequence numbers wrap around, and so may the counts.
        let taken = (at.taken & 0xffff_ffff) as u32;
        let written = (at.written & 0xffff_ffff) as u32;
        flow.snd_una = fixed.iss.plus(1).plus(taken);
        flow.snd_nxt = flow.snd_una;
        // Anything that waits in the socket may have been sent, and be acknowledged, already.
        flow.snd_max = flow.snd_una.plus(at.unread);
        if at.host_closed {
            flow.host_closed = true;
            flow.fin_at = Some(flow.snd_max);
            flow.snd_max = flow.snd_max.plus(1);
        }
        flow.readable = at.unread > 0;
        // A segment is enough to learn the window.
        flow.snd_wnd = u32::from(fixed.mss);
        flow.rcv_nxt = fixed
            .irs
            .plus(1)
            .plus(written)
            .plus(u32::from(at.guest_fin));
        flow.rcv_edge = flow.rcv_nxt;
        flow.guest_fin = at.guest_fin;
        // What the guest sent meanwhile is lost: it shall not wait for its timeout.
        flow.ack_due = true;
        flow.dups_due = DUP_ACKS;
        flow.enqueue(net);
        Ok(())
    }
}

impl Flow {
    /// The host has connected: the guest gets its SYN-ACK.
    fn connected(&mut self, net: &mut Net) {
        if self.phase != Phase::Connecting {
            return;
        }
        if let Some(socket) = &self.socket {
            self.fixed.acked_base = acked_base(socket);
        }
        self.phase = Phase::Answering;
        self.syn_due = true;
        self.enqueue(net);
    }

    /// A segment of the guest while the connection is being made.
    pub(super) fn handshake(
        &mut self,
        net: &mut Net,
        now: Instant,
        segment: &Segment<'_>,
        mac: EthernetAddress,
    ) -> Verdict {
        let flags = segment.flags;
        let acks_syn = flags.ack && self.snd_nxt != self.fixed.iss && segment.ack == self.snd_nxt;
        match self.phase {
            Phase::Connecting => {
                if flags.rst && segment.seq == self.fixed.irs.plus(1) {
                    return Verdict::ResetHost;
                }
                Verdict::Keep
            }
            Phase::Answering => {
                if flags.rst {
                    return if segment.seq == self.rcv_nxt {
                        Verdict::ResetHost
                    } else {
                        Verdict::Keep
                    };
                }
                if flags.syn {
                    if segment.seq == self.fixed.irs {
                        self.syn_due = true;
                        self.enqueue(net);
                    }
                    return Verdict::Keep;
                }
                if !acks_syn {
                    refuse(net, segment);
                    return Verdict::Keep;
                }
                self.established(net, now, segment, mac);
                Verdict::Opened
            }
            Phase::Calling => {
                if flags.rst {
                    return if acks_syn {
                        Verdict::ResetHost
                    } else {
                        Verdict::Keep
                    };
                }
                if flags.ack && !acks_syn {
                    refuse(net, segment);
                    return Verdict::Keep;
                }
                if !flags.syn || !flags.ack {
                    return Verdict::Keep;
                }
                self.fixed.irs = segment.seq;
                self.mss = clamp_mss(net, self.fixed.tuple.guest.ip(), segment.mss);
                self.fixed.mss = self.mss;
                if let Some(scale) = segment.scale {
                    self.fixed.our_scale = OUR_SCALE;
                    self.fixed.guest_scale = scale;
                }
                self.rcv_nxt = segment.seq.plus(1);
                self.rcv_edge = self.rcv_nxt;
                self.established(net, now, segment, mac);
                self.ack_due = true;
                Verdict::Opened
            }
            Phase::Open | Phase::Lingering => Verdict::Keep,
        }
    }

    fn established(
        &mut self,
        net: &mut Net,
        now: Instant,
        segment: &Segment<'_>,
        mac: EthernetAddress,
    ) {
        self.phase = Phase::Open;
        self.snd_una = self.snd_nxt;
        self.syn_due = false;
        let scale = if segment.flags.syn {
            0
        } else {
            self.fixed.guest_scale
        };
        self.snd_wnd = u32::from(segment.window) << scale;
        self.rto_at = None;
        self.retries = 0;
        self.idle_since = now;
        if let Some((_, sent)) = self.timed.take() {
            let rtt = now.saturating_duration_since(sent);
            self.srtt = Some((rtt, rtt / 2));
            self.rto = (rtt * 3).clamp(super::flow::RTO_MIN, super::flow::RTO_MAX);
        }
        net.learn(self.fixed.tuple.guest.ip(), mac);
        // The window in the SYN-ACK was a guess.
        self.ack_due = true;
        self.enqueue(net);
    }
}
