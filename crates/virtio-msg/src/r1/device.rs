// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between an r1 driver and devices that speak revision 1.

use super::ring::Ring;
use super::{Busy, Frame, Ignored, MESSAGE_SIZE, Message, Outcome, SIZE, VERSION};
use crate::message::{ConfigData, ConfigEvent, DeviceInfo, FeatureBlocks, Kind, decode};
use crate::types::{DevNum, Generation, Token};
use zerocopy::little_endian::U32;

/// Messages for the driver that may wait.
const WAITING: usize = 64;

/// How often a SET_CONFIG is tried when the generation has moved on under it. r1 knows no rejection.
const WRITE_TRIES: u8 = 3;

/// Between an r1 driver (QEMU's proxy) and devices that speak revision 1 (each a [`DeviceMachine`](crate::device::DeviceMachine)).
///
/// The four directions, each called whenever there may be something:
/// [`handle_wire`](Self::handle_wire) takes what the driver sent, [`poll_message`](Self::poll_message) gives out what is for the devices,
/// [`handle_message`](Self::handle_message) takes what the devices sent, [`poll_wire`](Self::poll_wire) gives out what is for the driver.
///
/// Messages of the driver are worked off in their order, one request at a time over all devices; up to `REQUESTS` of them wait, since an r1
/// driver does not wait for an answer where it knows there is none. Each request becomes one of revision 1, or two: a SET_CONFIG is preceded by reading
/// the generation, and the first request to a device by GET_DEVICE_INFO, because a device number without device answers nothing else. The responses of
/// SET_DEVICE_STATUS, SET_VQUEUE and RESET_VQUEUE are swallowed: QEMU ends itself on a response that it did not ask for.
///
/// IOMMU_ENABLE is noted ([`iommu_enabled`](Self::iommu_enabled)) and nothing more: IOMMU_TRANSLATE is not asked, addresses are taken for bus
/// addresses. On a bus whose windows are the driver's memory they are just that.
#[derive(Clone, Debug)]
pub struct DeviceAdapter<const REQUESTS: usize = 64> {
    /// What the driver sent and nobody has looked at yet.
    requests: Ring<Frame, REQUESTS>,
    active: Option<Active>,
    /// What the driver has yet to be sent. One place is kept for the response of the active request.
    out: Ring<Frame, WAITING>,
    /// The device that the driver last spoke to.
    known: Option<(DevNum, DeviceInfo)>,
    last_token: u16,
    iommu_enabled: bool,
    counters: DeviceAdapterCounters,
}

/// What a [`DeviceAdapter`] has seen. All counts wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceAdapterCounters {
    /// r1 requests taken, with or without response.
    pub requests: u64,
    /// r1 responses given.
    pub responses: u64,
    /// r1 messages dropped: malformed, out of range, or the device's own.
    pub wire_ignored: u64,
    /// Messages from the devices dropped.
    pub messages_ignored: u64,
    /// Requests dropped because there is no such device.
    pub absent: u64,
    /// Writes to the configuration that the device rejected; the driver is not told, r1 has no way.
    pub rejected_writes: u64,
}

/// The request that is being worked on.
#[derive(Clone, Copy, Debug)]
struct Active {
    frame: Frame,
    step: Step,
    /// The token of the revision-1 request, once that was given out.
    asked: Option<Token>,
}

/// Which revision-1 request is the next, or was the last.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// GET_DEVICE_INFO: is there a device?
    Learn,
    /// The generation that a write needs.
    Generation,
    /// A write with this generation.
    Write { generation: Generation, tries: u8 },
    /// The one request that corresponds.
    Ask,
}

impl<const REQUESTS: usize> Default for DeviceAdapter<REQUESTS> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const REQUESTS: usize> DeviceAdapter<REQUESTS> {
    /// Nothing is on its way.
    pub fn new() -> DeviceAdapter<REQUESTS> {
        DeviceAdapter {
            requests: Ring::new(),
            active: None,
            out: Ring::new(),
            known: None,
            last_token: 0,
            iommu_enabled: false,
            counters: DeviceAdapterCounters::default(),
        }
    }

    /// Forgets everything but the counters: for a new driver at the other end.
    pub fn reset(&mut self) {
        *self = DeviceAdapter {
            counters: self.counters,
            ..Self::new()
        };
    }

