// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TCP, split: the guest's connection ends here and a socket of the host goes on.
//!
//! No payload is kept. What the host sends stays in its socket, is peeked at straight into the
//! guest's buffers and taken out when the guest has acknowledged it. What the guest sends goes
//! from its memory into the socket, and only what the kernel took is acknowledged. So the window
//! of one side is the buffer of the other, and a connection survives this process: see
//! [`FlowStore`].

mod connect;
mod flow;
mod record;
mod rx;
mod segment;
mod timer;
mod tx;

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::net::{connect_unspec, sockopt};
use smoltcp::wire::EthernetAddress;

pub use self::record::{FlowStore, RECORD_LEN, RestoreError};

use self::flow::{Flow, Phase, Tuple, Verdict};
use self::record::Record;
use self::rx::DUP_ACKS;
use self::segment::{Flags, Segment, Seq, refuse};
use super::Turn;
use super::config::Limits;
use super::icmp::TooBig;
use super::line::Slot;
use super::net::Net;
use super::packet::{IpIn, ip_header};
use super::slab::{Key, Slab};
use crate::{RxSink, VnetHeader};

/// All connections.
pub(super) struct Tcp {
    flows: Slab<Flow>,
    by_tuple: HashMap<Tuple, Key>,
    half_open: usize,
    /// Those that may wait for a guest that is not there yet.
    calling: Vec<Key>,
    /// Those that are over, the oldest first, and stale ones.
    lingering: VecDeque<Key>,
    store: Option<Box<dyn FlowStore>>,
    next_key: u64,
}

