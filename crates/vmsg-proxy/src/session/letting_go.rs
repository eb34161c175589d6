// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When memory can be used for other things, after a connection was lost.
//!
//! A device host whose connection ends may have requests under way, and lives on with them: until they end they write to the memory that was
//! lent, whoever has it by then. That they have ended is known when the host's process has ended
//! ([`Session::handle_host_ended`]), when there is another host at its place, or when the same host has answered a CLAIM on the next
//! connection, which it does when the device has let go of everything; on a bus without claims, a reset. Until then what takes memory back is not said to be done, and
//! no other guest gets the device. Of a host whose process cannot be seen from here, as on another machine, it is taken for granted after [`UNSEEN`].

use super::machine::{Job, Phase, Session, Waiting};
use super::script::Step;
use super::types::{Op, OpError, STARTS_OVER};
use super::windows::Change;
use std::collections::VecDeque;
use std::time::Duration;
use virtio_msg::{DeviceStatus, Instant};

/// How long a host that cannot be seen may have requests under way after the end of its connection. As long as a medium takes that is about to fail.
const UNSEEN: Duration = Duration::from_secs(30);
/// What is being taken back when the connection ends waits at least so long for the news that the host has ended.
const GRACE: Duration = Duration::from_millis(200);
/// What is taken back later than that waits so long at most.
const LATER: Duration = Duration::from_millis(100);
/// Pause before a host that has not let go is asked again.
const ASK_PAUSE: Duration = Duration::from_millis(500);

/// Who may still use what was lent.
#[derive(Debug, Default)]
pub(super) struct LettingGo {
    /// The device host has got a queue over this connection, and was not reset since.
    in_use: bool,
    /// The end of its process will be told.
    seen: bool,
    /// The host of a connection that has ended.
    lost: Option<Lost>,
    /// When to ask it next.
    ask_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Lost {
    since: Instant,
    /// Then it is taken for gone. `None`: when that is told.
    until: Option<Instant>,
}

impl Session {
    /// Whether the end of the device host's process will be told by [`Self::handle_host_ended`]. To be said before [`Self::handle_link_up`].
    pub fn set_host_seen(&mut self, seen: bool) {
        self.letting_go.seen = seen;
    }

    /// The process of the device host whose connection was lost has ended: it does not use any memory any more.
    pub fn handle_host_ended(&mut self, now: Instant) {
        self.now = now;
        self.has_let_go();
        self.pump(now);
    }

    /// Nobody uses what was lent over the connections of before.
    pub(super) fn has_let_go(&mut self) {
        self.letting_go.lost = None;
        self.letting_go.ask_at = None;
    }

    /// A step was sent.
    pub(super) fn note_use(&mut self, step: &Step) {
        self.letting_go.in_use |= matches!(step, Step::SetQueue { .. });
    }

    /// The device was reset, and says so when it is done with everything.
    pub(super) fn note_reset(&mut self) {
        self.letting_go.in_use = false;
        if !self.caps.claims {
            self.has_let_go();
        }
    }

    /// The device was taken off the bus, which a host does when it has let go.
    pub(super) fn note_removal(&mut self) {
        self.letting_go.in_use = false;
        self.has_let_go();
    }

    fn lost(&self) -> Option<Lost> {
        let lost = self.letting_go.lost;
        lost.filter(|lost| lost.until.is_none_or(|until| self.now < until))
    }

    /// Whether the device host of a connection before may have requests under way.
    pub(super) fn may_be_in_use(&self) -> bool {
        self.lost().is_some()
    }

    /// Whether `op` is not done before the host of a lost connection has let go, and cannot be asked of a host now.
    pub(super) fn is_held_back(&self, op: &Op) -> bool {
        let away = matches!(self.phase, Phase::Down | Phase::Broken(_));
        away && self.may_be_in_use() && self.takes_back(op)
    }

    /// Whether the guest, or another one, may use memory for other things when this is done.
    fn takes_back(&self, op: &Op) -> bool {
        match op {
            Op::SetStatus(status) => status.is_empty(),
            Op::StopQueue(_) | Op::Release => true,
            Op::ChangeWindows { remove, .. } => !remove.is_empty(),
            Op::SetWindows(table) => !self.record.windows.are_all_in(table),
            // Of another guest.
            Op::Claim => !self.record.claimed,
            _ => false,
        }
    }

    /// How long an operation that is held back may wait: right after the loss, for the host to come back. Later nobody stands still for it, and
    /// who wants to wait asks again.
    pub(super) fn patience_after_loss(&self) -> Duration {
        let since = self.lost().map_or(self.now, |lost| lost.since);
        let left = (since + self.options.operation_timeout).0;
        let left = Duration::from_nanos(left.saturating_sub(self.now.0));
        left.max(self.options.overdue_timeout.min(LATER))
    }