    /// Takes one r1 message of the driver in; what follows its 40 bytes is left out.
    ///
    /// # Errors
    /// [`Busy`]: as many messages wait as there can be. Read no further until [`poll_message`](Self::poll_message) has given one out.
    pub fn handle_wire(&mut self, bytes: &[u8]) -> Result<Outcome, Busy> {
        let why = match super::decode(bytes) {
            Ok(frame) => match self.check(&frame.message) {
                Ok(()) if matches!(frame.message, Message::IommuEnable(_)) => {
                    self.iommu_enabled = frame.message == Message::IommuEnable(true);
                    return Ok(Outcome::Taken);
                }
                Ok(()) => {
                    return if self.requests.push(frame) {
                        Ok(Outcome::Taken)
                    } else {
                        Err(Busy)
                    };
                }
                Err(why) => why,
            },
            Err(error) => Ignored::Malformed(error),
        };
        self.counters.wire_ignored = self.counters.wire_ignored.wrapping_add(1);
        Ok(Outcome::Ignored(why))
    }

    fn check(&self, message: &Message) -> Result<(), Ignored> {
        match *message {
            Message::GetConfig { size, .. } | Message::SetConfig { size, .. }
                if !(1..=8).contains(&size) =>
            {
                Err(Ignored::OutOfRange)
            }
            Message::IommuTranslated { .. } => Err(Ignored::Unexpected),
            Message::EventConfig { .. }
            | Message::EventUsed { .. }
            | Message::IommuTranslate { .. } => Err(Ignored::WrongWay),
            _ if message.kind() == Kind::Response => Err(Ignored::WrongWay),
            _ => Ok(()),
        }
    }

    /// Writes the next revision-1 message for the devices to `out` ([`MESSAGE_SIZE`] bytes; with less room nothing is given out) and gives its
    /// size. Call until `None`.
    pub fn poll_message(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < MESSAGE_SIZE {
            return None;
        }
        loop {
            match &self.active {
                Some(Active { asked: Some(_), .. }) => return None,
                Some(active) => {
                    let active = *active;
                    let token = self.next_token();
                    let size = ask(&active, token, out);
                    self.active = size.map(|_| Active {
                        asked: Some(token),
                        ..active
                    });
                    if size.is_some() {
                        return size;
                    }
                }
                None => {}
            }
            if self.out.room() == 0 {
                return None;
            }
            let frame = self.requests.pop()?;
            if let Message::EventAvail {
                queue,
                next_offset,
                next_wrap,
            } = frame.message
            {
                let offset = u32::try_from(next_offset & 0x7fff_ffff).unwrap_or(0);
                let wrap = u32::from(next_wrap & 1 != 0) << 31;
                let next = offset | wrap;
                let event = crate::Message::EventAvail { queue, next };
                let event = crate::Frame::new(frame.dev_num, Token(0), event);
                if let Ok(size) = event.encode(out) {
                    return Some(size);
                }
                continue;
            }
            self.counters.requests = self.counters.requests.wrapping_add(1);
            let known = self
                .known
                .is_some_and(|(dev, info)| dev == frame.dev_num && info.is_present());
            let step = if !known || frame.message == Message::GetDeviceInfo {
                Step::Learn
            } else {
                first_step(&frame.message)
            };
            self.active = Some(Active {
                frame,
                step,
                asked: None,
            });
        }
    }

    fn next_token(&mut self) -> Token {
        self.last_token = self.last_token.wrapping_add(1).max(1);
        Token(self.last_token)
    }

    /// Takes one revision-1 message of the devices in.
    ///
    /// # Errors
    /// [`Busy`], for events only: as many messages wait for the driver as there can be. Offer it again when
    /// [`poll_wire`](Self::poll_wire) has given one out.
    pub fn handle_message(&mut self, bytes: &[u8]) -> Result<Outcome, Busy> {
        let why = match decode(bytes, usize::from(u16::MAX)) {
            Ok(frame) => match self.taken(&frame) {
                Ok(()) => return Ok(Outcome::Taken),
                Err(Refused::Busy) => return Err(Busy),
                Err(Refused::Ignored(why)) => why,
            },
            Err(error) => Ignored::Malformed(error),
        };
        self.counters.messages_ignored = self.counters.messages_ignored.wrapping_add(1);
        Ok(Outcome::Ignored(why))
    }

