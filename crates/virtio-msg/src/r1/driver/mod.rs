// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between a driver that speaks revision 1 and an r1 device.

mod operation;
mod options;
mod request;

pub use options::{DriverOptions, Translate, config_size};

use super::ring::Ring;
use super::{Busy, Frame, Ignored, MESSAGE_SIZE, Message, Outcome, SIZE};
use crate::feature;
use crate::message::{ConfigEvent, DeviceInfo, Kind, VqueueConfig, decode};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize, Token};
use operation::{BLOCKS, CHUNK, Op};

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
