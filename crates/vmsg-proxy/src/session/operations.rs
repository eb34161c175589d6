// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operations: what is checked before they begin, what they change in the record, and what is answered while the device is away.

use super::machine::{ConfigRead, Job, Phase, Session, Waiting};
use super::record::Notify;
use super::types::{
    DeviceFacts, Event, Op, OpError, OpId, Outcome, QueueSetup, ResetReason, ResumeAt, STARTS_OVER,
    Window,
};
use super::windows::Change;
use super::{common_memory, script};
use crate::places::Found;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{DeviceStatus, FeatureSet, Instant, feature};

/// How much longer an operation may take for each of its requests, where one window is many views.
const VIEW_TIME: Duration = Duration::from_millis(2);

impl Session {
    /// Takes the first operation that can be begun, or answered, now.
    pub(super) fn start_next(&mut self, now: Instant) -> bool {
        let online = self.phase == Phase::Ready;
        if self.phase == Phase::Attaching {
            return false;
        }
        // Nothing overtakes what is held back: it may be about the same windows.
        let mut held_back = false;
        let startable = |w: &Waiting| {
            held_back |= self.is_held_back(&w.op);
            let broken = matches!(self.phase, Phase::Broken(_));
            // Nobody has to wait for the answer of a device that was taken away.
            let gone = self.removed && self.phase == Phase::Absent;
            let looks = matches!(w.op, Op::Describe | Op::ReadConfig { .. });
            let free = !held_back || looks;
            online || gone || (free && (broken || self.recordable(&w.op)))
        };
        let Some(at) = self.waiting.iter().position(startable) else {
            return false;
        };
        let Some(Waiting { id, op, .. }) = self.waiting.remove(at) else {
            return false;
        };
        let planned = match self.validate(&op) {
            Ok(planned) => planned,
            Err(error) => {
                self.finish(id, Err(error));
                return true;
            }
        };
        if matches!(op, Op::SetQueue(..)) {
            let queues = self.facts.as_ref().map_or(0, |f| f.queue_sizes.len());
            self.record.prepare_inflight(queues);
        }
        if let Phase::Broken(reason) = &self.phase {
            let reason = reason.clone();
            self.answer_broken(id, op, planned, reason);
            return true;
        }
        if !online && !self.recordable(&op) {
            self.record.windows.abandon(planned);
            self.finish(id, Err(OpError::NoDevice));
            return true;
        }
        if !online {
            let result = self.outcome_from_record(&op);
            let status = asked_status(&op);
            self.apply(op, planned, status);
            self.finish(id, result);
            return true;
        }
        if let Op::SetNotify { queue, kick, call } = &op {
            self.record.set_notify(
                queue.0,
                Notify {
                    kick: kick.clone(),
                    call: call.clone(),
                },
            );
        }
        self.script = script::of_op(&op, &planned, &self.record, &self.caps);
        self.ask_first(&op);
        if let Op::ReadConfig { offset, len } = op {
            self.config_read = Some(ConfigRead::new(offset, len));
            if len == 0 {
                self.script.clear();
            }
        }
        // Each view is a request of its own.
        let views = u32::try_from(self.script.len()).unwrap_or(u32::MAX);
        let extra = VIEW_TIME.saturating_mul(if self.caps.has_common_views() {
            views
        } else {
            0
        });
        let deadline = now + (self.options.operation_timeout + extra);
        self.job = Some(Job::Op {
            id,
            op,
            planned,
            deadline,
            status: DeviceStatus::RESET,
        });
        true
    }

    /// Whether the record is enough to answer while the device is away.
    pub(super) fn recordable(&self, op: &Op) -> bool {
        // What a guest has mapped can be noted before the device was ever seen.
        matches!(op, Op::ChangeWindows { .. })
            || (self.facts.is_some() && !matches!(op, Op::WriteConfig { .. } | Op::SharedMemory(_)))
    }

    pub(super) fn answer_broken(&mut self, id: OpId, op: Op, planned: Change, reason: ResetReason) {
        let starts_over =
            matches!(&op, Op::Release) || matches!(&op, Op::SetStatus(status) if status.is_empty());
        let known = self.facts.is_some();
        let harmless = matches!(
            op,
            Op::StopQueue(_)
                | Op::SetNotify { .. }
                | Op::KeepInflight(_)
                | Op::SetRenewal(_)
                | Op::ChangeWindows { .. }
        ) || (known && matches!(op, Op::Describe | Op::ReadConfig { .. }));
        if !starts_over && !harmless {
            self.record.windows.abandon(planned);
            self.finish(id, Err(OpError::NeedsReset(reason)));
            return;
        }
        let result = self.outcome_from_record(&op);
        self.apply(op, planned, DeviceStatus::RESET);
        self.finish(id, result);
        if starts_over {
            self.link_fault(STARTS_OVER);
        }
    }

