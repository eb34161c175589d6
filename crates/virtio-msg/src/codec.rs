// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Revision 1: from bytes to [`Message`] and back.

use crate::message::{
    ConfigData, ConfigEvent, DecodeError, DeviceBitmap, DeviceInfo, EncodeError, FeatureBlocks,
    Frame, Kind, Message, ShmInfo, VqueueConfig, VqueueInfo,
};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize};
use crate::wire::bus as wire_bus;
use crate::wire::header::{Header, TYPE_BUS, TYPE_RESPONSE, is_event_id};
use crate::wire::transport as wire;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use wire::id;
use wire_bus::id as bus_id;

/// The payload as exactly one struct.
fn whole<T: FromBytes + KnownLayout + Immutable + Unaligned>(payload: &[u8]) -> Option<&T> {
    T::ref_from_bytes(payload).ok()
}

/// The payload as one struct and what follows.
fn start<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    payload: &[u8],
) -> Option<(&T, &[u8])> {
    T::ref_from_prefix(payload).ok()
}

fn empty(payload: &[u8]) -> Option<()> {
    payload.is_empty().then_some(())
}

fn len_is(data: &[u8], len: u32) -> bool {
    u32::try_from(data.len()) == Ok(len)
}

pub(crate) fn decode(bytes: &[u8], max: usize) -> Result<Frame<'_>, DecodeError> {
    let (header, payload) = Header::split(bytes, max)?;
    let Header {
        msg_type,
        msg_id,
        dev_num,
        token,
        msg_size,
    } = header;
    let unknown = DecodeError::Unknown { msg_type, msg_id };
    let parsed = if header.is_bus() {
        bus(msg_id, header.is_response(), payload)
    } else {
        transport(msg_id, header.is_response(), payload)
    };
    let message = parsed.ok_or(unknown)?.ok_or(DecodeError::WrongSize {
        msg_type,
        msg_id,
        size: msg_size,
    })?;
    Ok(Frame {
        dev_num,
        token,
        message,
    })
}

/// `None`: unknown id; `Some(None)`: wrong size.
type Parsed<'a> = Option<Option<Message<'a>>>;

/// A message about a device. Nothing answers an event.
pub(crate) fn transport(msg_id: u8, response: bool, p: &[u8]) -> Parsed<'_> {
    match response {
        true if is_event_id(msg_id) => None,
        true => transport_response(msg_id, p),
        false => transport_request(msg_id, p),
    }
}

/// A message about the bus. Nothing answers an event.
pub(crate) fn bus(msg_id: u8, response: bool, p: &[u8]) -> Parsed<'_> {
    match response {
        true if is_event_id(msg_id) => None,
        _ if msg_id >= bus_id::IMPLEMENTATION => Some(Some(Message::BusSpecific {
            id: msg_id,
            response,
            payload: p,
        })),
        true => bus_response(msg_id, p),
        false => bus_request(msg_id, p),
    }
}

fn transport_request(msg_id: u8, p: &[u8]) -> Parsed<'_> {
    Some(match msg_id {
        id::GET_DEVICE_INFO => empty(p).map(|()| Message::GetDeviceInfo),
        id::GET_DEVICE_FEATURES => {
            whole::<wire::FeatureRange>(p).map(|r| Message::GetDeviceFeatures {
                first: r.first.get(),
                count: r.count.get(),
            })
        }
        id::SET_DRIVER_FEATURES => feature_blocks(p).map(Message::SetDriverFeatures),
        id::GET_CONFIG => whole::<wire::ConfigRange>(p).map(|r| Message::GetConfig {
            offset: r.offset.get(),
            len: r.len.get(),
        }),
        id::SET_CONFIG => config_data(p)
            .filter(|d| len_is(d.data, d.len))
            .map(Message::SetConfig),
        id::GET_DEVICE_STATUS => empty(p).map(|()| Message::GetDeviceStatus),
        id::SET_DEVICE_STATUS => status(p).map(Message::SetDeviceStatus),
        id::GET_VQUEUE => queue(p).map(Message::GetVqueue),
        id::SET_VQUEUE => whole::<wire::Vqueue>(p).map(|q| {
            Message::SetVqueue(VqueueConfig {
                index: QueueIndex(q.index.get()),
                size: QueueSize(q.size.get()),
                descriptor: q.descriptor.get(),
                driver: q.driver.get(),
                device: q.device.get(),
            })
        }),
        id::RESET_VQUEUE => queue(p).map(Message::ResetVqueue),
        id::GET_SHM => whole::<wire::ShmIndex>(p).map(|s| Message::GetShm {
            index: s.index.get(),
        }),
        id::EVENT_CONFIG => config_event(p).map(Message::EventConfig),
        id::EVENT_AVAIL => whole::<wire::Avail>(p).map(|a| Message::EventAvail {
            queue: QueueIndex(a.index.get()),
            next: a.next.get(),
        }),
        id::EVENT_USED => queue(p).map(|queue| Message::EventUsed { queue }),
        _ => return None,
    })
}

