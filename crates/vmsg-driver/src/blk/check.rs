// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which requests a driver may make of a disk.

use vmsg_queue::Buffer;

use super::request::Request;
use super::{Config, SECTOR};

/// Whether a driver may make `request` of such a disk (virtio 1.3 §5.2.6.1).
///
/// # Errors
/// Why not.
pub(super) fn check(config: &Config, request: &Request<'_>) -> Result<(), &'static str> {
    match *request {
        Request::Read { sector, to } => data(config, sector, to),
        Request::Write { from, .. } if config.read_only => {
            let _ = from;
            Err("the disk is read-only")
        }
        Request::Write { sector, from } => data(config, sector, from),
        Request::Flush if !config.flush => Err("the disk has no flushes"),
        Request::Discard { sector, sectors } => {
            if sectors > config.max_discard_sectors {
                return Err("longer than a discard may be");
            }
            inside(config, sector, sectors.into())
        }
        Request::WriteZeroes {
            sector,
            sectors,
            unmap,
        } => {
            if sectors > config.max_write_zeroes_sectors {
                return Err("longer than a write of zeroes may be");
            }
            if unmap && !config.write_zeroes_may_unmap {
                return Err("the space cannot be given up");
            }
            inside(config, sector, sectors.into())
        }
        Request::Flush | Request::GetId | Request::Other { .. } => Ok(()),
    }
}

fn data(config: &Config, sector: u64, buffers: &[Buffer]) -> Result<(), &'static str> {
    let bytes: u64 = buffers.iter().map(|&(_, len)| u64::from(len)).sum();
    if u32::try_from(buffers.len()).map_or(true, |count| count > config.seg_max) {
        return Err("more segments than the device takes");
    }
    if buffers.iter().any(|&(_, len)| len > config.size_max) {
        return Err("a segment longer than the device takes");
    }
    if bytes == 0 || bytes % u64::from(config.block_size) != 0 {
        return Err("not a whole number of blocks");
    }
    inside(config, sector, bytes / SECTOR)
}

fn inside(config: &Config, sector: u64, sectors: u64) -> Result<(), &'static str> {
    let block = u64::from(config.block_size) / SECTOR;
    if sector % block != 0 || sectors % block != 0 {
        return Err("not at a block");
    }
    match sector.checked_add(sectors) {
        Some(end) if end <= config.capacity && sectors > 0 => Ok(()),
        _ => Err("outside of the disk"),
    }
}
