// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session machine: operations one after another, each a script of requests; attaching and replay are scripts as well.

use super::record::{LentWindow, Notify, Record};
use super::script::{self, Env, Step};
use super::types::{
    Counters, DeviceFacts, Event, Op, OpError, OpId, Options, Outcome, Outgoing, ResetReason,
    Target, Window,
};
use std::collections::VecDeque;
use std::time::Duration;
use virtio_msg::{
    DevNum, DeviceInfo, DeviceStatus, FeatureSet, Frame, Instant, Kind, MAX_BLOCKS, Message,
    QueueIndex, Token, decode, feature,
};
use vmsg_bus::Capabilities;

/// How long to wait before a device that is held is asked for again.
const CLAIM_PAUSE: Duration = Duration::from_millis(100);
/// Configuration space is at most this long in every transport there is.
pub(super) const MAX_CONFIG: u32 = 4096;
/// Messages ready to be sent that are not events of the session's own making; more pings than that are not answered.
const MAX_PONGS: usize = 16;

/// How the session stands with the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The bus is not connected.
    Down,
    /// Looking for the device, or replaying.
    Attaching,
    /// The bus has no such device.
    Absent,
    /// All is as recorded.
    Ready,
    /// What is recorded cannot be set up.
    Broken(ResetReason),
}

/// What the script belongs to.
#[derive(Debug)]
pub(super) enum Job {
    Attach {
        replaying: bool,
        claim_until: Instant,
        had_config: Option<Vec<u8>>,
    },
    Op {
        id: OpId,
        op: Op,
        planned: Vec<LentWindow>,
        deadline: Instant,
        status: DeviceStatus,
    },
    /// The configuration changed, and the device did not say what to.
    Refresh,
}

/// The one request that is outstanding.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) step: Step,
    token: Token,
    /// Message id and whether it is a bus message.
    kind: (u8, bool),
    dev: DevNum,
    deadline: Instant,
}

#[derive(Debug)]
struct Waiting {
    id: OpId,
    op: Op,
    deadline: Instant,
}

/// A read of configuration space that may take several messages.
#[derive(Debug)]
pub(super) struct ConfigRead {
    pub(super) offset: u32,
    pub(super) len: u32,
    pub(super) data: Vec<u8>,
    pub(super) generation: Option<u32>,
    pub(super) tries: u8,
}

impl ConfigRead {
    pub(super) fn new(offset: u32, len: u32) -> ConfigRead {
        ConfigRead {
            offset,
            len,
            data: Vec::new(),
            generation: None,
            tries: 8,
        }
    }

    fn done(&self) -> u32 {
        u32::try_from(self.data.len()).unwrap_or(self.len)
    }

    /// Offset and length of the next piece.
    pub(super) fn piece(&self, max: u32) -> (u32, u32) {
        (self.offset + self.done(), (self.len - self.done()).min(max))
    }

    pub(super) fn is_whole(&self) -> bool {
        self.done() >= self.len
    }
}

