// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What moves a session: scripts, one request after another.

use super::machine::{
    ConfigRead, Exchange, Failure, Job, MAX_CONFIG, NO_NAMES, Phase, Session, blank_facts,
};
use super::script::{self, Env, Step};
use super::types::{Event, OpError, OpId, Outcome, Target};
use std::collections::VecDeque;
use virtio_msg::{DevNum, DeviceStatus, Frame, Instant, MAX_BLOCKS, Token, decode, feature};

/// Requests that are sent without waiting for the answers of those before; a queue of a bus has room for more.
const BATCH: usize = 15;

impl Session {
    pub(super) fn attach(&mut self, now: Instant) {
        let number = match &self.target {
            Target::Number(number) => *number,
            Target::Name(_) => DevNum(0),
        };
        self.phase = Phase::Attaching;
        self.look_again = false;
        self.found = blank_facts(number);
        self.candidates.clear();
        let had_config = self.facts.as_ref().map(|_| self.record.config.clone());
        self.job = Some(Job::Attach {
            replaying: false,
            claim_until: now + self.options.claim_patience,
            had_config,
        });
        self.script = script::probe(&self.target);
        if matches!(self.target, Target::Name(_)) && !self.caps.enumerates {
            self.fail(now, Failure::Reset(NO_NAMES));
        }
    }

    pub(super) fn env(&self, token: Token) -> Env {
        let device = if matches!(self.job, Some(Job::Attach { .. })) {
            self.found.number
        } else {
            self.number()
        };
        let bits = self.found.info.feature_bits;
        let max_data = self.max_data();
        Env {
            device,
            token,
            access_platform: self
                .facts
                .as_ref()
                .is_some_and(|facts| facts.offered.bit(feature::ACCESS_PLATFORM)),
            feature_blocks: (bits / 32).clamp(1, u32::try_from(MAX_BLOCKS).unwrap_or(8)),
            generation: self.record.generation,
            config_piece: self
                .config_read
                .as_ref()
                .map_or((0, 0), |read| read.piece(max_data)),
            max_message_size: self.caps.max_message_size,
        }
    }

    /// Configuration data that fit one message.
    pub(super) fn max_data(&self) -> u32 {
        u32::try_from(script::data_per_message(self.caps.max_message_size)).unwrap_or(MAX_CONFIG)
    }

    pub(super) fn number(&self) -> DevNum {
        self.facts
            .as_ref()
            .map_or(self.found.number, |facts| facts.number)
    }

    /// Does what can be done without hearing from the other side.
    pub(super) fn pump(&mut self, now: Instant) {
        loop {
            if self.exchange.is_some() || self.pause.is_some() {
                if self.is_overdue() {
                    self.answer_overdue();
                }
                if self.exchange.is_some() || self.pause.is_some() {
                    return;
                }
            }
            if let Some(step) = self.script.pop_front() {
                if matches!(step, Step::Renew) {
                    self.renew(now);
                    continue;
                }
                let batch = self.take_batch(&step);
                self.send(now, step, batch);
                continue;
            }
            match self.job.take() {
                Some(Job::Attach {
                    replaying: false,
                    claim_until,
                    had_config,
                }) => {
                    self.job = Some(Job::Attach {
                        replaying: true,
                        claim_until,
                        had_config,
                    });
                    match self.check_device() {
                        Ok(()) => self.script = self.replay(),
                        Err(reason) => self.fail(now, Failure::Reset(reason)),
                    }
                }
                Some(Job::Attach {
                    replaying: true,
                    had_config,
                    ..
                }) => self.attached(had_config),
                Some(Job::Op {
                    id,
                    op,
                    planned,
                    status,
                    ..
                }) => {
                    let result = self.outcome(&op, status);
                    self.apply(op, planned, status);
                    self.finish(id, result);
                    self.start_over_if_broken();
                }
                Some(Job::Overdue { op, planned }) => {
                    self.apply(op, planned, DeviceStatus::RESET);
                    self.start_over_if_broken();
                }
                Some(Job::Refresh) => self.push_once(Event::ConfigChanged),
                Some(Job::Tidy) => {}
                None if self.wants_to_ask_anew() => self.ask_anew(),
                None if self.ask(now) => {}
                // Operations first: a device can say without end that its configuration has changed.
                None if self.start_next(now) => {}
                None if self.config_stale && self.phase == Phase::Ready => {
                    self.config_stale = false;
                    let size = self.config_size();
                    if size == 0 {
                        self.push_once(Event::ConfigChanged);
                    } else {
                        self.config_read = Some(ConfigRead::new(0, size));
                        self.job = Some(Job::Refresh);
                        self.script.push_back(Step::ConfigPiece);
                    }
                }
                None if self.phase == Phase::Ready && self.caps.views => {
                    let expired = self.record.windows.expired(now);
                    if expired.is_empty() {
                        return;
                    }
                    self.job = Some(Job::Tidy);
                    self.script
                        .extend(expired.into_iter().map(Step::BackingRemove));
                }
                None => return,
            }
        }
    }

