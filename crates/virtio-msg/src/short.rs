// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of mid 2025, with a header of six bytes: type, id, device number, size. For traces only.
//!
//! Ids and payloads are those of revision 1, but there is no token, GET_VQUEUE and SET_VQUEUE lack the reserved word before the addresses (so that
//! the longest message is 42 bytes, and buses had messages of 44), and QEMU fills some payloads up to a fixed size. One request was in flight at a
//! time.
//!
//! Source: Linux `include/uapi/linux/virtio_msg.h` and QEMU `include/hw/virtio/virtio-msg-prot.h` of that time.

use crate::codec;
use crate::message::{
    ConfigData, ConfigEvent, DecodeError, FeatureBlocks, Message, VqueueConfig, VqueueInfo,
};
use crate::status::DeviceStatus;
use crate::types::{DevNum, Generation, QueueIndex, QueueSize};
use crate::wire::header::{TYPE_BUS, TYPE_RESPONSE};
use crate::wire::transport::{self as wire, id};
use core::fmt;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Bytes in a header.
pub const HEADER_SIZE: usize = 6;

/// Bytes of a message on the buses of that time.
pub const SIZE: usize = 44;

#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    msg_type: u8,
    msg_id: u8,
    dev_num: U16,
    msg_size: U16,
}

#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Vqueue {
    index: U32,
    max_size: U32,
    size: U32,
    descriptor: U64,
    driver: U64,
    device: U64,
}

/// A message with its address. `Display` is the line of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Device number; 0 for bus messages.
    pub dev_num: DevNum,
    /// The message.
    pub message: Message<'a>,
}

/// `short dev 0 GET_VQUEUE: queue 1`, `short bus PING: data 0x00000001`.
impl fmt::Display for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_bus() {
            write!(f, "short bus {}", self.message)
        } else {
            write!(f, "short dev {} {}", self.dev_num, self.message)
        }
    }
}

/// Reads one message from the start of `bytes`; what follows it there is left out.
///
/// Total: whatever the bytes, the result is a frame or an error.
///
/// # Errors
/// [`DecodeError::TooShort`], [`DecodeError::Unknown`], [`DecodeError::WrongSize`].
pub fn decode(bytes: &[u8]) -> Result<Frame<'_>, DecodeError> {
    let too_short = |need| DecodeError::TooShort {
        have: bytes.len(),
        need,
    };
    let (header, _) = RawHeader::ref_from_prefix(bytes).map_err(|_| too_short(HEADER_SIZE))?;
    let RawHeader {
        msg_type,
        msg_id,
        dev_num,
        msg_size,
    } = *header;
    let size = usize::from(msg_size.get());
    if size < HEADER_SIZE {
        return Err(DecodeError::TooShort {
            have: size,
            need: HEADER_SIZE,
        });
    }
    let payload = bytes.get(HEADER_SIZE..size).ok_or(too_short(size))?;
    let response = msg_type & TYPE_RESPONSE != 0;
    let parsed = match msg_type & TYPE_BUS {
        0 => transport(msg_id, response, payload),
        _ => codec::bus(msg_id, response, payload),
    };
    let message = parsed
        .ok_or(DecodeError::Unknown { msg_type, msg_id })?
        .ok_or(DecodeError::WrongSize {
            msg_type,
            msg_id,
            size: msg_size.get(),
        })?;
    Ok(Frame {
        dev_num: DevNum(dev_num.get()),
        message,
    })
}

/// `None`: unknown id; `Some(None)`: wrong size.
fn transport(msg_id: u8, response: bool, p: &[u8]) -> Option<Option<Message<'_>>> {
    Some(match (msg_id, response) {
        (id::GET_DEVICE_FEATURES, true) => features(p).map(Message::DeviceFeatures),
        (id::SET_DRIVER_FEATURES, false) => features(p).map(Message::SetDriverFeatures),
        // QEMU repeats the request.
        (id::SET_DRIVER_FEATURES, true) => Some(Message::DriverFeaturesSet),
        (id::SET_VQUEUE, true) => Some(Message::VqueueSet),
        (id::GET_CONFIG, true) => config(p).map(Message::Config),
        (id::SET_CONFIG, false) => config(p).map(Message::SetConfig),
        (id::SET_CONFIG, true) => config(p).map(Message::ConfigSet),
        (id::GET_VQUEUE, true) => vqueue(p).map(Message::Vqueue),
        (id::SET_VQUEUE, false) => vqueue(p).map(|q| {
            Message::SetVqueue(VqueueConfig {
                index: q.index,
                size: q.size,
                descriptor: q.descriptor,
                driver: q.driver,
                device: q.device,
            })
        }),
        (id::EVENT_CONFIG, false) => event(p).map(Message::EventConfig),
        _ => return codec::transport(msg_id, response, p),
    })
}

/// QEMU leaves the count 0 and has two words all the same.
fn features(p: &[u8]) -> Option<FeatureBlocks<'_>> {
    let (range, rest) = wire::FeatureRange::ref_from_prefix(p).ok()?;
    let words = <[U32]>::ref_from_bytes(rest).ok()?;
    Some(FeatureBlocks {
        first: range.first.get(),
        count: range.count.get(),
        words,
    })
}

/// QEMU has eight bytes of data whatever the length.
fn cut(data: &[u8], len: u32) -> &[u8] {
    usize::try_from(len)
        .ok()
        .and_then(|len| data.get(..len))
        .unwrap_or(data)
}

fn config(p: &[u8]) -> Option<ConfigData<'_>> {
    let (head, data) = wire::ConfigData::ref_from_prefix(p).ok()?;
    let len = head.len.get();
    Some(ConfigData {
        generation: Generation(head.generation.get()),
        offset: head.offset.get(),
        len,
        data: cut(data, len),
    })
}

fn vqueue(p: &[u8]) -> Option<VqueueInfo> {
    let q = Vqueue::ref_from_bytes(p).ok()?;
    Some(VqueueInfo {
        index: QueueIndex(q.index.get()),
        max_size: QueueSize(q.max_size.get()),
        size: QueueSize(q.size.get()),
        descriptor: q.descriptor.get(),
        driver: q.driver.get(),
        device: q.device.get(),
    })
}

fn event(p: &[u8]) -> Option<ConfigEvent<'_>> {
    let (head, data) = wire::ConfigEvent::ref_from_prefix(p).ok()?;
    let len = head.len.get();
    Some(ConfigEvent {
        status: DeviceStatus::from_bits_retain(head.status.get()),
        generation: Generation(head.generation.get()),
        offset: head.offset.get(),
        len,
        data: cut(data, len),
    })
}

#[cfg(test)]
#[path = "short_test.rs"]
mod tests;