/// Why a script ended before its end.
#[derive(Debug)]
pub(super) enum Failure {
    /// The answer breaks the protocol.
    Bad(&'static str),
    Refused {
        what: &'static str,
        code: u32,
    },
    Reset(ResetReason),
    Held(String),
    /// There is no such device.
    Absent,
}

/// See the [module](super).
#[derive(Debug)]
pub struct Session {
    pub(super) target: Target,
    pub(super) options: Options,
    pub(super) caps: Capabilities,
    epoch: Option<u64>,
    new_host: bool,
    pub(super) phase: Phase,
    pub(super) facts: Option<DeviceFacts>,
    /// What the probe under way has found so far.
    pub(super) found: DeviceFacts,
    pub(super) candidates: VecDeque<DevNum>,
    pub(super) record: Record,
    pub(super) job: Option<Job>,
    pub(super) script: VecDeque<Step>,
    exchange: Option<Exchange>,
    pause: Option<Instant>,
    waiting: VecDeque<Waiting>,
    pub(super) config_read: Option<ConfigRead>,
    config_stale: bool,
    next_op: u64,
    next_token: u16,
    out: VecDeque<Outgoing>,
    events: VecDeque<Event>,
    counters: Counters,
}

impl Session {
    /// A session for `target`, not connected.
    pub fn new(target: Target, options: Options) -> Session {
        let number = match &target {
            Target::Number(number) => *number,
            Target::Name(_) => DevNum(0),
        };
        Session {
            target,
            options,
            caps: Capabilities::from_bits(0, virtio_msg::MIN_MESSAGE_SIZE),
            epoch: None,
            new_host: false,
            phase: Phase::Down,
            facts: None,
            found: blank_facts(number),
            candidates: VecDeque::new(),
            record: Record::default(),
            job: None,
            script: VecDeque::new(),
            exchange: None,
            pause: None,
            waiting: VecDeque::new(),
            config_read: None,
            config_stale: false,
            next_op: 0,
            next_token: 0,
            out: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    // Operations

    /// Starts an operation. Its end is told by [`Event::Done`].
    pub fn submit(&mut self, now: Instant, op: Op) -> OpId {
        self.next_op += 1;
        let id = OpId(self.next_op);
        if self.waiting.len() >= self.options.max_waiting {
            self.finish(id, Err(OpError::TooMany));
            return id;
        }
        let patience = if self.facts.is_none() && matches!(op, Op::Describe) {
            self.options.first_contact_timeout
        } else {
            self.options.operation_timeout
        };
        self.waiting.push_back(Waiting {
            id,
            op,
            deadline: now + patience,
        });
        self.pump(now);
        id
    }

    /// [`Op::SetWindows`].
    pub fn set_windows(&mut self, now: Instant, table: Vec<Window>) -> OpId {
        self.submit(now, Op::SetWindows(table))
    }

    /// [`Op::SetFeatures`].
    pub fn set_features(&mut self, now: Instant, features: FeatureSet) -> OpId {
        self.submit(now, Op::SetFeatures(features))
    }

    /// [`Op::SetStatus`].
    pub fn set_status(&mut self, now: Instant, status: DeviceStatus) -> OpId {
        self.submit(now, Op::SetStatus(status))
    }

    /// [`Op::SetStatus`] with 0.
    pub fn reset(&mut self, now: Instant) -> OpId {
        self.submit(now, Op::SetStatus(DeviceStatus::RESET))
    }

    /// [`Op::ReadConfig`].
    pub fn read_config(&mut self, now: Instant, offset: u32, len: u32) -> OpId {
        self.submit(now, Op::ReadConfig { offset, len })
    }

    /// [`Op::WriteConfig`].
    pub fn write_config(&mut self, now: Instant, offset: u32, data: Vec<u8>) -> OpId {
        self.submit(now, Op::WriteConfig { offset, data })
    }

    /// Tells the device that there are buffers in a queue; for buses and fronts without kick eventfds. Nothing happens
    /// while the device is away: a replay kicks every queue.
    pub fn kick(&mut self, queue: QueueIndex) {
        if self.phase == Phase::Ready
            && self.record.is_live()
            && self.record.queues.contains_key(&queue.0)
        {
            let kick = Step::Kick(queue.0).encode(&self.env(Token(0)));
            // A kick that waits to be sent already says it.
            if !self.out.iter().any(|out| out.bytes == kick.bytes) {
                self.out.push_back(kick);
            }
        }
    }

    // The link

    /// The bus is connected: `caps` is what it can do, `epoch` differs each time the device host starts.
    pub fn handle_link_up(&mut self, now: Instant, caps: Capabilities, epoch: u64) {
        self.lose_link();
        self.caps = caps;
        self.caps.max_message_size = caps
            .max_message_size
            .clamp(virtio_msg::MIN_MESSAGE_SIZE, virtio_msg::MAX_MESSAGE_SIZE);
        self.new_host = self.epoch != Some(epoch);
        self.epoch = Some(epoch);
        self.attach(now);
        self.pump(now);
    }

    /// The bus is not connected any more.
    pub fn handle_link_down(&mut self, now: Instant) {
        self.lose_link();
        self.pump(now);
    }

    /// A message of the bus, with whatever follows it in its slot.
    pub fn handle_message(&mut self, now: Instant, bytes: &[u8]) {
        if self.phase == Phase::Down {
            return;
        }
        let Ok(frame) = decode(bytes, self.caps.max_message_size) else {
            self.counters.malformed += 1;
            return;
        };
        match frame.message.kind() {
            Kind::Response => self.handle_response(now, &frame),
            Kind::Event => self.handle_event(now, &frame),
            Kind::Request => match frame.message {
                Message::Ping { data } if self.out.len() < MAX_PONGS => {
                    let mut bytes = vec![0; self.caps.max_message_size];
                    if let Ok(len) = frame.response(Message::Pong { data }).encode(&mut bytes) {
                        bytes.truncate(len);
                        self.out.push_back(Outgoing {
                            bytes,
                            fds: Vec::new(),
                        });
                    }
                }
                _ => self.counters.unexpected += 1,
            },
        }
        self.pump(now);
    }

    /// The next moment [`handle_timeout`](Self::handle_timeout) has to be called at.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let exchange = self.exchange.as_ref().map(|e| e.deadline);
        let waiting = self.waiting.iter().map(|w| w.deadline);
        waiting.chain(exchange).chain(self.pause).min()
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.exchange.as_ref().is_some_and(|e| e.deadline <= now) {
            self.counters.timeouts += 1;
            if let Some(Job::Op { id, .. }) = self.job {
                self.job = None;
                self.finish(id, Err(OpError::TimedOut));
            }
            self.link_fault("the device host did not answer in time");
        }
        if self.pause.is_some_and(|pause| pause <= now) {
            self.pause = None;
        }
        let error = if self.phase == Phase::Absent {
            OpError::NoDevice
        } else {
            OpError::TimedOut
        };
        let (expired, left) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|w: &Waiting| w.deadline <= now);
        self.waiting = left;
        let expired: VecDeque<Waiting> = expired;
        for waiting in expired {
            self.finish(waiting.id, Err(error.clone()));
        }
        self.pump(now);
    }

