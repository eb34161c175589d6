// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between a driver that speaks revision 1 and an r1 device.

use super::device::{halves, whole};
use super::operation::without_features_ok;
use super::operation::{BLOCKS, CHUNK, Next, Op, ReadConfig, WriteConfig, answers};
use super::options::{DriverOptions, Translate, config_size};
use super::ring::Ring;
use super::{Busy, Frame, Ignored, MESSAGE_SIZE, Message, Outcome, SIZE};
use crate::feature;
use crate::message::{
    ConfigData, ConfigEvent, DeviceInfo, FeatureBlocks, Kind, ShmInfo, VqueueConfig, VqueueInfo,
    decode,
};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize, Token};
use zerocopy::little_endian::U32;

/// Requests that may wait behind the one that is being worked on.
const WAITING: usize = 2;

/// Responses that may wait to be fetched: a scan of 32 device numbers at once.
const REPLIES: usize = 34;

/// Feature bits that are not shown to the driver: r1 cannot tell when a queue has been reset, and QEMU ignores RESET_VQUEUE.
const HIDDEN: u64 = 1 << feature::RING_RESET;

/// Between a driver that speaks revision 1 ([`Requester`](crate::driver::Requester) and what is built on it) and an r1 device (QEMU).
///
/// The four directions, each called whenever there may be something:
/// [`handle_request`](Self::handle_request) takes what the driver sent, [`poll_wire`](Self::poll_wire) gives out what is for the device,
/// [`handle_wire`](Self::handle_wire) takes what the device sent, [`poll_message`](Self::poll_message) gives out what is for the driver.
///
/// r1 has one device at the other end, whose number is an option; other numbers are answered as devices that are not there. It has at most
/// `QUEUES` queues; higher ones do not exist.
///
/// | revision 1 | r1 |
/// |---|---|
/// | GET_DEVICE_INFO | DEVICE_INFO, then GET_VQUEUE 0, 1, 2 … until there is none: the number of queues. 64 feature bits; configuration size by device id ([`config_size`]) |
/// | GET_DEVICE_FEATURES | GET_FEATURES; blocks from 2 on are zero. RING_RESET is left out |
/// | SET_DRIVER_FEATURES | SET_FEATURES with all 64 bits as they are known by then, so halves do not undo each other. Bits above 63: FEATURES_OK is not granted |
/// | GET_CONFIG | GET_CONFIG of 4, 2 and 1 bytes, naturally aligned, between two GET_CONFIG_GEN |
/// | SET_CONFIG | GET_CONFIG_GEN (another generation: rejected), SET_CONFIG of 4, 2 and 1 bytes, GET_CONFIG_GEN |
/// | GET_DEVICE_STATUS | GET_DEVICE_STATUS |
/// | SET_DEVICE_STATUS | SET_DEVICE_STATUS, GET_DEVICE_STATUS: the device handles them in their order, so a reset is complete when that is answered |
/// | GET_VQUEUE | GET_VQUEUE for the largest size; size and addresses are what was set |
/// | SET_VQUEUE | SET_VQUEUE, answered once it is sent; not sent, and not shown by GET_VQUEUE, if the queue cannot have that size |
/// | RESET_VQUEUE | RESET_VQUEUE, GET_DEVICE_STATUS. QEMU does nothing at all on the first |
/// | GET_SHM | none: there is no region |
/// | PING | GET_DEVICE_STATUS: answered if the device is there |
/// | GET_DEVICES, bus-specific | nothing like it: not answered |
/// | EVENT_AVAIL | EVENT_AVAIL, held back until DRIVER_OK was sent: QEMU breaks the device otherwise. Merged per queue |
/// | EVENT_USED | EVENT_USED, merged per queue |
/// | EVENT_CONFIG | EVENT_CONFIG, then GET_CONFIG_GEN for the generation; without data |
///
/// **One request is in flight.** The driver above keeps one outstanding, too, as ours do; up to two more wait. When a further one comes
/// while the device owes an answer, the driver has given up on the first: so does the adapter, and goes on with the next. What the device still says
/// to the first is told apart by id and by the offset, size, index or features that it repeats; where it repeats nothing, one response of
/// that id is skipped.
#[derive(Clone, Debug)]
pub struct DriverAdapter<const QUEUES: usize = 64> {
    options: DriverOptions,
    /// What SET_DRIVER_FEATURES has brought together.
    features: u64,
    /// A bit was set that r1 cannot carry.
    foreign: bool,
    /// DRIVER_OK is with the device.
    driver_ok: bool,
    queues: [Queue; QUEUES],
    kicks: usize,
    used: usize,
    /// Revision-1 requests as they came.
    waiting: Ring<[u8; MESSAGE_SIZE], WAITING>,
    active: Option<Active>,
    replies: Ring<Reply, REPLIES>,
    stale: Option<Stale>,
    /// EVENT_CONFIG came; its generation is to be asked.
    config_changed: Option<DeviceStatus>,
    /// EVENT_CONFIG for the driver.
    config_event: Option<(DeviceStatus, Generation)>,
    generation: Generation,
    translate: Option<Translate>,
    translated: Option<Message>,
    counters: DriverAdapterCounters,
}

