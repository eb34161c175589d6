// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that a vfio-user client has opened to its device.

use super::file::has_private;
use super::{FileError, GuestMemory, MemoryError, MemoryFile};
use crate::session::{FileId, Window};
use rustix::process::Pid;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use thiserror::Error;
use vmsg_mem::{Access, BusAddr, Mapping, RamSlice};
use vmsg_queue::remote::Memory;
use vmsg_vfio_user::DmaError;

/// The most ranges at a time. With a vIOMMU each page of each request is one.
pub(crate) const MAX_RANGES: usize = 16_384;

/// The most files behind ranges. Each takes a descriptor of this process, which has other clients, too; a guest has a handful.
pub(crate) const MAX_FILES: usize = 512;

/// Bytes of files that are mapped here for one client. Sparse files are cheap, but a process has no more than 128 TiB of addresses.
const MAX_MAPPED: u64 = 1 << 40;

/// Files remembered though no range of theirs is left: with a vIOMMU ranges come and go, and are of one file.
const SPARE_FILES: usize = 16;

/// What a read should fetch at least, where the memory is mapped and where each read is a message.
const READ_AHEAD: (usize, usize) = (256, 2048);

/// Bytes between messages and other memory at a time.
const CHUNK: usize = 1 << 16;

/// A way to memory that came without a file.
pub(crate) trait Messages: Send + Sync {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError>;
    fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError>;
    /// Ends those that wait now.
    fn cancel(&self);
}

impl Messages for vmsg_vfio_user::Dma {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        vmsg_vfio_user::Dma::read(self, address, into).map_err(|error| failed(address, error))
    }

    fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        vmsg_vfio_user::Dma::write(self, address, from).map_err(|error| failed(address, error))
    }

    fn cancel(&self) {
        vmsg_vfio_user::Dma::cancel(self);
    }
}

fn failed(address: u64, error: DmaError) -> MemoryError {
    match error {
        DmaError::Refused(errno) => MemoryError::Refused {
            addr: BusAddr(address),
            errno: errno.raw_os_error(),
        },
        DmaError::TimedOut => MemoryError::TimedOut,
        DmaError::Cancelled => MemoryError::Cancelled,
        _ => MemoryError::Gone,
    }
}

/// Why a range is not taken.
#[derive(Debug, Error)]
pub(crate) enum MapError {
    #[error("it is empty, or ends behind the last address")]
    BadRange,
    #[error("it overlaps the range at {0:#x}")]
    Overlap(u64),
    #[error("there are more than {MAX_RANGES} ranges")]
    TooMany,
    #[error("the ranges have more than {MAX_FILES} files")]
    TooManyFiles,
    #[error("its file: {0}")]
    File(#[from] FileError),
}

/// Why a range is not given back.
#[derive(Debug, Error)]
pub(crate) enum UnmapError {
    #[error("it cuts through the range at {0:#x}")]
    Cuts(u64),
}

/// A range of memory, as the client describes it.
#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) address: u64,
    pub(crate) size: u64,
    /// In the file.
    pub(crate) offset: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) fd: Option<OwnedFd>,
}

/// What the files of one client take. There are as many of them as references, but for the one that counts.
#[derive(Debug, Default)]
struct Budget {
    /// Bytes.
    mapped: AtomicU64,
}

impl Budget {
    fn admit(&self, len: u64) -> bool {
        let add = |mapped: u64| mapped.checked_add(len).filter(|sum| *sum <= MAX_MAPPED);
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.mapped.fetch_update(set, fetch, add).is_ok()
    }
}

/// A file, mapped as a whole when it is first needed.
#[derive(Debug)]
struct Backing {
    budget: Arc<Budget>,
    file: MemoryFile,
    /// Bytes that may be mapped.
    len: u64,
    mapping: OnceLock<Option<Mapping>>,
    /// Whether what the guest writes does not go there, once somebody has looked.
    private: OnceLock<bool>,
}

impl Backing {
    fn is_private(&self) -> bool {
        self.private.get() == Some(&true)
    }