    pub(super) fn validate(&mut self, op: &Op) -> Result<Change, OpError> {
        let online = self.phase == Phase::Ready;
        match op {
            Op::SetWindows(windows) => {
                if windows.len() > self.options.max_windows {
                    return Err(OpError::Invalid("too many windows"));
                }
                let places = self.find_places(windows, false)?;
                if places.iter().map(count).sum::<usize>() > self.options.max_views {
                    return Err(OpError::Invalid("memory in too many pieces"));
                }
                if !windows.is_empty()
                    && (online || !self.common.is_empty() || self.common_trouble.is_some())
                {
                    self.check_lendable(windows, &places, false)?;
                }
                self.record
                    .windows
                    .plan_table(windows, &places)
                    .ok_or(OpError::Invalid(
                        "a window is empty, too large, or overlaps another",
                    ))
            }
            Op::SetFeatures(features) => {
                let offered = self
                    .facts
                    .as_ref()
                    .map_or(FeatureSet::EMPTY, |facts| facts.offered);
                let foreign = features.difference(&offered);
                if foreign.is_empty() {
                    Ok(Change::default())
                } else {
                    Err(OpError::NotOffered(foreign))
                }
            }
            Op::SetQueue(queue, setup) => {
                let packed = self.record.features.bit(feature::RING_PACKED);
                match self
                    .facts
                    .as_ref()
                    .and_then(|facts| facts.queue_sizes.get(queue.to_usize()))
                {
                    None => Err(OpError::Invalid("no such queue")),
                    Some(&max) if setup.size > max => Err(OpError::Invalid(
                        "the queue is larger than the device allows",
                    )),
                    Some(_) if setup.size == 0 || !(packed || setup.size.is_power_of_two()) => {
                        Err(OpError::Invalid("no queue can have this size"))
                    }
                    Some(_) => {
                        if online {
                            self.check_queue(queue.0, setup)?;
                        }
                        Ok(Change::default())
                    }
                }
            }
            Op::StopQueue(queue) | Op::SetNotify { queue, .. } => {
                let known = self
                    .facts
                    .as_ref()
                    .is_some_and(|facts| queue.to_usize() < facts.queue_sizes.len());
                if known {
                    Ok(Change::default())
                } else {
                    Err(OpError::Invalid("no such queue"))
                }
            }
            Op::ReadConfig { offset, len } => self.check_range(*offset, *len),
            Op::WriteConfig { offset, data } => {
                let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                self.check_range(*offset, len)
            }
            Op::ChangeWindows { remove, add } => {
                let places = self.find_places(add, true)?;
                let (windows, new) = (&self.record.windows, places.iter().map(count));
                let left = windows.len().saturating_sub(windows.len_of(remove));
                if left.saturating_add(new.sum()) > self.options.max_views {
                    return Err(OpError::Invalid("too many windows"));
                }
                if !add.is_empty()
                    && (online || !self.common.is_empty() || self.common_trouble.is_some())
                {
                    self.check_lendable(add, &places, true)?;
                }
                let change = self.record.windows.plan_change(remove, add, &places);
                change.ok_or(OpError::Invalid(
                    "a window is not there, empty, too large, or overlaps another",
                ))
            }
            Op::SharedMemory(_)
            | Op::Describe
            | Op::Claim
            | Op::SetStatus(_)
            | Op::KeepInflight(_)
            | Op::SetRenewal(_)
            | Op::Release => Ok(Change::default()),
        }
    }

    /// Whether the bus can make `windows` the device's: it lends them, or has them in common. `some`: they are not all there are.
    fn check_lendable(
        &mut self,
        windows: &[Window],
        places: &[Option<Arc<Found>>],
        some: bool,
    ) -> Result<(), OpError> {
        if self.caps.has_common_views() && places.iter().all(Option::is_some) {
            return Ok(());
        }
        if self.caps.runtime_windows {
            return if self.caps.passes_fds {
                Ok(())
            } else {
                Err(OpError::BusCannot("lend memory"))
            };
        }
        if let Some(trouble) = &self.common_trouble {
            return Err(OpError::OtherMemory(trouble.clone()));
        }
        if self.common.is_empty() {
            return Err(OpError::BusCannot("lend memory"));
        }
        let left_out =
            common_memory::left_out(windows, &self.common, some).map_err(OpError::OtherMemory)?;
        for window in left_out {
            self.tell_left_out(window);
        }
        Ok(())
    }

    /// Says that a window cannot be the device's.
    pub(super) fn tell_left_out(&mut self, window: &Window) {
        self.events
            .retain(|event| !matches!(event, Event::LeftOut { .. }));
        self.events.push_back(Event::LeftOut {
            base: window.base,
            len: window.len,
        });
    }

