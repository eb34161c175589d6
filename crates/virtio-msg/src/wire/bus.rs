// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ids and payloads of the bus messages.

use super::transport::wire_struct;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Message ids.
pub mod id {
    /// Which device numbers are there.
    pub const GET_DEVICES: u8 = 0x02;
    /// Are you there.
    pub const PING: u8 = 0x03;
    /// A device came or went.
    pub const EVENT_DEVICE: u8 = 0x40;
    /// From here on ids belong to the implementation of the bus: 0x80 to 0xBF need a response, 0xC0 to 0xFF are events.
    pub const IMPLEMENTATION: u8 = 0x80;
}

wire_struct! {
    /// Request GET_DEVICES.
    DeviceRange {
        /// First device number, a multiple of 8.
        offset: U16,
        /// How many device numbers, a multiple of 8.
        count: U16,
    }
}

wire_struct! {
    /// Start of the response of GET_DEVICES. The bitmap of `count` bits follows, least significant bit first.
    Devices {
        /// First device number.
        offset: U16,
        /// How many device numbers.
        count: U16,
        /// Where to ask next; 0 = there are no more.
        next: U16,
    }
}

wire_struct! {
    /// Request and response PING.
    Ping {
        /// Any number; the response carries the same.
        data: U32,
    }
}

wire_struct! {
    /// EVENT_DEVICE.
    DeviceEvent {
        /// Device number.
        dev_num: U16,
        /// What happened to it.
        state: U16,
    }
}