    fn taken(&mut self, frame: &crate::Frame<'_>) -> Result<(), Refused> {
        let event = match frame.message {
            crate::Message::EventUsed { queue } => Message::EventUsed { queue },
            crate::Message::EventConfig(event) => config_event(&event),
            crate::Message::EventDevice { device, .. } => {
                // Whether it came or went: ask again. What it was asked may never be answered.
                if self.known.is_some_and(|(dev, _)| dev == device) {
                    self.known = None;
                }
                if self.active.is_some_and(|a| a.frame.dev_num == device) {
                    self.active = None;
                }
                return Err(Refused::Ignored(Ignored::NoCounterpart));
            }
            _ if frame.message.kind() == Kind::Response => return self.response(frame),
            crate::Message::EventAvail { .. } => return Err(Refused::Ignored(Ignored::WrongWay)),
            _ => return Err(Refused::Ignored(Ignored::NoCounterpart)),
        };
        let event = Frame::new(frame.dev_num, event);
        // Saying it twice says no more, and QEMU has but 128 places for what comes while it waits for a response.
        if matches!(event.message, Message::EventUsed { .. })
            && self.out.iter().any(|waiting| *waiting == event)
        {
            return Ok(());
        }
        // The last place is for a response.
        if self.out.room() < 2 || !self.out.push(event) {
            return Err(Refused::Busy);
        }
        Ok(())
    }

    fn response(&mut self, frame: &crate::Frame<'_>) -> Result<(), Refused> {
        let unexpected = Refused::Ignored(Ignored::Unexpected);
        let active = self.active.ok_or(unexpected)?;
        if active.asked != Some(frame.token) || active.frame.dev_num != frame.dev_num {
            return Err(unexpected);
        }
        match self.after(&active, &frame.message).ok_or(unexpected)? {
            After::Next(step) => {
                self.active = Some(Active {
                    step,
                    asked: None,
                    ..active
                });
            }
            After::Answer(message) => {
                self.active = None;
                self.counters.responses = self.counters.responses.wrapping_add(1);
                // There is room: the request was not begun without, and events leave the last place.
                self.out.push(Frame::new(frame.dev_num, message));
            }
            After::Silence => self.active = None,
        }
        Ok(())
    }

    /// What a response means; `None` if it is none to what was asked.
    fn after(&mut self, active: &Active, message: &crate::Message<'_>) -> Option<After> {
        let request = active.frame.message;
        Some(match (active.step, *message) {
            (Step::Learn, crate::Message::DeviceInfo(info)) => {
                self.known = Some((active.frame.dev_num, info));
                if request == Message::GetDeviceInfo {
                    After::Answer(Message::DeviceInfo {
                        version: VERSION,
                        device_id: info.device_id,
                        vendor_id: info.vendor_id,
                    })
                } else if info.is_present() {
                    After::Next(first_step(&request))
                } else {
                    self.counters.absent = self.counters.absent.wrapping_add(1);
                    After::Silence
                }
            }
            (Step::Generation, crate::Message::Config(data)) => After::Next(Step::Write {
                generation: data.generation,
                tries: 1,
            }),
            (Step::Write { tries, .. }, crate::Message::ConfigSet(data)) => {
                let Message::SetConfig {
                    offset,
                    size,
                    data: written,
                } = request
                else {
                    return None;
                };
                if data.len == 0 && tries < WRITE_TRIES {
                    return Some(After::Next(Step::Write {
                        generation: data.generation,
                        tries: tries + 1,
                    }));
                }
                if data.len == 0 {
                    self.counters.rejected_writes = self.counters.rejected_writes.wrapping_add(1);
                }
                After::Answer(Message::ConfigSet {
                    offset,
                    size,
                    data: written,
                })
            }
            (Step::Ask, message) => answer(&request, &message)?,
            _ => return None,
        })
    }

    /// Writes the next r1 message for the driver to `out` (40 bytes; with less room nothing is given out) and gives its size. Call until `None`.
    pub fn poll_wire(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < SIZE {
            return None;
        }
        self.out.pop()?.encode(out).ok()
    }

    /// Whether the driver has said that its addresses want translation.
    pub fn iommu_enabled(&self) -> bool {
        self.iommu_enabled
    }

    /// What was counted.
    pub fn counters(&self) -> &DeviceAdapterCounters {
        &self.counters
    }
}

#[derive(Clone, Copy)]
enum Refused {
    Busy,
    Ignored(Ignored),
}

enum After {
    Next(Step),
    Answer(Message),
    Silence,
}

fn first_step(message: &Message) -> Step {
    match message {
        Message::SetConfig { .. } => Step::Generation,
        _ => Step::Ask,
    }
}