impl Tcp {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            flows: Slab::new(limits.tcp_flows),
            by_tuple: HashMap::new(),
            half_open: 0,
            calling: Vec::new(),
            lingering: VecDeque::new(),
            store: None,
            next_key: 1,
        }
    }

    pub(super) fn set_store(&mut self, store: Box<dyn FlowStore>) {
        self.store = Some(store);
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// True if the flow is there and in line for the guest.
    pub(super) fn waits(&mut self, key: Key) -> bool {
        self.flows
            .get_mut(key)
            .is_some_and(|flow| flow.share.is_in_line())
    }

    /// Takes a TCP segment of a guest.
    pub(super) fn receive(
        &mut self,
        net: &mut Net,
        now: Instant,
        packet: &IpIn<'_>,
        vnet: &VnetHeader,
        mac: EthernetAddress,
    ) {
        let Some(segment) = Segment::parse(packet, vnet) else {
            net.counters.malformed += 1;
            return;
        };
        let syn = segment.flags.syn && !segment.flags.ack;
        let known = self.by_tuple.get(&segment.tuple).copied();
        let Some((key, flow)) = known.and_then(|key| Some((key, self.flows.get_mut(key)?))) else {
            if syn {
                self.open(net, now, &segment);
            } else {
                refuse(net, &segment);
            }
            return;
        };
        flow.pair = net.pair;
        let verdict = match flow.phase {
            Phase::Lingering if syn || segment.flags.rst => {
                self.close(net, key);
                if syn {
                    self.open(net, now, &segment);
                }
                return;
            }
            Phase::Lingering => {
                flow.linger(net, &segment);
                Verdict::Keep
            }
            Phase::Open => flow.segment(net, now, &segment),
            Phase::Connecting | Phase::Answering | Phase::Calling => {
                flow.handshake(net, now, &segment, mac)
            }
        };
        self.settle(net, now, key, verdict);
        // What completes the handshake may carry payload.
        if verdict == Verdict::Opened
            && !segment.flags.syn
            && segment.len() > 0
            && let Some(flow) = self.flows.get_mut(key)
        {
            let verdict = flow.segment(net, now, &segment);
            self.settle(net, now, key, verdict);
        }
    }

    /// Does what a look at a flow has decided.
    fn settle(&mut self, net: &mut Net, now: Instant, key: Key, verdict: Verdict) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        match verdict {
            Verdict::Keep => {}
            Verdict::Opened => {
                self.half_open -= 1;
                flow.arm(net);
                // What came while the guest was not ready had its event then.
                flow.readable = true;
                let mac = net
                    .neighbour(flow.fixed.tuple.guest.ip())
                    .unwrap_or(EthernetAddress::BROADCAST);
                if let (Some(store), Some(fd)) = (&mut self.store, &flow.socket) {
                    flow.key = self.next_key;
                    self.next_key += 1;
                    let record = Record {
                        key: flow.key,
                        fixed: flow.fixed,
                        mac,
                    };
                    store.put(
                        flow.key,
                        record.emit().as_slice(),
                        std::os::fd::AsFd::as_fd(fd),
                    );
                }
            }
            Verdict::Finished => {
                flow.phase = Phase::Lingering;
                flow.rto_at = None;
                flow.idle_since = now;
                flow.arm(net);
                self.let_go(net, key, false);
                self.lingers(key);
            }
            Verdict::ResetHost => {
                self.let_go(net, key, true);
                self.close(net, key);
            }
            Verdict::ResetBoth => {
                if matches!(flow.phase, Phase::Open | Phase::Answering) {
                    let flags = Flags {
                        rst: true,
                        ..Flags::ACK
                    };
                    flow.out(flow.snd_nxt, flags).queue(net);
                }
                let reset = flow.phase != Phase::Lingering;
                self.let_go(net, key, reset);
                self.close(net, key);
            }
        }
    }

    /// Closes the host's end, by a reset if so wished, and has it forgotten.
    fn let_go(&mut self, net: &mut Net, key: Key, reset: bool) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        if let Some(socket) = flow.socket.take() {
            net.unwatch(std::os::fd::AsFd::as_fd(&socket));
            if reset {
                // At once, even if another process has the socket, too. If it fails, then as the
                // connection is broken already.
                let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
                let _ = connect_unspec(&socket);
            }
        }
        if flow.key != 0
            && let Some(store) = &mut self.store
        {
            store.remove(flow.key);
            flow.key = 0;
        }
    }

    /// Forgets a flow.
    fn close(&mut self, net: &mut Net, key: Key) {
        self.let_go(net, key, false);
        if let Some(mut flow) = self.flows.remove(key) {
            net.timers.clear(flow.source, &mut flow.timer);
            self.by_tuple.remove(&flow.fixed.tuple);
            if !matches!(flow.phase, Phase::Open | Phase::Lingering) {
                self.half_open -= 1;
            }
        }
    }

    /// Remembers who gives way first. Each is there once, so that forgetting stale ones now and
    /// then takes no time on the whole.
    fn lingers(&mut self, key: Key) {
        if self.lingering.len() > 2 * self.flows.len() + 64 {
            let flows = &mut self.flows;
            self.lingering.retain(|key| flows.get_mut(*key).is_some());
        }
        self.lingering.push_back(key);
    }

    /// Makes sure that one more flow fits; connections that are over give way, the oldest first.
    fn make_room(&mut self, net: &mut Net) -> bool {
        while self.flows.is_full()
            && let Some(key) = self.lingering.pop_front()
        {
            self.close(net, key);
        }
        !self.flows.is_full()
    }

    /// Something has happened to the host's end.
    pub(super) fn event(&mut self, net: &mut Net, now: Instant, key: Key, events: EventFlags) {
        let Some(flow) = self.flows.get_mut(key) else {
            return;
        };
        if flow.phase == Phase::Connecting {
            self.try_connected(net, now, key, events);
            return;
        }
        if events.contains(EventFlags::ERR) {
            let broken = flow
                .socket
                .as_ref()
                .is_some_and(|socket| !matches!(sockopt::socket_error(socket), Ok(Ok(()))));
            if broken {
                self.settle(net, now, key, Verdict::ResetBoth);
                return;
            }
        }
        if events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP) {
            flow.readable = true;
            if events.intersects(EventFlags::RDHUP | EventFlags::HUP) {
                flow.host_closed = true;
            }
            if flow.phase == Phase::Open {
                flow.idle_since = now;
                flow.enqueue(net);
            }
        }
        if events.contains(EventFlags::OUT) && (flow.awaits_room || flow.overrun) {
            flow.awaits_room = false;
            let edge = flow.rcv_edge;
            flow.open_window(net);
            if flow.overrun {
                flow.overrun = false;
                flow.dups_due = DUP_ACKS;
            }
            if flow.rcv_edge != edge || flow.dups_due > 0 {
                flow.ack_due = true;
                flow.enqueue(net);
            }
        }
    }

    /// A flow's timer has come up.
    pub(super) fn expire(&mut self, net: &mut Net, now: Instant, key: Key) {
        if let Some(flow) = self.flows.get_mut(key) {
            let verdict = flow.expire(net, now);
            self.settle(net, now, key, verdict);
        }
    }

    /// A flow's turn to send to the guest.
    pub(super) fn turn(
        &mut self,
        net: &mut Net,
        now: Instant,
        slot: Slot,
        key: Key,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let Some(flow) = self.flows.get_mut(key) else {
            return Turn::Done;
        };
        let full = net.config.limits.turn_bytes;
        let Some(mut budget) = net.line.begin(slot, &mut flow.share, full) else {
            return Turn::Done;
        };
        let (turn, verdict) = flow.turn(net, now, &mut budget, sink);
        net.line.end(slot, &mut flow.share, turn, budget);
        if verdict != Verdict::Keep {
            self.settle(net, now, key, verdict);
        }
        turn
    }

    /// The hardware address of a guest has become known: SYNs that went to nobody go again.
    pub(super) fn neighbour_found(&mut self, net: &mut Net, guest: IpAddr) {
        let flows = &mut self.flows;
        self.calling.retain(|key| {
            let Some(flow) = flows.get_mut(*key) else {
                return false;
            };
            if flow.phase != Phase::Calling {
                return false;
            }
            if flow.fixed.tuple.guest.ip() == guest {
                flow.syn_due = true;
                flow.enqueue(net);
            }
            true
        });
    }

    /// A router behind a guest, or the guest, takes no packets as long as the one it quotes
    /// (RFC 1191, RFC 8201).
    pub(super) fn too_big(&mut self, net: &mut Net, message: &TooBig) {
        let tuple = Tuple {
            guest: message.guest,
            peer: message.peer,
        };
        let Some(flow) = self
            .by_tuple
            .get(&tuple)
            .copied()
            .and_then(|key| self.flows.get_mut(key))
        else {
            net.counters.refused += 1;
            return;
        };
        let guest = message.guest.ip();
        // Less than what all must take would only do harm.
        let least = if guest.is_ipv6() { 1280 } else { 576 };
        let mss = message.mtu.max(least) - ip_header(guest) - segment::HEADER;
        let seq = Seq(message.seq);
        // Only what is on the way can have been too long (RFC 5927).
        let known = flow.phase == Phase::Open
            && seq.since(flow.snd_una) >= 0
            && seq.since(flow.snd_max) < 0;
        match u16::try_from(mss) {
            Ok(mss) if known && mss < flow.mss => {
                flow.mss = mss;
                flow.send_again(net);
            }
            _ => net.counters.refused += 1,
        }
    }

    /// Resets every connection.
    pub(super) fn shutdown(&mut self, net: &mut Net, now: Instant) {
        for key in self.flows.keys() {
            self.settle(net, now, key, Verdict::ResetBoth);
        }
    }
}

#[cfg(test)]
#[path = "window_test.rs"]
mod window_test;