/// What a [`DriverAdapter`] has seen. All counts wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverAdapterCounters {
    /// Revision-1 requests begun.
    pub requests: u64,
    /// Revision-1 requests answered.
    pub responses: u64,
    /// r1 messages given out.
    pub wire_sent: u64,
    /// r1 messages dropped: malformed, out of range, late, or a driver's.
    pub wire_ignored: u64,
    /// Revision-1 messages dropped.
    pub messages_ignored: u64,
    /// Requests given up because the driver sent others.
    pub abandoned: u64,
    /// Pages that the device asked for.
    pub translations: u64,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    /// `None`: never asked.
    max: Option<QueueSize>,
    /// Size 0: not set up.
    config: VqueueConfig,
    /// The next-offset word of a kick that is to be passed on.
    kick: Option<u32>,
    used: bool,
}

const NO_QUEUE: Queue = Queue {
    max: None,
    config: VqueueConfig {
        index: QueueIndex(0),
        size: QueueSize(0),
        descriptor: 0,
        driver: 0,
        device: 0,
    },
    kick: None,
    used: false,
};

#[derive(Clone, Copy, Debug)]
struct Active {
    token: Token,
    op: Op,
    wire: Wire,
}

#[derive(Clone, Copy, Debug)]
enum Wire {
    /// To be sent; answered by the device or not, as its kind says.
    Send(Message),
    /// Sent.
    Awaiting(Message),
}

/// A request whose response may still come.
#[derive(Clone, Copy, Debug)]
struct Stale {
    request: Message,
    owed: u8,
    /// One was skipped while an equal request was in flight.
    skipped: bool,
}

#[derive(Clone, Copy, Debug)]
struct Reply {
    bytes: [u8; MESSAGE_SIZE],
    size: usize,
}

impl<const QUEUES: usize> Default for DriverAdapter<QUEUES> {
    fn default() -> Self {
        Self::new(DriverOptions::default())
    }
}

impl<const QUEUES: usize> DriverAdapter<QUEUES> {
    /// Nothing is on its way, nothing is known of the device.
    pub fn new(options: DriverOptions) -> DriverAdapter<QUEUES> {
        DriverAdapter {
            options,
            features: 0,
            foreign: false,
            driver_ok: false,
            queues: [NO_QUEUE; QUEUES],
            kicks: 0,
            used: 0,
            waiting: Ring::new(),
            active: None,
            replies: Ring::new(),
            stale: None,
            config_changed: None,
            config_event: None,
            generation: Generation(0),
            translate: None,
            translated: None,
            counters: DriverAdapterCounters::default(),
        }
    }

    /// Forgets everything but the options and the counters: for a new device, or a new driver above.
    pub fn reset(&mut self) {
        *self = DriverAdapter {
            counters: self.counters,
            ..Self::new(self.options)
        };
    }

    /// Takes one revision-1 message of the driver in; what follows its size is left out.
    ///
    /// # Errors
    /// [`Busy`]: requests wait, and what is for the device has not been fetched with [`poll_wire`](Self::poll_wire), or too many responses not with
    /// [`poll_message`](Self::poll_message). Never for events.
    pub fn handle_request(&mut self, bytes: &[u8]) -> Result<Outcome, Busy> {
        let why = match decode(bytes, MESSAGE_SIZE) {
            Ok(frame) => match self.taken(&frame, bytes) {
                Ok(()) => return Ok(Outcome::Taken),
                Err(None) => return Err(Busy),
                Err(Some(why)) => why,
            },
            Err(error) => Ignored::Malformed(error),
        };
        self.counters.messages_ignored = self.counters.messages_ignored.wrapping_add(1);
        Ok(Outcome::Ignored(why))
    }

