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

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::net::{connect_unspec, sockopt};
use smoltcp::wire::EthernetAddress;

pub use self::record::{FlowStore, RECORD_LEN, RestoreError};

use self::flow::{Flow, Phase, Tuple, Verdict};
use self::record::Record;
use self::rx::DUP_ACKS;
use self::segment::{Flags, Segment, refuse};
use super::Turn;
use super::config::Limits;
use super::net::Net;
use super::packet::Ipv4In;
use super::slab::{Key, Slab};
use crate::{RxSink, VnetHeader};

/// All connections.
pub(super) struct Tcp {
    flows: Slab<Flow>,
    by_tuple: HashMap<Tuple, Key>,
    half_open: usize,
    store: Option<Box<dyn FlowStore>>,
    next_key: u64,
}

impl Tcp {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            flows: Slab::new(limits.tcp_flows),
            by_tuple: HashMap::new(),
            half_open: 0,
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
        self.flows.get_mut(key).is_some_and(|flow| flow.queued)
    }

    /// Takes a TCP segment of a guest.
    pub(super) fn receive(
        &mut self,
        net: &mut Net,
        now: Instant,
        packet: &Ipv4In<'_>,
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
                    .neighbour(*flow.fixed.tuple.guest.ip())
                    .unwrap_or(EthernetAddress::BROADCAST);
                if let (Some(store), Some(fd)) = (&mut self.store, &flow.socket) {
                    flow.key = self.next_key;
                    self.next_key += 1;
                    let record = Record {
                        key: flow.key,
                        fixed: flow.fixed,
                        mac,
                    };
                    store.put(flow.key, &record.emit(), std::os::fd::AsFd::as_fd(fd));
                }
            }
            Verdict::Finished => {
                flow.phase = Phase::Lingering;
                flow.rto_at = None;
                flow.idle_since = now;
                flow.arm(net);
                self.let_go(net, key, false);
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

    /// Makes sure that one more flow fits; connections that are over give way.
    fn make_room(&mut self, net: &mut Net) -> bool {
        if self.flows.is_full() {
            let over = self
                .flows
                .iter()
                .find(|(_, flow)| flow.phase == Phase::Lingering)
                .map(|(key, _)| key);
            if let Some(key) = over {
                self.close(net, key);
            }
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
        key: Key,
        sink: &mut dyn RxSink,
    ) -> Turn {
        let Some(flow) = self.flows.get_mut(key) else {
            return Turn::Done;
        };
        flow.queued = false;
        let (turn, verdict) = flow.turn(net, now, sink);
        if turn != Turn::Done {
            flow.queued = true;
        }
        self.settle(net, now, key, verdict);
        turn
    }

    /// The hardware address of a guest has become known: SYNs that went to nobody go again.
    pub(super) fn neighbour_found(&mut self, net: &mut Net, guest: std::net::Ipv4Addr) {
        if self.half_open == 0 {
            return;
        }
        for key in self.flows.keys() {
            if let Some(flow) = self.flows.get_mut(key)
                && flow.phase == Phase::Calling
                && *flow.fixed.tuple.guest.ip() == guest
            {
                flow.syn_due = true;
                flow.enqueue(net);
            }
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