    /// The next message to send, in order.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        self.out.pop_front()
    }

    /// The next result or news.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    // What is known

    /// The device, if it was ever seen.
    pub fn device(&self) -> Option<&DeviceFacts> {
        self.facts.as_ref()
    }

    /// The device status that the guest was told last.
    pub fn status(&self) -> DeviceStatus {
        self.record.status
    }

    /// The features the guest has accepted.
    pub fn features(&self) -> FeatureSet {
        self.record.features
    }

    /// Whether the device is there and all that was negotiated is set up.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// What has happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    // Inside

    fn attach(&mut self, now: Instant) {
        let number = match &self.target {
            Target::Number(number) => *number,
            Target::Name(_) => DevNum(0),
        };
        self.phase = Phase::Attaching;
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
            self.fail(
                now,
                Failure::Reset(ResetReason::BusCannot("find a device by its name")),
            );
        }
    }

    fn env(&self, token: Token) -> Env {
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
            feature_blocks: (bits / 32).clamp(1, u32::try_from(MAX_BLOCKS).unwrap_or(8)),
            generation: self.record.generation,
            config_piece: self
                .config_read
                .as_ref()
                .map_or((0, 0), |read| read.piece(max_data)),
            max_message_size: self.caps.max_message_size,
        }
    }

    /// Configuration data that fit one message: header 8, generation, offset and length 12.
    fn max_data(&self) -> u32 {
        u32::try_from(self.caps.max_message_size - 20).unwrap_or(MAX_CONFIG)
    }

    fn number(&self) -> DevNum {
        self.facts
            .as_ref()
            .map_or(self.found.number, |facts| facts.number)
    }

    /// Does what can be done without hearing from the other side.
    fn pump(&mut self, now: Instant) {
        loop {
            if self.exchange.is_some() || self.pause.is_some() {
                return;
            }
            if let Some(step) = self.script.pop_front() {
                self.send(now, step);
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
                        Ok(()) => self.script = script::replay(&self.record, &self.caps),
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
                }
                Some(Job::Refresh) => self.push_once(Event::ConfigChanged),
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
                None => {
                    if !self.start_next(now) {
                        return;
                    }
                }
            }
        }
    }

    pub(super) fn config_size(&self) -> u32 {
        self.facts
            .as_ref()
            .map_or(0, |facts| facts.info.config_size.min(MAX_CONFIG))
    }

    fn send(&mut self, now: Instant, step: Step) {
        self.next_token = self.next_token.checked_add(1).unwrap_or(1);
        let token = Token(self.next_token);
        let out = step.encode(&self.env(token));
        if step.wants_answer() {
            // From here on the device may move in the queues, whether or not the answer arrives.
            if matches!(step, Step::Status(status) if status.contains(DeviceStatus::DRIVER_OK)) {
                self.record.mark_running();
            }
            let frame =
                decode(&out.bytes, self.caps.max_message_size).expect("what was just encoded");
            let kind = (frame.message.id(), frame.message.is_bus());
            let (dev, deadline) = (frame.dev_num, now + self.options.request_timeout);
            self.exchange = Some(Exchange {
                step,
                token,
                kind,
                dev,
                deadline,
            });
        }
        self.out.push_back(out);
    }

    /// Takes the first operation that can be begun, or answered, now.
    fn start_next(&mut self, now: Instant) -> bool {
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
        let Some(Waiting { id, op, deadline }) = self.waiting.remove(at) else {
            return false;
        };
        let planned = match self.validate(&op) {
            Ok(planned) => planned,
            Err(error) => {
                self.finish(id, Err(error));
                return true;
            }
        };
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
            self.record.notify.insert(
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
        let deadline = deadline.min(now + self.options.claim_patience);
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
    fn recordable(&self, op: &Op) -> bool {
        self.facts.is_some() && !matches!(op, Op::WriteConfig { .. })
    }

    fn answer_broken(&mut self, id: OpId, op: Op, reason: ResetReason) {
        let starts_over =
            matches!(&op, Op::Release) || matches!(&op, Op::SetStatus(status) if status.is_empty());
        let known = self.facts.is_some();
        let harmless = matches!(op, Op::StopQueue(_) | Op::SetNotify { .. })
            || (known && matches!(op, Op::Describe | Op::ReadConfig { .. }));
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

    fn validate(&mut self, op: &Op) -> Result<Vec<LentWindow>, OpError> {
        let online = self.phase == Phase::Ready;
        match op {
            Op::SetWindows(windows) => {
                if windows.len() > self.options.max_windows {
                    return Err(OpError::Invalid("too many windows"));
                }
                if online
                    && !windows.is_empty()
                    && !(self.caps.passes_fds && self.caps.runtime_windows)
                {
                    return Err(OpError::BusCannot("lend memory"));
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
                    Some(_) => Ok(Vec::new()),
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
                if len > self.max_data() {
                    return Err(OpError::Invalid(
                        "more configuration than one message carries",
                    ));
                }
                self.check_range(*offset, len)
            }
            Op::Describe | Op::Claim | Op::SetStatus(_) | Op::Release => Ok(Vec::new()),
        }
    }

    fn check_range(&self, offset: u32, len: u32) -> Result<Vec<LentWindow>, OpError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.config_size() => Ok(Vec::new()),
            _ => Err(OpError::Invalid("outside of the configuration space")),
        }
    }

    /// What a finished script means for its operation.
    fn outcome(&mut self, op: &Op, status: DeviceStatus) -> Result<Outcome, OpError> {
        match op {
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

    fn outcome_from_record(&self, op: &Op) -> Result<Outcome, OpError> {
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
    fn apply(&mut self, op: Op, planned: Vec<LentWindow>, status: DeviceStatus) {
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
                record.queues.remove(&queue.0);
                record.notify.remove(&queue.0);
            }
            Op::SetNotify { queue, kick, call } => {
                record.notify.insert(queue.0, Notify { kick, call });
            }
            Op::Release => record.release(),
            Op::Describe | Op::ReadConfig { .. } | Op::WriteConfig { .. } => {}
        }
    }

    fn finish(&mut self, id: OpId, result: Result<Outcome, OpError>) {
        self.events.push_back(Event::Done { id, result });
    }

    /// Adds news unless it waits to be read already: a peer cannot make the list grow.
    fn push_once(&mut self, event: Event) {
        if !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    fn attached(&mut self, had_config: Option<Vec<u8>>) {
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

    /// Whether the device that was found can stand in for the one the guest knows. If so it takes its place.
    fn check_device(&mut self) -> Result<(), ResetReason> {
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
        if !self.record.windows.is_empty() && !(self.caps.passes_fds && self.caps.runtime_windows) {
            return Err(ResetReason::BusCannot("lend memory"));
        }
        self.facts = Some(found);
        Ok(())
    }

    /// Ends the script under way.
    pub(super) fn fail(&mut self, now: Instant, failure: Failure) {
        self.script.clear();
        match (self.job.take(), failure) {
            (None, _) => {}
            (Some(Job::Attach { .. }), Failure::Absent) => {
                self.phase = Phase::Absent;
                self.push_once(Event::DeviceAbsent);
            }
            (Some(job @ Job::Attach { claim_until, .. }), Failure::Held(_))
                if now < claim_until =>
            {
                // The connection before this one may not be buried yet.
                self.job = Some(job);
                self.script = script::replay(&self.record, &self.caps);
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
            (Some(Job::Attach { .. } | Job::Refresh), Failure::Bad(why)) => {
                self.counters.bad_answers += 1;
                self.link_fault(why);
            }
            (Some(Job::Refresh), _) => {}
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
            (Some(Job::Op { id, op, .. }), failure) => {
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
                    || matches!(op, Op::SetWindows(_) | Op::Release);
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

    fn break_down(&mut self, reason: ResetReason) {
        self.phase = Phase::Broken(reason.clone());
        self.record.status.insert(DeviceStatus::NEEDS_RESET);
        self.push_once(Event::NeedsReset(reason));
    }

    /// Gives the connection up.
    fn link_fault(&mut self, why: &'static str) {
        self.counters.link_faults += 1;
        self.lose_link();
        self.push_once(Event::LinkFault(why));
    }

    /// Nothing outstanding will be answered any more. What was being done is recorded as if it had been: the replay does it.
    fn lose_link(&mut self) {
        self.phase = Phase::Down;
        self.exchange = None;
        self.pause = None;
        self.script.clear();
        self.out.clear();
        self.config_stale = false;
        if let Some(Job::Op {
            id, op, planned, ..
        }) = self.job.take()
        {
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
    }

    /// An interrupted operation may have made the device move.
    fn record_running(&mut self) {
        if self.record.is_live() {
            self.record.mark_running();
        }
    }

    fn handle_response(&mut self, now: Instant, frame: &Frame<'_>) {
        let fits = |e: &Exchange| {
            e.token == frame.token
                && e.dev == frame.dev_num
                && e.kind == (frame.message.id(), frame.message.is_bus())
        };
        match self.exchange.take_if(|e| fits(e)) {
            None => self.counters.late += 1,
            Some(exchange) => {
                if let Err(failure) = self.answer(exchange.step, frame.message) {
                    self.fail(now, failure);
                }
            }
        }
    }

    fn handle_event(&mut self, now: Instant, frame: &Frame<'_>) {
        match frame.message {
            Message::EventDevice { device, state } => {
                let wanted = self
                    .facts
                    .as_ref()
                    .is_none_or(|facts| facts.number == device)
                    || matches!(self.target, Target::Name(_));
                match state {
                    virtio_msg::DeviceState::Ready if self.phase == Phase::Absent && wanted => {
                        self.attach(now)
                    }
                    // What the host keeps for this connection belonged to that device: begin with a new one.
                    virtio_msg::DeviceState::Removed
                        if self.phase == Phase::Ready && self.number() == device =>
                    {
                        self.link_fault("the device was removed");
                    }
                    _ => {}
                }
            }
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

/// The status an operation asks for, if that is what it does.
fn asked_status(op: &Op) -> DeviceStatus {
    match op {
        Op::SetStatus(status) => *status,
        _ => DeviceStatus::RESET,
    }
}

fn blank_facts(number: DevNum) -> DeviceFacts {
    DeviceFacts {
        number,
        info: DeviceInfo::ABSENT,
        offered: FeatureSet::EMPTY,
        queue_sizes: Vec::new(),
    }
}