    /// `Err(None)`: busy.
    fn taken(&mut self, frame: &crate::Frame<'_>, bytes: &[u8]) -> Result<(), Option<Ignored>> {
        use crate::Message as From;
        let bus = frame.message.is_bus();
        match frame.message.kind() {
            Kind::Response => return Err(Some(Ignored::Unexpected)),
            Kind::Event if !matches!(frame.message, From::EventAvail { .. }) => {
                return Err(Some(Ignored::WrongWay));
            }
            _ => {}
        }
        if bus && !matches!(frame.message, From::Ping { .. }) {
            return Err(Some(Ignored::NoCounterpart));
        }
        if !bus && frame.dev_num != self.options.dev_num {
            if frame.message != From::GetDeviceInfo {
                return Err(Some(Ignored::OtherDevice));
            }
            // The last place is for the request that is being worked on.
            if self.replies.room() < 2 {
                return Err(None);
            }
            self.reply(&frame.response(From::DeviceInfo(DeviceInfo::ABSENT)));
            return Ok(());
        }
        match frame.message {
            From::EventAvail { queue, next } => {
                let slot = self
                    .queues
                    .get_mut(queue.to_usize())
                    .ok_or(Some(Ignored::OutOfRange))?;
                self.kicks += usize::from(slot.kick.is_none());
                slot.kick = Some(next);
                return Ok(());
            }
            From::GetDeviceFeatures { count, .. } if count > BLOCKS => {
                return Err(Some(Ignored::ResponseTooLong));
            }
            From::GetConfig { len, .. } if usize::try_from(len).map_or(true, |n| n > CHUNK) => {
                return Err(Some(Ignored::ResponseTooLong));
            }
            _ => {}
        }
        if self.waiting.room() == 0 {
            if !self.is_waiting_for_device() {
                return Err(None);
            }
            self.abandon();
        }
        let mut place = [0; MESSAGE_SIZE];
        for (to, byte) in place.iter_mut().zip(bytes) {
            *to = *byte;
        }
        if !self.waiting.push(place) {
            return Err(None);
        }
        self.begin();
        Ok(())
    }

    fn is_waiting_for_device(&self) -> bool {
        matches!(
            self.active,
            Some(Active {
                wire: Wire::Awaiting(_),
                ..
            })
        )
    }

    /// Gives up the request that the device owes an answer to, and begins the next.
    fn abandon(&mut self) {
        let Some(Active {
            op,
            wire: Wire::Awaiting(request),
            ..
        }) = self.active.take()
        else {
            return;
        };
        self.counters.abandoned = self.counters.abandoned.wrapping_add(1);
        self.stale = match self.stale {
            // The one that was skipped was its own: the device lost the other.
            Some(stale) if stale.request == request && stale.skipped => None,
            Some(stale) if stale.request == request => Some(Stale {
                owed: stale.owed.saturating_add(1),
                ..stale
            }),
            _ => Some(Stale {
                request,
                owed: 1,
                skipped: false,
            }),
        };
        if let (Op::Event, Some(status)) = (op, self.config_changed.take()) {
            self.config_event = Some((status, self.generation));
        }
        self.begin();
    }

    /// Begins requests until one has something to send, or there are none.
    fn begin(&mut self) {
        while self.active.is_none() && self.replies.room() > 0 {
            let Some(bytes) = self.waiting.pop() else {
                if self.config_changed.is_some() {
                    self.active = Some(Active {
                        token: Token(0),
                        op: Op::Event,
                        wire: Wire::Send(Message::GetConfigGen),
                    });
                }
                return;
            };
            if let Ok(frame) = decode(&bytes, MESSAGE_SIZE) {
                self.counters.requests = self.counters.requests.wrapping_add(1);
                self.active = self.started(&frame).map(|(op, message)| Active {
                    token: frame.token,
                    op,
                    wire: Wire::Send(message),
                });
            }
        }
    }

