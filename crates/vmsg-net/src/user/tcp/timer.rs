// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to a connection when nothing happens.

use std::time::Instant;

use super::super::arp;
use super::super::net::Net;
use super::flow::{Flow, Phase, RETRIES, RTO_MAX, Verdict};

impl Flow {
    /// The entry among the timers has come up.
    pub(super) fn expire(&mut self, net: &mut Net, now: Instant) -> Verdict {
        self.timer = None;
        let due = self.rto_at.is_some_and(|at| at <= now);
        if !due {
            if self.deadline(&net.config.limits) > now {
                self.arm(net);
                return Verdict::Keep;
            }
            return Verdict::ResetBoth;
        }
        self.rto_at = None;
        if self.share.waits() {
            // Still waiting for a buffer of the guest: nothing was sent in vain.
            self.rto_at = Some(now + self.rto);
            self.arm(net);
            return Verdict::Keep;
        }
        self.retries += 1;
        if self.retries > RETRIES {
            return Verdict::ResetBoth;
        }
        self.rto = (self.rto * 2).min(RTO_MAX);
        self.timed = None;
        match self.phase {
            Phase::Connecting | Phase::Lingering => {}
            Phase::Answering | Phase::Calling => {
                let guest = self.fixed.tuple.guest.ip();
                if net.neighbour(guest).is_none() {
                    arp::ask(net, guest);
                }
                self.syn_due = true;
                self.enqueue(net);
            }
            Phase::Open if self.in_flight() > 0 => {
                self.cwnd = 2 * u32::from(self.mss);
                self.send_again(net);
            }
            Phase::Open => {
                if self.readable || self.fin_at.is_some() {
                    self.probe = true;
                    self.rto_at = Some(now + self.rto);
                    self.enqueue(net);
                }
            }
        }
        self.arm(net);
        Verdict::Keep
    }

    /// Sends everything once more that the guest has not acknowledged.
    pub(super) fn send_again(&mut self, net: &mut Net) {
        net.counters.tcp_retransmits += 1;
        self.snd_nxt = self.snd_una;
        self.recover = None;
        self.resend = false;
        self.dup_acks = 0;
        self.readable = true;
        self.enqueue(net);
    }
}
