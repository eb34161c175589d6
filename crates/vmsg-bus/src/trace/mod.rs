// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages recorded to a file, and read back: docs/trace.md.
//!
//! A trace is a pcapng file that Wireshark opens. [`Writer::open`] begins or continues one; each end of a bus is an
//! [`Interface`] of it, which [`set_trace`](crate::DriverBus::set_trace) gives to the end. [`Reader`] reads such files
//! back, whoever wrote them.
//!
//! Recording never holds up a bus: messages go into a bounded buffer, and a thread writes that to the file. What finds no room
//! is counted, and the file says how many are missing where.

mod block;
mod file;
mod reader;
mod target;
mod writer;

pub use file::OpenError;
pub use reader::{Captured, Item, ReadError, Reader, Source};
pub use target::Trace;
pub use writer::{Interface, Writer};

use crate::tap::Direction;

/// Link type of the messages, `LINKTYPE_USER0`.
pub const LINK_TYPE: u16 = 147;

/// Length in bytes of what stands before each message in a file.
pub const HEAD_LEN: usize = 8;

/// The version of [`Head`].
const HEAD_VERSION: u8 = 1;

/// Which end of the bus records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The driver's.
    Driver,
    /// The device host's.
    Device,
}

impl Side {
    /// Which way a message goes that was sent or received here.
    pub const fn way(self, direction: Direction) -> Way {
        match (self, direction) {
            (Side::Driver, Direction::Sent) | (Side::Device, Direction::Received) => Way::ToDevice,
            (Side::Driver, Direction::Received) | (Side::Device, Direction::Sent) => Way::ToDriver,
        }
    }
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the driver to the device host.
    ToDevice,
    /// From the device host to the driver.
    ToDriver,
}

/// How the bytes of a message are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Revision 1: a header of 8 bytes with token and size.
    #[default]
    Revision1,
    /// 40 bytes, a header of 4 bytes (February 2025).
    R1,
    /// 44 bytes, a header of 6 bytes without a token (mid 2025).
    Short,
}

/// What stands before each message in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    layout: Layout,
    way: Way,
    /// File descriptors that went with the message.
    fds: u8,
    /// Which end recorded it.
    side: Side,
    /// Number of the interface, counted through all sections, modulo 2^16.
    connection: u16,
}

impl Head {
    fn to_bytes(self) -> [u8; HEAD_LEN] {
        let layout = match self.layout {
            Layout::Revision1 => 1,
            Layout::R1 => 2,
            Layout::Short => 3,
        };
        let way = match self.way {
            Way::ToDevice => 0,
            Way::ToDriver => 1,
        };
        let side = match self.side {
            Side::Driver => 0,
            Side::Device => 1,
        };
        let [low, high] = self.connection.to_le_bytes();
        // The length of the head leaves room for later fields.
        [HEAD_VERSION, 8, layout, way, self.fds, side, low, high]
    }

    /// The head of a packet and the message behind it.
    fn split(packet: &[u8]) -> Result<(Head, &[u8]), &'static str> {
        let Some(&[version, len, layout, way, fds, side, low, high]) = packet.first_chunk() else {
            return Err("a packet without a head");
        };
        if version != HEAD_VERSION {
            return Err("a packet whose head is of another version");
        }
        let len = usize::from(len);
        if len < HEAD_LEN {
            return Err("a packet whose head is too short");
        }
        let message = packet.get(len..).ok_or("a packet that ends in its head")?;
        let head = Head {
            layout: match layout {
                1 => Layout::Revision1,
                2 => Layout::R1,
                3 => Layout::Short,
                _ => return Err("a message of unknown layout"),
            },
            way: match way {
                0 => Way::ToDevice,
                1 => Way::ToDriver,
                _ => return Err("a message of unknown direction"),
            },
            fds,
            side: match side {
                0 => Side::Driver,
                1 => Side::Device,
                _ => return Err("a message from an unknown end"),
            },
            connection: u16::from_le_bytes([low, high]),
        };
        Ok((head, message))
    }
}