    /// The operation for a request, and its first message; `None` if it was answered at once.
    fn started(&mut self, frame: &crate::Frame<'_>) -> Option<(Op, Message)> {
        use crate::Message as From;
        Some(match frame.message {
            From::GetDeviceInfo => (
                Op::Info {
                    info: DeviceInfo::ABSENT,
                    queues: 0,
                },
                Message::GetDeviceInfo,
            ),
            From::GetDeviceFeatures { first, count } if first < 2 && count > 0 => (
                Op::GetFeatures { first, count },
                Message::GetFeatures { index: 0 },
            ),
            From::GetDeviceFeatures { first, count } => {
                self.reply_features(frame, first, count, 0);
                return None;
            }
            From::SetDriverFeatures(blocks) => {
                let mut both = halves(self.features);
                for (number, word) in blocks.iter().take(blocks.words.len()) {
                    match usize::try_from(number).ok().and_then(|n| both.get_mut(n)) {
                        Some(half) => *half = word,
                        None => self.foreign |= word != 0,
                    }
                }
                self.features = whole(both);
                let features = self.features;
                (Op::SetFeatures, Message::SetFeatures { index: 0, features })
            }
            From::GetConfig { offset, len } => {
                let len = u8::try_from(len).ok()?;
                (
                    Op::ReadConfig(ReadConfig::new(offset, len)),
                    Message::GetConfigGen,
                )
            }
            From::SetConfig(data) => (
                Op::WriteConfig(WriteConfig::new(data.generation, data.offset, data.data)?),
                Message::GetConfigGen,
            ),
            From::GetDeviceStatus => (Op::Status { set: false }, Message::GetDeviceStatus),
            From::SetDeviceStatus(status) => {
                let status = if self.foreign {
                    without_features_ok(status)
                } else {
                    status
                };
                (Op::Status { set: true }, Message::SetDeviceStatus(status))
            }
            From::GetVqueue(index) if index.to_usize() < QUEUES => {
                (Op::GetQueue(index), Message::GetVqueue(index))
            }
            From::GetVqueue(index) => {
                self.reply(&frame.response(From::Vqueue(VqueueInfo {
                    index,
                    ..VqueueInfo::default()
                })));
                return None;
            }
            From::SetVqueue(config) if self.is_possible(&config) => {
                (Op::SetQueue, Message::SetVqueue(config))
            }
            From::SetVqueue(_) => {
                self.reply(&frame.response(From::VqueueSet));
                return None;
            }
            From::ResetVqueue(index) if index.to_usize() < QUEUES => {
                (Op::ResetQueue, Message::ResetVqueue(index))
            }
            From::ResetVqueue(_) => {
                self.reply(&frame.response(From::VqueueReset));
                return None;
            }
            From::GetShm { index } => {
                self.reply(&frame.response(From::Shm(ShmInfo {
                    index,
                    ..ShmInfo::default()
                })));
                return None;
            }
            From::Ping { data } => (Op::Ping { data }, Message::GetDeviceStatus),
            _ => return None,
        })
    }

    /// Whether the device would take this; QEMU looks at no index.
    fn is_possible(&self, config: &VqueueConfig) -> bool {
        config.size.to_u16().is_some()
            && self
                .queues
                .get(config.index.to_usize())
                .is_some_and(|q| q.max.is_none_or(|max| config.size <= max))
    }

    fn reply(&mut self, frame: &crate::Frame<'_>) {
        let mut bytes = [0; MESSAGE_SIZE];
        if let Ok(size) = frame.encode(&mut bytes) {
            self.counters.responses = self.counters.responses.wrapping_add(1);
            // There is room: nothing is begun without.
            self.replies.push(Reply { bytes, size });
        }
    }

    fn reply_features(&mut self, frame: &crate::Frame<'_>, first: u32, count: u32, bits: u64) {
        let known = halves(bits);
        let mut words = [U32::ZERO; BLOCKS as usize];
        for (i, word) in (0..count).zip(words.iter_mut()) {
            let block = first.checked_add(i).and_then(|n| usize::try_from(n).ok());
            *word = block
                .and_then(|n| known.get(n))
                .copied()
                .unwrap_or(0)
                .into();
        }
        let used = usize::try_from(count).map_or(words.len(), |n| n.min(words.len()));
        self.reply(
            &frame.response(crate::Message::DeviceFeatures(FeatureBlocks {
                first,
                count,
                words: &words[..used],
            })),
        );
    }

