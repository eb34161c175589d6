// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a block device says about itself (virtio 1.3 §5.2.4).

use core::ops::Range;

use virtio_msg::FeatureSet;

use super::feature_bit;

/// Bytes of the configuration space that are known here: up to the limits of WRITE_ZEROES.
pub const CONFIG_LEN: usize = 60;

/// Bytes of a sector: the unit of every offset and length, whatever the block size.
pub const SECTOR: u64 = 512;

/// Where the fields of the configuration space are (`struct virtio_blk_config`).
mod field {
    use super::Range;

    pub(super) const CAPACITY: Range<usize> = 0..8;
    pub(super) const SIZE_MAX: Range<usize> = 8..12;
    pub(super) const SEG_MAX: Range<usize> = 12..16;
    pub(super) const BLK_SIZE: Range<usize> = 20..24;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const ALIGNMENT_OFFSET: usize = 25;
    pub(super) const MIN_IO_SIZE: Range<usize> = 26..28;
    pub(super) const OPT_IO_SIZE: Range<usize> = 28..32;
    pub(super) const WRITEBACK: usize = 32;
    pub(super) const NUM_QUEUES: Range<usize> = 34..36;
    pub(super) const MAX_DISCARD_SECTORS: Range<usize> = 36..40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: Range<usize> = 44..48;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: Range<usize> = 48..52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// Where the byte is that turns the write cache of the device on and off (with CONFIG_WCE).
pub const WRITEBACK_OFFSET: u32 = 32;

/// What a block device says about itself, as far as the negotiated features make it valid. All of it is the device's word, with the contradictions taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Size in sectors of 512 bytes; times 512 it still fits 64 bits.
    pub capacity: u64,
    /// The longest segment in bytes, not 0; `u32::MAX`: no limit is told.
    pub size_max: u32,
    /// Segments of data in a request at most, not 0; 1 if no limit is told, as Linux takes it.
    pub seg_max: u32,
    /// Bytes that requests are best a multiple of: a power of two, at least 512.
    pub block_size: u32,
    /// Blocks in a physical block, as a power of two (at most 31).
    pub physical_block_exp: u8,
    /// Where the first physical block begins, in blocks.
    pub alignment_offset: u8,
    /// The smallest request that is good for the device, in blocks; 0: not told.
    pub min_io_blocks: u16,
    /// The best length of a request, in blocks; 0: not told.
    pub opt_io_blocks: u32,
    /// The device may tell writes as done before they are on the medium.
    pub write_back: bool,
    /// Queues; at least 1.
    pub queues: u16,
    /// Sectors of a discard at most; 0: there are no discards.
    pub max_discard_sectors: u32,
    /// Sectors that discards are best aligned to; 0: not told.
    pub discard_alignment: u32,
    /// Sectors of a write of zeroes at most; 0: there is no such request.
    pub max_write_zeroes_sectors: u32,
    /// Zeroes may be written by giving the space up.
    pub write_zeroes_may_unmap: bool,
    /// Nothing can be written.
    pub read_only: bool,
    /// There are flushes.
    pub flush: bool,
}

impl Config {
    /// Reads the first bytes of the configuration space; those that the device does not have are missing at the end. `None` if a field that
    /// `features` makes valid is missing or impossible.
    pub fn parse(bytes: &[u8], features: &FeatureSet) -> Option<Self> {
        let has = |bit| features.bit(bit);
        let u16_at = |at: Range<usize>| Some(u16::from_le_bytes(bytes.get(at)?.try_into().ok()?));
        let u32_at = |at: Range<usize>| Some(u32::from_le_bytes(bytes.get(at)?.try_into().ok()?));
        let byte = |at: usize| bytes.get(at).copied();
        let capacity = u64::from_le_bytes(bytes.get(field::CAPACITY)?.try_into().ok()?);
        capacity.checked_mul(SECTOR)?;

        let mut config = Self {
            capacity,
            size_max: u32::MAX,
            seg_max: 1,
            block_size: 512,
            physical_block_exp: 0,
            alignment_offset: 0,
            min_io_blocks: 0,
            opt_io_blocks: 0,
            write_back: has(feature_bit::FLUSH),
            queues: 1,
            max_discard_sectors: 0,
            discard_alignment: 0,
            max_write_zeroes_sectors: 0,
            write_zeroes_may_unmap: false,
            read_only: has(feature_bit::RO),
            flush: has(feature_bit::FLUSH),
        };
        if has(feature_bit::SIZE_MAX) {
            config.size_max = u32_at(field::SIZE_MAX).filter(|&max| max > 0)?;
        }
        if has(feature_bit::SEG_MAX) {
            config.seg_max = u32_at(field::SEG_MAX)?.max(1);
        }
        if has(feature_bit::BLK_SIZE) {
            let fits = |size: &u32| size.is_power_of_two() && *size >= 512;
            config.block_size = u32_at(field::BLK_SIZE).filter(fits)?;
        }
        if has(feature_bit::TOPOLOGY) {
            config.physical_block_exp = byte(field::PHYSICAL_BLOCK_EXP).filter(|&exp| exp < 32)?;
            config.alignment_offset = byte(field::ALIGNMENT_OFFSET)?;
            config.min_io_blocks = u16_at(field::MIN_IO_SIZE)?;
            config.opt_io_blocks = u32_at(field::OPT_IO_SIZE)?;
        }
        if has(feature_bit::CONFIG_WCE) {
            config.write_back = byte(field::WRITEBACK)? != 0;
        }
        if has(feature_bit::MQ) {
            config.queues = u16_at(field::NUM_QUEUES).filter(|&queues| queues > 0)?;
        }
        if has(feature_bit::DISCARD) {
            config.max_discard_sectors = u32_at(field::MAX_DISCARD_SECTORS)?;
            config.discard_alignment = u32_at(field::DISCARD_SECTOR_ALIGNMENT)?;
        }
        if has(feature_bit::WRITE_ZEROES) {
            config.max_write_zeroes_sectors = u32_at(field::MAX_WRITE_ZEROES_SECTORS)?;
            config.write_zeroes_may_unmap = byte(field::WRITE_ZEROES_MAY_UNMAP)? != 0;
        }
        Some(config)
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.capacity * SECTOR
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