    fn mapping(&self) -> Option<&Mapping> {
        let map = || {
            if !self.budget.admit(self.len) {
                return None;
            }
            let of = |access| Mapping::of_fd(self.file.fd.as_fd(), 0, self.len, access);
            let mapping = of(Access::ReadWrite).or_else(|_| of(Access::Read)).ok();
            if mapping.is_none() {
                self.budget.mapped.fetch_sub(self.len, Ordering::Relaxed);
            }
            mapping
        };
        self.mapping.get_or_init(map).as_ref()
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(Some(_)) = self.mapping.get() {
            self.budget.mapped.fetch_sub(self.len, Ordering::Relaxed);
        }
    }
}

#[derive(Clone, Debug)]
struct Mapped {
    size: u64,
    offset: u64,
    readable: bool,
    writable: bool,
    backing: Option<Arc<Backing>>,
}

#[derive(Debug, Default)]
struct State {
    /// By address.
    ranges: BTreeMap<u64, Mapped>,
    files: HashMap<FileId, Arc<Backing>>,
    budget: Arc<Budget>,
}

impl State {
    /// The range that has `address`, and where in it that is.
    fn find(&self, address: u64) -> Option<(&Mapped, u64)> {
        let (start, range) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        (offset < range.size).then_some((range, offset))
    }

    /// The file of a new range that ends at `end` in it.
    fn backing(&mut self, fd: OwnedFd, end: u64) -> Result<Arc<Backing>, MapError> {
        let file = MemoryFile::new(fd, end)?;
        if let Some(known) = self.files.get(&file.id).filter(|known| known.len >= end) {
            return Ok(known.clone());
        }
        if self.files.len() >= SPARE_FILES {
            self.files.retain(|_, file| Arc::strong_count(file) > 1);
        }
        // The ranges of a file that has grown meanwhile may have several.
        if Arc::strong_count(&self.budget) > MAX_FILES {
            return Err(MapError::TooManyFiles);
        }
        let backing = Arc::new(Backing {
            budget: self.budget.clone(),
            len: file.len,
            mapping: OnceLock::new(),
            private: OnceLock::new(),
            file,
        });
        self.files.insert(backing.file.id, backing.clone());
        Ok(backing)
    }
}

/// Where a part of an access goes.
enum Place<'a> {
    Here(RamSlice<'a>),
    Messages(u64),
}

/// The ranges that are open at the moment. Shared by the thread that hears of changes and those that copy: a range is gone when nobody copies
/// from or to it any more.
pub(crate) struct DmaMemory {
    state: RwLock<State>,
    messages: Box<dyn Messages>,
    /// The client's process, if it is known.
    client: Option<Pid>,
}

impl std::fmt::Debug for DmaMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaMemory")
            .field("ranges", &self.state().ranges.len())
            .finish_non_exhaustive()
    }
}