    /// Writes the next r1 message for the device to `out` (40 bytes; with less room nothing is given out) and gives its size. Call until `None`.
    pub fn poll_wire(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < SIZE {
            return None;
        }
        self.begin();
        let message = match self.translated.take() {
            Some(message) => message,
            None => self.next_request().or_else(|| self.next_kick())?,
        };
        self.counters.wire_sent = self.counters.wire_sent.wrapping_add(1);
        Frame::new(self.options.dev_num, message).encode(out).ok()
    }

    fn next_request(&mut self) -> Option<Message> {
        let active = self.active?;
        let Wire::Send(message) = active.wire else {
            return None;
        };
        self.note_sent(&message);
        if message.kind() == Kind::Request {
            self.active = Some(Active {
                wire: Wire::Awaiting(message),
                ..active
            });
            return Some(message);
        }
        // No response will come.
        match active.op {
            Op::SetQueue => {
                self.active = None;
                self.reply(&self.frame(active.token, crate::Message::VqueueSet));
                self.begin();
            }
            op => {
                self.active = Some(Active {
                    op,
                    wire: Wire::Send(Message::GetDeviceStatus),
                    ..active
                });
            }
        }
        Some(message)
    }

    /// What the device has from now on.
    fn note_sent(&mut self, message: &Message) {
        match *message {
            Message::SetDeviceStatus(status) => {
                self.driver_ok = status.contains(DeviceStatus::DRIVER_OK);
                if status == DeviceStatus::RESET {
                    self.forget_driver();
                }
            }
            Message::SetVqueue(config) => {
                if let Some(queue) = self.queues.get_mut(config.index.to_usize()) {
                    queue.config = config;
                }
            }
            Message::ResetVqueue(index) => {
                if let Some(queue) = self.queues.get_mut(index.to_usize()) {
                    queue.config = NO_QUEUE.config;
                }
            }
            _ => {}
        }
    }

    /// What a reset takes back.
    fn forget_driver(&mut self) {
        self.features = 0;
        self.foreign = false;
        self.kicks = 0;
        self.used = 0;
        self.config_changed = None;
        self.config_event = None;
        for queue in &mut self.queues {
            *queue = Queue {
                max: queue.max,
                ..NO_QUEUE
            };
        }
    }

    /// A kick never overtakes what makes its queue, nor comes before DRIVER_OK.
    fn next_kick(&mut self) -> Option<Message> {
        if self.kicks == 0 || !self.driver_ok {
            return None;
        }
        let changes = |bytes: &[u8; MESSAGE_SIZE]| {
            decode(bytes, MESSAGE_SIZE).is_ok_and(|frame| {
                matches!(
                    frame.message,
                    crate::Message::SetVqueue(_)
                        | crate::Message::SetDeviceStatus(_)
                        | crate::Message::ResetVqueue(_)
                )
            })
        };
        if self.waiting.iter().any(changes) {
            return None;
        }
        for (index, queue) in (0..).zip(self.queues.iter_mut()) {
            let Some(next) = queue.kick.take() else {
                continue;
            };
            self.kicks = self.kicks.saturating_sub(1);
            if queue.config.size.0 != 0 {
                return Some(Message::EventAvail {
                    queue: QueueIndex(index),
                    next_offset: u64::from(next & 0x7fff_ffff),
                    next_wrap: u64::from(next >> 31),
                });
            }
        }
        None
    }

