// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files and anonymous memory, mapped into this process.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::{FileType, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::fault::Guard;
use crate::{Access, DeviceRegion, Error, QueueMemory, RamSlice};

/// File system magic of hugetlbfs (linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// Memory shared with others, mapped until this is dropped.
///
/// Other processes can change the contents at any time. They can also truncate
/// the file, unless it is sealed ([`check_seals`]): see [`fault`](crate::fault).
pub struct Mapping {
    /// The pages: first address and length in bytes.
    pages: NonNull<u8>,
    pages_len: usize,
    /// Where the range begins in the first page.
    skip: usize,
    len: usize,
    access: Access,
    /// Always there until the mapping is dropped, unless this is a part.
    guard: Option<Guard>,
    /// What this is a part of, which has the pages.
    whole: Option<Arc<Mapping>>,
    /// The file, and where in it the range begins.
    file: Option<(Arc<OwnedFd>, u64)>,
    /// Dropped last.
    keeper: Option<Keeper>,
}

/// Something that memory is nothing without.
type Keeper = Arc<dyn Any + Send + Sync + UnwindSafe + RefUnwindSafe>;

// SAFETY: the mapping is only a range of addresses that stays valid; access goes through RamSlice.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on. Neither needs to be a
    /// multiple of the page size.
    ///
    /// PCI memory that is ordinary memory to the processor (`resource2_wc` in sysfs, which on
    /// arm64 is Normal-NC) can be mapped so too; other memory of devices is for
    /// [`DeviceMapping`](crate::DeviceMapping).
    ///
    /// Touching a file on FUSE may hang for as long as its server wants.
    /// A file for which [`check_seals`] says true is not on FUSE.
    ///
    /// # Errors
    ///
    /// [`Error::FileTooShort`] for a regular file that does not reach so far
    /// (device files do not tell their size), [`Error::Os`] if `len` is zero or
    /// the file cannot be mapped, or not with this access.
    pub fn of_fd(fd: BorrowedFd<'_>, offset: u64, len: u64, access: Access) -> Result<Self, Error> {
        let need = offset
            .checked_add(len)
            .ok_or_else(|| map_error(rustix::io::Errno::OVERFLOW))?;
        let stat = rustix::fs::fstat(fd).map_err(map_error)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let have = u64::try_from(stat.st_size).unwrap_or(0);
            if have < need {
                return Err(Error::FileTooShort { have, need });
            }
        }
        Self::of_device(fd, offset, len, access)
    }

    /// As [`Self::of_fd`], whatever length the file says it has.
    pub(crate) fn of_device(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Self, Error> {
        let os = map_error;
        let page_size = page_size(fd);
        let bytes = usize::try_from(len).map_err(|_| os(rustix::io::Errno::OVERFLOW))?;
        // The rest of the division is less than a page, which fits.
        let skip = usize::try_from(offset % page_size as u64)
            .map_err(|_| os(rustix::io::Errno::OVERFLOW))?;
        let pages_len = bytes
            .checked_add(skip)
            .and_then(|bytes| bytes.checked_next_multiple_of(page_size))
            .ok_or(os(rustix::io::Errno::OVERFLOW))?;
        if bytes == 0 {
            return Err(os(rustix::io::Errno::INVAL));
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping, where the kernel finds room.
        let pages = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                pages_len,
                protection,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset - skip as u64,
            )
        }
        .map_err(os)?;
        let pages = NonNull::new(pages.cast::<u8>()).ok_or(os(rustix::io::Errno::INVAL))?;
        let guard = Guard::new(
            pages.as_ptr().expose_provenance(),
            pages_len,
            page_size,
            access == Access::ReadWrite,
        );
        Ok(Self {
            pages,
            pages_len,
            skip,
            len: bytes,
            access,
            guard: Some(guard),
            whole: None,
            file: None,
            keeper: None,
        })
    }

    /// The same mapping, which keeps `keeper` alive as long as it lives itself: an open device
    /// whose memory answers only while that is so.
    #[must_use]
    pub fn keeping<T>(mut self, keeper: Arc<T>) -> Self
    where
        T: Send + Sync + UnwindSafe + RefUnwindSafe + 'static,
    {
        self.keeper = Some(keeper);
        self
    }

    /// The same mapping, which keeps the file it is of, so that [`file`](Self::file) can give it to others; `offset` is where in `file` the
    /// mapping begins, in bytes.
    #[must_use]
    pub fn with_file(mut self, file: Arc<OwnedFd>, offset: u64) -> Self {
        self.file = Some((file, offset));
        self
    }

    /// The file behind the memory, and where in it the first byte of the mapping is, in bytes: for somebody else who is to map the same
    /// memory. `None` where nobody has [kept it](Self::with_file).
    pub fn file(&self) -> Option<(&Arc<OwnedFd>, u64)> {
        self.file.as_ref().map(|(file, offset)| (file, *offset))
    }

    /// New zeroed memory of `len` bytes, and the file to lend it by. `name` is
    /// for people who look into /proc. A sealed file can neither shrink nor
    /// grow any more.
    ///
    /// # Errors
    ///
    /// [`Error::Os`].
    pub fn memfd(name: &str, len: u64, sealed: bool) -> Result<(Self, OwnedFd), Error> {
        let os = |source: rustix::io::Errno| Error::Os {
            what: "create shared memory",
            source: source.into(),
        };
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(os)?;
        rustix::fs::ftruncate(&fd, len).map_err(os)?;
        if sealed {
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&fd, seals).map_err(os)?;
        }
        let mapping = Self::of_fd(fd.as_fd(), 0, len, Access::ReadWrite)?;
        Ok((mapping, fd))
    }

    /// The memory. With [`Access::Read`] nothing must be written through it: that
    /// kills the process.
    #[inline]
    pub fn ram(&self) -> RamSlice<'_> {
        // SAFETY: skip + len lies in the mapped pages, which stay while `self` is borrowed; no
        // reference into them is ever made.
        unsafe { RamSlice::from_raw_parts(self.pages.add(self.skip), self.len) }
    }

    /// The same memory, to be touched as that of a device: by aligned accesses of
    /// natural size. With [`Access::Read`] nothing must be written through it either.
    #[inline]
    pub fn device_region(&self) -> DeviceRegion<'_> {
        // SAFETY: as for `ram`.
        unsafe { DeviceRegion::from_raw_parts(self.pages.add(self.skip), self.len) }
    }

    /// `len` bytes of this one from `offset`, as a mapping that keeps the whole mapped; `None` if they are not all
    /// inside, or none.
    pub fn part(self: &Arc<Self>, offset: usize, len: usize) -> Option<Self> {
        if len == 0 || offset.checked_add(len)? > self.len {
            return None;
        }
        Some(Self {
            pages: self.pages,
            pages_len: self.pages_len,
            skip: self.skip + offset,
            len,
            access: self.access,
            guard: None,
            whole: Some(Arc::clone(self)),
            // Cannot overflow: the file is that long.
            file: self
                .file()
                .map(|(file, begin)| (Arc::clone(file), begin + offset as u64)),
            keeper: None,
        })
    }

    /// Whether all of the pages of `len` bytes from `offset` on are in memory (mincore): touching them waits for nothing and takes no
    /// memory. They may go at any time. The kernel says yes of files that the process might not write.
    ///
    /// # Errors
    ///
    /// Those of mincore(2); `EINVAL` if the bytes are not all inside.
    pub fn is_resident(&self, offset: usize, len: usize) -> io::Result<bool> {
        const PAGES: usize = 256;
        let bounds = || io::Error::from_raw_os_error(libc::EINVAL);
        let part = self.ram().get(offset, len).ok_or_else(bounds)?;
        let size = rustix::param::page_size();
        let mut there = [0u8; PAGES];
        let skip = part.as_ptr().addr() % size;
        let mut page = part.as_ptr().wrapping_sub(skip);
        let mut left = (skip + len).div_ceil(size);
        while left > 0 {
            let count = left.min(PAGES);
            // SAFETY: the pages are mapped, and there is a byte for each.
            let result = unsafe { libc::mincore(page.cast(), count * size, there.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            if there[..count].iter().any(|byte| byte & 1 == 0) {
                return Ok(false);
            }
            page = page.wrapping_add(count * size);
            left -= count;
        }
        Ok(true)
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for no bytes, which never is mapped.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What the mapping allows.
    pub const fn access(&self) -> Access {
        self.access
    }

    /// True once some of the memory was found to be gone and was replaced by
    /// private zeroes ([`fault`](crate::fault)). The other side does not see
    /// what is written there.
    pub fn is_lost(&self) -> bool {
        match &self.whole {
            Some(whole) => whole.is_lost(),
            None => self.guard.as_ref().is_some_and(Guard::is_lost),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.whole.is_some() {
            return;
        }
        // First: another mapping may get these addresses as soon as they are free.
        drop(self.guard.take());
        // SAFETY: mapped by us and not part of another mapping, and all borrows of the memory have ended.
        let result = unsafe { rustix::mm::munmap(self.pages.as_ptr().cast(), self.pages_len) };
        debug_assert!(result.is_ok());
        drop(self.keeper.take());
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("ram", &self.ram())
            .field("access", &self.access)
            .field("lost", &self.is_lost())
            .finish()
    }
}

fn map_error(source: rustix::io::Errno) -> Error {
    Error::Os {
        what: "map a file",
        source: source.into(),
    }
}

/// Size of the pages behind a file: hugetlbfs has its own.
fn page_size(fd: BorrowedFd<'_>) -> usize {
    let ordinary = rustix::param::page_size();
    match rustix::fs::fstatfs(fd) {
        // The type of the field differs between architectures; the magic fits all of them.
        #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation)]
        Ok(stat) if stat.f_type as u32 == HUGETLBFS_MAGIC as u32 => {
            usize::try_from(stat.f_bsize).map_or(ordinary, |size| size.max(ordinary))
        }
        _ => ordinary,
    }
}

/// True if a file can never shrink: it is sealed against it. False if not, or
/// if it is of a kind that knows no seals.
///
/// # Errors
///
/// [`Error::Os`].
pub fn check_seals(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    match rustix::fs::fcntl_get_seals(fd) {
        Ok(seals) => Ok(seals.contains(SealFlags::SHRINK)),
        Err(rustix::io::Errno::INVAL) => Ok(false),
        Err(error) => Err(Error::Os {
            what: "read the seals of a file",
            source: io::Error::from(error),
        }),
    }
}

/// A part of a [`Mapping`] that keeps it mapped, for message queues that live
/// in a structure of their own.
#[derive(Clone, Debug)]
pub struct MappedSlice {
    /// Valid as long as `mapping`, and only handed out for borrows of `self`.
    ram: RamSlice<'static>,
    mapping: Arc<Mapping>,
}

impl MappedSlice {
    /// `len` bytes of `mapping` from `offset`; `None` if they are not all inside.
    pub fn new(mapping: Arc<Mapping>, offset: usize, len: usize) -> Option<Self> {
        let ram = extend(&mapping).get(offset, len)?;
        Some(Self { ram, mapping })
    }

    /// The memory.
    #[inline]
    pub fn ram(&self) -> RamSlice<'_> {
        self.ram
    }

    /// What it is a part of.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

/// The memory of a mapping without the borrow. Callers keep the `Arc` next to
/// it and hand it out only for as long as they are borrowed themselves.
pub(crate) fn extend(mapping: &Arc<Mapping>) -> RamSlice<'static> {
    let ram = mapping.ram();
    // SAFETY: see above: nobody outside this crate gets it with this lifetime.
    unsafe { RamSlice::from_raw_parts(NonNull::new_unchecked(ram.as_ptr()), ram.len()) }
}

impl QueueMemory for MappedSlice {
    #[inline]
    fn len(&self) -> usize {
        self.ram.len()
    }
    fn is_aligned(&self) -> bool {
        self.ram.is_aligned()
    }
    #[inline]
    fn load_relaxed(&self, offset: usize) -> u32 {
        self.ram.load_relaxed(offset)
    }
    #[inline]
    fn load_acquire(&self, offset: usize) -> u32 {
        self.ram.load_acquire(offset)
    }
    #[inline]
    fn store_relaxed(&self, offset: usize, value: u32) {
        self.ram.store_relaxed(offset, value);
    }
    #[inline]
    fn store_release(&self, offset: usize, value: u32) {
        self.ram.store_release(offset, value);
    }
    #[inline]
    fn take(&self, offset: usize) -> bool {
        self.ram.take(offset)
    }
    #[inline]
    fn fence(&self) {
        self.ram.fence();
    }
    #[inline]
    fn prefetch(&self, offset: usize) {
        self.ram.prefetch(offset);
    }
    #[inline]
    fn demote(&self, offset: usize) {
        self.ram.demote(offset);
    }
    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        QueueMemory::read(&self.ram, offset, into);
    }
    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        QueueMemory::write(&self.ram, offset, from);
    }
}

#[cfg(test)]
#[path = "mapping_test.rs"]
mod tests;
