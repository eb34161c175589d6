// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Segments to the guest.

use std::time::Instant;

use rustix::io::{Errno, ioctl_fionread};

use super::super::Turn;
use super::super::line::Budget;
use super::super::net::Net;
use super::super::packet::count;
use super::flow::{Flow, OUR_SCALE, Phase, Verdict};
use super::segment::{Flags, Seq, largest_mss, max_payload};
use crate::{RxSink, io, sys};

/// Small segments that go in one turn at most.
const TURN_SEGMENTS: usize = 64;

impl Flow {
    /// Sends what there is to send until the turn is over. The flow is no longer in line; it is
    /// put there again by whoever called if there is more.
    pub(super) fn turn(
        &mut self,
        net: &mut Net,
        now: Instant,
        budget: &mut Budget,
        sink: &mut dyn RxSink,
    ) -> (Turn, Verdict) {
        let turn = match self.phase {
            Phase::Connecting => Ok(Turn::Done),
            Phase::Answering | Phase::Calling => Ok(self.send_syn(net, now, sink)),
            Phase::Lingering => Ok(self.send_acks(net, sink)),
            Phase::Open => self.send(net, now, budget, sink),
        };
        match turn {
            Ok(turn) => {
                self.arm(net);
                (turn, Verdict::Keep)
            }
            Err(_) => (Turn::Done, Verdict::ResetBoth),
        }
    }

    fn send_syn(&mut self, net: &mut Net, now: Instant, sink: &mut dyn RxSink) -> Turn {
        if !self.syn_due {
            return Turn::Done;
        }
        let calling = self.phase == Phase::Calling;
        let flags = Flags {
            syn: true,
            ack: !calling,
            ..Flags::default()
        };
        let mut out = self.out(self.fixed.iss, flags);
        // A window in a SYN is not scaled.
        out.window = u16::MAX;
        let mss = largest_mss(net, self.fixed.tuple.guest.ip());
        let scale = if calling {
            Some(OUR_SCALE)
        } else {
            (self.fixed.our_scale > 0).then_some(OUR_SCALE)
        };
        out.options = Some((mss, scale));
        if calling {
            out.ack = Seq(0);
        }
        if !out.send(net, sink) {
            return Turn::NoRoom;
        }
        self.rcv_edge = self.rcv_nxt.plus(u32::from(u16::MAX));
        self.syn_due = false;
        self.snd_nxt = self.fixed.iss.plus(1);
        self.snd_max = self.snd_nxt;
        if self.retries == 0 {
            self.timed = Some((self.snd_nxt, now));
        }
        self.rto_at = Some(now + self.rto);
        Turn::Done
    }

    /// Acknowledgements without payload.
    fn send_acks(&mut self, net: &mut Net, sink: &mut dyn RxSink) -> Turn {
        while self.ack_due || self.dups_due > 0 || self.probe {
            // A window probe repeats a number that the guest has confirmed, so that it answers.
            let seq = if self.probe {
                self.snd_una.plus(u32::MAX)
            } else {
                self.snd_nxt
            };
            if !self.out(seq, Flags::ACK).send(net, sink) {
                return Turn::NoRoom;
            }
            if self.probe {
                self.probe = false;
            } else if self.ack_due {
                self.ack_due = false;
            } else {
                self.dups_due -= 1;
            }
        }
        Turn::Done
    }

    fn send(
        &mut self,
        net: &mut Net,
        now: Instant,
        budget: &mut Budget,
        sink: &mut dyn RxSink,
    ) -> Result<Turn, Errno> {
        if self.ack_due {
            self.open_window(net);
        }
        let turn = self.send_data(net, now, budget, sink)?;
        if turn == Turn::NoRoom {
            return Ok(turn);
        }
        match self.send_acks(net, sink) {
            Turn::Done => Ok(turn),
            other => Ok(other),
        }
    }

