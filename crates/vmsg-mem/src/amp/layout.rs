// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The 64 bytes that say where everything is.

use super::Side;
use crate::QueueMemory;

const MAGIC: u16 = 0x4c4f;
const VERSION: u16 = 1;
const MASKED: u16 = 1;
const HEAD_BYTES: u64 = 8;

/// Where queues and notifications lie, counted from the beginning of this description. One of these was checked: all of it
/// lies in the memory and nothing overlaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    masked: bool,
    notifications: u8,
    per_device: u8,
    elements: u16,
    element_size: u16,
    dev_notif: u64,
    dev_head: u64,
    dev_queue: u64,
    drv_notif: u64,
    drv_head: u64,
    drv_queue: u64,
}

/// Why a layout cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// Another length than 64.
    #[error("the layout says that it is {0} bytes long, not 64")]
    Length(u16),
    /// Another version than 1.
    #[error("the layout has version {0}, known is 1")]
    Version(u16),
    /// Feature bits that are not known.
    #[error("the layout has unknown features ({0:#06x})")]
    Features(u16),
    /// The reserved field is not 0.
    #[error("the layout's reserved field is {0:#x}")]
    Reserved(u16),
    /// Too many notification words, or a number of notifications per device that is none of 1, 2, 4, 8, 16.
    #[error("the layout has {words} words of notifications, {per_device} notifications per device")]
    Notifications {
        /// Words of 64 bits.
        words: u8,
        /// Bits that a device has.
        per_device: u8,
    },
    /// Fewer than two elements, or elements too short for a header.
    #[error("the layout has {elements} elements of {size} bytes")]
    Elements {
        /// How many each way.
        elements: u16,
        /// Bytes of each.
        size: u16,
    },
    /// A part does not lie in the memory, on the layout itself, or on an odd address.
    #[error("the layout's {part} lies at {offset:#x}, where it cannot")]
    Place {
        /// Which.
        part: &'static str,
        /// Where.
        offset: u64,
    },
    /// Two parts overlap.
    #[error("the layout's {0} and {1} overlap")]
    Overlap(&'static str, &'static str),
}

impl Layout {
    /// Bytes of the description.
    pub const BYTES: usize = 64;

    /// The most notification words.
    pub const MAX_NOTIFICATIONS: u8 = 64;

    /// Queues of `elements` elements of `element_size` bytes each way, without notifications, packed behind the
    /// description; a queue head has 64 bytes to itself. `None` if that is no layout.
    pub fn packed(elements: u16, element_size: u16) -> Option<Self> {
        Self::packed_with(elements, element_size, 0, 0)
    }

    /// As [`Self::packed`], with `notifications` words of 64 bits each way, of which a device has `per_device` bits.
    pub fn packed_with(
        elements: u16,
        element_size: u16,
        notifications: u8,
        per_device: u8,
    ) -> Option<Self> {
        let bytes = u64::from(elements) * u64::from(element_size);
        let (dev_head, drv_head, dev_queue) = (64, 128, 192);
        let drv_queue = dev_queue + bytes;
        let end = (drv_queue + bytes).next_multiple_of(64);
        let words = u64::from(notifications) * 16;
        let (dev_notif, drv_notif) = match notifications {
            0 => (0, 0),
            _ => (end, end + words),
        };
        let layout = Self {
            masked: false,
            notifications,
            per_device,
            elements,
            element_size,
            dev_notif,
            dev_head,
            dev_queue,
            drv_notif,
            drv_head,
            drv_queue,
        };
        layout.check(u64::MAX).ok()?;
        Some(layout)
    }

    /// The largest packed one that fits into `bytes`, with no more than `most` elements.
    pub fn fitting(bytes: usize, element_size: u16, most: u16) -> Option<Self> {
        let room = bytes.checked_sub(192)? / 2 / usize::from(element_size.max(1));
        let elements = u16::try_from(room).unwrap_or(u16::MAX).min(most);
        Self::packed(elements, element_size)
    }

    /// Elements each way.
    pub const fn elements(&self) -> u16 {
        self.elements
    }

    /// Bytes of each.
    pub const fn element_size(&self) -> u16 {
        self.element_size
    }

    /// Words of notifications each way, of 64 bits.
    pub const fn notifications(&self) -> u8 {
        self.notifications
    }

    /// Whether each side also has a mask of notifications that it does not want to be rung for.
    pub const fn is_masked(&self) -> bool {
        self.masked
    }

    /// Offset of the queue head of `side`.
    pub fn head(&self, side: Side) -> usize {
        fit(match side {
            Side::Device => self.dev_head,
            Side::Driver => self.drv_head,
        })
    }

    /// Offset of the elements that `side` fills.
    pub fn queue(&self, side: Side) -> usize {
        fit(match side {
            Side::Device => self.dev_queue,
            Side::Driver => self.drv_queue,
        })
    }

    /// Offset of the notification words of `side`; `None` if there are none.
    pub fn notification_area(&self, side: Side) -> Option<usize> {
        (self.notifications > 0).then_some(fit(match side {
            Side::Device => self.dev_notif,
            Side::Driver => self.drv_notif,
        }))
    }

    /// Bytes from its beginning to the end of its last part.
    pub fn len(&self) -> usize {
        let parts = self.parts().into_iter();
        // Of parts that are not there the offset means nothing, and may be anything.
        let there = parts.filter(|(_, _, len, _)| *len > 0);
        let end = there.map(|(_, offset, len, _)| offset.saturating_add(len));
        fit(end.max().unwrap_or(0))
    }

