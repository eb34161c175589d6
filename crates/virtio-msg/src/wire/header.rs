// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of every message, and the rules about sizes.

use crate::message::{DecodeError, EncodeError};
use crate::types::{DevNum, Token};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes in a header.
pub const HEADER_SIZE: usize = 8;

/// The smallest maximum message size a bus can have: the response of GET_VQUEUE and the request SET_VQUEUE take 48 bytes.
pub const MIN_MESSAGE_SIZE: usize = 48;

/// The largest maximum message size a bus can advertise. A single message has at most 65535 bytes, since its size field has 16 bits.
pub const MAX_MESSAGE_SIZE: usize = 65536;

/// Type bit 0: the message is a response.
pub const TYPE_RESPONSE: u8 = 1;

/// Type bit 1: the message is about the bus, not about a device.
pub const TYPE_BUS: u8 = 2;

/// The header as it lies in memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// Bit 0 response, bit 1 bus message, others 0 and ignored.
    pub msg_type: u8,
    /// Which message.
    pub msg_id: u8,
    /// Device number, 0 for bus messages.
    pub dev_num: U16,
    /// Correlation of request and response.
    pub token: U16,
    /// Bytes of header and payload.
    pub msg_size: U16,
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bit 0 response, bit 1 bus message; other bits are sent 0 and ignored on receipt.
    pub msg_type: u8,
    /// Which message.
    pub msg_id: u8,
    /// Device number, 0 for bus messages.
    pub dev_num: DevNum,
    /// Correlation of request and response; 0 in events.
    pub token: Token,
    /// Bytes of header and payload.
    pub msg_size: u16,
}

impl Header {
    /// Whether the message is a response.
    pub fn is_response(&self) -> bool {
        self.msg_type & TYPE_RESPONSE != 0
    }

    /// Whether the message is about the bus.
    pub fn is_bus(&self) -> bool {
        self.msg_type & TYPE_BUS != 0
    }

    /// Whether the message is an event: nobody answers it.
    pub fn is_event(&self) -> bool {
        is_event_id(self.msg_id)
    }

    /// Reads the header at the start of `bytes` and applies the size rules: the message is at least a header long, not longer than
    /// `max`, and whole. Gives the header and the payload. What follows the message in `bytes` (the rest of a slot) is left out.
    ///
    /// # Errors
    /// [`DecodeError::TooShort`], [`DecodeError::TooLong`].
    pub fn split(bytes: &[u8], max: usize) -> Result<(Header, &[u8]), DecodeError> {
        let (raw, _) = RawHeader::ref_from_prefix(bytes).map_err(|_| DecodeError::TooShort {
            have: bytes.len(),
            need: HEADER_SIZE,
        })?;
        let header = Header {
            msg_type: raw.msg_type,
            msg_id: raw.msg_id,
            dev_num: DevNum(raw.dev_num.get()),
            token: Token(raw.token.get()),
            msg_size: raw.msg_size.get(),
        };
        let size = usize::from(header.msg_size);
        if size < HEADER_SIZE {
            return Err(DecodeError::TooShort {
                have: size,
                need: HEADER_SIZE,
            });
        }
        if size > max {
            return Err(DecodeError::TooLong { size, max });
        }
        let payload = bytes.get(HEADER_SIZE..size).ok_or(DecodeError::TooShort {
            have: bytes.len(),
            need: size,
        })?;
        Ok((header, payload))
    }

    /// Writes the header to the start of `out` and gives the `payload_len` bytes that follow it, for the payload.
    ///
    /// # Errors
    /// [`EncodeError`] if the message does not fit `out` or a 16-bit size. Then nothing was written.
    pub fn emit(
        msg_type: u8,
        msg_id: u8,
        dev_num: DevNum,
        token: Token,
        payload_len: usize,
        out: &mut [u8],
    ) -> Result<&mut [u8], EncodeError> {
        let size = payload_len.saturating_add(HEADER_SIZE);
        let room = out.len();
        let Ok(msg_size) = u16::try_from(size) else {
            return Err(EncodeError {
                size,
                room: room.min(usize::from(u16::MAX)),
            });
        };
        let message = out.get_mut(..size).ok_or(EncodeError { size, room })?;
        let (head, payload) = message.split_at_mut(HEADER_SIZE);
        let raw = RawHeader {
            msg_type,
            msg_id,
            dev_num: dev_num.0.into(),
            token: token.0.into(),
            msg_size: msg_size.into(),
        };
        head.copy_from_slice(raw.as_bytes());
        Ok(payload)
    }
}

/// Whether messages with this id are events: 0x40 to 0x7F, and 0xC0 to 0xFF among the bus messages of an implementation.
pub const fn is_event_id(msg_id: u8) -> bool {
    msg_id & 0x40 != 0
}
