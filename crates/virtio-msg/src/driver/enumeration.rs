// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which devices are there.

use crate::message::Message;
use crate::types::DevNum;
use crate::wire::MIN_MESSAGE_SIZE;

/// So many device numbers are tried one by one on a bus that does not answer GET_DEVICES: those that QEMU has.
pub const SCANNED_DEVICES: u16 = 32;

/// The first window. Linux and QEMU expect no other.
const FIRST_WINDOW: u16 = 32;

/// Bytes of a GET_DEVICES response before its bitmap.
const DEVICES_HEAD: usize = 14;

/// What an [`Enumeration`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnumerationStep {
    /// Send this request to this device number (0 for the bus).
    Send(DevNum, Message<'static>),
    /// The response, or the time-out, is awaited.
    Wait,
    /// Every device was reported.
    Done,
}

/// Finds the devices of a bus: by GET_DEVICES, and where that is not answered by GET_DEVICE_INFO to one number after the other.
///
/// Whatever is answered, it ends: after 8192 windows or [`SCANNED_DEVICES`] numbers at the latest.
#[derive(Clone, Debug)]
pub struct Enumeration {
    state: State,
    sent: bool,
    window: u16,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Asking { offset: u16 },
    Scanning { next: u16 },
    Done,
}

impl Enumeration {
    /// For a bus with this message size.
    pub fn new(max_message_size: usize) -> Enumeration {
        let bytes = max_message_size.max(MIN_MESSAGE_SIZE) - DEVICES_HEAD;
        let window = u16::try_from(bytes * 8).unwrap_or(u16::MAX).min(1024) & !7;
        Enumeration {
            state: State::Asking { offset: 0 },
            sent: false,
            window,
        }
    }

    /// For a bus that is known not to answer GET_DEVICES.
    pub fn scan() -> Enumeration {
        Enumeration {
            state: State::Scanning { next: 0 },
            sent: false,
            window: 0,
        }
    }

    /// What to do now.
    pub fn step(&mut self) -> EnumerationStep {
        if matches!(self.state, State::Done) {
            return EnumerationStep::Done;
        }
        if self.sent {
            return EnumerationStep::Wait;
        }
        self.sent = true;
        match self.state {
            State::Asking { offset } => {
                let count = if offset == 0 {
                    FIRST_WINDOW
                } else {
                    self.window.min(u16::MAX - 7 - offset + 8)
                };
                EnumerationStep::Send(DevNum(0), Message::GetDevices { offset, count })
            }
            State::Scanning { next } => EnumerationStep::Send(DevNum(next), Message::GetDeviceInfo),
            State::Done => EnumerationStep::Done,
        }
    }

    /// Takes the response to the last request in, and reports each device that it tells of, once.
    pub fn handle_response(&mut self, message: &Message<'_>, mut found: impl FnMut(DevNum)) {
        if !self.sent {
            return;
        }
        self.sent = false;
        self.state = match (self.state, message) {
            (State::Asking { offset }, Message::Devices(map)) => {
                // A window that was not asked for would tell of devices twice.
                let ours = map.offset == offset;
                map.iter().filter(|_| ours).for_each(&mut found);
                // QEMU never says 0 at the end.
                match offset.checked_add(map.count) {
                    Some(end) if ours && map.count != 0 && map.next >= end && map.next % 8 == 0 => {
                        State::Asking { offset: map.next }
                    }
                    _ => State::Done,
                }
            }
            (State::Scanning { next }, Message::DeviceInfo(info)) => {
                if info.is_present() {
                    found(DevNum(next));
                }
                after(next)
            }
            _ => State::Done,
        };
    }

    /// The last request was not answered.
    pub fn handle_timeout(&mut self) {
        if !self.sent {
            return;
        }
        self.sent = false;
        self.state = match self.state {
            State::Asking { offset: 0 } => State::Scanning { next: 0 },
            State::Scanning { next } => after(next),
            _ => State::Done,
        };
    }
}

fn after(number: u16) -> State {
    if number + 1 < SCANNED_DEVICES {
        State::Scanning { next: number + 1 }
    } else {
        State::Done
    }
}

#[cfg(test)]
#[path = "enumeration_test.rs"]
mod tests;
