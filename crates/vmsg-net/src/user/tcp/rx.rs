// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Segments from the guest, of a connection that is there.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use super::super::net::Net;
use super::super::packet::count;
use super::flow::{Flow, Phase, RTO_FIRST, RTO_MAX, RTO_MIN, Verdict};
use super::segment::{Segment, Seq};
use crate::io;

/// Duplicate acknowledgements that tell of a loss (RFC 5681).
pub(super) const DUP_ACKS: u8 = 3;

/// A socket that does not behave: the connection cannot go on.
pub(super) struct Broken;

impl Flow {
    /// Takes a segment of an open connection.
    pub(super) fn segment(
        &mut self,
        net: &mut Net,
        now: Instant,
        segment: &Segment<'_>,
    ) -> Verdict {
        let flags = segment.flags;
        if flags.rst {
            // RFC 5961: only the exact number counts, everything else is asked about.
            return if segment.seq == self.rcv_nxt {
                Verdict::ResetHost
            } else {
                self.ack_due = true;
                self.enqueue(net);
                Verdict::Keep
            };
        }
        if flags.syn || !flags.ack || segment.ack.since(self.snd_max) > 0 {
            self.ack_due = true;
            self.enqueue(net);
            return Verdict::Keep;
        }
        self.idle_since = now;
        if self.acknowledge(net, now, segment).is_err() || self.take(net, segment).is_err() {
            return Verdict::ResetBoth;
        }
        if self.guest_fin && self.fin_acked() {
            return Verdict::Finished;
        }
        self.arm(net);
        Verdict::Keep
    }

    /// What the segment says about our own bytes.
    fn acknowledge(
        &mut self,
        net: &mut Net,
        now: Instant,
        segment: &Segment<'_>,
    ) -> Result<(), Broken> {
        let behind = segment.ack.since(self.snd_una);
        if behind < 0 {
            return Ok(());
        }
        let window = u32::from(segment.window) << self.fixed.guest_scale;
        let reopened = window > self.snd_wnd;
        if behind > 0 {
            self.release(segment)?;
            self.measure(now, segment);
            self.dup_acks = 0;
            self.retries = 0;
            self.cwnd = self
                .cwnd
                .saturating_add(behind.unsigned_abs())
                .min(net.config.limits.tcp_in_flight);
            match self.recover {
                Some(end) if segment.ack.since(end) < 0 => self.resend = true,
                _ => {
                    self.recover = None;
                    self.resend = false;
                }
            }
            self.rto_at = (self.in_flight() > 0).then(|| now + self.rto);
        } else if segment.payload.is_empty()
            && !segment.flags.fin
            && window == self.snd_wnd
            && self.in_flight() > 0
        {
            self.dup_acks = self.dup_acks.saturating_add(1);
            if self.dup_acks == DUP_ACKS && self.recover.is_none() {
                self.recover = Some(self.snd_nxt);
                self.resend = true;
            }
        }
        if self.in_flight() == 0 {
            self.retries = 0;
        }
        self.snd_wnd = window;
        if reopened && window > 0 && self.in_flight() == 0 {
            // No probing any more, and no waiting as long as between the last probes.
            self.rto_at = None;
            self.rto = self.settled_rto();
            self.retries = 0;
        }
        let pending = self.readable || self.fin_at.is_some_and(|at| self.snd_nxt.since(at) <= 0);
        if self.resend || (pending && (behind > 0 || reopened)) {
            self.enqueue(net);
        }
        Ok(())
    }

    /// Takes from the socket what the guest has acknowledged.
    fn release(&mut self, segment: &Segment<'_>) -> Result<(), Broken> {
        let fin = self.fin_at.is_some_and(|at| segment.ack.since(at) > 0);
        let mut left = (segment.ack.after(self.snd_una) - u32::from(fin)) as usize;
        let fd = self.fd().ok_or(Broken)?;
        while left > 0 {
            match io::discard(fd, left) {
                // All of it was there when it was sent.
                Ok(0) => return Err(Broken),
                Ok(n) => left = left.saturating_sub(n),
                Err(_) => return Err(Broken),
            }
        }
        self.snd_una = segment.ack;
        if self.snd_nxt.since(segment.ack) < 0 {
            self.snd_nxt = segment.ack;
        }
        // The kernel moves its offset back by what was taken, but not below zero.
        if self.peek_at.is_some_and(|at| at.since(segment.ack) < 0) {
            self.peek_at = Some(segment.ack);
        }
        Ok(())
    }

