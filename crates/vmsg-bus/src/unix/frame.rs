// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The frames of the handshake: docs/bus-unix.md §2.
//!
//! Parsing is total and checks everything that later code relies on.

use crate::capabilities::{MAX_NAME, printable};
use crate::{MAX_FDS, MESSAGE_SIZES, SLOTS};
use std::fmt;
use vmsg_mem::spsc::Layout;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `VMSG`.
const MAGIC: u32 = 0x4753_4d56;
const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const REFUSE: u16 = 3;

/// The version spoken here.
pub(crate) const VERSION: u16 = 1;

/// The longest frame; a longer one is malformed.
pub(crate) const MAX_FRAME: usize = 1024;

/// The longest explanation in a REFUSE, in bytes.
const MAX_TEXT: usize = 256;

/// The longest file of queues that a driver maps.
pub(crate) const MAX_FILE: u64 = 64 << 20;

/// HELLO flag: will not claim a device.
const OBSERVER: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HeadWire {
    magic: U32,
    kind: U16,
    length: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HelloWire {
    version_min: U16,
    version_max: U16,
    message_size: U32,
    flags: U32,
    name_len: U16,
    zero: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WelcomeWire {
    version: U16,
    zero: U16,
    message_size: U32,
    slot_size: U32,
    slots: U32,
    capabilities: U32,
    max_fds: U32,
    epoch: U64,
    max_windows: U32,
    zero2: U32,
    to_device: U64,
    to_driver: U64,
    file_len: U64,
    name_len: U16,
    zero3: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RefuseWire {
    reason: U32,
    version_min: U16,
    version_max: U16,
    text_len: U16,
    zero: U16,
}

/// Why a device host turns a driver away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefuseReason {
    /// No version that both sides speak.
    Version,
    /// Too many connections.
    TooMany,
    /// The HELLO was malformed.
    BadHello,
    /// Messages of the wanted size are too short.
    MessageSize,
    /// Not permitted.
    Denied,
    /// The host is about to end.
    ShuttingDown,
    /// Another reason.
    Other(u32),
}

impl RefuseReason {
    fn code(self) -> u32 {
        match self {
            Self::Version => 1,
            Self::TooMany => 2,
            Self::BadHello => 3,
            Self::MessageSize => 4,
            Self::Denied => 5,
            Self::ShuttingDown => 6,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::TooMany,
            3 => Self::BadHello,
            4 => Self::MessageSize,
            5 => Self::Denied,
            6 => Self::ShuttingDown,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "no common version of the bus",
            Self::TooMany => "too many connections",
            Self::BadHello => "malformed handshake",
            Self::MessageSize => "the message size is too small",
            Self::Denied => "not permitted",
            Self::ShuttingDown => "the device host is shutting down",
            Self::Other(code) => return write!(f, "reason {code}"),
        })
    }
}

/// What a driver says first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version_min: u16,
    pub(crate) version_max: u16,
    /// 0: as the host likes.
    pub(crate) message_size: u32,
    pub(crate) observer: bool,
    pub(crate) name: String,
}

/// How a host agrees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    pub(crate) message_size: usize,
    pub(crate) slot_size: usize,
    pub(crate) slots: u32,
    pub(crate) capabilities: u32,
    pub(crate) epoch: u64,
    pub(crate) max_windows: u32,
    pub(crate) to_device: usize,
    pub(crate) to_driver: usize,
    /// Bytes of each queue.
    pub(crate) queue_len: usize,
    pub(crate) file_len: u64,
    pub(crate) name: String,
}

/// How a host declines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refuse {
    pub(crate) reason: RefuseReason,
    pub(crate) versions: (u16, u16),
    pub(crate) text: String,
}

/// What a host answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Welcome(Welcome),
    Refuse(Refuse),
}

type Malformed = &'static str;

/// Splits a frame into its kind and what follows the head.
fn open(frame: &[u8]) -> Result<(u16, &[u8]), Malformed> {
    let (head, body) =
        HeadWire::read_from_prefix(frame).map_err(|_| "a frame shorter than its head")?;
    if head.magic.get() != MAGIC {
        return Err("not a frame of this bus");
    }
    if usize::from(head.length.get()) != frame.len() || frame.len() > MAX_FRAME {
        return Err("a frame with a wrong length");
    }
    Ok((head.kind.get(), body))
}

fn close(kind: u16, fixed: &[u8], text: &str) -> Vec<u8> {
    let length = size_of::<HeadWire>() + fixed.len() + text.len();
    let length = u16::try_from(length).expect("names and texts are cut before");
    let mut frame = HeadWire {
        magic: MAGIC.into(),
        kind: kind.into(),
        length: length.into(),
    }
    .as_bytes()
    .to_vec();
    frame.extend_from_slice(fixed);
    frame.extend_from_slice(text.as_bytes());
    frame
}

fn text_of(rest: &[u8], len: U16, max: usize) -> Result<String, Malformed> {
    let len = usize::from(len.get());
    if len > max {
        return Err("a text that is too long");
    }
    let bytes = rest.get(..len).ok_or("a text longer than its frame")?;
    Ok(String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect())
}

