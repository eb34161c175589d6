// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames that say who has sent them, and in which order.

/// A type of frames for experiments (IEEE 802, local experimental ethertype 1).
const TYPE: [u8; 2] = [0x88, 0xb5];
const TAG: [u8; 2] = [0x81, 0x00];
pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// The address of a station.
pub(crate) fn mac(id: u16) -> [u8; 6] {
    let [high, low] = id.to_be_bytes();
    [0x52, 0x54, 0, 0xcc, high, low]
}

/// A frame of `len` bytes, at least 32.
pub(crate) fn build(
    to: [u8; 6],
    from: [u8; 6],
    tag: Option<u16>,
    (id, sequence): (u16, u32),
    len: usize,
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(len);
    frame.extend(to);
    frame.extend(from);
    if let Some(tci) = tag {
        frame.extend(TAG);
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(TYPE);
    frame.extend(id.to_be_bytes());
    frame.extend(sequence.to_be_bytes());
    let body = u32::try_from(frame.len()).expect("short");
    let len = u32::try_from(len).expect("short");
    frame.extend((0..len.saturating_sub(body)).map(|at| pattern(id, sequence, at)));
    frame
}

fn pattern(id: u16, sequence: u32, at: u32) -> u8 {
    let mixed = (u32::from(id) ^ sequence.wrapping_mul(0x9e37_79b9)).wrapping_add(at * 7);
    mixed.to_le_bytes()[1] ^ mixed.to_le_bytes()[0]
}

/// What a frame says that has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub(crate) from: u16,
    pub(crate) sequence: u32,
    /// VLAN of its tag.
    pub(crate) tag: Option<u16>,
}

impl Seen {
    /// Reads a frame, every byte of which must be as it was sent.
    pub(crate) fn read(frame: &[u8]) -> Self {
        let (tag, rest) = match frame[12..14] == TAG {
            true => {
                let tci = u16::from_be_bytes([frame[14], frame[15]]);
                (Some(tci & 0xfff), &frame[16..])
            }
            false => (None, &frame[12..]),
        };
        assert_eq!(rest[..2], TYPE, "{frame:02x?}");
        let from = u16::from_be_bytes([rest[2], rest[3]]);
        let sequence = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]);
        for (at, byte) in (0..).zip(&rest[8..]) {
            assert_eq!(*byte, pattern(from, sequence, at), "{from} {sequence} {at}");
        }
        Self {
            from,
            sequence,
            tag,
        }
    }
}