    /// Whether a queue can be set up on a bus that is as it is now.
    pub(super) fn check_queue(&self, queue: u32, setup: &QueueSetup) -> Result<(), OpError> {
        if !self.can_resume(setup.resume) {
            return Err(OpError::NeedsReset(ResetReason::CannotResume { queue }));
        }
        if !self.caps.runtime_windows
            && !self.common.is_empty()
            && !common_memory::holds(setup, &self.common)
        {
            return Err(OpError::Invalid(
                "the queue lies outside of the memory that the bus has in common",
            ));
        }
        Ok(())
    }

    /// Whether the device can be made to begin there. Where QUEUE_RESUME does not exist our own hosts begin at the used index that stands
    /// in the ring; others at 0, and would process again what the guest has long had back.
    fn can_resume(&self, at: ResumeAt) -> bool {
        match at {
            _ if self.caps.runtime_windows => true,
            ResumeAt::Start => true,
            ResumeAt::UsedIndex => self.is_ours(),
            ResumeAt::Explicit { avail, used } => avail == used && self.is_ours(),
        }
    }

    /// Whether the device is one of this project's hosts, by what GET_DEVICE_INFO says.
    pub(super) fn is_ours(&self) -> bool {
        self.facts.as_ref().is_some_and(DeviceFacts::is_ours)
    }

    pub(super) fn check_range(&self, offset: u32, len: u32) -> Result<Change, OpError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.config_size() => Ok(Change::default()),
            _ => Err(OpError::Invalid("outside of the configuration space")),
        }
    }

    /// What a finished script means for its operation.
    pub(super) fn outcome(&mut self, op: &Op, status: DeviceStatus) -> Result<Outcome, OpError> {
        match op {
            Op::SharedMemory(_) => Ok(Outcome::SharedMemory(self.region.take())),
            Op::SetStatus(_) => Ok(Outcome::Status(status)),
            Op::ReadConfig { .. } => Ok(Outcome::Config(
                self.config_read.take().map_or(Vec::new(), |read| read.data),
            )),
            Op::Describe => self
                .facts
                .clone()
                .map(Outcome::Device)
                .ok_or(OpError::NoDevice),
            _ => Ok(Outcome::Done),
        }
    }

    pub(super) fn outcome_from_record(&self, op: &Op) -> Result<Outcome, OpError> {
        match op {
            Op::SetStatus(status) => Ok(Outcome::Status(*status)),
            Op::ReadConfig { offset, len } => {
                let range = usize::try_from(*offset)
                    .ok()
                    .zip(usize::try_from(*len).ok());
                let data =
                    range.and_then(|(at, len)| self.record.config.get(at..at.checked_add(len)?));
                data.map(|data| Outcome::Config(data.to_vec()))
                    .ok_or(OpError::Invalid("outside of the configuration space"))
            }
            Op::Describe => self
                .facts
                .clone()
                .map(Outcome::Device)
                .ok_or(OpError::NoDevice),
            _ => Ok(Outcome::Done),
        }
    }

    /// Records what an operation has changed.
    pub(super) fn apply(&mut self, op: Op, planned: Change, status: DeviceStatus) {
        let record = &mut self.record;
        match op {
            Op::Claim => record.claimed = true,
            Op::SetWindows(_) | Op::ChangeWindows { .. } => record.windows.apply(planned),
            Op::SetFeatures(features) => record.features = features,
            Op::SetStatus(asked) if asked.is_empty() => record.reset(),
            Op::SetStatus(_) => {
                record.status = status;
                if status.contains(DeviceStatus::NEEDS_RESET) {
                    self.push_once(Event::NeedsReset(ResetReason::DeviceReported));
                }
            }
            Op::SetQueue(queue, setup) => {
                record.queues.insert(queue.0, setup);
                if record.is_live() && self.phase != Phase::Down {
                    record.mark_running();
                }
            }
            Op::StopQueue(queue) => {
                record.remove_queue(queue.0);
            }
            Op::SetNotify { queue, kick, call } => {
                record.set_notify(queue.0, Notify { kick, call });
            }
            Op::KeepInflight(memory) => record.inflight.front = memory,
            Op::SetRenewal(renewal) => record.renewal = renewal,
            Op::Release => record.release(),
            Op::SharedMemory(_) | Op::Describe | Op::ReadConfig { .. } | Op::WriteConfig { .. } => {
            }
        }
    }
}

/// How many windows or views one is on the bus.
fn count(found: &Option<Arc<Found>>) -> usize {
    found.as_ref().map_or(1, |found| found.places.len())
}

/// The status an operation asks for, if that is what it does.
pub(super) fn asked_status(op: &Op) -> DeviceStatus {
    match op {
        Op::SetStatus(status) => *status,
        _ => DeviceStatus::RESET,
    }
}
