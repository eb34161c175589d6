// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a guest as its front end describes it, and how it becomes windows.

use super::wire::{RawRegion, WireError};
use crate::memory::{FileError, MemoryFile};
use crate::session::Window;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use thiserror::Error;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};

/// The most regions: of GET_MAX_MEM_SLOTS, and below what device hosts accept at a time.
pub(super) const MAX_REGIONS: usize = 48;

/// What is wrong with a memory table.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Regions come without files: the guest's memory is not shared.
    #[error("the guest's memory is not shared ({regions} regions, {fds} files)")]
    NotShared {
        /// Regions announced.
        regions: usize,
        /// Files that came.
        fds: usize,
    },
    /// Two regions lie over each other, or there are too many.
    #[error("regions overlap, or are more than {MAX_REGIONS}")]
    Overlap,
    /// The region to remove is not there.
    #[error("no such region")]
    NoSuchRegion,
    /// A file cannot be taken for memory.
    #[error("the file of a region: {0}")]
    File(#[from] FileError),
    /// The message itself is broken.
    #[error(transparent)]
    Wire(#[from] WireError),
}

#[derive(Clone, Debug)]
struct Region {
    raw: RawRegion,
    file: MemoryFile,
}

impl Region {
    fn new(raw: RawRegion, fd: OwnedFd) -> Result<Region, MemoryError> {
        // The sum was checked with the message.
        let file = MemoryFile::new(fd, raw.offset.saturating_add(raw.size))?;
        Ok(Region { raw, file })
    }

    /// How far `address` lies in the region, if `len` bytes from there do.
    fn offset_of(start: u64, size: u64, address: u64, len: u64) -> Option<u64> {
        let offset = address.checked_sub(start)?;
        (offset.checked_add(len)? <= size).then_some(offset)
    }
}

/// A memory table.
#[derive(Clone, Debug, Default)]
pub(super) struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// The table of SET_MEM_TABLE.
    pub(super) fn of_table(
        raw: Vec<RawRegion>,
        fds: Vec<OwnedFd>,
    ) -> Result<GuestMemory, MemoryError> {
        if raw.is_empty() || raw.len() != fds.len() {
            return Err(MemoryError::NotShared {
                regions: raw.len(),
                fds: fds.len(),
            });
        }
        let regions = raw
            .into_iter()
            .zip(fds)
            .map(|(raw, fd)| Region::new(raw, fd));
        GuestMemory {
            regions: regions.collect::<Result<_, _>>()?,
        }
        .checked()
    }

    /// This table and one region more; `None` if it has it already.
    pub(super) fn with(
        &self,
        raw: RawRegion,
        fd: OwnedFd,
    ) -> Result<Option<GuestMemory>, MemoryError> {
        let region = Region::new(raw, fd)?;
        let same = |r: &Region| r.raw == region.raw && r.file.id == region.file.id;
        if self.regions.iter().any(same) {
            return Ok(None);
        }
        let mut memory = self.clone();
        memory.regions.push(region);
        memory.checked().map(Some)
    }

    /// This table without a region. The file is not told, and the offset need not be the same.
    pub(super) fn without(&self, raw: &RawRegion) -> Result<GuestMemory, MemoryError> {
        let mut memory = self.clone();
        let same =
            |r: &Region| (r.raw.guest, r.raw.user, r.raw.size) == (raw.guest, raw.user, raw.size);
        let at = memory
            .regions
            .iter()
            .position(same)
            .ok_or(MemoryError::NoSuchRegion)?;
        memory.regions.remove(at);
        Ok(memory)
    }

    fn checked(self) -> Result<GuestMemory, MemoryError> {
        let mut starts: Vec<(u64, u64)> = self
            .regions
            .iter()
            .map(|r| (r.raw.guest, r.raw.size))
            .collect();
        starts.sort_unstable();
        if starts
            .windows(2)
            .any(|pair| pair[0].0 + pair[0].1 > pair[1].0)
            || starts.len() > MAX_REGIONS
        {
            return Err(MemoryError::Overlap);
        }
        Ok(self)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// What is lent to the device: guest physical addresses.
    pub(super) fn windows(&self) -> Vec<Window> {
        let window = |r: &Region| Window {
            base: r.raw.guest,
            len: r.raw.size,
            file_offset: r.raw.offset,
            writable: true,
            fd: r.file.fd.clone(),
            file: r.file.id,
        };
        self.regions.iter().map(window).collect()
    }

    /// All of it, mapped here: guest physical addresses.
    pub(super) fn table(&self) -> Result<WindowTable, MemoryError> {
        let entry = |r: &Region| {
            let (offset, len) = (r.raw.offset, r.raw.size);
            let mapping = Mapping::of_fd(r.file.fd.as_fd(), offset, len, Access::ReadWrite)?;
            Ok(TableEntry {
                base: BusAddr(r.raw.guest),
                len: mapping.len(),
                mapping: Arc::new(mapping),
                offset: 0,
                access: Access::ReadWrite,
            })
        };
        let entries: Result<Vec<_>, vmsg_mem::Error> = self.regions.iter().map(entry).collect();
        entries
            .and_then(WindowTable::new)
            .map_err(|error| MemoryError::File(FileError::Look(error)))
    }

    /// The guest physical address of an address in the front end's process, if `len` bytes from there lie in one region.
    pub(super) fn to_guest(&self, user: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = Region::offset_of(r.raw.user, r.raw.size, user, len)?;
            r.raw.guest.checked_add(offset)
        })
    }

    /// Reads a 16-bit ring word at a guest physical address.
    pub(super) fn read_u16(&self, guest: u64) -> Option<u16> {
        let (region, offset) = self
            .regions
            .iter()
            .find_map(|r| Some((r, Region::offset_of(r.raw.guest, r.raw.size, guest, 2)?)))?;
        let at = region.raw.offset.checked_add(offset)?;
        let mapping = Mapping::of_fd(region.file.fd.as_fd(), at, 2, Access::Read).ok()?;
        let mut bytes = [0; 2];
        (mapping.ram().read(0, &mut bytes) == 2 && !mapping.is_lost())
            .then(|| u16::from_le_bytes(bytes))
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
