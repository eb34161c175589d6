// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session machine: operations one after another, each a script of requests; attaching and replay are scripts as well.

use super::letting_go::LettingGo;
use super::overdue::Ping;
use super::record::{QueueVectors, Record};
use super::script::Step;
use super::types::{
    Bell, CommonMemory, Counters, DeviceFacts, Event, Op, OpError, OpId, Options, OtherMemory,
    Outgoing, ResetReason, SharedRegion, Target, Window,
};
use super::windows::Change;
use crate::places::Places;
use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::{
    DevNum, DeviceInfo, DeviceStatus, FeatureSet, Instant, Kind, Message, QueueIndex, Token, decode,
};
use vmsg_bus::Capabilities;

/// How long to wait before a device that is held is asked for again.
pub(super) const CLAIM_PAUSE: Duration = Duration::from_millis(100);
/// Configuration space is at most this long in every transport there is.
pub(super) const MAX_CONFIG: u32 = 4096;
/// Messages ready to be sent that are not events of the session's own making; more pings than that are not answered.
const MAX_PONGS: usize = 16;

/// What becomes of a session for a name where devices have none.
pub(super) const NO_NAMES: ResetReason =
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
        planned: Change,
        deadline: Instant,
        status: DeviceStatus,
    },
    /// What the device was asked for in vain until now; whoever wanted it was told so.
    Overdue { op: Op, planned: Change },
    /// The configuration changed, and the device did not say what to.
    Refresh,
    /// Backings that nobody needs are taken back.
    Tidy,
}

impl Job {
    /// Whether it is [`Op::ChangeWindows`].
    pub(super) fn changes_windows(&self) -> bool {
        matches!(
            self,
            Job::Op {
                op: Op::ChangeWindows { .. },
                ..
            }
        )
    }
}