/// Writes the revision-1 request of this step; `None` if there is none.
fn ask(active: &Active, token: Token, out: &mut [u8]) -> Option<usize> {
    use crate::Message as To;
    let send = |message: To<'_>, out: &mut [u8]| {
        crate::Frame::new(active.frame.dev_num, token, message)
            .encode(out)
            .ok()
    };
    let generation_only = To::GetConfig { offset: 0, len: 0 };
    match (active.step, active.frame.message) {
        (Step::Learn, _) => send(To::GetDeviceInfo, out),
        (Step::Generation, _) => send(generation_only, out),
        (Step::Write { generation, .. }, Message::SetConfig { offset, size, data }) => {
            let bytes = data.to_le_bytes();
            let data = bytes.get(..usize::from(size))?;
            let len = u32::from(size);
            send(
                To::SetConfig(ConfigData {
                    generation,
                    offset,
                    len,
                    data,
                }),
                out,
            )
        }
        (_, Message::GetFeatures { index }) => send(
            To::GetDeviceFeatures {
                first: index.checked_mul(2)?,
                count: 2,
            },
            out,
        ),
        (_, Message::SetFeatures { index, features }) => {
            let [low, high] = halves(features);
            send(
                To::SetDriverFeatures(FeatureBlocks {
                    first: index.checked_mul(2)?,
                    count: 2,
                    words: &[low.into(), high.into()],
                }),
                out,
            )
        }
        (_, Message::GetConfig { offset, size }) => send(
            To::GetConfig {
                offset,
                len: size.into(),
            },
            out,
        ),
        (_, Message::GetConfigGen) => send(generation_only, out),
        (_, Message::GetDeviceStatus) => send(To::GetDeviceStatus, out),
        (_, Message::SetDeviceStatus(status)) => send(To::SetDeviceStatus(status), out),
        (_, Message::GetVqueue(index)) => send(To::GetVqueue(index), out),
        (_, Message::SetVqueue(config)) => send(To::SetVqueue(config), out),
        (_, Message::ResetVqueue(index)) => send(To::ResetVqueue(index), out),
        _ => None,
    }
}

/// The r1 response that this one of revision 1 becomes; `None` if it does not belong to the request.
fn answer(request: &Message, message: &crate::Message<'_>) -> Option<After> {
    use crate::Message as From;
    Some(match (*request, *message) {
        (Message::GetFeatures { index }, From::DeviceFeatures(blocks)) => {
            After::Answer(Message::Features {
                index,
                features: whole([blocks.get(0), blocks.get(1)]),
            })
        }
        (Message::SetFeatures { index, features }, From::DriverFeaturesSet) => {
            After::Answer(Message::FeaturesSet { index, features })
        }
        (Message::GetConfig { offset, size }, From::Config(config)) => {
            let mut bytes = [0; 8];
            let len = usize::from(size).min(bytes.len()).min(config.data.len());
            bytes[..len].copy_from_slice(&config.data[..len]);
            let data = u64::from_le_bytes(bytes);
            After::Answer(Message::Config { offset, size, data })
        }
        (Message::GetConfigGen, From::Config(config)) => {
            After::Answer(Message::ConfigGen(config.generation))
        }
        (Message::GetDeviceStatus, From::DeviceStatus(status)) => {
            After::Answer(Message::DeviceStatus(status))
        }
        (Message::GetVqueue(index), From::Vqueue(info)) => After::Answer(Message::Vqueue {
            index,
            max_size: info.max_size,
        }),
        (Message::SetDeviceStatus(_), From::DeviceStatusSet(_))
        | (Message::SetVqueue(_), From::VqueueSet)
        | (Message::ResetVqueue(_), From::VqueueReset) => After::Silence,
        _ => return None,
    })
}

/// What does not fit 16 bytes, or 24 bits of offset, is for the driver to read.
fn config_event(event: &ConfigEvent<'_>) -> Message {
    let mut value = [0; 16];
    let size = u8::try_from(event.data.len()).unwrap_or(0);
    let (offset, size) = match value.get_mut(..event.data.len()) {
        Some(to) if event.offset < 1 << 24 => {
            to.copy_from_slice(event.data);
            (event.offset, size)
        }
        _ => (0, 0),
    };
    Message::EventConfig {
        status: event.status,
        offset: if size == 0 { 0 } else { offset },
        size,
        value,
    }
}

/// The low and the high 32 bits.
pub(super) fn halves(features: u64) -> [u32; 2] {
    let [low, high]: [U32; 2] = zerocopy::transmute!(features.to_le_bytes());
    [low.get(), high.get()]
}

/// The reverse of [`halves`].
pub(super) fn whole([low, high]: [u32; 2]) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
