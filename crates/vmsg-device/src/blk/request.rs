// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a chain asks for (VIRTIO 1.3, 5.2.6).
//!
//! All of the driver's words are read here, once: the memory they are in is still the driver's.

use vmsg_block::Facts;
use vmsg_mem::Pieces;

use super::bits::{
    MAX_DATA, MAX_RANGE, MAX_RANGES, MAX_WRITE, SECTOR, SERIAL_BYTES, Status, UNMAP, request,
};

/// Type u32, reserved u32, sector u64.
const HEADER: usize = 16;

/// Sector u64, number of sectors u32, flags u32.
const SEGMENT: usize = 16;

/// What may be asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) facts: Facts,
    /// Both parties have agreed on it.
    pub(super) discard: bool,
    /// Likewise.
    pub(super) write_zeroes: bool,
    /// Writing zeroes may give space up.
    pub(super) may_unmap: bool,
}

/// A part of the disk, in bytes; not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// What is to be done. Everything is inside the disk, and aligned.
#[derive(Clone, Debug)]
pub(super) enum Order<'m> {
    Read {
        offset: u64,
        to: Pieces<'m>,
    },
    Write {
        offset: u64,
        from: Pieces<'m>,
    },
    Flush,
    /// The last one first.
    Discard(Vec<Range>),
    /// Likewise.
    WriteZeroes(Vec<Range>),
    /// The serial number.
    Id(Pieces<'m>),
}

/// Why it is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) why: &'static str,
}

const fn bad(why: &'static str) -> Refusal {
    let status = Status::IoErr;
    Refusal { status, why }
}

const fn unknown(why: &'static str) -> Refusal {
    let status = Status::Unsupp;
    Refusal { status, why }
}

/// Reads what is asked for; `writable` is without the byte of the status. Where descriptors begin and end says nothing (2.7.4.2).
pub(super) fn read<'m>(
    readable: Pieces<'m>,
    writable: Pieces<'m>,
    limits: &Limits,
) -> Result<Order<'m>, Refusal> {
    let header: [u8; HEADER] = readable
        .read_array()
        .ok_or(bad("the header of a request is cut off"))?;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let data = readable.skip(HEADER);
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([a, b, c, d]) {
        request::IN => {
            let offset = place(sector, writable.len(), &limits.facts)?;
            Ok(Order::Read {
                offset,
                to: writable,
            })
        }
        request::OUT => {
            may_write(limits)?;
            if data.len() as u64 > MAX_WRITE {
                return Err(bad("a write of more than 128 MiB"));
            }
            let offset = place(sector, data.len(), &limits.facts)?;
            Ok(Order::Write { offset, from: data })
        }
        request::FLUSH => Ok(Order::Flush),
        request::GET_ID => Ok(Order::Id(writable.take(SERIAL_BYTES))),
        request::DISCARD if limits.discard => {
            may_write(limits)?;
            ranges(data, 0, limits).map(Order::Discard)
        }
        request::WRITE_ZEROES if limits.write_zeroes => {
            may_write(limits)?;
            ranges(data, UNMAP, limits).map(Order::WriteZeroes)
        }
        _ => Err(unknown("a request of a kind that was not agreed on")),
    }
}

fn may_write(limits: &Limits) -> Result<(), Refusal> {
    if limits.facts.read_only {
        return Err(bad("a write to a disk that is read-only"));
    }
    Ok(())
}

/// Where on the disk `len` bytes from `sector` on are.
fn place(sector: u64, len: usize, facts: &Facts) -> Result<u64, Refusal> {
    let len = len as u64;
    if len > MAX_DATA {
        return Err(bad("a request of more than 1 GiB"));
    }
    inside(sector, len, facts)
}

fn inside(sector: u64, len: u64, facts: &Facts) -> Result<u64, Refusal> {
    let beyond = bad("a request behind the end of the disk");
    let offset = sector.checked_mul(SECTOR).ok_or(beyond)?;
    if offset.checked_add(len).is_none_or(|end| end > facts.size) {
        return Err(beyond);
    }
    let block = u64::from(facts.block_size);
    if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Err(bad("a request of parts of blocks"));
    }
    Ok(offset)
}

/// Reads all segments before anything is done about the first.
fn ranges(data: Pieces<'_>, flags: u32, limits: &Limits) -> Result<Vec<Range>, Refusal> {
    let count = data.len() / SEGMENT;
    if count == 0 || !data.len().is_multiple_of(SEGMENT) {
        return Err(bad("a request with a part of a segment, or with none"));
    }
    if count > MAX_RANGES {
        return Err(bad("a request with more segments than there may be"));
    }
    let mut ranges = Vec::with_capacity(count);
    let mut rest = data;
    while let Some(bytes) = rest.read_array::<SEGMENT>() {
        rest = rest.skip(SEGMENT);
        let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
        let sectors = u32::from_le_bytes([a, b, c, d]);
        let set = u32::from_le_bytes([e, f, g, h]);
        if set & !flags != 0 {
            return Err(unknown("a segment with a flag that is not known"));
        }
        if sectors > MAX_RANGE {
            return Err(bad("a segment that is longer than it may be"));
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = inside(u64::from_le_bytes(sector), len, &limits.facts)?;
        if len > 0 {
            let unmap = set & UNMAP != 0 && limits.may_unmap;
            ranges.push(Range { offset, len, unmap });
        }
    }
    ranges.reverse();
    Ok(ranges)
}
