// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a queue is, what it may do and how much memory it takes.

use vmsg_mem::BusAddr;

use crate::QueueError;

/// Size of a descriptor in bytes, in the table of the queue and in indirect tables.
pub(crate) const DESCRIPTOR_SIZE: usize = 16;
/// The same, as the lengths in descriptors are counted.
pub(crate) const DESCRIPTOR_LEN: u32 = 16;

/// Where the three areas of a virtqueue are (virtio 1.3, section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of descriptors: a power of two, at most 32,768.
    pub size: u16,
    /// Descriptor area: the descriptor table, aligned to 16 bytes.
    pub desc: BusAddr,
    /// Driver area: the available ring, aligned to 2 bytes.
    pub driver: BusAddr,
    /// Device area: the used ring, aligned to 4 bytes.
    pub device: BusAddr,
}

/// The negotiated features that concern a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueFeatures {
    /// `VIRTIO_F_EVENT_IDX` (29): each side names the index at which it wants to be notified.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` (28): a descriptor may stand for a table of them.
    pub indirect: bool,
}

impl QueueFeatures {
    /// Takes what concerns a queue from the feature bits 0 to 63.
    pub const fn from_bits(features: u64) -> Self {
        Self {
            event_idx: features & (1 << 29) != 0,
            indirect: features & (1 << 28) != 0,
        }
    }
}

/// A legal size of a split queue: a power of two, at most 32,768.
pub(crate) fn check_size(size: u16) -> Result<(), QueueError> {
    if size.is_power_of_two() {
        Ok(())
    } else {
        Err(QueueError::BadSize { size })
    }
}

/// How a driver lays a split queue out in one run of memory: the three areas,
/// then the indirect tables, if any.
///
/// Offsets and lengths are in bytes. The run must begin at a multiple of
/// [`Layout::ALIGN`], on the bus and in the driver's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u16,
    indirect: u16,
}

impl Layout {
    /// Alignment of the whole run in bytes.
    pub const ALIGN: usize = DESCRIPTOR_SIZE;
    /// Alignment of the device area in bytes: a cache line, so that the two
    /// sides do not write to the same one. The specification asks for 4.
    const DEVICE_ALIGN: usize = 64;

    /// A queue of `size` descriptors with an indirect table of `indirect`
    /// entries for each of them; 0 for none.
    ///
    /// # Errors
    ///
    /// [`QueueError::BadSize`] unless `size` is a power of two.
    pub fn new(size: u16, indirect: u16) -> Result<Self, QueueError> {
        check_size(size)?;
        Ok(Self { size, indirect })
    }

    /// Number of descriptors.
    pub const fn size(&self) -> u16 {
        self.size
    }

    /// Entries of each indirect table, 0 if there are none.
    pub const fn indirect_entries(&self) -> u16 {
        self.indirect
    }

    /// Length of the descriptor table, which begins at offset 0.
    pub const fn desc_len(&self) -> usize {
        DESCRIPTOR_SIZE * self.size as usize
    }

    /// Offset of the driver area.
    pub const fn driver_offset(&self) -> usize {
        self.desc_len()
    }

    /// Length of the driver area: flags, index, ring, used_event.
    pub const fn driver_len(&self) -> usize {
        driver_len(self.size, true)
    }

    /// Offset of the device area.
    pub const fn device_offset(&self) -> usize {
        (self.driver_offset() + self.driver_len()).next_multiple_of(Self::DEVICE_ALIGN)
    }

    /// Length of the device area: flags, index, ring, avail_event.
    pub const fn device_len(&self) -> usize {
        device_len(self.size, true)
    }

    /// Offset of the indirect tables, one after another, that of descriptor 0 first.
    pub const fn indirect_offset(&self) -> usize {
        (self.device_offset() + self.device_len()).next_multiple_of(Self::DEVICE_ALIGN)
    }

    /// Length of one indirect table.
    pub const fn indirect_len(&self) -> usize {
        DESCRIPTOR_SIZE * self.indirect as usize
    }

    /// Length of everything.
    pub const fn total_len(&self) -> usize {
        self.indirect_offset() + self.indirect_len() * self.size as usize
    }
}

/// Length of the available ring in bytes.
pub(crate) const fn driver_len(size: u16, event_idx: bool) -> usize {
    4 + 2 * size as usize + if event_idx { 2 } else { 0 }
}

/// Length of the used ring in bytes.
pub(crate) const fn device_len(size: u16, event_idx: bool) -> usize {
    4 + 8 * size as usize + if event_idx { 2 } else { 0 }
}
