// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a block device (VIRTIO 1.3, 5.2.4).

use vmsg_block::Facts;

use super::bits::{MAX_RANGE, MAX_RANGES, MAX_SEGMENT, MAX_SEGMENTS, SECTOR};

/// Up to the fields of write zeroes: what is behind them belongs to features that are never offered. QEMU's vhost-user-blk has
/// as much.
pub(super) const SIZE: usize = 60;

/// Where the byte is that says whether writes are cached.
pub(super) const WRITEBACK: usize = 32;

/// What of the configuration does not come from the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rest {
    pub(super) queues: u16,
    pub(super) write_back: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// The bytes: capacity u64, size_max u32, seg_max u32, geometry 4, blk_size u32, physical_block_exp u8, alignment_offset u8,
/// min_io_size u16, opt_io_size u32, writeback u8, unused u8, num_queues u16, max_discard_sectors u32, max_discard_seg u32,
/// discard_sector_alignment u32, max_write_zeroes_sectors u32, max_write_zeroes_seg u32, write_zeroes_may_unmap u8, unused 3.
pub(super) fn bytes(facts: &Facts, rest: Rest) -> [u8; SIZE] {
    let ranges = u32::try_from(MAX_RANGES).expect("few");
    let mut bytes = [0; SIZE];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    let block = facts.block_size.max(512);
    put(0, &(facts.size / SECTOR).to_le_bytes());
    put(8, &MAX_SEGMENT.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &block.to_le_bytes());
    let physical = facts.physical_block_size.max(block);
    let exponent = (physical / block).ilog2();
    put(24, &[u8::try_from(exponent).unwrap_or(u8::MAX)]);
    let alignment = facts.alignment_offset / block;
    put(25, &[u8::try_from(alignment).unwrap_or(0)]);
    let least = physical / block;
    put(26, &u16::try_from(least).unwrap_or(u16::MAX).to_le_bytes());
    put(28, &(facts.optimal_io_size / block).to_le_bytes());
    put(WRITEBACK, &[u8::from(rest.write_back)]);
    put(34, &rest.queues.to_le_bytes());
    if rest.discard {
        let alignment = facts.discard_granularity.max(block) / 512;
        put(36, &MAX_RANGE.to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &alignment.to_le_bytes());
    }
    if rest.write_zeroes {
        put(48, &MAX_RANGE.to_le_bytes());
        put(52, &ranges.to_le_bytes());
        put(56, &[u8::from(rest.discard)]);
    }
    bytes
}
