// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file itself, and everything that can be done with it by waiting.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use vmsg_mem::{Held, Pieces, block_device};

use crate::Failure;

/// The largest buffer of our own, bytes: what is larger goes through it piece by piece.
pub(super) const CHUNK: usize = 128 << 10;
/// Most pieces that one system call takes (IOV_MAX).
const MOST: usize = 1024;

/// What the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    Device,
}

/// What requests past the page cache must be aligned to, bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Their place in the file, and the length of each piece.
    pub(super) offset: u32,
    /// The pieces in memory.
    pub(super) memory: u32,
}

/// An open file that is a disk.
#[derive(Debug)]
pub(super) struct Medium {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) kind: Kind,
    /// There if it is used past the page cache.
    pub(super) direct: Option<Alignment>,
    /// Holes can be made.
    can_punch: AtomicBool,
    /// Zeroes can be had without writing them.
    can_zero: AtomicBool,
    /// The errno of the first failed attempt to bring what was written to the medium, or 0. Linux tells such a failure once and
    /// forgets it, and the data with it: nothing that was written before is known to be there, and no later attempt says so.
    lost: AtomicI32,
}

impl Medium {
    pub(super) fn new(fd: OwnedFd, kind: Kind, direct: Option<Alignment>) -> Self {
        Self {
            fd: Arc::new(fd),
            kind,
            direct,
            can_punch: AtomicBool::new(true),
            can_zero: AtomicBool::new(true),
            lost: AtomicI32::new(0),
        }
    }

