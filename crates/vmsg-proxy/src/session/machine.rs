// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session machine: operations one after another, each a script of requests; attaching and replay are scripts as well.

use super::record::{LentWindow, Record};
use super::script::{self, Env, Step};
use super::types::{
    Bell, CommonMemory, Counters, DeviceFacts, Event, Op, OpError, OpId, Options, OtherMemory,
    Outcome, Outgoing, ResetReason, Target, Window,
};
use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;
use virtio_msg::{
    DevNum, DeviceInfo, DeviceStatus, FeatureSet, Frame, Instant, Kind, MAX_BLOCKS, Message,
    QueueIndex, Token, decode, feature,
};
use vmsg_bus::Capabilities;

/// How long to wait before a device that is held is asked for again.
pub(super) const CLAIM_PAUSE: Duration = Duration::from_millis(100);
/// Configuration space is at most this long in every transport there is.
pub(super) const MAX_CONFIG: u32 = 4096;
/// Messages ready to be sent that are not events of the session's own making; more pings than that are not answered.
const MAX_PONGS: usize = 16;

/// What becomes of a session for a name where devices have none.
const NO_NAMES: ResetReason =
    ResetReason::BusCannot("find a device by its name: give its number, as in dev=0");

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
pub(super) struct Waiting {
    pub(super) id: OpId,
    pub(super) op: Op,
    pub(super) deadline: Instant,
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
    /// What both sides of the bus have in common, on a bus that lends nothing.
    pub(super) common: Vec<CommonMemory>,
    /// Why that is nothing, if it should be something.
    pub(super) common_trouble: Option<OtherMemory>,
    pub(super) epoch: Option<u64>,
    pub(super) new_host: bool,
    pub(super) phase: Phase,
    pub(super) facts: Option<DeviceFacts>,
    /// What the probe under way has found so far.
    pub(super) found: DeviceFacts,
    pub(super) candidates: VecDeque<DevNum>,
    pub(super) record: Record,
    pub(super) job: Option<Job>,
    pub(super) script: VecDeque<Step>,
    pub(super) exchange: Option<Exchange>,
    pub(super) pause: Option<Instant>,
    pub(super) waiting: VecDeque<Waiting>,
    pub(super) config_read: Option<ConfigRead>,
    pub(super) config_stale: bool,
    /// Somebody has waited for the device in vain, and it was not seen since.
    pub(super) waited_in_vain: bool,
    /// Connections so far.
    links: u64,
    next_op: u64,
    tokens: RangeInclusive<u16>,
    next_token: u16,
    pub(super) out: VecDeque<Outgoing>,
    /// Queues to be kicked when there is room for messages, each once.
    pub(super) kicks: Vec<u32>,
    pub(super) events: VecDeque<Event>,
    pub(super) counters: Counters,
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
            common: Vec::new(),
            common_trouble: None,
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
            waited_in_vain: false,
            links: 0,
            next_op: 0,
            tokens: 1..=u16::MAX,
            next_token: 0,
            out: VecDeque::new(),
            kicks: Vec::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// The tokens of its requests, where sessions share a connection. Not empty, and without 0.
    pub fn set_tokens(&mut self, tokens: RangeInclusive<u16>) {
        self.tokens = tokens;
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
        let patience = match op {
            Op::Describe if self.facts.is_some() => self.options.operation_timeout,
            Op::Describe if self.waited_in_vain => self.options.second_contact_timeout,
            Op::Describe => self.options.first_contact_timeout,
            _ => self.options.operation_timeout,
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
        // A kick that waits to be sent already says it.
        if self.can_kick(queue.0) && !self.kicks.contains(&queue.0) {
            self.kicks.push(queue.0);
        }
    }

    fn can_kick(&self, queue: u32) -> bool {
        self.phase == Phase::Ready
            && self.record.is_live()
            && self.record.queues.contains_key(&queue)
    }

    // The link

    /// What memory the bus has in common, if it is one that lends none by message. To be said before [`Self::handle_link_up`], and
    /// before [`Op::SetWindows`] if it may have changed: the guest's VMM makes that file.
    pub fn set_common_memory(&mut self, common: Result<Vec<CommonMemory>, OtherMemory>) {
        (self.common, self.common_trouble) = match common {
            Ok(common) => (common, None),
            Err(trouble) => (Vec::new(), Some(trouble)),
        };
    }

    /// The bus is connected: `caps` is what it can do, `epoch` differs each time the device host starts.
    pub fn handle_link_up(&mut self, now: Instant, caps: Capabilities, epoch: u64) {
        self.lose_link();
        self.links += 1;
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
        // Whoever answers each request in time, but has many asked, must not hold a front up either.
        if matches!(self.job, Some(Job::Attach { .. } | Job::Refresh))
            && self
                .waiting
                .iter()
                .any(|w| w.deadline <= now && self.recordable(&w.op))
        {
            self.counters.timeouts += 1;
            self.link_fault("the device host takes too long");
            self.pump(now);
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
            self.waited_in_vain |= self.facts.is_none();
            self.finish(waiting.id, Err(error.clone()));
        }
        self.pump(now);
    }

    /// The next message to send, in order.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        if let Some(out) = self.out.pop_front() {
            return Some(out);
        }
        while let Some(queue) = self.kicks.pop() {
            // It may have been stopped since.
            if self.can_kick(queue) {
                return Some(Step::Kick(queue).encode(&self.env(Token(0))));
            }
        }
        None
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

