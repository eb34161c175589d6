// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is sent, and into what kind of buffers.

use vmsg_net::VnetHeader;

/// Entries of each queue.
pub(crate) const QUEUE: usize = 256;
/// Bytes before each frame.
pub(crate) const HEADER: usize = 12;
/// Payload of a TCP segment.
const SEGMENT: u16 = 1448;

/// Frames of one length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    /// Bytes from the Ethernet header on.
    pub(crate) len: usize,
    /// Frames that are sent before anybody else does anything.
    pub(crate) batch: usize,
    /// Buffers that are sent from, one after the other.
    pub(crate) outgoing: usize,
    /// Bytes between them.
    pub(crate) stride: usize,
    /// Bytes of a receive buffer.
    pub(crate) buffer: usize,
}

pub(crate) const SMALL: Shape = Shape {
    name: "64 B",
    len: 64,
    batch: 64,
    outgoing: QUEUE,
    stride: 2048,
    buffer: 2048,
};

/// Each is a batch of its own.
pub(crate) const SINGLE: Shape = Shape {
    name: "64 B, each alone",
    batch: 1,
    ..SMALL
};

pub(crate) const FULL: Shape = Shape {
    name: "1514 B",
    len: 1514,
    ..SMALL
};

/// 45 segments, in buffers as Linux has them.
pub(crate) const LARGE: Shape = Shape {
    name: "64 KiB, TSO",
    len: 54 + 45 * SEGMENT as usize,
    batch: 8,
    outgoing: 32,
    stride: 1 << 16,
    buffer: 4096,
};

impl Shape {
    /// Receive buffers that a frame takes.
    pub(crate) fn buffers(&self) -> usize {
        (HEADER + self.len).div_ceil(self.buffer)
    }

    pub(crate) fn vnet(&self) -> VnetHeader {
        if self.len <= 1514 {
            return VnetHeader::default();
        }
        VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            gso_type: VnetHeader::GSO_TCPV4,
            hdr_len: 54,
            gso_size: SEGMENT,
            csum_start: 34,
            csum_offset: 16,
        }
    }

    /// A TCP segment from one port to another, behind its virtio header.
    pub(crate) fn bytes(&self, from: usize, to: usize) -> Vec<u8> {
        let mut bytes = vec![0x5a; HEADER + self.len];
        bytes[..HEADER].fill(0);
        bytes[..VnetHeader::LEN].copy_from_slice(&self.vnet().to_bytes());
        let frame = &mut bytes[HEADER..];
        frame[..6].copy_from_slice(&mac(to));
        frame[6..12].copy_from_slice(&mac(from));
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        let ip = &mut frame[14..];
        ip[..20].copy_from_slice(&[
            0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        let total = u16::try_from(self.len - 14).expect("an IP packet");
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        let sum: u32 = ip[..20]
            .chunks(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("few words");
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip[20..40].copy_from_slice(&[
            0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
        ]);
        bytes
    }
}

/// The address behind a port.
pub(crate) fn mac(port: usize) -> [u8; 6] {
    let [low, high, ..] = port.to_le_bytes();
    [0x52, 0x54, 0, 0, high, low]
}
