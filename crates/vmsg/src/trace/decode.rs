// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From recorded bytes to what a line says.

use virtio_msg::{Frame, Kind, Message, r1, short};
use vmsg_bus::control;
use vmsg_bus::trace::{Captured, Layout};

/// A message as far as lines, filters and pairs need it.
pub(super) struct Decoded {
    pub(super) bus: bool,
    pub(super) dev: u16,
    /// `None` in layouts without tokens.
    pub(super) token: Option<u16>,
    pub(super) id: u8,
    pub(super) kind: Kind,
    pub(super) name: &'static str,
    /// The device it is about.
    pub(super) about: Option<u16>,
    /// The line.
    pub(super) text: String,
}

impl Decoded {
    /// Decodes what was recorded, or says why it cannot be.
    pub(super) fn new(captured: &Captured<'_>) -> Result<Self, String> {
        if let Some(len) = captured.cut_from {
            return Err(format!("only part of {len} bytes was recorded"));
        }
        match captured.layout {
            Layout::Revision1 => revision1(captured.message),
            Layout::R1 => {
                let frame = r1::decode(captured.message).map_err(|error| error.to_string())?;
                Ok(Self {
                    bus: false,
                    dev: frame.dev_num.0,
                    token: None,
                    id: frame.message.id(),
                    kind: frame.message.kind(),
                    name: frame.message.name(),
                    about: Some(frame.dev_num.0),
                    text: frame.to_string(),
                })
            }
            Layout::Short => {
                let frame = short::decode(captured.message).map_err(|error| error.to_string())?;
                let bus = frame.message.is_bus();
                Ok(Self {
                    bus,
                    dev: frame.dev_num.0,
                    token: None,
                    id: frame.message.id(),
                    kind: frame.message.kind(),
                    name: frame.message.name(),
                    about: (!bus).then_some(frame.dev_num.0),
                    text: frame.to_string(),
                })
            }
        }
    }
}

fn revision1(bytes: &[u8]) -> Result<Decoded, String> {
    let frame = virtio_msg::decode(bytes, usize::from(u16::MAX)).map_err(|e| e.to_string())?;
    let Frame {
        dev_num,
        token,
        message,
    } = frame;
    let mut decoded = Decoded {
        bus: message.is_bus(),
        dev: dev_num.0,
        token: Some(token.0),
        id: message.id(),
        kind: message.kind(),
        name: message.name(),
        about: (!message.is_bus()).then_some(dev_num.0),
        text: String::new(),
    };
    match message {
        Message::EventDevice { device, .. } => decoded.about = Some(device.0),
        Message::BusSpecific {
            id,
            response,
            payload,
        } => {
            if let Some(name) = control::name(id) {
                decoded.name = name;
                decoded.about = device_of(id, payload);
                if let Some(fields) = own(id, response, payload) {
                    let response = if response { " response" } else { "" };
                    decoded.text = format!("bus #{token} {name}{response}: {fields}");
                    return Ok(decoded);
                }
            }
        }
        _ => {}
    }
    decoded.text = frame.to_string();
    Ok(decoded)
}

/// The fields of a message of our own buses.
fn own(id: u8, response: bool, payload: &[u8]) -> Option<String> {
    if response {
        let decoded = control::Response::decode(id, payload).ok()?;
        Some(match device_of(id, payload) {
            Some(device) => format!("device {device}, {decoded}"),
            None if matches!(id, control::id::BACKING_ADD | control::id::BACKING_REMOVE) => {
                format!("backing {}, {decoded}", decoded.subject)
            }
            None => format!("window {}, {decoded}", decoded.subject),
        })
    } else {
        let decoded = control::Request::decode(id, payload).ok()?;
        Some(decoded.to_string())
    }
}

/// All but the messages about windows and backings begin with the number of a device, requests and responses.
fn device_of(id: u8, payload: &[u8]) -> Option<u16> {
    if matches!(
        id,
        control::id::WINDOW_ADD
            | control::id::WINDOW_REMOVE
            | control::id::BACKING_ADD
            | control::id::BACKING_REMOVE
            | control::id::VIEW_ADD
    ) {
        return None;
    }
    payload.first_chunk().map(|dev| u16::from_le_bytes(*dev))
}

/// What a layout is called.
pub(super) fn layout(layout: Layout) -> &'static str {
    match layout {
        Layout::Revision1 => "revision-1",
        Layout::R1 => "r1",
        Layout::Short => "short",
    }
}

/// What a kind of message is called.
pub(super) fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Request => "request",
        Kind::Response => "response",
        Kind::Event => "event",
    }
}

/// The names of all messages, of all layouts.
pub(super) const NAMES: [&str; 36] = [
    "GET_DEVICE_INFO",
    "GET_DEVICE_FEATURES",
    "SET_DRIVER_FEATURES",
    "GET_CONFIG",
    "SET_CONFIG",
    "GET_DEVICE_STATUS",
    "SET_DEVICE_STATUS",
    "GET_VQUEUE",
    "SET_VQUEUE",
    "RESET_VQUEUE",
    "GET_SHM",
    "EVENT_CONFIG",
    "EVENT_AVAIL",
    "EVENT_USED",
    "GET_DEVICES",
    "PING",
    "EVENT_DEVICE",
    "BUS_SPECIFIC",
    "WINDOW_ADD",
    "WINDOW_REMOVE",
    "QUEUE_NOTIFY",
    "QUEUE_RESUME",
    "CLAIM",
    "DEVICE_NAME",
    "QUEUE_INFLIGHT",
    "BACKING_ADD",
    "BACKING_REMOVE",
    "VIEW_ADD",
    "SHARED_MEMORY",
    "QUEUE_VECTORS",
    "DEVICE_INFO",
    "GET_FEATURES",
    "SET_FEATURES",
    "GET_CONFIG_GEN",
    "IOMMU_ENABLE",
    "IOMMU_TRANSLATE",
];

/// Whether a message is called so.
pub(super) fn is_name(name: &str) -> bool {
    NAMES.iter().any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
#[path = "decode_test.rs"]
mod tests;
