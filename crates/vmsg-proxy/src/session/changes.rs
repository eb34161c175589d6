// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to a session from outside: devices that differ, requests that fail, links that end, events of the device.

use super::machine::{CLAIM_PAUSE, Failure, Job, Phase, Session, Waiting, blank_facts};
use super::operations::asked_status;
use super::types::{Event, Op, OpError, REMOVED, ResetReason, Target};
use super::{common_memory, script};
use std::collections::BTreeMap;
use virtio_msg::{DevNum, DeviceState, DeviceStatus, Frame, Instant, Message, QueueIndex, feature};

impl Session {
    /// Whether the device that was found can stand in for the one the guest knows. If so it takes its place.
    pub(super) fn check_device(&mut self) -> Result<(), ResetReason> {
        let found = std::mem::replace(&mut self.found, blank_facts(DevNum(0)));
        self.found.number = found.number;
        self.found.info = found.info;
        if let Some(known) = self.facts.as_ref().filter(|_| self.record.is_negotiated()) {
            let (was, is) = (&known.info, &found.info);
            if was.device_id != is.device_id {
                return Err(ResetReason::DeviceIdChanged {
                    was: was.device_id,
                    is: is.device_id,
                });
            }
            if was.max_queues != is.max_queues {
                return Err(ResetReason::QueuesChanged {
                    was: was.max_queues,
                    is: is.max_queues,
                });
            }
            if was.config_size != is.config_size {
                return Err(ResetReason::ConfigSizeChanged {
                    was: was.config_size,
                    is: is.config_size,
                });
            }
            let missing = self.record.features.difference(&found.offered);
            if !missing.is_empty() {
                return Err(ResetReason::FeaturesMissing(missing));
            }
            if self.record.is_live() && self.record.features.bit(feature::RING_PACKED) {
                return Err(ResetReason::PackedLive);
            }
            for (&queue, setup) in &self.record.queues {
                let max = found
                    .queue_sizes
                    .get(QueueIndex(queue).to_usize())
                    .copied()
                    .unwrap_or(0);
                if setup.size > max {
                    return Err(ResetReason::QueueTooLarge {
                        queue,
                        size: setup.size,
                        max,
                    });
                }
            }
        }
        self.facts = Some(found);
        self.removed = false;
        self.waited_in_vain = false;
        if !self.record.windows.is_empty() {
            if let Some(trouble) = &self.common_trouble {
                return Err(ResetReason::OtherMemory(trouble.clone()));
            }
            let possible = if self.caps.has_common_views() {
                self.record.windows.are_in_common()
            } else if self.caps.runtime_windows {
                self.caps.passes_fds
            } else {
                !self.common.is_empty()
            };
            if !possible {
                return Err(ResetReason::BusCannot("lend memory"));
            }
            if !self.caps.runtime_windows {
                let windows = self.record.windows.iter().map(|lent| &lent.window);
                common_memory::left_out(windows, &self.common, false)
                    .map_err(ResetReason::OtherMemory)?;
            }
        }
        let queues = if self.renews() {
            &BTreeMap::new()
        } else {
            &self.record.queues
        };
        for (&queue, setup) in queues {
            self.check_queue(queue, setup)
                .map_err(|error| match error {
                    OpError::NeedsReset(reason) => reason,
                    _ => ResetReason::BusCannot("reach a queue in the memory it has in common"),
                })?;
        }
        Ok(())
    }

    pub(super) fn attached(&mut self, had_config: Option<Vec<u8>>) {
        let replayed = !self.record.is_blank();
        self.phase = Phase::Ready;
        self.counters.replays += u64::from(replayed);
        self.push_once(Event::Ready {
            replayed,
            new_host: self.new_host,
        });
        if had_config.is_some_and(|had| had != self.record.config) {
            self.push_once(Event::ConfigChanged);
        }
    }

