// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operations: what is checked before they begin, what they change in the record, and what is answered while the device is away.

use super::machine::{ConfigRead, Job, Phase, Session, Waiting};
use super::record::{LentWindow, Notify};
use super::types::{
    DeviceFacts, Event, Op, OpError, OpId, Outcome, QueueSetup, ResetReason, ResumeAt, Window,
};
use super::{common_memory, script};
use virtio_msg::{DeviceStatus, FeatureSet, Instant, feature};

impl Session {
    /// Takes the first operation that can be begun, or answered, now.
    pub(super) fn start_next(&mut self, now: Instant) -> bool {
        let online = self.phase == Phase::Ready;
        if self.phase == Phase::Attaching {
            return false;
        }
        let startable = |w: &Waiting| {
            online || matches!(self.phase, Phase::Broken(_)) || self.recordable(&w.op)
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
            self.answer_broken(id, op, reason);
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
        if let Op::ReadConfig { offset, len } = op {
            self.config_read = Some(ConfigRead::new(offset, len));
            if len == 0 {
                self.script.clear();
            }
        }
        let deadline = now + self.options.operation_timeout;
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
        self.facts.is_some() && !matches!(op, Op::WriteConfig { .. } | Op::SharedMemory(_))
    }

    pub(super) fn answer_broken(&mut self, id: OpId, op: Op, reason: ResetReason) {
        let starts_over =
            matches!(&op, Op::Release) || matches!(&op, Op::SetStatus(status) if status.is_empty());
        let known = self.facts.is_some();
        let harmless = matches!(
            op,
            Op::StopQueue(_) | Op::SetNotify { .. } | Op::KeepInflight(_)
        ) || (known && matches!(op, Op::Describe | Op::ReadConfig { .. }));
        if !starts_over && !harmless {
            self.finish(id, Err(OpError::NeedsReset(reason)));
            return;
        }
        let result = self.outcome_from_record(&op);
        self.apply(op, Vec::new(), DeviceStatus::RESET);
        self.finish(id, result);
        if starts_over {
            self.link_fault("the device starts over after a failed replay");
        }
    }

    pub(super) fn validate(&mut self, op: &Op) -> Result<Vec<LentWindow>, OpError> {
        let online = self.phase == Phase::Ready;
        match op {
            Op::SetWindows(windows) => {
                if windows.len() > self.options.max_windows {
                    return Err(OpError::Invalid("too many windows"));
                }
                if !windows.is_empty()
                    && (online || !self.common.is_empty() || self.common_trouble.is_some())
                {
                    self.check_lendable(windows)?;
                }
                self.record.plan_windows(windows).ok_or(OpError::Invalid(
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
                    Ok(Vec::new())
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
                        Ok(Vec::new())
                    }
                }
            }
            Op::StopQueue(queue) | Op::SetNotify { queue, .. } => {
                let known = self
                    .facts
                    .as_ref()
                    .is_some_and(|facts| queue.to_usize() < facts.queue_sizes.len());
                if known {
                    Ok(Vec::new())
                } else {
                    Err(OpError::Invalid("no such queue"))
                }
            }
            Op::ReadConfig { offset, len } => self.check_range(*offset, *len),
            Op::WriteConfig { offset, data } => {
                let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
                self.check_range(*offset, len)
            }
            Op::ChangeWindows { .. } => Err(OpError::BusCannot("change single windows")),
            Op::SharedMemory(_)
            | Op::Describe
            | Op::Claim
            | Op::SetStatus(_)
            | Op::KeepInflight(_)
            | Op::Release => Ok(Vec::new()),
        }
    }

    /// Whether the bus can make `windows` the device's: it lends them, or has them in common.
    fn check_lendable(&mut self, windows: &[Window]) -> Result<(), OpError> {
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
            common_memory::left_out(windows, &self.common).map_err(OpError::OtherMemory)?;
        for window in left_out {
            self.events
                .retain(|event| !matches!(event, Event::LeftOut { .. }));
            self.events.push_back(Event::LeftOut {
                base: window.base,
                len: window.len,
            });
        }
        Ok(())
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

    pub(super) fn check_range(&self, offset: u32, len: u32) -> Result<Vec<LentWindow>, OpError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.config_size() => Ok(Vec::new()),
            _ => Err(OpError::Invalid("outside of the configuration space")),
        }
    }

    /// What a finished script means for its operation.
    pub(super) fn outcome(&mut self, op: &Op, status: DeviceStatus) -> Result<Outcome, OpError> {
        match op {
            Op::SharedMemory(_) => Ok(Outcome::SharedMemory(None)),
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
    pub(super) fn apply(&mut self, op: Op, planned: Vec<LentWindow>, status: DeviceStatus) {
        let record = &mut self.record;
        match op {
            Op::Claim => record.claimed = true,
            Op::SetWindows(_) => record.windows = planned,
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
            Op::Release => record.release(),
            Op::ChangeWindows { .. }
            | Op::SharedMemory(_)
            | Op::Describe
            | Op::ReadConfig { .. }
            | Op::WriteConfig { .. } => {}
        }
    }
}

/// The status an operation asks for, if that is what it does.
pub(super) fn asked_status(op: &Op) -> DeviceStatus {
    match op {
        Op::SetStatus(status) => *status,
        _ => DeviceStatus::RESET,
    }
}