    fn frame<'a>(&self, token: Token, message: crate::Message<'a>) -> crate::Frame<'a> {
        if message.is_bus() {
            crate::Frame::bus(token, message)
        } else {
            crate::Frame::new(self.options.dev_num, token, message)
        }
    }

    /// Takes one r1 message of the device in; what follows its 40 bytes is left out.
    ///
    /// # Errors
    /// [`Busy`], for IOMMU_TRANSLATE only: the one before is not answered, or its answer not fetched. Read no further until it is.
    pub fn handle_wire(&mut self, bytes: &[u8]) -> Result<Outcome, Busy> {
        let why = match super::decode(bytes) {
            Ok(frame) => match self.wire_taken(&frame) {
                Ok(()) => return Ok(Outcome::Taken),
                Err(None) => return Err(Busy),
                Err(Some(why)) => why,
            },
            Err(error) => Ignored::Malformed(error),
        };
        self.counters.wire_ignored = self.counters.wire_ignored.wrapping_add(1);
        Ok(Outcome::Ignored(why))
    }

    /// `Err(None)`: busy.
    fn wire_taken(&mut self, frame: &Frame) -> Result<(), Option<Ignored>> {
        // QEMU answers as number 0 whatever it was asked as.
        if frame.dev_num != self.options.dev_num && frame.dev_num != DevNum(0) {
            return Err(Some(Ignored::OtherDevice));
        }
        match frame.message {
            Message::EventUsed { queue } => {
                let slot = self
                    .queues
                    .get_mut(queue.to_usize())
                    .filter(|q| q.config.size.0 != 0)
                    .ok_or(Some(Ignored::OutOfRange))?;
                self.used += usize::from(!slot.used);
                slot.used = true;
                Ok(())
            }
            Message::EventConfig { status, .. } => {
                self.config_changed = Some(status);
                self.begin();
                Ok(())
            }
            Message::IommuTranslate { va, prot } => {
                if self.translate.is_some() || self.translated.is_some() {
                    return Err(None);
                }
                self.counters.translations = self.counters.translations.wrapping_add(1);
                self.translate = Some(Translate { va, prot });
                if !self.options.ask_translate {
                    self.answer_translate(va, prot);
                }
                Ok(())
            }
            response if response.kind() == Kind::Response => self.response(&response).map_err(Some),
            _ => Err(Some(Ignored::WrongWay)),
        }
    }

    fn response(&mut self, response: &Message) -> Result<(), Ignored> {
        let stale = self
            .stale
            .filter(|s| s.owed > 0 && answers(&s.request, response));
        let Some(Active {
            token,
            op,
            wire: Wire::Awaiting(request),
        }) = self
            .active
            .filter(|a| matches!(a.wire, Wire::Awaiting(r) if answers(&r, response)))
        else {
            if stale.is_some_and(|s| s.owed == 1) {
                self.stale = None;
            } else if let Some(stale) = stale {
                self.stale = Some(Stale {
                    owed: stale.owed - 1,
                    ..stale
                });
            }
            return Err(Ignored::Unexpected);
        };
        if let Some(stale) = stale {
            self.stale = Some(Stale {
                owed: stale.owed - 1,
                skipped: true,
                ..stale
            });
            return Err(Ignored::Unexpected);
        }
        if self.stale.is_some_and(|s| s.request == request) {
            self.stale = None;
        }
        self.active = self
            .advanced(token, op, response)
            .map(|(op, message)| Active {
                token,
                op,
                wire: Wire::Send(message),
            });
        self.begin();
        Ok(())
    }

    /// The operation after a response, and its next message; `None` if it is done.
    fn advanced(&mut self, token: Token, op: Op, response: &Message) -> Option<(Op, Message)> {
        use crate::Message as To;
        if let Message::ConfigGen(generation) = *response {
            self.generation = generation;
        }
        let done = match (op, *response) {
            (
                Op::Info { .. },
                Message::DeviceInfo {
                    device_id,
                    vendor_id,
                    ..
                },
            ) => {
                let info = DeviceInfo {
                    device_id,
                    vendor_id,
                    feature_bits: 64,
                    config_size: self
                        .options
                        .config_size
                        .unwrap_or_else(|| config_size(device_id)),
                    ..DeviceInfo::ABSENT
                };
                if device_id != 0 && QUEUES > 0 {
                    let op = Op::Info { info, queues: 0 };
                    return Some((op, Message::GetVqueue(QueueIndex(0))));
                }
                To::DeviceInfo(if device_id == 0 {
                    DeviceInfo::ABSENT
                } else {
                    info
                })
            }
            (Op::Info { info, queues }, Message::Vqueue { max_size, .. }) => {
                if let Some(queue) = self.queues.get_mut(QueueIndex(queues).to_usize()) {
                    queue.max = Some(max_size);
                }
                let next = QueueIndex(queues + 1);
                if max_size.0 != 0 && next.to_usize() < QUEUES {
                    let op = Op::Info {
                        info,
                        queues: next.0,
                    };
                    return Some((op, Message::GetVqueue(next)));
                }
                To::DeviceInfo(DeviceInfo {
                    max_queues: queues + u32::from(max_size.0 != 0),
                    ..info
                })
            }
            (Op::GetFeatures { first, count }, Message::Features { features, .. }) => {
                let frame = self.frame(token, To::GetDeviceFeatures { first, count });
                self.reply_features(&frame, first, count, features & !HIDDEN);
                return None;
            }
            (Op::SetFeatures, _) => To::DriverFeaturesSet,
            (Op::ReadConfig(mut read), _) => match read.step(response) {
                Next::Send(message) => return Some((Op::ReadConfig(read), message)),
                Next::Done | Next::Rejected => {
                    let reply = To::Config(ConfigData {
                        generation: read.before,
                        offset: read.offset,
                        len: read.len.into(),
                        data: &read.data[..usize::from(read.len).min(CHUNK)],
                    });
                    self.reply(&self.frame(token, reply));
                    return None;
                }
            },
            (Op::WriteConfig(mut write), _) => {
                let len = match write.step(response) {
                    Next::Send(message) => return Some((Op::WriteConfig(write), message)),
                    Next::Done => write.len,
                    Next::Rejected => 0,
                };
                let reply = To::ConfigSet(ConfigData {
                    generation: write.generation,
                    offset: write.offset,
                    len: len.into(),
                    data: &write.data[..usize::from(len).min(CHUNK)],
                });
                self.reply(&self.frame(token, reply));
                return None;
            }
            (Op::Status { set: false }, Message::DeviceStatus(status)) => To::DeviceStatus(status),
            (Op::Status { set: true }, Message::DeviceStatus(status)) => {
                To::DeviceStatusSet(status)
            }
            (Op::GetQueue(index), Message::Vqueue { max_size, .. }) => {
                To::Vqueue(self.queue_info(index, max_size))
            }
            (Op::ResetQueue, _) => To::VqueueReset,
            (Op::Ping { data }, _) => To::Pong { data },
            (Op::Event, _) => {
                let status = self.config_changed.take()?;
                self.config_event = Some((status, self.generation));
                return None;
            }
            _ => return None,
        };
        self.reply(&self.frame(token, done));
        None
    }

    fn queue_info(&mut self, index: QueueIndex, max_size: QueueSize) -> VqueueInfo {
        let none = VqueueInfo {
            index,
            ..VqueueInfo::default()
        };
        let Some(queue) = self.queues.get_mut(index.to_usize()) else {
            return none;
        };
        queue.max = Some(max_size);
        if max_size.0 == 0 {
            return none;
        }
        let VqueueConfig {
            index: _,
            size,
            descriptor,
            driver,
            device,
        } = queue.config;
        VqueueInfo {
            index,
            max_size,
            size,
            descriptor,
            driver,
            device,
        }
    }

    /// Writes the next revision-1 message for the driver to `out` ([`MESSAGE_SIZE`] bytes; with less room nothing is given out) and gives its
    /// size. Call until `None`.
    pub fn poll_message(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < MESSAGE_SIZE {
            return None;
        }
        if let Some(Reply { bytes, size }) = self.replies.pop() {
            out[..size].copy_from_slice(&bytes[..size]);
            self.begin();
            return Some(size);
        }
        let event = self.next_event()?;
        self.frame(Token(0), event).encode(out).ok()
    }

    fn next_event(&mut self) -> Option<crate::Message<'static>> {
        if let Some((status, generation)) = self.config_event.take() {
            return Some(crate::Message::EventConfig(ConfigEvent {
                status,
                generation,
                offset: 0,
                len: 0,
                data: &[],
            }));
        }
        if self.used == 0 {
            return None;
        }
        let (index, queue) = (0..).zip(self.queues.iter_mut()).find(|(_, q)| q.used)?;
        queue.used = false;
        self.used = self.used.saturating_sub(1);
        let queue = QueueIndex(index);
        Some(crate::Message::EventUsed { queue })
    }

    /// The page that the device asks for, if the owner decides ([`DriverOptions::ask_translate`]) and has not yet.
    pub fn poll_translate(&self) -> Option<Translate> {
        self.translate
    }

    /// Says where the page is that [`poll_translate`](Self::poll_translate) gave, and what may be done with it (`prot` 0: nothing).
    /// Without such a page, nothing happens.
    pub fn answer_translate(&mut self, pa: u64, prot: u8) {
        if let Some(Translate { va, .. }) = self.translate.take() {
            self.translated = Some(Message::IommuTranslated { va, pa, prot });
        }
    }

    /// Whether the device owes an answer.
    pub fn is_busy(&self) -> bool {
        self.active.is_some()
    }

    /// What was counted.
    pub fn counters(&self) -> &DriverAdapterCounters {
        &self.counters
    }
}