fn transport_response(msg_id: u8, p: &[u8]) -> Parsed<'_> {
    Some(match msg_id {
        id::GET_DEVICE_INFO => whole::<wire::DeviceInfo>(p).map(|i| {
            Message::DeviceInfo(DeviceInfo {
                device_id: i.device_id.get(),
                vendor_id: i.vendor_id.get(),
                feature_bits: i.feature_bits.get(),
                config_size: i.config_size.get(),
                max_queues: i.max_queues.get(),
                admin_first: i.admin_first.get(),
                admin_count: i.admin_count.get(),
            })
        }),
        id::GET_DEVICE_FEATURES => feature_blocks(p).map(Message::DeviceFeatures),
        id::SET_DRIVER_FEATURES => empty(p).map(|()| Message::DriverFeaturesSet),
        id::GET_CONFIG => config_data(p)
            .filter(|d| len_is(d.data, d.len))
            .map(Message::Config),
        id::SET_CONFIG => config_set(p),
        id::GET_DEVICE_STATUS => status(p).map(Message::DeviceStatus),
        id::SET_DEVICE_STATUS => status(p).map(Message::DeviceStatusSet),
        id::GET_VQUEUE => whole::<wire::Vqueue>(p).map(|q| {
            Message::Vqueue(VqueueInfo {
                index: QueueIndex(q.index.get()),
                max_size: QueueSize(q.max_size.get()),
                size: QueueSize(q.size.get()),
                descriptor: q.descriptor.get(),
                driver: q.driver.get(),
                device: q.device.get(),
            })
        }),
        id::SET_VQUEUE => empty(p).map(|()| Message::VqueueSet),
        id::RESET_VQUEUE => empty(p).map(|()| Message::VqueueReset),
        id::GET_SHM => whole::<wire::Shm>(p).map(|s| {
            Message::Shm(ShmInfo {
                index: s.index.get(),
                len: s.len.get(),
                address: s.address.get(),
            })
        }),
        _ => return None,
    })
}

fn bus_request(msg_id: u8, p: &[u8]) -> Parsed<'_> {
    Some(match msg_id {
        bus_id::GET_DEVICES => whole::<wire_bus::DeviceRange>(p).map(|r| Message::GetDevices {
            offset: r.offset.get(),
            count: r.count.get(),
        }),
        bus_id::PING => whole::<wire_bus::Ping>(p).map(|d| Message::Ping { data: d.data.get() }),
        bus_id::EVENT_DEVICE => whole::<wire_bus::DeviceEvent>(p).map(|e| Message::EventDevice {
            device: DevNum(e.dev_num.get()),
            state: e.state.get().into(),
        }),
        _ => return None,
    })
}

fn bus_response(msg_id: u8, p: &[u8]) -> Parsed<'_> {
    Some(match msg_id {
        bus_id::GET_DEVICES => start::<wire_bus::Devices>(p)
            .and_then(|(d, bitmap)| {
                let count = usize::from(d.count.get());
                let len = count.div_ceil(8);
                // QEMU (October 2025) has room for a byte for each device, and fills a bit for each.
                let right = bitmap.len() == len || bitmap.len() == count;
                Some(DeviceBitmap {
                    offset: d.offset.get(),
                    count: d.count.get(),
                    next: d.next.get(),
                    bitmap: bitmap.get(..len).filter(|_| right)?,
                })
            })
            .map(Message::Devices),
        bus_id::PING => whole::<wire_bus::Ping>(p).map(|d| Message::Pong { data: d.data.get() }),
        _ => return None,
    })
}

fn status(p: &[u8]) -> Option<DeviceStatus> {
    whole::<wire::Status>(p).map(|s| DeviceStatus::from_bits_retain(s.status.get()))
}

fn queue(p: &[u8]) -> Option<QueueIndex> {
    whole::<wire::Queue>(p).map(|q| QueueIndex(q.index.get()))
}

fn feature_blocks(p: &[u8]) -> Option<FeatureBlocks<'_>> {
    let (range, rest) = start::<wire::FeatureRange>(p)?;
    let words = <[U32]>::ref_from_bytes(rest).ok()?;
    let count = range.count.get();
    (u32::try_from(words.len()) == Ok(count)).then_some(FeatureBlocks {
        first: range.first.get(),
        count,
        words,
    })
}

fn config_data(p: &[u8]) -> Option<ConfigData<'_>> {
    let (head, data) = start::<wire::ConfigData>(p)?;
    let (generation, offset, len) = (
        Generation(head.generation.get()),
        head.offset.get(),
        head.len.get(),
    );
    Some(ConfigData {
        generation,
        offset,
        len,
        data,
    })
}