    pub(super) fn config_size(&self) -> u32 {
        self.facts
            .as_ref()
            .map_or(0, |facts| facts.info.config_size.min(MAX_CONFIG))
    }

    /// Steps that can be asked for together with `step`, as nothing happens before the last of their change is asked for: not among them.
    fn take_batch(&mut self, step: &Step) -> VecDeque<Step> {
        let waits = |step: &Step| matches!(step, Step::CommonView { more: true, .. });
        let mut batch = VecDeque::new();
        if waits(step) {
            while batch.len() < BATCH && self.script.front().is_some_and(waits) {
                batch.extend(self.script.pop_front());
            }
        }
        batch
    }

    fn send(&mut self, now: Instant, step: Step, batch: VecDeque<Step>) {
        let next = self.next_token.checked_add(1);
        self.next_token = next
            .filter(|token| self.tokens.contains(token))
            .unwrap_or(*self.tokens.start());
        let token = Token(self.next_token);
        let env = self.env(token);
        let out = step.encode(&env);
        let more: Vec<_> = batch.iter().map(|step| step.encode(&env)).collect();
        self.note_use(&step);
        if step.wants_answer() {
            // From here on the device may move in the queues, whether or not the answer arrives.
            if matches!(step, Step::Status(status) if status.contains(DeviceStatus::DRIVER_OK)) {
                self.record.mark_running();
            }
            let frame =
                decode(&out.bytes, self.caps.max_message_size).expect("what was just encoded");
            let kind = (frame.message.id(), frame.message.is_bus());
            let mut deadline = now + self.options.request_timeout;
            if matches!(step, Step::Inflight { .. }) && matches!(self.job, Some(Job::Op { .. })) {
                // There are hosts that will never answer, and what comes after it has to be done in time as well. Not in a replay: there it is
                // better to wait than to do without.
                deadline = now + self.options.request_timeout / 4;
            }
            if let Some(Job::Op { deadline: end, .. }) = self.job {
                deadline = deadline.min(end);
            }
            let dev = frame.dev_num;
            let ping = self.ping_for(now, &step);
            self.exchange = Some(Exchange {
                step,
                token,
                kind,
                dev,
                deadline,
                ping,
                waited: 0,
                batch,
            });
        }
        self.out.push_back(out);
        self.out.extend(more);
    }

    pub(super) fn finish(&mut self, id: OpId, result: Result<Outcome, OpError>) {
        self.events.push_back(Event::Done { id, result });
    }

    /// Adds news unless it waits to be read already: a peer cannot make the list grow.
    pub(super) fn push_once(&mut self, event: Event) {
        if !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    pub(super) fn handle_response(&mut self, now: Instant, frame: &Frame<'_>) {
        let fits = |e: &Exchange| {
            // QEMU's answers to GET_DEVICES have token 0.
            let lost = frame.token == Token(0) && matches!(e.step, Step::ListDevices { .. });
            (e.token == frame.token || lost)
                && e.dev == frame.dev_num
                && e.kind == (frame.message.id(), frame.message.is_bus())
        };
        match self.exchange.take_if(|e| fits(e)) {
            None if self.take_pong(frame) => {}
            None => self.counters.late += 1,
            Some(mut exchange) => {
                let next = exchange.batch.pop_front();
                if let Err(failure) = self.answer(exchange.step, frame.message) {
                    self.fail(now, failure);
                } else if let Some(step) = next {
                    exchange.step = step;
                    self.exchange = Some(exchange);
                }
            }
        }
    }
}