    fn send_data(
        &mut self,
        net: &mut Net,
        now: Instant,
        budget: &mut Budget,
        sink: &mut dyn RxSink,
    ) -> Result<Turn, Errno> {
        let max = max_payload(net, self.fixed.tuple.guest.ip(), self.mss);
        let mut segments = TURN_SEGMENTS;
        if self.resend && self.in_flight() > 0 {
            let end = self.fin_at.unwrap_or(self.snd_nxt);
            let end = if end.since(self.snd_nxt) < 0 {
                end
            } else {
                self.snd_nxt
            };
            let len = (end.after(self.snd_una) as usize).min(max);
            let sent = if len == 0 {
                self.send_fin(net, now, self.snd_una, sink)
            } else {
                self.send_segment(net, self.snd_una, len, sink)?.is_some()
            };
            if !sent {
                return Ok(Turn::NoRoom);
            }
            net.counters.tcp_retransmits += 1;
            self.timed = None;
            budget.spend(len);
        }
        self.resend = false;
        let Some(fd) = self.fd() else {
            return Ok(Turn::Done);
        };
        if !self.readable && self.fin_at.is_none() {
            return Ok(Turn::Done);
        }
        // Looked at once a turn: what comes later has its own event.
        let unread = match self.fin_at {
            Some(at) => at.after(self.snd_una),
            None => u32::try_from(ioctl_fionread(fd)?).unwrap_or(u32::MAX >> 1),
        };
        let end = self.snd_una.plus(unread);
        if self.host_closed && self.fin_at.is_none() {
            self.fin_at = Some(end);
        }
        let window = self
            .snd_wnd
            .min(self.cwnd)
            .min(net.config.limits.tcp_in_flight);
        loop {
            let left = end.after(self.snd_nxt) as usize;
            if left == 0 {
                self.readable = false;
                if self.fin_at == Some(self.snd_nxt) && !self.send_fin(net, now, self.snd_nxt, sink)
                {
                    return Ok(Turn::NoRoom);
                }
                return Ok(Turn::Done);
            }
            let room = window.saturating_sub(self.in_flight()) as usize;
            let len = left.min(room).min(max);
            // Not in crumbs while the guest is going to tell more.
            let crumbs = len < left && len < usize::from(self.mss) && self.in_flight() > 0;
            if room == 0 || crumbs {
                if self.in_flight() == 0 && self.rto_at.is_none() {
                    self.rto_at = Some(now + self.rto);
                }
                return Ok(Turn::Done);
            }
            if budget.is_spent() || segments == 0 {
                return Ok(Turn::Again);
            }
            let seq = self.snd_nxt;
            match self.send_segment(net, seq, len, sink)? {
                None => return Ok(Turn::NoRoom),
                Some(0) => {
                    // The socket has less than it said. An error, whose event is to come; or an
                    // urgent mark, which no peek goes beyond before what precedes it was taken.
                    self.readable = self.in_flight() > 0;
                    return Ok(Turn::Done);
                }
                Some(n) => {
                    budget.spend(n);
                    segments -= 1;
                    self.snd_nxt = seq.plus(count(n));
                    if self.snd_nxt.since(self.snd_max) > 0 {
                        self.snd_max = self.snd_nxt;
                        self.timed = self.timed.or(Some((self.snd_nxt, now)));
                    }
                    if self.rto_at.is_none() {
                        self.rto_at = Some(now + self.rto);
                    }
                }
            }
        }
    }

    /// Sends up to `len` bytes from `seq` on, as they wait in the socket. `None`: no room.
    fn send_segment(
        &mut self,
        net: &mut Net,
        seq: Seq,
        len: usize,
        sink: &mut dyn RxSink,
    ) -> Result<Option<usize>, Errno> {
        let Some(socket) = self.socket.as_ref() else {
            return Ok(Some(0));
        };
        let offset = seq.after(self.snd_una);
        let flags = Flags {
            psh: true,
            ..Flags::ACK
        };
        let out = self.out(seq, flags);
        let mss = usize::from(self.mss);
        let mut sent = None;
        // A guest with few or small buffers may have room for a small segment only.
        for len in [len, len.min(mss)] {
            let fill = |net: &mut Net, body: vmsg_mem::Pieces<'_>| {
                if net.peek_offsets && self.peek_at != Some(seq) {
                    sys::set_peek_offset(std::os::fd::AsFd::as_fd(socket), offset)
                        .map_err(|_| Errno::INVAL)?;
                    self.peek_at = Some(seq);
                }
                let skip = if net.peek_offsets { 0 } else { offset as usize };
                let fd = std::os::fd::AsFd::as_fd(socket);
                match io::peek(fd, skip, body, &mut net.scratch) {
                    Ok(n) => {
                        self.peek_at = Some(seq.plus(count(n)));
                        Ok(n)
                    }
                    Err(Errno::AGAIN | Errno::INTR) => Ok(0),
                    Err(error) => Err(error),
                }
            };
            sent = out.send_payload(net, sink, len, fill)?;
            if sent.is_some() || len <= mss {
                break;
            }
        }
        if sent.is_some_and(|n| n > 0) {
            self.ack_due = false;
        }
        Ok(sent)
    }

    fn send_fin(&mut self, net: &mut Net, now: Instant, seq: Seq, sink: &mut dyn RxSink) -> bool {
        let flags = Flags {
            fin: true,
            ..Flags::ACK
        };
        if !self.out(seq, flags).send(net, sink) {
            return false;
        }
        self.ack_due = false;
        let end = seq.plus(1);
        if self.snd_nxt.since(end) < 0 {
            self.snd_nxt = end;
        }
        if self.snd_max.since(end) < 0 {
            self.snd_max = end;
        }
        if self.rto_at.is_none() {
            self.rto_at = Some(now + self.rto);
        }
        true
    }
}
