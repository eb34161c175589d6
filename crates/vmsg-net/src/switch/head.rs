// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The beginning of a frame.

use vmsg_mem::Pieces;

use super::TagChange;

/// Where the type of an untagged frame stands; a tag begins there.
const TYPE: usize = 12;
/// EtherType of a VLAN tag (IEEE 802.1Q, 9.6).
pub(super) const TAG: [u8; 2] = [0x81, 0x00];
/// EtherTypes of tags that are not ours: 802.1ad, and what was used before it.
const OTHER_TAGS: [[u8; 2]; 3] = [[0x88, 0xa8], [0x91, 0x00], [0x92, 0x00]];

/// The addresses and, if there is one, the first VLAN tag of a frame, as they were when the frame was looked at. The sender
/// may change its memory at any time: these bytes were checked and are those that receivers get.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    bytes: [u8; Self::MOST],
    /// The frame has a VLAN tag of ours.
    tagged: bool,
}

impl Head {
    /// Addresses, tag, type.
    const MOST: usize = 18;
    /// Addresses and type.
    pub(super) const LEAST: usize = 14;

    pub(super) const EMPTY: Self = Self {
        bytes: [0; Self::MOST],
        tagged: false,
    };

    /// Looks at a frame; `None` if it is too short.
    #[inline]
    pub(super) fn read(frame: Pieces<'_>) -> Option<Self> {
        let Some(bytes) = frame.read_array() else {
            return Self::read_short(frame);
        };
        Some(Self {
            bytes,
            tagged: [bytes[TYPE], bytes[TYPE + 1]] == TAG,
        })
    }

    /// Looks at a frame that has not even room for a tag.
    #[cold]
    fn read_short(frame: Pieces<'_>) -> Option<Self> {
        let mut bytes = [0; Self::MOST];
        let len = frame.read(&mut bytes);
        let tagged = [bytes[TYPE], bytes[TYPE + 1]] == TAG;
        let least = if tagged { Self::MOST } else { Self::LEAST };
        (len >= least).then_some(Self { bytes, tagged })
    }

    #[inline]
    pub(super) fn destination(&self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.bytes;
        [a, b, c, d, e, f]
    }

    #[inline]
    pub(super) fn source(&self) -> [u8; 6] {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = self.bytes;
        [a, b, c, d, e, f]
    }

    /// Both addresses.
    #[inline]
    pub(super) fn addresses(&self) -> [u8; 12] {
        let mut addresses = [0; 12];
        addresses.copy_from_slice(&self.bytes[..12]);
        addresses
    }

    /// Priority, DEI and VLAN of the first tag, if there is one.
    #[inline]
    pub(super) fn tci(&self) -> Option<u16> {
        self.tagged
            .then(|| u16::from_be_bytes([self.bytes[14], self.bytes[15]]))
    }

    /// The type behind the first tag, or of an untagged frame.
    #[inline]
    pub(super) fn inner_type(&self) -> [u8; 2] {
        let at = if self.tagged { TYPE + 4 } else { TYPE };
        [self.bytes[at], self.bytes[at + 1]]
    }

    /// The bytes that were looked at: up to and with the type behind the first tag. In the frame as it was sent the rest
    /// begins behind as many.
    #[inline]
    pub(super) fn checked(&self) -> &[u8] {
        &self.bytes[..if self.tagged { Self::MOST } else { Self::LEAST }]
    }

    /// What comes behind the first tag, or in an untagged frame behind the addresses, is a tag again.
    #[inline]
    pub(super) fn has_inner_tag(&self) -> bool {
        let kind = self.inner_type();
        kind == TAG || OTHER_TAGS.contains(&kind)
    }

    /// The beginning of the frame as a receiver gets it: [`checked`](Self::checked) with the change; and its length.
    /// `None` if there is no tag that could be changed.
    #[inline]
    pub(super) fn changed(&self, change: TagChange) -> Option<([u8; Self::MOST], usize)> {
        let mut bytes = self.bytes;
        let len = match change {
            TagChange::Keep => self.checked().len(),
            TagChange::Strip if self.tagged => {
                bytes[TYPE..TYPE + 2].copy_from_slice(&self.inner_type());
                Self::LEAST
            }
            TagChange::Push(tci) if !self.tagged => {
                bytes[TYPE..TYPE + 2].copy_from_slice(&TAG);
                bytes[14..16].copy_from_slice(&tci.to_be_bytes());
                bytes[16..18].copy_from_slice(&self.inner_type());
                Self::MOST
            }
            TagChange::Replace(tci) if self.tagged => {
                bytes[14..16].copy_from_slice(&tci.to_be_bytes());
                Self::MOST
            }
            TagChange::Strip | TagChange::Push(_) | TagChange::Replace(_) => return None,
        };
        Some((bytes, len))
    }

    /// More of the beginning of the frame, for those who look deeper: as much as `room` holds, with what was checked in the
    /// place of what the sender may have written there since. Returns how many bytes there are.
    pub(super) fn longer(&self, frame: Pieces<'_>, room: &mut [u8]) -> usize {
        let len = frame.read(room);
        let checked = self.checked();
        room[..checked.len()].copy_from_slice(checked);
        len.max(checked.len())
    }
}
