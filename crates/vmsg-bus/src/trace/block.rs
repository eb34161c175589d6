// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Blocks of pcapng files (draft-ietf-opsawg-pcapng), as far as traces have them.

/// Block types.
pub(super) const SECTION: u32 = 0x0A0D_0D0A;
pub(super) const INTERFACE: u32 = 1;
pub(super) const STATISTICS: u32 = 5;
pub(super) const PACKET: u32 = 6;

/// What a section header has at offset 8, read in its own byte order.
pub(super) const BYTE_ORDER: u32 = 0x1A2B_3C4D;

/// Type and length before a block's body, and the length again behind it.
pub(super) const FRAME: usize = 12;

/// Options, of all blocks and of those named.
pub(super) mod option {
    pub(crate) const END: u16 = 0;
    pub(crate) const COMMENT: u16 = 1;
    pub(crate) const SECTION_APPLICATION: u16 = 4;
    pub(crate) const INTERFACE_NAME: u16 = 2;
    pub(crate) const INTERFACE_DESCRIPTION: u16 = 3;
    pub(crate) const INTERFACE_RESOLUTION: u16 = 9;
    pub(crate) const INTERFACE_OFFSET: u16 = 14;
    pub(crate) const PACKET_FLAGS: u16 = 2;
    pub(crate) const PACKET_DROPS: u16 = 4;
    pub(crate) const STATISTICS_RECEIVED: u16 = 4;
    pub(crate) const STATISTICS_DROPPED: u16 = 5;
}

/// Longest text of an option that is written.
const MAX_TEXT: usize = 512;

/// Appends one block to a buffer; what is written last, its length, is only then known.
struct Block<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Block<'a> {
    fn begin(out: &'a mut Vec<u8>, kind: u32) -> Self {
        let start = out.len();
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        Self { out, start }
    }

    fn u16(&mut self, value: u16) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    /// High half first, as timestamps stand in a block.
    fn time(&mut self, nanoseconds: u64) {
        self.u32((nanoseconds >> 32) as u32);
        #[expect(clippy::cast_possible_truncation, reason = "the low half")]
        self.u32(nanoseconds as u32);
    }

    fn pad(&mut self) {
        let len = self.out.len() - self.start;
        self.out.resize(self.start + len.next_multiple_of(4), 0);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        self.u16(code);
        self.u16(u16::try_from(value.len()).expect("options are short"));
        self.out.extend_from_slice(value);
        self.pad();
    }

    fn text(&mut self, code: u16, text: &str) {
        let mut len = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        self.option(code, &text.as_bytes()[..len]);
    }

    /// Ends a block that has options.
    fn end(mut self) {
        self.option(option::END, &[]);
        self.close();
    }

    fn close(mut self) {
        let len = u32::try_from(self.out.len() - self.start + 4).expect("blocks are short");
        self.u32(len);
        self.out[self.start + 4..self.start + 8].copy_from_slice(&len.to_le_bytes());
    }
}

/// Begins a section; all interfaces are counted anew.
pub(super) fn section(out: &mut Vec<u8>, application: &str) {
    let mut block = Block::begin(out, SECTION);
    block.u32(BYTE_ORDER);
    block.u16(1);
    block.u16(0);
    // The length of the section is not known.
    block.u64(u64::MAX);
    block.text(option::SECTION_APPLICATION, application);
    block.end();
}

pub(super) fn interface(out: &mut Vec<u8>, name: &str, description: &str) {
    let mut block = Block::begin(out, INTERFACE);
    block.u16(super::LINK_TYPE);
    block.u16(0);
    // No limit to the length of packets.
    block.u32(0);
    block.text(option::INTERFACE_NAME, name);
    block.text(option::INTERFACE_DESCRIPTION, description);
    block.option(option::INTERFACE_RESOLUTION, &[9]);
    block.end();
}

/// What an enhanced packet block is made of.
pub(super) struct Packet<'a> {
    pub(super) interface: u32,
    /// Nanoseconds since 1970.
    pub(super) time: u64,
    pub(super) head: [u8; super::HEAD_LEN],
    pub(super) message: &'a [u8],
    /// Sent by who records, not received.
    pub(super) outbound: bool,
    /// Messages of this interface that are missing before this one.
    pub(super) lost: u64,
}

pub(super) fn packet(out: &mut Vec<u8>, packet: &Packet<'_>) {
    let len = packet.head.len() + packet.message.len();
    let len = u32::try_from(len).expect("messages are short");
    let mut block = Block::begin(out, PACKET);
    block.u32(packet.interface);
    block.time(packet.time);
    block.u32(len);
    block.u32(len);
    block.out.extend_from_slice(&packet.head);
    block.out.extend_from_slice(packet.message);
    block.pad();
    let flags: u32 = if packet.outbound { 2 } else { 1 };
    block.option(option::PACKET_FLAGS, &flags.to_le_bytes());
    if packet.lost > 0 {
        block.option(option::PACKET_DROPS, &packet.lost.to_le_bytes());
        let comment = format!(
            "{} messages before this one were not recorded: the file could not keep up",
            packet.lost
        );
        block.text(option::COMMENT, &comment);
    }
    block.end();
}

/// How much went over an interface.
pub(super) fn statistics(out: &mut Vec<u8>, interface: u32, time: u64, seen: u64, lost: u64) {
    let mut block = Block::begin(out, STATISTICS);
    block.u32(interface);
    block.time(time);
    block.option(option::STATISTICS_RECEIVED, &seen.to_le_bytes());
    block.option(option::STATISTICS_DROPPED, &lost.to_le_bytes());
    block.end();
}