    /// Never: it has 64 bytes itself.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Name, offset, bytes and alignment of the parts. Those that are not there have no bytes.
    fn parts(&self) -> [(&'static str, u64, u64, u64); 7] {
        let queue = u64::from(self.elements) * u64::from(self.element_size);
        let words = if self.masked { 3 } else { 2 };
        let notif = u64::from(self.notifications) * 8 * words;
        [
            ("description", 0, 64, 1),
            ("queue head of the device", self.dev_head, HEAD_BYTES, 4),
            ("queue head of the driver", self.drv_head, HEAD_BYTES, 4),
            ("queue of the device", self.dev_queue, queue, 1),
            ("queue of the driver", self.drv_queue, queue, 1),
            ("notifications of the device", self.dev_notif, notif, 8),
            ("notifications of the driver", self.drv_notif, notif, 8),
        ]
    }

    fn check(&self, memory: u64) -> Result<(), LayoutError> {
        if self.elements < 2 || self.element_size < 8 {
            return Err(LayoutError::Elements {
                elements: self.elements,
                size: self.element_size,
            });
        }
        let known = matches!(self.per_device, 1 | 2 | 4 | 8 | 16);
        if self.notifications > Self::MAX_NOTIFICATIONS || (self.notifications > 0 && !known) {
            return Err(LayoutError::Notifications {
                words: self.notifications,
                per_device: self.per_device,
            });
        }
        let parts = self.parts();
        for (index, (part, offset, len, align)) in parts.into_iter().enumerate() {
            if len == 0 || index == 0 {
                continue;
            }
            let inside = offset.checked_add(len).is_some_and(|end| end <= memory);
            if !inside || offset == 0 || offset % align != 0 {
                return Err(LayoutError::Place { part, offset });
            }
            for (other, begin, bytes, _) in parts.into_iter().take(index) {
                if bytes > 0 && begin < offset + len && offset < begin + bytes {
                    return Err(LayoutError::Overlap(other, part));
                }
            }
        }
        Ok(())
    }

    /// As it stands in memory.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let features = if self.masked { MASKED } else { 0 };
        for (at, half) in [
            (0, MAGIC),
            (2, 64),
            (4, VERSION),
            (6, features),
            (10, self.elements),
            (12, self.element_size),
        ] {
            bytes[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
        bytes[8] = self.notifications;
        bytes[9] = self.per_device;
        let offsets = [
            self.dev_notif,
            self.dev_head,
            self.dev_queue,
            self.drv_notif,
            self.drv_head,
            self.drv_queue,
        ];
        for (to, offset) in bytes[16..].chunks_exact_mut(8).zip(offsets) {
            to.copy_from_slice(&offset.to_le_bytes());
        }
        bytes
    }

    /// Reads and checks one that stands at the beginning of `memory` bytes of memory; `None` without its magic number.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn parse(bytes: &[u8; Self::BYTES], memory: usize) -> Result<Option<Self>, LayoutError> {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let offset = |at: usize| {
            let chunk = bytes[at..].first_chunk::<8>();
            u64::from_le_bytes(*chunk.expect("within the 64 bytes"))
        };
        if half(0) != MAGIC {
            return Ok(None);
        }
        if half(2) != 64 {
            return Err(LayoutError::Length(half(2)));
        }
        if half(4) != VERSION {
            return Err(LayoutError::Version(half(4)));
        }
        if half(6) & !MASKED != 0 {
            return Err(LayoutError::Features(half(6)));
        }
        if half(14) != 0 {
            return Err(LayoutError::Reserved(half(14)));
        }
        let layout = Self {
            masked: half(6) & MASKED != 0,
            notifications: bytes[8],
            per_device: bytes[9],
            elements: half(10),
            element_size: half(12),
            dev_notif: offset(16),
            dev_head: offset(24),
            dev_queue: offset(32),
            drv_notif: offset(40),
            drv_head: offset(48),
            drv_queue: offset(56),
        };
        layout.check(memory as u64)?;
        Ok(Some(layout))
    }

    /// Reads and checks the one at the beginning of `memory`; `None` as long as there is none.
    ///
    /// # Errors
    ///
    /// [`LayoutError`].
    pub fn load<M: QueueMemory>(memory: &M) -> Result<Option<Self>, LayoutError> {
        let mut bytes = [0; Self::BYTES];
        if memory.len() < Self::BYTES {
            return Ok(None);
        }
        // SYNC POINT: the magic number was stored last.
        bytes[..4].copy_from_slice(&memory.load_acquire(0).to_le_bytes());
        for (at, word) in (4..).step_by(4).zip(bytes[4..].chunks_exact_mut(4)) {
            word.copy_from_slice(&memory.load_relaxed(at).to_le_bytes());
        }
        Self::parse(&bytes, memory.len())
    }

    /// Writes it to the beginning of `memory`, its magic number last.
    pub fn store<M: QueueMemory>(&self, memory: &M) {
        Self::withdraw(memory);
        memory.fence();
        let bytes = self.to_bytes();
        let word = |chunk: &[u8]| {
            chunk
                .first_chunk()
                .map_or(0, |word| u32::from_le_bytes(*word))
        };
        for (at, chunk) in (4..).step_by(4).zip(bytes[4..].chunks_exact(4)) {
            memory.store_relaxed(at, word(chunk));
        }
        memory.store_release(0, word(&bytes));
    }

    /// Takes the magic number away: nobody who comes now finds a layout.
    pub fn withdraw<M: QueueMemory>(memory: &M) {
        memory.store_release(0, 0);
    }
}

/// Checked, or to be found out of bounds by whoever uses it.
fn fit(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
