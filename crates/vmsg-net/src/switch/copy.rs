// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a frame gets from its sender's memory into one receiver's buffers: in one copy.
//!
//! The receiver gets the frame as it is, when it takes the offloads that the frame makes use of. Otherwise a partial checksum is
//! completed while the bytes pass by, and large segments are cut ([`super::segment`]).

use vmsg_mem::Pieces;

use super::segment;
use crate::checksum::Sum;
use crate::{Offloads, RxSink, Target, TxFrame, VnetHeader};

/// Bytes of an Ethernet header without tags.
pub(super) const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
pub(super) const TAG: usize = 4;
/// Where the type, or a tag, stands.
const TYPE: usize = 12;
/// Most tags that are looked behind.
const MAX_TAGS: usize = 3;
/// TPID of IEEE 802.1Q.
const CUSTOMER: [u8; 2] = [0x81, 0x00];
/// TPID of service tags (IEEE 802.1ad).
const SERVICE: [u8; 2] = [0x88, 0xa8];

/// What happens to the outer VLAN tag of a frame on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagChange {
    /// The frame goes as it is, tagged or not.
    Keep,
    /// The outer tag is taken off.
    Strip,
    /// A tag with this TCI (priority and VLAN) is put before all others.
    Push(u16),
    /// The outer tag gets this TCI.
    Replace(u16),
}

/// What has become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// The receiver has it, as one frame of so many bytes.
    Frame(usize),
    /// The receiver has all of it, in `count` frames of `bytes` bytes together.
    Frames {
        /// How many.
        count: usize,
        /// Their bytes from the Ethernet header on.
        bytes: usize,
    },
    /// The receiver has not enough buffers.
    NoBuffers {
        /// Segments that it got before.
        count: usize,
        /// Their bytes from the Ethernet header on.
        bytes: usize,
        /// Frames that it did not get; 1 for a frame that need not be cut.
        lost: usize,
    },
    /// It is longer than the receiver's MTU, and cannot be cut.
    TooLarge,
    /// What its sender says about it is impossible, or its headers contradict each other or that.
    Malformed,
}

/// The first bytes of a frame, as the receiver is to get them.
pub(super) struct Front {
    bytes: [u8; Target::HEAD + TAG],
    len: usize,
    /// Bytes of the sender's frame that these stand for.
    pub(super) taken: usize,
    /// Where the headers above Ethernet begin.
    pub(super) network: usize,
}

impl Front {
    /// `None` if the frame is too short, or the tag that is to be changed is not there.
    #[inline]
    fn new(head: &[u8], change: TagChange) -> Option<Self> {
        let head = &head[..head.len().min(Target::HEAD)];
        if head.len() < ETHERNET {
            return None;
        }
        let mut bytes = [0; Target::HEAD + TAG];
        let mut len = head.len();
        let tagged = is_tag(head, TYPE);
        match change {
            TagChange::Keep => bytes[..len].copy_from_slice(head),
            TagChange::Strip if tagged && len >= ETHERNET + TAG => {
                bytes[..TYPE].copy_from_slice(&head[..TYPE]);
                len -= TAG;
                bytes[TYPE..len].copy_from_slice(&head[TYPE + TAG..]);
            }
            TagChange::Replace(tci) if tagged && len >= ETHERNET + TAG => {
                bytes[..len].copy_from_slice(head);
                bytes[TYPE + 2..TYPE + TAG].copy_from_slice(&tci.to_be_bytes());
            }
            TagChange::Strip | TagChange::Replace(_) => return None,
            TagChange::Push(tci) => {
                bytes[..TYPE].copy_from_slice(&head[..TYPE]);
                bytes[TYPE..TYPE + 2].copy_from_slice(&CUSTOMER);
                bytes[TYPE + 2..TYPE + TAG].copy_from_slice(&tci.to_be_bytes());
                bytes[TYPE + TAG..len + TAG].copy_from_slice(&head[TYPE..]);
                len += TAG;
            }
        }
        let mut network = ETHERNET;
        for _ in 0..MAX_TAGS {
            if !is_tag(&bytes[..len], network - 2) {
                break;
            }
            network += TAG;
        }
        (network <= len).then_some(Self {
            bytes,
            len,
            taken: head.len(),
            network,
        })
    }

    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Where the byte `at` of the sender's frame, behind its tags, is in the receiver's.
    #[inline]
    pub(super) const fn moved(&self, at: usize) -> usize {
        (at + self.len).saturating_sub(self.taken)
    }

    /// The reverse of [`moved`](Self::moved).
    #[inline]
    pub(super) const fn original(&self, at: usize) -> usize {
        (at + self.taken).saturating_sub(self.len)
    }

    /// What the receiver chooses its queue by.
    #[inline]
    pub(super) fn target(&self) -> Target<'_> {
        Target::Head(&self.bytes[..self.len.min(Target::HEAD)])
    }
}

