// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of jobs when a connection ends, when they have waited too long, and when nobody wants them any more.

use std::time::{Duration, Instant};

use super::{Job, Jobs, Owner, PATIENCE, Part, copy};
use crate::nbd::replies::Expected;
use crate::{Completion, Failure};

impl Jobs {
    /// The connection is lost, and nothing of it will be done any more.
    pub(in crate::nbd) fn lost_connection(&mut self) {
        self.on_wire = 0;
        self.again.clear();
        self.ghosts = 0;
        let mut again: Vec<(u32, usize)> = Vec::new();
        for (index, slot) in self.parts.iter_mut().enumerate() {
            let Some(part) = slot else { continue };
            let job = self.jobs[part.job].as_mut();
            let goes_on = job
                .as_ref()
                .is_some_and(|job| matches!(job.owner, Owner::User(_)) && job.failure.is_none());
            if goes_on {
                part.sent = false;
                part.expected = Expected::new(part.expected.offset, part.expected.len);
                again.push(((part.header.cookie >> 32) as u32, index));
            } else {
                if let Some(job) = job {
                    job.open -= 1;
                }
                *slot = None;
            }
        }
        // In the order in which they were sent first. Numbers wrap far from each other.
        let newest = self.cookies;
        again.sort_by_key(|&(number, _)| std::cmp::Reverse(newest.wrapping_sub(number)));
        self.again.extend(again.into_iter().map(|(_, index)| index));
        for index in 0..self.jobs.len() {
            let Some(job) = &mut self.jobs[index] else {
                continue;
            };
            let failed = job.failure.is_some() && job.open == 0;
            match job.owner {
                Owner::User(tag) if failed => {
                    let result = job.failure.take().map_or(Ok(()), Err);
                    self.done.push(Completion { tag, result });
                }
                Owner::User(_) => continue,
                Owner::Relief => self.relief = false,
                Owner::Nobody | Owner::Again => {}
            }
            self.jobs[index] = None;
            self.count -= 1;
            self.fresh.retain(|&fresh| fresh != index);
        }
        self.replay = None;
    }

    /// A connection is there.
    pub(in crate::nbd) fn connected(&mut self) {
        let begin = self.unflushed.begin();
        self.replay = (!self.unflushed.is_empty()).then_some(begin);
    }

    /// Jobs that have waited too long, as nothing has gone on since `alive`.
    pub(in crate::nbd) fn overdue(&self, alive: Instant, timeout: Duration, now: Instant) -> bool {
        let late = |job: &Job| {
            let silent = now.saturating_duration_since(job.since.max(alive)) >= timeout;
            silent || now.saturating_duration_since(job.since) >= timeout * PATIENCE
        };
        self.jobs.iter().flatten().any(late)
    }

    /// Makes jobs fail that have waited too long. Nothing is on the wire.
    pub(in crate::nbd) fn expire(
        &mut self,
        alive: Instant,
        timeout: Duration,
        reason: &str,
        now: Instant,
    ) -> usize {
        debug_assert_eq!(self.on_wire, 0, "the connection is given up before");
        let mut expired = 0;
        for index in 0..self.jobs.len() {
            let Some(job) = &self.jobs[index] else {
                continue;
            };
            let silent = now.saturating_duration_since(job.since.max(alive)) >= timeout;
            if !silent && now.saturating_duration_since(job.since) < timeout * PATIENCE {
                continue;
            }
            if let Owner::User(tag) = job.owner {
                let result = Err(Failure::Gone(reason.to_owned()));
                self.done.push(Completion { tag, result });
            }
            self.forget(index);
            expired += 1;
        }
        expired
    }

    /// Takes a job out of which nothing is on the wire.
    fn forget(&mut self, index: usize) {
        self.again.retain(|&part| {
            self.parts[part]
                .as_ref()
                .is_some_and(|part| part.job != index)
        });
        for slot in &mut self.parts {
            if slot.as_ref().is_some_and(|part| part.job == index) {
                *slot = None;
            }
        }
        self.fresh.retain(|&fresh| fresh != index);
        if self.jobs[index].take().is_some() {
            self.count -= 1;
        }
    }

    /// Tells all jobs as canceled. What is on the wire comes to its end without touching anybody's memory; `sending` is a part
    /// whose data is not yet all sent.
    pub(in crate::nbd) fn cancel(&mut self, sending: Option<usize>) {
        for index in 0..self.jobs.len() {
            let Some(job) = &mut self.jobs[index] else {
                continue;
            };
            let Owner::User(tag) = job.owner else {
                continue;
            };
            self.done.push(Completion {
                tag,
                result: Err(Failure::Canceled),
            });
            let sent = |part: &Part| part.job == index && part.sent;
            if !self.parts.iter().flatten().any(sent) {
                self.forget(index);
                continue;
            }
            let half = sending.and_then(|part| self.parts[part].as_ref());
            let half = half.is_some_and(|part| part.job == index);
            let job = self.jobs[index].as_mut().expect("looked at before");
            job.owner = Owner::Nobody;
            job.data = job
                .data
                .take()
                .filter(|_| half)
                .map(|data| copy(data.pieces()));
            job.cut = job.len;
            if job.what.changes() {
                self.ghosts += 1;
            }
            self.fresh.retain(|&fresh| fresh != index);
            // Parts that wait for being sent again are not; then the others of the job are on the wire.
            for at in 0..self.parts.len() {
                let unsent = self.parts[at]
                    .as_ref()
                    .is_some_and(|part| part.job == index && !part.sent);
                if unsent {
                    self.parts[at] = None;
                    self.again.retain(|&part| part != at);
                    let job = self.jobs[index].as_mut().expect("as above");
                    job.open -= 1;
                }
            }
        }
    }
}