    /// The retransmission timeout without any doubling.
    fn settled_rto(&self) -> Duration {
        self.srtt.map_or(RTO_FIRST, |(srtt, var)| {
            (srtt + (4 * var).max(Duration::from_millis(1))).clamp(RTO_MIN, RTO_MAX)
        })
    }

    /// Times round trips (RFC 6298).
    fn measure(&mut self, now: Instant, segment: &Segment<'_>) {
        let Some((seq, sent)) = self.timed else {
            // A timeout has doubled it; the way is free again.
            self.rto = self.settled_rto();
            return;
        };
        if segment.ack.since(seq) < 0 {
            return;
        }
        self.timed = None;
        let rtt = now.saturating_duration_since(sent);
        let (srtt, var) = match self.srtt {
            None => (rtt, rtt / 2),
            Some((srtt, var)) => ((srtt * 7 + rtt) / 8, (var * 3 + srtt.abs_diff(rtt)) / 4),
        };
        self.srtt = Some((srtt, var));
        self.rto = self.settled_rto();
    }

    /// Passes the payload on, straight from the guest's memory; only what the kernel takes is
    /// acknowledged. What comes out of order is dropped, as there is no place to keep it.
    fn take(&mut self, net: &mut Net, segment: &Segment<'_>) -> Result<(), Broken> {
        let late = self.rcv_nxt.since(segment.seq);
        if segment.len() == 0 {
            // Probes for liveness and windows use an old number.
            if late != 0 {
                self.ack_due = true;
                self.enqueue(net);
            }
            return Ok(());
        }
        let end = segment.seq.plus(segment.len());
        if late < 0 {
            self.note_drop(end);
            // While the kernel takes nothing it is no use to have it sent again at once.
            if !self.overrun {
                self.dups_due = (self.dups_due + 1).min(DUP_ACKS);
                self.enqueue(net);
            }
            return Ok(());
        }
        self.ack_due = true;
        self.enqueue(net);
        let late = late.unsigned_abs() as usize;
        if self.guest_fin || late > segment.payload.len() {
            return Ok(());
        }
        let payload = segment.payload.skip(late);
        let fd = self.socket.as_ref().ok_or(Broken)?.as_fd();
        if !payload.is_empty() {
            let sent = match io::send(fd, payload) {
                Ok(sent) => sent,
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => 0,
                Err(_) => return Err(Broken),
            };
            // At most a packet.
            self.rcv_nxt = self.rcv_nxt.plus(count(sent));
            if self.rcv_edge.since(self.rcv_nxt) < 0 {
                self.rcv_edge = self.rcv_nxt;
            }
            if sent < payload.len() {
                self.overrun = true;
                self.note_drop(end);
                return Ok(());
            }
        }
        if self
            .dropped_to
            .is_some_and(|to| to.since(self.rcv_nxt) <= 0)
        {
            self.dropped_to = None;
        }
        if self.dropped_to.is_some() && !self.overrun {
            // The guest believes that the rest is here; it shall not wait for its timeout.
            self.dups_due = DUP_ACKS;
        }
        if segment.flags.fin {
            match shutdown(fd, Shutdown::Write) {
                Ok(()) => {}
                // Nobody is there to hear it.
                Err(Errno::NOTCONN) => {}
                Err(_) => return Err(Broken),
            }
            self.rcv_nxt = self.rcv_nxt.plus(1);
            self.rcv_edge = self.rcv_nxt;
            self.guest_fin = true;
        }
        Ok(())
    }

    fn note_drop(&mut self, end: Seq) {
        if self.dropped_to.is_none_or(|to| end.since(to) > 0) {
            self.dropped_to = Some(end);
        }
    }

    /// Takes a segment of a connection that is over.
    pub(super) fn linger(&mut self, net: &mut Net, segment: &Segment<'_>) {
        debug_assert_eq!(self.phase, Phase::Lingering);
        if segment.len() > 0 && !segment.flags.rst {
            self.ack_due = true;
            self.enqueue(net);
        }
    }
}