impl DmaMemory {
    pub(crate) fn new(messages: Box<dyn Messages>, client: Option<Pid>) -> DmaMemory {
        DmaMemory {
            state: RwLock::default(),
            messages,
            client,
        }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a range. Gives the window to lend for it, if there is a file and the device may read it.
    pub(crate) fn map(&self, range: Range) -> Result<Option<Window>, MapError> {
        let end = range.address.checked_add(range.size);
        let end = end.filter(|_| range.size > 0).ok_or(MapError::BadRange)?;
        let mut state = self.state_mut();
        let before = state.ranges.range(..end).next_back();
        if let Some((start, other)) = before
            && *start + other.size > range.address
        {
            return Err(MapError::Overlap(*start));
        }
        if state.ranges.len() >= MAX_RANGES {
            return Err(MapError::TooMany);
        }
        let backing = match range.fd {
            Some(fd) => {
                let end = range.offset.checked_add(range.size);
                Some(state.backing(fd, end.ok_or(MapError::BadRange)?)?)
            }
            None => None,
        };
        let mapped = Mapped {
            size: range.size,
            offset: range.offset,
            readable: range.readable,
            writable: range.writable,
            backing,
        };
        let window = window(range.address, &mapped);
        state.ranges.insert(range.address, mapped);
        Ok(window)
    }

    /// Closes all ranges that lie between `address` and `address + size`, and gives the bytes that these were. Waits for accesses under way,
    /// but not for the client.
    pub(crate) fn unmap(&self, address: u64, size: u64) -> Result<u64, UnmapError> {
        // Of an address space of 2^64 bytes the last one cannot be named.
        let end = address.saturating_add(size);
        let mut state = self.state_mut();
        if let Some((start, other)) = state.ranges.range(..address).next_back()
            && *start + other.size > address
        {
            return Err(UnmapError::Cuts(*start));
        }
        let inside: Vec<u64> = state
            .ranges
            .range(address..end)
            .map(|(at, _)| *at)
            .collect();
        if let Some(last) = inside.last()
            && last + state.ranges[last].size > end
        {
            return Err(UnmapError::Cuts(*last));
        }
        let gone = inside.iter().filter_map(|at| state.ranges.remove(at));
        Ok(gone.map(|range| range.size).sum())
    }

    /// Closes all ranges, and gives the bytes that these were.
    pub(crate) fn clear(&self) -> u64 {
        let ranges = std::mem::take(&mut self.state_mut().ranges);
        ranges.values().map(|range| range.size).sum()
    }

    /// What can be lent, by address.
    pub(crate) fn windows(&self) -> Vec<Window> {
        let state = self.state();
        let windows = state.ranges.iter();
        windows
            .filter_map(|(at, range)| window(*at, range))
            .collect()
    }

    /// Whether memory at `address` is there but can only be reached by messages: without a file, or with one that the client has mapped for itself
    /// alone (QEMU's `share=off`). In the latter case no range of this file is mapped or lent from now on.
    pub(crate) fn is_unshared(&self, address: u64) -> bool {
        let state = self.state();
        let Some((range, _)) = state.find(address) else {
            return false;
        };
        range.backing.as_ref().is_none_or(|backing| {
            let look = || {
                self.client
                    .is_some_and(|client| has_private(client, backing.file.id))
            };
            *backing.private.get_or_init(look)
        })
    }

    /// Bytes of the largest range.
    pub(crate) fn largest(&self) -> u64 {
        let state = self.state();
        let sizes = state.ranges.values().map(|range| range.size);
        sizes.max().unwrap_or(0)
    }

    /// Calls `each` for the parts of `len` bytes at `addr`, in order, with how many bytes were before it and how many it has.
    fn walk(
        &self,
        addr: BusAddr,
        len: usize,
        access: Access,
        mut each: impl FnMut(usize, usize, Place<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped { addr, len };
        let mut done = 0;
        while done < len {
            let at = addr.0.checked_add(done as u64).ok_or(unmapped)?;
            let state = self.state();
            let (range, offset) = state.find(at).ok_or(unmapped)?;
            let allowed = match access {
                Access::Read => range.readable,
                Access::ReadWrite => range.writable,
            };
            if !allowed {
                return Err(MemoryError::Denied { addr, len });
            }
            let left = usize::try_from(range.size - offset).unwrap_or(usize::MAX);
            let n = left.min(len - done);
            match range.backing.as_ref().filter(|file| !file.is_private()) {
                Some(backing) => {
                    let mapping = backing.mapping().ok_or(unmapped)?;
                    if access == Access::ReadWrite && mapping.access() == Access::Read {
                        return Err(MemoryError::Denied { addr, len });
                    }
                    let place = usize::try_from(range.offset + offset).map_err(|_| unmapped)?;
                    let ram = mapping.ram().get(place, n).ok_or(unmapped)?;
                    each(done, n, Place::Here(ram))?;
                    // The client has cut its file off.
                    if mapping.is_lost() {
                        return Err(unmapped);
                    }
                }
                None => {
                    // The answer comes through the thread that changes the ranges.
                    drop(state);
                    each(done, n, Place::Messages(at))?;
                }
            }
            done += n;
        }
        Ok(())
    }

    /// Calls `each` with the word at `addr`, or with nothing if it is not mapped here.
    fn word<T>(
        &self,
        addr: BusAddr,
        access: Access,
        mut each: impl FnMut(Place<'_>) -> Result<T, MemoryError>,
    ) -> Result<T, MemoryError> {
        if !addr.0.is_multiple_of(2) {
            return Err(MemoryError::Misaligned { addr });
        }
        let mut word = None;
        self.walk(addr, 2, access, |_, n, place| {
            if n == 2 {
                word = Some(each(place)?);
            }
            Ok(())
        })?;
        // A word in two ranges, of which one ends at an odd address.
        word.ok_or(MemoryError::Misaligned { addr })
    }
}

/// Goes through `len` bytes of messages at `at` with a buffer: gives the address, the bytes before it, and the buffer.
fn in_chunks(
    at: u64,
    len: usize,
    mut each: impl FnMut(u64, usize, &mut [u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut buf = vec![0; len.min(CHUNK)];
    let mut done = 0;
    while done < len {
        let n = buf.len().min(len - done);
        // The range was found whole.
        each(at + done as u64, done, &mut buf[..n])?;
        done += n;
    }
    Ok(())
}

/// What can be lent of a range.
fn window(base: u64, range: &Mapped) -> Option<Window> {
    let backing = range.backing.as_ref();
    let backing = backing.filter(|file| range.readable && !file.is_private())?;
    Some(Window {
        base,
        len: range.size,
        file_offset: range.offset,
        writable: range.writable,
        fd: backing.file.fd.clone(),
        file: backing.file.id,
    })
}

impl Memory for DmaMemory {
    type Error = MemoryError;

    fn read(&self, addr: BusAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.walk(addr, into.len(), Access::Read, |done, n, place| {
            let into = &mut into[done..done + n];
            match place {
                Place::Here(ram) => {
                    ram.read(0, into);
                    Ok(())
                }
                Place::Messages(at) => self.messages.read(at, into),
            }
        })
    }

    fn write(&self, addr: BusAddr, from: &[u8]) -> Result<(), MemoryError> {
        self.walk(addr, from.len(), Access::ReadWrite, |done, n, place| {
            let from = &from[done..done + n];
            match place {
                Place::Here(ram) => {
                    ram.write(0, from);
                    Ok(())
                }
                Place::Messages(at) => self.messages.write(at, from),
            }
        })
    }

    fn load_u16(&self, addr: BusAddr) -> Result<u16, MemoryError> {
        self.word(addr, Access::Read, |place| match place {
            Place::Here(ram) => {
                let word = ram.atomic_u16(0).ok_or(MemoryError::Misaligned { addr })?;
                // SYNC POINT: pairs with the driver's release of an index.
                Ok(u16::from_le(word.load(Ordering::Acquire)))
            }
            Place::Messages(at) => {
                let mut bytes = [0; 2];
                self.messages.read(at, &mut bytes)?;
                Ok(u16::from_le_bytes(bytes))
            }
        })
    }

    fn store_u16(&self, addr: BusAddr, value: u16) -> Result<(), MemoryError> {
        self.word(addr, Access::ReadWrite, |place| match place {
            Place::Here(ram) => {
                let word = ram.atomic_u16(0).ok_or(MemoryError::Misaligned { addr })?;
                // SYNC POINT: pairs with the driver's acquire of an index.
                word.store(value.to_le(), Ordering::Release);
                Ok(())
            }
            Place::Messages(at) => self.messages.write(at, &value.to_le_bytes()),
        })
    }

    fn read_into(&self, addr: BusAddr, to: RamSlice<'_>) -> Result<(), MemoryError> {
        self.walk(addr, to.len(), Access::Read, |done, n, place| {
            let to = to
                .get(done, n)
                .ok_or(MemoryError::Unmapped { addr, len: n })?;
            match place {
                Place::Here(ram) => {
                    ram.copy_to(to);
                    Ok(())
                }
                Place::Messages(at) => in_chunks(at, n, |at, done, bytes| {
                    self.messages.read(at, bytes)?;
                    to.write(done, bytes);
                    Ok(())
                }),
            }
        })
    }

    fn write_from(&self, addr: BusAddr, from: RamSlice<'_>) -> Result<(), MemoryError> {
        self.walk(addr, from.len(), Access::ReadWrite, |done, n, place| {
            let from = from
                .get(done, n)
                .ok_or(MemoryError::Unmapped { addr, len: n })?;
            match place {
                Place::Here(ram) => {
                    from.copy_to(ram);
                    Ok(())
                }
                Place::Messages(at) => in_chunks(at, n, |at, done, bytes| {
                    from.read(done, bytes);
                    self.messages.write(at, bytes)
                }),
            }
        })
    }

    fn read_ahead(&self) -> usize {
        let state = self.state();
        if state.files.values().all(|file| file.is_private()) {
            READ_AHEAD.1
        } else {
            READ_AHEAD.0
        }
    }
}

impl GuestMemory for DmaMemory {
    fn cancel(&self) {
        self.messages.cancel();
    }
}

#[cfg(test)]
#[path = "dma_test.rs"]
mod tests;