/// The one request that is outstanding.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) step: Step,
    pub(super) token: Token,
    /// Message id and whether it is a bus message.
    pub(super) kind: (u8, bool),
    pub(super) dev: DevNum,
    pub(super) deadline: Instant,
    pub(super) ping: Ping,
    /// How often its time was over, and it was waited for.
    pub(super) waited: u32,
    /// Requests that were sent together with it, and are answered after it with the same token.
    pub(super) batch: VecDeque<Step>,
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
    /// Finds the guest's memory in what the bus has in common, on a bus that passes no descriptors.
    pub(super) places: Option<Arc<dyn Places>>,
    /// That was said once and for all.
    places_said: bool,
    /// Why that is nothing, if it should be something.
    pub(super) common_trouble: Option<OtherMemory>,
    pub(super) epoch: Option<u64>,
    pub(super) new_host: bool,
    pub(super) phase: Phase,
    pub(super) facts: Option<DeviceFacts>,
    /// What the probe under way has found so far.
    pub(super) found: DeviceFacts,
    pub(super) candidates: VecDeque<DevNum>,
    /// The device was taken away, and none was found in its place yet.
    pub(super) removed: bool,
    /// A device has come while the probe was under way.
    pub(super) look_again: bool,
    pub(super) record: Record,
    pub(super) job: Option<Job>,
    pub(super) script: VecDeque<Step>,
    pub(super) exchange: Option<Exchange>,
    pub(super) pause: Option<Instant>,
    pub(super) waiting: VecDeque<Waiting>,
    pub(super) config_read: Option<ConfigRead>,
    pub(super) config_stale: bool,
    /// Descriptors that came with the message being handled.
    pub(super) fds: Vec<OwnedFd>,
    /// The region that the operation under way has got.
    pub(super) region: Option<SharedRegion>,
    /// Somebody has waited for the device in vain, and it was not seen since.
    pub(super) waited_in_vain: bool,
    /// Connections so far.
    pub(super) links: u64,
    /// When something last came in.
    pub(super) now: Instant,
    /// Who may still use what was lent.
    pub(super) letting_go: LettingGo,
    /// A replay is under way that begins the queues anew, or was.
    pub(super) renewing: bool,
    next_op: u64,
    pub(super) tokens: RangeInclusive<u16>,
    pub(super) next_token: u16,
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
            places: None,
            places_said: false,
            common_trouble: None,
            epoch: None,
            new_host: false,
            phase: Phase::Down,
            facts: None,
            found: blank_facts(number),
            candidates: VecDeque::new(),
            removed: false,
            look_again: false,
            record: Record::default(),
            job: None,
            script: VecDeque::new(),
            exchange: None,
            pause: None,
            waiting: VecDeque::new(),
            config_read: None,
            config_stale: false,
            fds: Vec::new(),
            region: None,
            waited_in_vain: false,
            links: 0,
            now: Instant(0),
            letting_go: LettingGo::default(),
            renewing: false,
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
        self.now = now;
        self.next_op += 1;
        let id = OpId(self.next_op);
        if self.waiting.len() >= self.options.max_waiting {
            self.finish(id, Err(OpError::TooMany));
            return id;
        }
        let patience = match op {
            _ if self.is_held_back(&op) => self.patience_after_loss(),
            Op::Claim => self.options.operation_timeout,
            _ if self.is_overdue() => self.options.overdue_timeout,
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

    /// [`Op::ChangeWindows`].
    pub fn change_windows(&mut self, now: Instant, remove: Vec<u64>, add: Vec<Window>) -> OpId {
        self.submit(now, Op::ChangeWindows { remove, add })
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

    /// How the guest's memory is found in what the bus has in common, on a bus whose windows are views of that. To be said before anything else.
    pub fn set_places(&mut self, places: Arc<dyn Places>) {
        self.places = Some(places);
        self.places_said = true;
    }

    /// The same as the connection that is about to be has it, for a session that was not told by [`Self::set_places`].
    pub fn set_places_of_link(&mut self, places: Arc<dyn Places>) {
        if !self.places_said {
            self.places = Some(places);
        }
    }

    /// The doorbells that queues can have on the connection that is about to be: for queue 0, 1, … and again from the first. To be said before
    /// [`Self::handle_link_up`].
    pub fn set_vectors(&mut self, vectors: Vec<QueueVectors>) {
        self.record.vectors_to_give = vectors;
    }

    /// The device has rung the call of a queue, by a doorbell of the bus, and there is no eventfd to pass that on to.
    pub fn queue_used(&mut self, queue: QueueIndex) {
        if self.record.queues.contains_key(&queue.0) {
            self.push_once(Event::QueueUsed(queue));
        }
    }

    /// The bus is connected: `caps` is what it can do, `epoch` differs each time the device host starts.
    pub fn handle_link_up(&mut self, now: Instant, caps: Capabilities, epoch: u64) {
        self.now = now;
        self.lose_link();
        self.links += 1;
        self.caps = caps;
        self.caps.max_message_size = caps
            .max_message_size
            .clamp(virtio_msg::MIN_MESSAGE_SIZE, virtio_msg::MAX_MESSAGE_SIZE);
        self.new_host = self.epoch != Some(epoch);
        self.epoch = Some(epoch);
        if self.new_host {
            self.forget_unknown_inflight();
            // There is one host at a place at a time. Others than ours need not say who they are: they are asked.
            if self.caps.claims {
                self.has_let_go();
            }
        }
        self.attach(now);
        self.pump(now);
    }

    /// The bus is not connected any more.
    pub fn handle_link_down(&mut self, now: Instant) {
        self.now = now;
        self.lose_link();
        self.pump(now);
    }

    /// As [`Self::handle_message`], with the descriptors that came with it; those that it has no use for are closed.
    pub fn handle_message_with_fds(&mut self, now: Instant, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.fds = fds;
        self.handle_message(now, bytes);
        self.fds.clear();
    }

    /// A message of the bus, with whatever follows it in its slot.
    pub fn handle_message(&mut self, now: Instant, bytes: &[u8]) {
        self.now = now;
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
        let (notify, vectors) = (self.record.notify(), self.record.vectors());
        let queues: BTreeSet<u32> = notify.keys().chain(vectors.keys()).copied().collect();
        let queues = queues.into_iter().filter(move |_| ours);
        queues.map(|queue| Bell {
            queue: QueueIndex(queue),
            kick: notify.get(&queue).and_then(|notify| notify.kick.as_ref()),
            call: notify.get(&queue).and_then(|notify| notify.call.as_ref()),
            vectors: vectors.get(&queue).copied().unwrap_or_default(),
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
}

pub(super) fn blank_facts(number: DevNum) -> DeviceFacts {
    DeviceFacts {
        number,
        info: DeviceInfo::ABSENT,
        offered: FeatureSet::EMPTY,
        queue_sizes: Vec::new(),
    }
}