    /// Ends the script under way.
    pub(super) fn fail(&mut self, now: Instant, failure: Failure) {
        self.script.clear();
        match (self.job.take(), failure) {
            (None, _) => {}
            (Some(Job::Attach { .. }), Failure::Absent) if self.look_again => self.attach(now),
            (Some(Job::Attach { .. }), Failure::Absent) => {
                self.note_removal();
                self.phase = Phase::Absent;
                self.push_once(Event::DeviceAbsent);
            }
            (Some(job @ Job::Attach { claim_until, .. }), Failure::Held(_))
                if now < claim_until =>
            {
                // The connection before this one may not be buried yet.
                self.job = Some(job);
                self.script = self.replay();
                self.pause = Some(now + CLAIM_PAUSE);
            }
            (
                Some(Job::Attach {
                    replaying: true, ..
                }),
                Failure::Refused { what, code },
            ) => {
                self.break_down(ResetReason::ReplayRefused { what, code });
            }
            (Some(Job::Attach { .. }), Failure::Held(holder)) => {
                self.break_down(ResetReason::Held(holder))
            }
            (Some(Job::Attach { .. }), Failure::Reset(reason)) => self.break_down(reason),
            (Some(Job::Attach { .. }), Failure::Refused { .. }) => {
                self.link_fault("the device host refused to be asked")
            }
            (Some(Job::Attach { .. } | Job::Refresh | Job::Tidy), Failure::Bad(why)) => {
                self.counters.bad_answers += 1;
                self.link_fault(why);
            }
            (Some(Job::Tidy), _) => self.link_fault("the device host does not let go of a file"),
            (Some(Job::Refresh), _) => {}
            (Some(Job::Overdue { op, planned }), _) => {
                self.record.windows.abandon(planned);
                if matches!(op, Op::Release) {
                    self.record.release();
                }
                self.link_fault("the device host is in an unknown state");
            }
            (
                Some(Job::Op {
                    id,
                    op,
                    planned,
                    deadline,
                    status,
                }),
                Failure::Held(_),
            ) if now + CLAIM_PAUSE < deadline => {
                self.script = script::of_op(&op, &planned, &self.record, &self.caps);
                self.job = Some(Job::Op {
                    id,
                    op,
                    planned,
                    deadline,
                    status,
                });
                self.pause = Some(now + CLAIM_PAUSE);
            }
            (Some(job @ Job::Op { .. }), Failure::Bad(why)) if job.changes_windows() => {
                // As if nothing had been answered: what is unmapped must not stay mapped.
                self.counters.bad_answers += 1;
                self.job = Some(job);
                self.link_fault(why);
            }
            (
                Some(Job::Op {
                    id, op, planned, ..
                }),
                failure,
            ) => {
                self.record.windows.abandon(planned);
                let error = match failure {
                    Failure::Bad(why) => {
                        self.counters.bad_answers += 1;
                        OpError::BadAnswer(why)
                    }
                    Failure::Refused { what, code } => OpError::Refused { what, code },
                    Failure::Reset(reason) => OpError::NeedsReset(reason),
                    Failure::Held(holder) => OpError::Held(holder),
                    Failure::Absent => OpError::NoDevice,
                };
                // After these nobody knows what the other side has: start over from the record.
                let unclear = matches!(error, OpError::BadAnswer(_))
                    || matches!(op, Op::SetWindows(_) | Op::Release)
                    // Others of its views were asked for at the same time.
                    || (self.caps.has_common_views() && matches!(op, Op::ChangeWindows { .. }));
                if matches!(op, Op::Release) {
                    self.record.release();
                }
                self.finish(id, Err(error));
                if unclear {
                    self.link_fault("the device host is in an unknown state");
                }
            }
        }
    }

    pub(super) fn break_down(&mut self, reason: ResetReason) {
        self.phase = Phase::Broken(reason.clone());
        self.record.status.insert(DeviceStatus::NEEDS_RESET);
        self.push_once(Event::NeedsReset(reason));
    }

    /// Gives the connection up.
    pub(super) fn link_fault(&mut self, why: &'static str) {
        self.counters.link_faults += 1;
        self.lose_link();
        self.push_once(Event::LinkFault(why));
    }