/// The response of SET_CONFIG may leave the data out; and with length 0 a peer may still send back what it was sent.
fn config_set(p: &[u8]) -> Option<Message<'_>> {
    let mut data = config_data(p)?;
    if data.len == 0 {
        data.data = &[];
    }
    (data.data.is_empty() || len_is(data.data, data.len)).then_some(Message::ConfigSet(data))
}

/// The data may be left out, whatever the length.
fn config_event(p: &[u8]) -> Option<ConfigEvent<'_>> {
    let (head, data) = start::<wire::ConfigEvent>(p)?;
    let event = ConfigEvent {
        status: DeviceStatus::from_bits_retain(head.status.get()),
        generation: Generation(head.generation.get()),
        offset: head.offset.get(),
        len: head.len.get(),
        data,
    };
    (data.is_empty() || len_is(data, event.len)).then_some(event)
}

impl Message<'_> {
    /// The message id on the wire of revision 1.
    pub fn id(&self) -> u8 {
        match self {
            Message::GetDeviceInfo | Message::DeviceInfo(_) => id::GET_DEVICE_INFO,
            Message::GetDeviceFeatures { .. } | Message::DeviceFeatures(_) => {
                id::GET_DEVICE_FEATURES
            }
            Message::SetDriverFeatures(_) | Message::DriverFeaturesSet => id::SET_DRIVER_FEATURES,
            Message::GetConfig { .. } | Message::Config(_) => id::GET_CONFIG,
            Message::SetConfig(_) | Message::ConfigSet(_) => id::SET_CONFIG,
            Message::GetDeviceStatus | Message::DeviceStatus(_) => id::GET_DEVICE_STATUS,
            Message::SetDeviceStatus(_) | Message::DeviceStatusSet(_) => id::SET_DEVICE_STATUS,
            Message::GetVqueue(_) | Message::Vqueue(_) => id::GET_VQUEUE,
            Message::SetVqueue(_) | Message::VqueueSet => id::SET_VQUEUE,
            Message::ResetVqueue(_) | Message::VqueueReset => id::RESET_VQUEUE,
            Message::GetShm { .. } | Message::Shm(_) => id::GET_SHM,
            Message::EventConfig(_) => id::EVENT_CONFIG,
            Message::EventAvail { .. } => id::EVENT_AVAIL,
            Message::EventUsed { .. } => id::EVENT_USED,
            Message::GetDevices { .. } | Message::Devices(_) => bus_id::GET_DEVICES,
            Message::Ping { .. } | Message::Pong { .. } => bus_id::PING,
            Message::EventDevice { .. } => bus_id::EVENT_DEVICE,
            Message::BusSpecific { id, .. } => *id,
        }
    }

    /// Whether this is a bus message.
    pub fn is_bus(&self) -> bool {
        matches!(
            self,
            Message::GetDevices { .. }
                | Message::Devices(_)
                | Message::Ping { .. }
                | Message::Pong { .. }
                | Message::EventDevice { .. }
                | Message::BusSpecific { .. }
        )
    }

    /// Whether this is a request, a response or an event.
    pub fn kind(&self) -> Kind {
        match self {
            Message::DeviceInfo(_)
            | Message::DeviceFeatures(_)
            | Message::DriverFeaturesSet
            | Message::Config(_)
            | Message::ConfigSet(_)
            | Message::DeviceStatus(_)
            | Message::DeviceStatusSet(_)
            | Message::Vqueue(_)
            | Message::VqueueSet
            | Message::VqueueReset
            | Message::Shm(_)
            | Message::Devices(_)
            | Message::Pong { .. }
            | Message::BusSpecific { response: true, .. } => Kind::Response,
            other if is_event_id(other.id()) => Kind::Event,
            _ => Kind::Request,
        }
    }
}

