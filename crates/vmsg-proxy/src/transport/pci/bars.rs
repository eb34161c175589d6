// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What lies where in which BAR.

use super::super::SharedMemory;

/// MSI-X table and pending bits.
pub(super) const MSIX_BAR: u8 = 1;
/// Shared memory.
pub(super) const SHARED_BAR: u8 = 2;
/// The structures of virtio.
pub(super) const VIRTIO_BAR: u8 = 4;
/// Bytes of the BAR of the structures.
pub(super) const VIRTIO_BAR_SIZE: u64 = 0x4000;
/// Where the notifications begin.
pub(super) const NOTIFY: u64 = 0x3000;
/// Bytes that each structure has for itself.
const PART: u64 = 0x1000;
/// Bytes from one queue's place for notifications to the next.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// A structure of virtio.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Common,
    Isr,
    Device,
    Notify,
}

impl Part {
    pub(super) const ALL: [Part; 4] = [Part::Common, Part::Isr, Part::Device, Part::Notify];

    /// Where it begins.
    pub(super) fn start(self) -> u32 {
        match self {
            Part::Common => 0,
            Part::Isr => 0x1000,
            Part::Device => 0x2000,
            Part::Notify => 0x3000,
        }
    }

    /// What of an access belongs to this part: the offset in the part, and the range of the data.
    pub(super) fn of_access(
        self,
        offset: u64,
        len: usize,
    ) -> Option<(u64, std::ops::Range<usize>)> {
        overlap(offset, len, u64::from(self.start()), PART)
    }
}

/// What of `len` bytes at `offset` lies in the `size` bytes at `start`: the offset in there, and the range of the data.
pub(super) fn overlap(
    offset: u64,
    len: usize,
    start: u64,
    size: u64,
) -> Option<(u64, std::ops::Range<usize>)> {
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    let first = offset.max(start);
    let last = end.min(start.checked_add(size)?);
    if first >= last {
        return None;
    }
    let from = usize::try_from(first - offset).ok()?;
    let to = usize::try_from(last - offset).ok()?;
    Some((first - start, from..to))
}

/// A shared-memory region with its place in BAR 2.
#[derive(Clone, Debug)]
pub struct SharedAt {
    /// Offset in the BAR, a multiple of 64 KiB, which is the largest page that guests have.
    pub offset: u64,
    /// The region.
    pub memory: SharedMemory,
}

/// Places of shared-memory regions.
const SHARED_ALIGNMENT: u64 = 0x1_0000;
/// More than any machine has room for.
const SHARED_MAX: u64 = 1 << 40;

/// Gives each region its place. What does not fit is left out, and said.
pub(super) fn place(regions: Vec<SharedMemory>, room: usize) -> Vec<SharedAt> {
    let mut placed: Vec<SharedAt> = Vec::new();
    let mut end = 0u64;
    for memory in regions {
        let next = end
            .checked_add(memory.len)
            .and_then(|end| end.checked_next_multiple_of(SHARED_ALIGNMENT))
            .filter(|&end| end <= SHARED_MAX);
        let known = placed.iter().any(|other| other.memory.id == memory.id);
        match next {
            Some(next) if placed.len() < room && !known && memory.len != 0 => {
                placed.push(SharedAt {
                    offset: end,
                    memory,
                });
                end = next;
            }
            _ => tracing::warn!(
                id = memory.id,
                len = memory.len,
                "a shared-memory region of the device has no place in the function"
            ),
        }
    }
    placed
}

/// Bytes of the BAR for these; 0: there is none.
pub(super) fn shared_size(placed: &[SharedAt]) -> u64 {
    placed.last().map_or(0, |last| {
        (last.offset + last.memory.len.max(SHARED_ALIGNMENT)).next_power_of_two()
    })
}
