// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers to the bus messages that both sides of every bus understand.

use crate::message::{DeviceBitmap, Frame, Message};
use crate::types::DevNum;

/// Bytes of a GET_DEVICES response before its bitmap.
const DEVICES_HEAD: usize = 14;

/// The response to PING, from either side: the same number. `None` if the frame is something else.
pub fn answer_ping<'a>(frame: &Frame<'_>) -> Option<Frame<'a>> {
    match frame.message {
        Message::Ping { data } => Some(frame.response(Message::Pong { data })),
        _ => None,
    }
}

/// Answers PING and GET_DEVICES on the device side: writes the response to `out` and gives its size. `present` says which devices are
/// there, `highest` is the highest of their numbers. `max_message_size` bounds the response; if the bitmap that was asked for does not
/// fit, it is shorter.
///
/// `None`: the frame is something else, or is malformed (GET_DEVICES with numbers that are no multiples of 8); then nothing is answered.
pub fn answer(
    frame: &Frame<'_>,
    highest: Option<DevNum>,
    present: impl Fn(DevNum) -> bool,
    max_message_size: usize,
    out: &mut [u8],
) -> Option<usize> {
    let Message::GetDevices { offset, count } = frame.message else {
        return answer_ping(frame)?.encode(out).ok();
    };
    if offset % 8 != 0 || count % 8 != 0 {
        return None;
    }
    let room = max_message_size.min(out.len()).saturating_sub(DEVICES_HEAD);
    let room = u16::try_from(room.saturating_mul(8)).unwrap_or(u16::MAX - 7);
    // The numbers end at 65535.
    let left = (u16::MAX - offset - 7).saturating_add(8);
    let count = count.min(room).min(left);
    let next = match (offset.checked_add(count), highest) {
        (Some(end), Some(highest)) if count != 0 && highest.0 >= end => end,
        _ => 0,
    };
    let answer = frame.response(Message::Devices(DeviceBitmap {
        offset,
        count,
        next,
        bitmap: &[],
    }));
    let size = answer.encode(out).ok()?;
    // The bitmap is the end of the message.
    let bitmap = out.get_mut(..size)?.get_mut(DEVICES_HEAD..)?;
    for (number, bit) in (offset..=u16::MAX).zip(0..count) {
        if present(DevNum(number)) {
            if let Some(byte) = bitmap.get_mut(usize::from(bit / 8)) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    Some(size)
}

#[cfg(test)]
#[path = "bus_test.rs"]
mod tests;