pub(crate) fn encode(frame: &Frame<'_>, out: &mut [u8]) -> Result<usize, EncodeError> {
    let m = &frame.message;
    let put =
        |fixed: &[u8], tail: &[u8], zeros: usize, out: &mut [u8]| -> Result<usize, EncodeError> {
            let kind = if m.kind() == Kind::Response {
                TYPE_RESPONSE
            } else {
                0
            };
            let msg_type = kind | if m.is_bus() { TYPE_BUS } else { 0 };
            let len = fixed.len().saturating_add(tail.len()).saturating_add(zeros);
            let payload = Header::emit(msg_type, m.id(), frame.dev_num, frame.token, len, out)?;
            let (head, rest) = payload.split_at_mut(fixed.len());
            let (data, pad) = rest.split_at_mut(tail.len());
            head.copy_from_slice(fixed);
            data.copy_from_slice(tail);
            pad.fill(0);
            Ok(crate::wire::HEADER_SIZE + len)
        };
    match m {
        Message::GetDeviceInfo
        | Message::DriverFeaturesSet
        | Message::GetDeviceStatus
        | Message::VqueueSet
        | Message::VqueueReset => put(&[], &[], 0, out),
        Message::DeviceInfo(i) => put(
            wire::DeviceInfo {
                device_id: i.device_id.into(),
                vendor_id: i.vendor_id.into(),
                feature_bits: i.feature_bits.into(),
                config_size: i.config_size.into(),
                max_queues: i.max_queues.into(),
                admin_first: i.admin_first.into(),
                admin_count: i.admin_count.into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::GetDeviceFeatures { first, count } => put(
            wire::FeatureRange {
                first: (*first).into(),
                count: (*count).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::DeviceFeatures(b) | Message::SetDriverFeatures(b) => {
            let head = wire::FeatureRange {
                first: b.first.into(),
                count: b.count.into(),
            };
            let count = usize::try_from(b.count).unwrap_or(usize::MAX);
            let words = b.words.get(..count).unwrap_or(b.words);
            let zeros = count.saturating_sub(words.len()).saturating_mul(4);
            put(head.as_bytes(), words.as_bytes(), zeros, out)
        }
        Message::GetConfig { offset, len } => put(
            wire::ConfigRange {
                offset: (*offset).into(),
                len: (*len).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::Config(d) | Message::SetConfig(d) | Message::ConfigSet(d) => {
            let head = wire::ConfigData {
                generation: d.generation.0.into(),
                offset: d.offset.into(),
                len: d.len.into(),
            };
            let missing = usize::try_from(d.len)
                .unwrap_or(usize::MAX)
                .saturating_sub(d.data.len());
            let zeros = if matches!(m, Message::Config(_)) {
                missing
            } else {
                0
            };
            put(head.as_bytes(), d.data, zeros, out)
        }
        Message::DeviceStatus(s) | Message::SetDeviceStatus(s) | Message::DeviceStatusSet(s) => {
            put(
                wire::Status {
                    status: s.bits().into(),
                }
                .as_bytes(),
                &[],
                0,
                out,
            )
        }
        Message::GetVqueue(queue) | Message::ResetVqueue(queue) | Message::EventUsed { queue } => {
            put(
                wire::Queue {
                    index: queue.0.into(),
                }
                .as_bytes(),
                &[],
                0,
                out,
            )
        }
        Message::Vqueue(q) => put(
            wire::Vqueue {
                index: q.index.0.into(),
                max_size: q.max_size.0.into(),
                size: q.size.0.into(),
                reserved: 0.into(),
                descriptor: q.descriptor.into(),
                driver: q.driver.into(),
                device: q.device.into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::SetVqueue(q) => put(
            wire::Vqueue {
                index: q.index.0.into(),
                max_size: 0.into(),
                size: q.size.0.into(),
                reserved: 0.into(),
                descriptor: q.descriptor.into(),
                driver: q.driver.into(),
                device: q.device.into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::GetShm { index } => put(
            wire::ShmIndex {
                index: (*index).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::Shm(s) => put(
            wire::Shm {
                index: s.index.into(),
                len: s.len.into(),
                address: s.address.into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::EventConfig(e) => put(
            wire::ConfigEvent {
                status: e.status.bits().into(),
                generation: e.generation.0.into(),
                offset: e.offset.into(),
                len: e.len.into(),
            }
            .as_bytes(),
            e.data,
            0,
            out,
        ),
        Message::EventAvail { queue, next } => put(
            wire::Avail {
                index: queue.0.into(),
                next: (*next).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::GetDevices { offset, count } => put(
            wire_bus::DeviceRange {
                offset: (*offset).into(),
                count: (*count).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::Devices(d) => {
            let head = wire_bus::Devices {
                offset: d.offset.into(),
                count: d.count.into(),
                next: d.next.into(),
            };
            let len = usize::from(d.count).div_ceil(8);
            let bitmap = d.bitmap.get(..len).unwrap_or(d.bitmap);
            put(head.as_bytes(), bitmap, len - bitmap.len(), out)
        }
        Message::Ping { data } | Message::Pong { data } => put(
            wire_bus::Ping {
                data: (*data).into(),
            }
            .as_bytes(),
            &[],
            0,
            out,
        ),
        Message::EventDevice { device, state } => {
            let state: u16 = (*state).into();
            put(
                wire_bus::DeviceEvent {
                    dev_num: device.0.into(),
                    state: state.into(),
                }
                .as_bytes(),
                &[],
                0,
                out,
            )
        }
        Message::BusSpecific { payload, .. } => put(payload, &[], 0, out),
    }
}