    /// The connection ends now, if there is one.
    pub(super) fn hold_back(&mut self) {
        if self.phase == Phase::Down {
            return;
        }
        if std::mem::take(&mut self.letting_go.in_use) {
            let until = (!self.letting_go.seen).then(|| self.now + UNSEEN);
            let since = self.now;
            self.letting_go.lost = Some(Lost { since, until });
        }
        self.letting_go.ask_at = None;
        if !self.may_be_in_use() {
            return;
        }
        // Whatever stands behind what is held back waits as long.
        let grace = self.now + GRACE;
        let mut waiting = std::mem::take(&mut self.waiting);
        for waiting in waiting.iter_mut().filter(|w| self.recordable(&w.op)) {
            waiting.deadline = waiting.deadline.max(grace);
        }
        self.waiting = waiting;
    }

    /// The connection has ended in the middle of an operation that takes memory back.
    pub(super) fn hold_back_op(&mut self, waiting: Waiting, planned: Change) {
        self.record.windows.abandon(planned);
        let deadline = waiting.deadline.max(self.now + GRACE);
        self.waiting.push_front(Waiting {
            deadline,
            ..waiting
        });
    }

    /// An operation is not waited for any more, because of what a host of before may do. What it takes back is recorded as taken back: no host gets
    /// it again.
    pub(super) fn give_up_held_back(&mut self, waiting: Waiting) {
        let Waiting { id, op, .. } = waiting;
        let error = match op {
            Op::Release => {
                self.record.release();
                OpError::StillInUse
            }
            Op::ChangeWindows { .. } => match self.validate(&op) {
                Ok(planned) => {
                    self.apply(op, planned, DeviceStatus::RESET);
                    OpError::StillInUse
                }
                Err(error) => error,
            },
            _ => OpError::Busy,
        };
        self.finish(id, Err(error));
    }

    /// Whether `op` only had to wait because of others that were held back, of which there are none any more.
    pub(super) fn stood_behind(&self, op: &Op) -> bool {
        let free = !self.waiting.iter().any(|w| self.is_held_back(&w.op));
        self.phase == Phase::Down && self.may_be_in_use() && self.recordable(op) && free
    }

    /// Whether somebody waits for a host that could be asked on a new connection.
    pub(super) fn wants_to_ask_anew(&self) -> bool {
        let starts_over = |w: &Waiting| match &w.op {
            Op::Release => true,
            Op::SetStatus(status) => status.is_empty(),
            _ => false,
        };
        matches!(self.phase, Phase::Broken(_))
            && self.may_be_in_use()
            && self.waiting.iter().any(starts_over)
    }

    /// Asks on a new connection, whose replay claims the device. A host without claims is asked here: it may be one that a replay does not get to.
    pub(super) fn ask_anew(&mut self) {
        if self.caps.claims {
            self.link_fault("the device has not let go of what another connection lent");
            return;
        }
        self.script = self.question();
        self.job = Some(Job::Overdue {
            op: Op::SetStatus(DeviceStatus::RESET),
            planned: Change::default(),
        });
    }

    /// A device that could not be replayed was reset after all: it is looked for again.
    pub(super) fn start_over_if_broken(&mut self) {
        if matches!(self.phase, Phase::Broken(_)) && !self.record.is_negotiated() {
            self.link_fault(STARTS_OVER);
        }
    }

    /// Asks a host that nobody uses whether it has let go. Where a guest is there, the replay has asked.
    pub(super) fn ask(&mut self, now: Instant) -> bool {
        let is_time = self.letting_go.ask_at.is_none_or(|at| at <= now);
        let nobody = if self.caps.claims {
            !self.record.claimed
        } else {
            !self.record.is_negotiated()
        };
        if !(self.phase == Phase::Ready && self.may_be_in_use() && nobody && is_time) {
            return false;
        }
        self.letting_go.ask_at = Some(now + ASK_PAUSE);
        self.script = self.question();
        self.job = Some(Job::Overdue {
            op: Op::Release,
            planned: Change::default(),
        });
        true
    }

    /// What is answered when the host has let go.
    fn question(&self) -> VecDeque<Step> {
        if self.caps.claims {
            [false, true].map(|release| Step::Claim { release }).into()
        } else {
            VecDeque::from([Step::Status(DeviceStatus::RESET)])
        }
    }

    /// Asks that before anything else, if a guest ends that has not asked: nothing else would be waited for.
    pub(super) fn ask_first(&mut self, op: &Op) {
        let unasked = self.may_be_in_use() && !self.record.claimed;
        if matches!(op, Op::Release) && unasked {
            let mut script = self.question();
            script.append(&mut self.script);
            self.script = script;
        }
    }

    /// When something is to be done about that.
    pub(super) fn letting_go_timeout(&self) -> Option<Instant> {
        let lost = self.lost()?;
        let held_back = self.waiting.iter().any(|w| self.is_held_back(&w.op));
        let idle = self.phase == Phase::Ready && self.job.is_none();
        let until = lost.until.filter(|_| held_back);
        until
            .into_iter()
            .chain(self.letting_go.ask_at.filter(|_| idle))
            .min()
    }
}