    /// The kick and call eventfds that the bus does not pass to the device: whoever has the session must wait on the kicks and ring the
    /// calls. Queues with neither are left out.
    pub fn bells(&self) -> impl Iterator<Item = Bell<'_>> {
        let ours = !(self.caps.out_of_band_notify && self.caps.passes_fds);
        let all = self.record.notify().iter().filter(move |_| ours);
        all.map(|(&queue, notify)| Bell {
            queue: QueueIndex(queue),
            kick: notify.kick.as_ref(),
            call: notify.call.as_ref(),
        })
    }

    /// Another value whenever [`Self::bells`] may be others.
    pub fn bells_version(&self) -> (u64, u64) {
        (self.record.notify_version(), self.links)
    }

    /// Which device it is for.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What has happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    // Inside

    pub(super) fn attach(&mut self, now: Instant) {
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
            self.fail(now, Failure::Reset(NO_NAMES));
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
                None => return,
            }
        }
    }

    pub(super) fn config_size(&self) -> u32 {
        self.facts
            .as_ref()
            .map_or(0, |facts| facts.info.config_size.min(MAX_CONFIG))
    }

    fn send(&mut self, now: Instant, step: Step) {
        let next = self.next_token.checked_add(1);
        self.next_token = next
            .filter(|token| self.tokens.contains(token))
            .unwrap_or(*self.tokens.start());
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
            let mut deadline = now + self.options.request_timeout;
            if let Some(Job::Op { deadline: end, .. }) = self.job {
                deadline = deadline.min(end);
            }
            let dev = frame.dev_num;
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

    pub(super) fn finish(&mut self, id: OpId, result: Result<Outcome, OpError>) {
        self.events.push_back(Event::Done { id, result });
    }

    /// Adds news unless it waits to be read already: a peer cannot make the list grow.
    pub(super) fn push_once(&mut self, event: Event) {
        if !self.events.contains(&event) {
            self.events.push_back(event);
        }
    }

    fn handle_response(&mut self, now: Instant, frame: &Frame<'_>) {
        let fits = |e: &Exchange| {
            // QEMU's answers to GET_DEVICES have token 0.
            let lost = frame.token == Token(0) && matches!(e.step, Step::ListDevices { .. });
            (e.token == frame.token || lost)
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
}

pub(super) fn blank_facts(number: DevNum) -> DeviceFacts {
    DeviceFacts {
        number,
        info: DeviceInfo::ABSENT,
        offered: FeatureSet::EMPTY,
        queue_sizes: Vec::new(),
    }
}
