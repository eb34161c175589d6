// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that do not let go of their queues in time, as a disk whose medium hangs.
//!
//! A reset is done when the device does not touch the guest's memory any more, and requests that are under way at a medium cannot be called
//! back: it may take any time. To break the connection off would not make the device let go. So while the other side answers a PING it is waited
//! for: the operation ends with [`OpError::Busy`], its request stays asked for (once more, but no oftener), and what needs the device ends in the same way until the answer
//! has come. A device host that does not answer a PING either is given up as any other.

use super::machine::{Exchange, Job, Session, Waiting};
use super::script::{self, Step};
use super::types::{Op, OpError, Outgoing};
use super::windows::Change;
use virtio_msg::{DevNum, DeviceStatus, Frame, Instant, Message};

/// Whether the other side was asked if it lives, while a request is outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ping {
    /// It is given up at the deadline.
    Never,
    /// It will be asked.
    Due(Instant),
    /// It was asked.
    Sent,
    /// It has answered.
    Answered,
}

/// Times a CLAIM is waited for before it is sent again on another connection, if it was the answer that got lost.
const CLAIM_PERIODS: u32 = 5;

/// What the PING carries; the token says which one is answered.
const DATA: u32 = 0;

impl Session {
    /// Whether, and when, to ask about a request that is sent now.
    pub(super) fn ping_for(&self, now: Instant, step: &Step) -> Ping {
        let lets_go = match step {
            Step::Status(status) => status.is_empty(),
            Step::ResetQueue(_) => true,
            // Answered when the device has let go of what it had over another connection.
            Step::Claim { release: false } => self.may_be_in_use(),
            _ => false,
        };
        let may_wait = match &self.job {
            Some(Job::Op { op, .. }) => {
                matches!(op, Op::SetStatus(_) | Op::StopQueue(_) | Op::Release)
            }
            Some(Job::Attach { .. }) => matches!(step, Step::Claim { .. }),
            Some(Job::Overdue { .. }) => true,
            _ => false,
        };
        if lets_go && may_wait {
            Ping::Due(now + self.options.request_timeout / 2)
        } else {
            Ping::Never
        }
    }

    /// Asks whether the other side lives, if it is time.
    pub(super) fn send_ping(&mut self, now: Instant) {
        let Some(exchange) = &mut self.exchange else {
            return;
        };
        if !matches!(exchange.ping, Ping::Due(at) if at <= now) {
            return;
        }
        exchange.ping = Ping::Sent;
        let frame = Frame::new(DevNum(0), exchange.token, Message::Ping { data: DATA });
        let mut bytes = vec![0; self.caps.max_message_size];
        if let Ok(len) = frame.encode(&mut bytes) {
            bytes.truncate(len);
            self.out.push_back(Outgoing {
                bytes,
                fds: Vec::new(),
            });
        }
    }

    /// Takes the answer to a PING. False: it is none that was asked for.
    pub(super) fn take_pong(&mut self, frame: &Frame<'_>) -> bool {
        match &mut self.exchange {
            Some(Exchange { ping, token, .. })
                if *ping == Ping::Sent
                    && *token == frame.token
                    && frame.message == (Message::Pong { data: DATA }) =>
            {
                *ping = Ping::Answered;
                true
            }
            _ => false,
        }
    }

    /// Goes on waiting for a device whose host lives, if its time is over. Whoever has asked does not wait any longer.
    pub(super) fn wait_longer(&mut self, now: Instant) {
        let Some(exchange) = &mut self.exchange else {
            return;
        };
        if exchange.deadline > now || exchange.ping != Ping::Answered {
            return;
        }
        // A CLAIM is not sent twice on a connection: it is counted there.
        let claims = matches!(exchange.step, Step::Claim { .. });
        if claims && exchange.waited >= CLAIM_PERIODS {
            return;
        }
        exchange.waited += 1;
        exchange.deadline = now + self.options.request_timeout;
        exchange.ping = Ping::Due(now + self.options.request_timeout / 2);
        match self.job.take() {
            Some(Job::Op {
                id, op, planned, ..
            }) => {
                self.counters.overdue += 1;
                self.job = Some(Job::Overdue { op, planned });
                self.finish(id, Err(OpError::Busy));
                // Once more, if it was the answer that got lost: the device does one after the other.
                let asks_again =
                    |exchange: &mut Exchange| !matches!(exchange.step, Step::Claim { .. });
                if let Some(exchange) = self.exchange.take_if(asks_again) {
                    self.script.push_front(exchange.step);
                }
            }
            other => self.job = other,
        }
    }

    /// Whether the device has not let go yet of what it was asked to.
    pub(super) fn is_overdue(&self) -> bool {
        matches!(self.job, Some(Job::Overdue { .. }))
    }

    /// Whether a guest that has ended is being released.
    pub(super) fn is_releasing(&self) -> bool {
        let op = match &self.job {
            Some(Job::Op { op, .. } | Job::Overdue { op, .. }) => op,
            _ => return false,
        };
        matches!(op, Op::Release)
    }

    /// Answers what need not wait for the device.
    pub(super) fn answer_overdue(&mut self) {
        let releases = self.is_releasing();
        let mut left = std::mem::take(&mut self.waiting);
        while let Some(Waiting { id, op, deadline }) = left.pop_front() {
            match &op {
                Op::Release => {
                    self.release_overdue(Waiting { id, op, deadline });
                    self.waiting.append(&mut left);
                    return;
                }
                Op::Describe
                | Op::ReadConfig { .. }
                | Op::KeepInflight(_)
                | Op::SetRenewal(_)
                | Op::SetNotify { .. } => {
                    let result = self.validate(&op).map(|planned| {
                        let result = self.outcome_from_record(&op);
                        self.apply(op, planned, self.record.status);
                        result
                    });
                    self.finish(id, result.and_then(|result| result));
                }
                Op::Claim if self.record.claimed && !releases => {
                    let result = self.outcome_from_record(&op);
                    self.finish(id, result);
                }
                Op::SetWindows(_) | Op::ChangeWindows { .. } => {
                    self.finish(id, Err(OpError::Busy));
                }
                _ => self.waiting.push_back(Waiting { id, op, deadline }),
            }
        }
    }

    /// The guest ends while the device has not let go: all that goes with that is done when it has.
    fn release_overdue(&mut self, waiting: Waiting) {
        let Waiting { id, op, deadline } = waiting;
        let Some(Job::Overdue {
            op: before,
            planned,
        }) = self.job.take()
        else {
            self.waiting.push_back(Waiting { id, op, deadline });
            return;
        };
        if !matches!(before, Op::Release) {
            self.record.windows.abandon(planned);
            let outstanding = self.exchange.as_ref().map(|exchange| &exchange.step);
            let resets = matches!(outstanding, Some(Step::Status(status)) if status.is_empty());
            self.script = script::of_op(&op, &Change::default(), &self.record, &self.caps);
            if resets && matches!(self.script.front(), Some(Step::Status(_))) {
                self.script.pop_front();
            }
        }
        self.job = Some(Job::Op {
            id,
            op,
            planned: Change::default(),
            deadline,
            status: DeviceStatus::RESET,
        });
    }
}