fn is_tag(bytes: &[u8], at: usize) -> bool {
    bytes
        .get(at..at + 2)
        .is_some_and(|kind| kind == CUSTOMER || kind == SERVICE)
}

/// Puts `frame` into the buffers of a receiver who has settled on `to`: of that, the fields `guest_…` and `mtu` count.
///
/// `head` is the beginning of the frame, [`Target::HEAD`] bytes or all of a shorter one, read once: what was decided by these
/// bytes holds for what the receiver gets, whatever the sender writes there meanwhile. All offsets and lengths that the
/// sender gives are checked against the frame, once.
pub fn deliver(
    frame: &TxFrame<'_>,
    head: &[u8],
    tag: TagChange,
    to: &Offloads,
    sink: &mut dyn RxSink,
) -> Delivered {
    let Some(front) = Front::new(head, tag) else {
        return Delivered::Malformed;
    };
    if frame.header.gso_type == VnetHeader::GSO_NONE {
        plain(frame, &front, to, sink)
    } else {
        segment::deliver(frame, &front, to, sink)
    }
}

/// A frame that need not be cut.
#[inline]
fn plain(frame: &TxFrame<'_>, front: &Front, to: &Offloads, sink: &mut dyn RxSink) -> Delivered {
    let rest = frame.payload.skip(front.taken);
    let len = front.len + rest.len();
    if len - front.network > usize::from(to.mtu) {
        return Delivered::TooLarge;
    }
    let mut header = VnetHeader::default();
    let mut partial = None;
    if frame.header.needs_csum() {
        let start = front.moved(usize::from(frame.header.csum_start));
        let at = start + usize::from(frame.header.csum_offset);
        let Ok(csum_start) = u16::try_from(start) else {
            return Delivered::Malformed;
        };
        if start < front.network || at + 2 > len {
            return Delivered::Malformed;
        }
        if to.guest_csum {
            header.flags = VnetHeader::NEEDS_CSUM;
            header.csum_start = csum_start;
            header.csum_offset = frame.header.csum_offset;
        } else {
            partial = Some((start, at));
        }
    } else if to.guest_csum {
        header.flags = frame.header.flags & VnetHeader::DATA_VALID;
    }
    let Some(room) = sink.offer(front.target(), len) else {
        return Delivered::NoBuffers {
            count: 0,
            bytes: 0,
            lost: 1,
        };
    };
    room.write(front.bytes());
    let behind = room.skip(front.len);
    match partial {
        None => {
            rest.copy_to(behind);
        }
        Some((start, at)) => {
            let mut sum = Running::default();
            if let Some(bytes) = front.bytes().get(start..) {
                sum.add(bytes);
            }
            let before = start.saturating_sub(front.len);
            rest.take(before).copy_to(behind);
            copy_and_sum(rest.skip(before), behind.skip(before), &mut sum);
            room.skip(at).take(2).write(&sum.checksum());
        }
    }
    sink.commit(&header, len);
    Delivered::Frame(len)
}

/// A sum over bytes that come in parts of any length.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Running {
    sum: Sum,
    /// An odd number of bytes has been added.
    odd: bool,
}

impl Running {
    /// Goes on behind an even number of bytes.
    pub(super) const fn from(sum: Sum) -> Self {
        Self { sum, odd: false }
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        if self.odd {
            // Every byte is in the other half of its word (RFC 1071, 2 B).
            let mut part = Sum::default();
            part.add(bytes);
            self.sum.add(&part.folded().to_le_bytes());
        } else {
            self.sum.add(bytes);
        }
        self.odd ^= !bytes.len().is_multiple_of(2);
    }

    pub(super) const fn finish(self) -> u16 {
        self.sum.finish()
    }

    /// The checksum as it is stored where nobody has looked at the protocol. In UDP, zero would mean that there is none; its
    /// other form, 0xffff, is as good for all others.
    fn checksum(self) -> [u8; 2] {
        match self.finish() {
            0 => [0xff; 2],
            sum => sum.to_be_bytes(),
        }
    }
}

/// Copies `from` to `to` and sums what was copied, even if the sender changes it at this moment: the bytes pass through a small
/// buffer that stays in the nearest cache.
pub(super) fn copy_and_sum(mut from: Pieces<'_>, mut to: Pieces<'_>, sum: &mut Running) {
    let mut chunk = [0; 2048];
    while !from.is_empty() {
        let n = from.read(&mut chunk);
        if n == 0 {
            return;
        }
        sum.add(&chunk[..n]);
        to.write(&chunk[..n]);
        from = from.skip(n);
        to = to.skip(n);
    }
}

#[cfg(test)]
#[path = "copy_test.rs"]
mod tests;