    /// Its size in bytes at the moment.
    pub(super) fn size(&self) -> io::Result<u64> {
        match self.kind {
            Kind::Regular => {
                let size = rustix::fs::fstat(&self.fd)?.st_size;
                Ok(u64::try_from(size).unwrap_or(0))
            }
            // Nobody uses the position.
            Kind::Device => Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?),
        }
    }

    /// Whether a request can be made for this place without looking at what else is in its first and last block.
    pub(super) fn is_aligned(&self, offset: u64, len: u64) -> bool {
        self.direct.is_none_or(|direct| {
            offset.is_multiple_of(u64::from(direct.offset))
                && len.is_multiple_of(u64::from(direct.offset))
        })
    }

    /// Whether a request can be made with this memory.
    pub(super) fn takes(&self, pieces: Pieces<'_>) -> bool {
        let Some(direct) = self.direct else {
            return true;
        };
        let mut count = 0;
        pieces.iter().all(|piece| {
            count += 1;
            count <= MOST
                && piece.as_ptr().addr() % direct.memory as usize == 0
                && piece.len() % direct.offset as usize == 0
        })
    }

    /// A buffer that can be used for requests of any kind.
    pub(super) fn buffer(&self, len: usize) -> Held {
        let align = self
            .direct
            .map_or(1, |direct| direct.memory.max(direct.offset));
        Held::buffer(len, align as usize)
    }

    /// Reads, whatever the alignment.
    pub(super) fn read(&self, mut offset: u64, to: Pieces<'_>) -> Result<(), Failure> {
        if self.is_aligned(offset, to.len() as u64) && self.takes(to) {
            return self.read_plain(offset, to);
        }
        let mut rest = to;
        while !rest.is_empty() {
            let (place, skip, len) = self.around(offset, rest.len());
            let buffer = self.buffer(len);
            self.read_plain(place, buffer.pieces())?;
            let part = buffer.pieces().skip(skip).copy_to(rest);
            rest = rest.skip(part);
            offset += part as u64;
        }
        Ok(())
    }

    /// Writes, whatever the alignment. What is not aligned ([`Self::is_aligned`]) must be written while nothing else is.
    pub(super) fn write(&self, mut offset: u64, from: Pieces<'_>) -> Result<(), Failure> {
        if self.is_aligned(offset, from.len() as u64) && self.takes(from) {
            return self.write_plain(offset, from);
        }
        let mut rest = from;
        while !rest.is_empty() {
            let (place, skip, len) = self.around(offset, rest.len());
            let buffer = self.buffer(len);
            if skip > 0 || len - skip > rest.len() {
                self.read_plain(place, buffer.pieces())?;
            }
            let part = rest.copy_to(buffer.pieces().skip(skip));
            self.write_plain(place, buffer.pieces())?;
            rest = rest.skip(part);
            offset += part as u64;
        }
        Ok(())
    }

    /// A part of the file that can be read and written past the page cache and has the first of `len` bytes at `offset`: where it
    /// begins, how far into it those are, how long it is.
    fn around(&self, offset: u64, len: usize) -> (u64, usize, usize) {
        let align = self.direct.map_or(1, |direct| direct.offset as usize);
        let skip = usize::try_from(offset % align as u64).expect("less than the alignment");
        let whole = skip.saturating_add(len).min(CHUNK.max(align));
        (offset - skip as u64, skip, whole.next_multiple_of(align))
    }

    fn read_plain(&self, mut offset: u64, mut to: Pieces<'_>) -> Result<(), Failure> {
        while !to.is_empty() {
            let count = to.read_from_at(&self.fd, offset)?;
            if !self.goes_on(count, to.len()) {
                return Err(too_short());
            }
            to = to.skip(count);
            offset += count as u64;
        }
        Ok(())
    }

    fn write_plain(&self, mut offset: u64, mut from: Pieces<'_>) -> Result<(), Failure> {
        while !from.is_empty() {
            let count = from.write_to_at(&self.fd, offset)?;
            if !self.goes_on(count, from.len()) {
                return Err(nothing_written());
            }
            from = from.skip(count);
            offset += count as u64;
        }
        Ok(())
    }

    /// Whether what is left of a request for `len` bytes of which `count` are done can be asked for.
    pub(super) fn goes_on(&self, count: usize, len: usize) -> bool {
        count == len || (count > 0 && self.is_aligned(0, count as u64))
    }

    /// Brings all that was written to the medium.
    pub(super) fn sync(&self) -> Result<(), Failure> {
        self.is_intact()?;
        self.synced(
            rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.fd)).map_err(io::Error::from),
        )
    }

    /// An error if something that was written has been lost.
    pub(super) fn is_intact(&self) -> Result<(), Failure> {
        match self.lost.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Failure::Io(io::Error::from_raw_os_error(errno))),
        }
    }

    /// Takes note of how an attempt to bring data to the medium went, and says what is to be said of it.
    pub(super) fn synced(&self, result: io::Result<()>) -> Result<(), Failure> {
        if let Err(error) = &result {
            let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            let first = self
                .lost
                .compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire)
                .is_ok();
            if first {
                tracing::error!(%error, "written data may be lost: each flush fails from now on");
            }
        }
        result?;
        self.is_intact()
    }

    /// Lets go of the contents.
    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<(), Failure> {
        let result = match self.kind {
            Kind::Regular => self.punch(offset, len),
            Kind::Device => block_device::discard(&self.fd, offset, len),
        };
        match result {
            // It is advice. Devices take whole blocks only.
            Err(error) if is_unsupported(&error) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes zeroes. What is not aligned must be done while nothing else is.
    pub(super) fn zero(&self, mut offset: u64, mut len: u64, unmap: bool) -> Result<(), Failure> {
        for (mode, can) in self.ways_to_zero(unmap) {
            if !can.load(Ordering::Relaxed) {
                continue;
            }
            match self.allocate(mode, offset, len) {
                Ok(()) => return Ok(()),
                Err(error) if is_unsupported(&error) => {
                    // A block device may just not like this range.
                    if error.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
                        can.store(false, Ordering::Relaxed);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        let size = usize::try_from(len).map_or(CHUNK, |len| len.min(CHUNK));
        let zeroes = self.buffer(size);
        while len > 0 {
            // The first part ends where a chunk does, so that those behind it are aligned.
            let end = CHUNK as u64 - offset % CHUNK as u64;
            let part = usize::try_from(len.min(end)).expect("not more than a chunk");
            self.write(offset, zeroes.pieces().take(part))?;
            offset += part as u64;
            len -= part as u64;
        }
        Ok(())
    }

    /// How zeroes can be had without writing them, and whether that is known not to work.
    fn ways_to_zero(&self, unmap: bool) -> impl Iterator<Item = (FallocateFlags, &AtomicBool)> {
        let punch = (HOLE, &self.can_punch);
        let zero = (ZEROES, &self.can_zero);
        unmap.then_some(punch).into_iter().chain([zero])
    }

    /// The first of the ways to have zeroes that may work.
    pub(super) fn way_to_zero(&self, unmap: bool) -> Option<FallocateFlags> {
        self.ways_to_zero(unmap)
            .find(|(_, can)| can.load(Ordering::Relaxed))
            .map(|(mode, _)| mode)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(HOLE, offset, len)
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let call = || rustix::fs::fallocate(&self.fd, mode, offset, len);
        Ok(rustix::io::retry_on_intr(call)?)
    }

    /// Finds out whether holes can be made, by one far behind the end where nothing is.
    pub(super) fn try_punch(&self, size: u64) -> bool {
        let behind = size.next_multiple_of(1 << 21);
        let can = !matches!(self.punch(behind, 1 << 21), Err(error) if is_unsupported(&error));
        self.can_punch.store(can, Ordering::Relaxed);
        can
    }
}

/// A hole in the file, which reads as zeroes.
pub(super) const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
/// Zeroes with space behind them.
const ZEROES: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// Whether an error means that there is no such operation here, or not for such a range.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL, Errno::NODEV]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// The file ends before the disk does.
pub(super) fn too_short() -> Failure {
    Failure::Io(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file is shorter than the disk",
    ))
}

pub(super) fn nothing_written() -> Failure {
    Failure::Io(io::Error::from(io::ErrorKind::WriteZero))
}
