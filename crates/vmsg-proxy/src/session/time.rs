// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of a session as time passes.

use super::machine::{Failure, Job, NO_NAMES, Phase, Session, Waiting};
use super::overdue::Ping;
use super::script::Step;
use super::types::{Op, OpError};
use std::collections::VecDeque;
use virtio_msg::Instant;

impl Session {
    /// The next moment [`handle_timeout`](Self::handle_timeout) has to be called at.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let exchange = self.exchange.as_ref().map(|e| match e.ping {
            Ping::Due(at) => at.min(e.deadline),
            _ => e.deadline,
        });
        let waiting = self.waiting.iter().map(|w| w.deadline);
        let tidy = self.record.windows.next_expiry();
        let tidy = tidy.filter(|_| self.phase == Phase::Ready && self.job.is_none());
        let others = self.pause.into_iter().chain(tidy);
        let others = others.chain(self.letting_go_timeout());
        waiting.chain(exchange).chain(others).min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        if self.inflight_unanswered(now) {
            self.pump(now);
        }
        self.send_ping(now);
        self.wait_longer(now);
        if self.exchange.as_ref().is_some_and(|e| e.deadline <= now) {
            self.counters.timeouts += 1;
            // Foreign device hosts drop what they do not know without a word.
            let nameless = !self.caps.claims
                && matches!(&self.exchange, Some(e) if matches!(e.step, Step::NameOf(_)));
            if nameless {
                self.exchange = None;
                self.fail(now, Failure::Reset(NO_NAMES));
                self.pump(now);
                return;
            }
            // What only the device can do has failed; the rest is recorded, for the replay.
            if let Some(Job::Op { id, op, .. }) = &self.job
                && !self.recordable(op)
            {
                let id = *id;
                self.job = None;
                self.finish(id, Err(OpError::TimedOut));
            }
            self.link_fault("the device host did not answer in time");
        }
        if self.pause.is_some_and(|pause| pause <= now) {
            self.pause = None;
        }
        // Whoever answers each request in time, but has many asked, must not hold a front up either. And what a guest has unmapped is unmapped,
        // and a guest that is gone is gone, whatever is in front of that.
        let patient = matches!(self.job, Some(Job::Op { .. } | Job::Overdue { .. }) | None);
        let is_overdue = |w: &Waiting| {
            let must_be = matches!(w.op, Op::ChangeWindows { .. } | Op::Release);
            w.deadline <= now && self.recordable(&w.op) && (must_be || !patient)
        };
        // There is somebody to be given up.
        let asked = !matches!(self.phase, Phase::Down | Phase::Broken(_)) && !self.is_overdue();
        if self.waiting.iter().any(is_overdue) {
            if asked {
                self.counters.timeouts += 1;
                self.link_fault("the device host takes too long");
            }
            self.pump(now);
        }
        let error = if self.phase == Phase::Absent {
            OpError::NoDevice
        } else if self.is_overdue() || self.is_releasing() {
            OpError::Busy
        } else {
            OpError::TimedOut
        };
        let (expired, left) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|w: &Waiting| w.deadline <= now);
        self.waiting = left;
        let expired: VecDeque<Waiting> = expired;
        for waiting in expired {
            if self.is_held_back(&waiting.op) {
                self.give_up_held_back(waiting);
                continue;
            }
            if self.stood_behind(&waiting.op) {
                // What it stood behind was given up just now.
                self.waiting.push_back(waiting);
                continue;
            }
            self.waited_in_vain |= self.facts.is_none();
            if matches!(waiting.op, Op::Release) && !self.is_releasing() {
                // Of a device that was never seen: there is nobody to tell.
                self.record.release();
            }
            self.finish(waiting.id, Err(error.clone()));
        }
        self.pump(now);
    }
}