/// `text` cut to `max` bytes at a character, and its length.
fn cut(text: &str, max: usize) -> (&str, U16) {
    let text = &text[..text.floor_char_boundary(max)];
    (text, U16::new(u16::try_from(text.len()).unwrap_or(0)))
}

impl Hello {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (name, name_len) = cut(&self.name, MAX_NAME);
        let wire = HelloWire {
            version_min: self.version_min.into(),
            version_max: self.version_max.into(),
            message_size: self.message_size.into(),
            flags: U32::new(if self.observer { OBSERVER } else { 0 }),
            name_len,
            zero: U16::ZERO,
        };
        close(HELLO, wire.as_bytes(), name)
    }

    pub(crate) fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let (kind, body) = open(frame)?;
        if kind != HELLO {
            return Err("not a HELLO");
        }
        let (wire, rest) = HelloWire::read_from_prefix(body).map_err(|_| "a short HELLO")?;
        Ok(Self {
            version_min: wire.version_min.get(),
            version_max: wire.version_max.get(),
            message_size: wire.message_size.get(),
            observer: wire.flags.get() & OBSERVER != 0,
            name: printable(text_of(rest, wire.name_len, MAX_NAME)?.as_bytes()),
        })
    }
}

impl Answer {
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        match open(frame)? {
            (WELCOME, body) => Welcome::decode(body).map(Self::Welcome),
            (REFUSE, body) => Refuse::decode(body).map(Self::Refuse),
            _ => Err("neither WELCOME nor REFUSE"),
        }
    }
}

impl Welcome {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (name, name_len) = cut(&self.name, MAX_NAME);
        let size = |bytes: usize| {
            u32::try_from(bytes).expect("sizes of a listener are checked when it is made")
        };
        let wire = WelcomeWire {
            version: VERSION.into(),
            zero: U16::ZERO,
            message_size: size(self.message_size).into(),
            slot_size: size(self.slot_size).into(),
            slots: self.slots.into(),
            capabilities: self.capabilities.into(),
            max_fds: size(MAX_FDS).into(),
            epoch: self.epoch.into(),
            max_windows: self.max_windows.into(),
            zero2: U32::ZERO,
            to_device: U64::new(self.to_device as u64),
            to_driver: U64::new(self.to_driver as u64),
            file_len: self.file_len.into(),
            name_len,
            zero3: U16::ZERO,
        };
        close(WELCOME, wire.as_bytes(), name)
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let (wire, rest) = WelcomeWire::read_from_prefix(body).map_err(|_| "a short WELCOME")?;
        if wire.version.get() != VERSION {
            return Err("a WELCOME of a version that was not offered");
        }
        let message_size = wire.message_size.get() as usize;
        let slot_size = wire.slot_size.get() as usize;
        if !MESSAGE_SIZES.contains(&message_size)
            || slot_size < message_size
            || slot_size > *MESSAGE_SIZES.end()
        {
            return Err("a WELCOME with sizes out of range");
        }
        let slots = wire.slots.get();
        if !slot_size.is_multiple_of(64) || !SLOTS.contains(&slots) {
            return Err("a WELCOME with impossible slots");
        }
        let file_len = wire.file_len.get();
        let queue_len = Layout::armed(slot_size)
            .bytes_for(slots)
            .ok_or("a WELCOME with impossible queues")?;
        let (to_device, to_driver) = (wire.to_device.get(), wire.to_driver.get());
        let (low, high) = (to_device.min(to_driver), to_device.max(to_driver));
        let fits = |from: u64, until: u64| {
            from.checked_add(queue_len as u64)
                .is_some_and(|end| end <= until)
        };
        if file_len > MAX_FILE
            || low % 64 != 0
            || high % 64 != 0
            || !fits(low, high)
            || !fits(high, file_len)
        {
            return Err("a WELCOME whose queues do not lie in its file");
        }
        let offset = |at: u64| usize::try_from(at).map_err(|_| "a WELCOME with impossible offsets");
        Ok(Self {
            message_size,
            slot_size,
            slots,
            capabilities: wire.capabilities.get(),
            epoch: wire.epoch.get(),
            max_windows: wire.max_windows.get(),
            to_device: offset(to_device)?,
            to_driver: offset(to_driver)?,
            queue_len,
            file_len,
            name: printable(text_of(rest, wire.name_len, MAX_NAME)?.as_bytes()),
        })
    }
}

impl Refuse {
    pub(crate) fn new(reason: RefuseReason, text: impl Into<String>) -> Self {
        Self {
            reason,
            versions: (VERSION, VERSION),
            text: text.into(),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let (text, text_len) = cut(&self.text, MAX_TEXT);
        let wire = RefuseWire {
            reason: self.reason.code().into(),
            version_min: self.versions.0.into(),
            version_max: self.versions.1.into(),
            text_len,
            zero: U16::ZERO,
        };
        close(REFUSE, wire.as_bytes(), text)
    }

    fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let (wire, rest) = RefuseWire::read_from_prefix(body).map_err(|_| "a short REFUSE")?;
        Ok(Self {
            reason: RefuseReason::from_code(wire.reason.get()),
            versions: (wire.version_min.get(), wire.version_max.get()),
            text: text_of(rest, wire.text_len, MAX_TEXT)?,
        })
    }
}

#[cfg(test)]
#[path = "frame_test.rs"]
mod tests;