    /// Nothing outstanding will be answered any more. What was being done is recorded as if it had been: the replay does it.
    pub(super) fn lose_link(&mut self) {
        self.hold_back();
        self.phase = Phase::Down;
        self.exchange = None;
        self.pause = None;
        self.script.clear();
        self.out.clear();
        self.kicks.clear();
        self.config_stale = false;
        self.record.forget_vectors();
        let job = self.job.take();
        if let Some(Job::Overdue { op, planned }) = job {
            // Whoever was asked in vain is gone, or will be told anew.
            self.apply(op, planned, DeviceStatus::RESET);
        } else if let Some(Job::Op {
            id,
            op,
            planned,
            deadline,
            ..
        }) = job
        {
            if self.is_held_back(&op) {
                self.hold_back_op(Waiting { id, op, deadline }, planned);
                self.config_read = None;
                self.record.windows.forget_idle();
                return;
            }
            if self.recordable(&op) {
                let result = self.outcome_from_record(&op);
                let status = asked_status(&op);
                self.apply(op, planned, status);
                self.record_running();
                self.finish(id, result);
            } else {
                self.finish(id, Err(OpError::LinkLost));
            }
        }
        self.config_read = None;
        self.record.windows.forget_idle();
    }

    /// An interrupted operation may have made the device move.
    pub(super) fn record_running(&mut self) {
        if self.record.is_live() {
            self.record.mark_running();
        }
    }

    fn handle_device_event(&mut self, now: Instant, device: DevNum, state: DeviceState) {
        let wanted = match &self.target {
            Target::Number(number) => *number == device,
            // It may have another number than the one before.
            Target::Name(_) => true,
        };
        match (state, &self.phase) {
            (DeviceState::Ready, Phase::Absent) if wanted => self.attach(now),
            // The list of devices that is being looked through may be older.
            (DeviceState::Ready, Phase::Attaching) if wanted => self.look_again = true,
            (DeviceState::Removed, Phase::Ready | Phase::Broken(_) | Phase::Attaching)
                if self.found.number == device =>
            {
                self.handle_removal();
            }
            _ => {}
        }
    }

    /// The device is gone, and what was in flight in its queues with it. What the guest has negotiated stays recorded: another device may
    /// be found in its place.
    fn handle_removal(&mut self) {
        self.removed = true;
        self.note_removal();
        if self.record.is_live() {
            self.push_once(Event::NeedsReset(ResetReason::Removed));
        }
        if self.caps.passes_fds {
            // What the host keeps for this connection belonged to that device: begin with a new one.
            self.link_fault(REMOVED);
        } else {
            // There it belonged to the device alone, and others use the connection.
            self.lose_link();
            self.links += 1;
            self.phase = Phase::Absent;
            self.push_once(Event::DeviceAbsent);
        }
    }

    pub(super) fn handle_event(&mut self, now: Instant, frame: &Frame<'_>) {
        match frame.message {
            Message::EventDevice { device, state } => self.handle_device_event(now, device, state),
            _ if frame.dev_num != self.number() || self.facts.is_none() => {
                self.counters.unexpected += 1
            }
            Message::EventConfig(event) => {
                if event.status.contains(DeviceStatus::NEEDS_RESET)
                    && !self.record.status.contains(DeviceStatus::NEEDS_RESET)
                {
                    self.record.status.insert(DeviceStatus::NEEDS_RESET);
                    self.push_once(Event::NeedsReset(ResetReason::DeviceReported));
                }
                let at = usize::try_from(event.offset).unwrap_or(usize::MAX);
                let place = at
                    .checked_add(event.data.len())
                    .and_then(|end| self.record.config.get_mut(at..end));
                match place {
                    Some(place) if !event.data.is_empty() && self.config_read.is_none() => {
                        place.copy_from_slice(event.data);
                        self.record.generation = event.generation.0;
                        self.push_once(Event::ConfigChanged);
                    }
                    _ => self.config_stale = true,
                }
            }
            Message::EventUsed { queue } if self.record.queues.contains_key(&queue.0) => {
                self.push_once(Event::QueueUsed(queue))
            }
            _ => self.counters.unexpected += 1,
        }
    }
}
