// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that a driver lends to its devices.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_msg::DevNum;
use vmsg_bus::control::{COMMON_BACKING, ViewAdd, WindowAdd, window_of_device};
use vmsg_bus::{Bus, CommonRam};
use vmsg_mem::{Access, BusAddr, Mapping, RamSlice, TableEntry};

use crate::client::Client;
use crate::error::Error;
use crate::wait::Wait;

/// Memory is given out in units of so many bytes: the page size of virtio drivers.
pub const PAGE_SIZE: usize = 4096;

/// Memory that is mapped here and that device sides find on the bus, with an allocator of whole pages: a memfd that is lent as a window, or a
/// part of what both sides know anyway.
///
/// What is lent once is lent for good: a device side may keep its descriptor. So one pool is for devices of one owner.
#[derive(Debug)]
pub struct DmaPool {
    mapping: Arc<Mapping>,
    source: Source,
    base: BusAddr,
    pages: Mutex<Pages>,
}

/// How device sides come to the memory.
#[derive(Debug)]
enum Source {
    /// It is lent to them.
    Lent(OwnedFd),
    /// They know it from the start, at the same bus addresses.
    Known,
    /// They have it, and are told where it is on the bus: it begins so many bytes into the memory in common.
    Common(u64),
}

impl DmaPool {
    /// `len` bytes, rounded up to whole pages, at `base` on the bus. `base` is a multiple of [`PAGE_SIZE`] and not 0, which some
    /// drivers take for "none".
    ///
    /// # Errors
    /// [`Error::Mem`] if there is no memory, or no such bus addresses.
    pub fn new(name: &str, base: BusAddr, len: usize) -> Result<Self, Error> {
        let whole = len.checked_next_multiple_of(PAGE_SIZE);
        let len = whole.ok_or_else(|| bad(base, len))?;
        check(base, len)?;
        let (mapping, fd) = Mapping::memfd(name, len as u64, true)?;
        Ok(Self::of(Arc::new(mapping), Source::Lent(fd), base))
    }

    /// `len` bytes of the file `fd` from `offset` on, a multiple of [`PAGE_SIZE`] each, which the device side finds at `base` without being
    /// told: on `linux-user`, and on `ivshmem` with `memory=known` (`vmsg_bus::StaticRam`).
    ///
    /// # Errors
    /// [`Error::Mem`] if the file is shorter, or there are no such bus addresses.
    pub fn in_known(
        fd: BorrowedFd<'_>,
        offset: u64,
        base: BusAddr,
        len: usize,
    ) -> Result<Self, Error> {
        check(base, len)?;
        let mapping = Mapping::of_fd(fd, offset, len as u64, Access::ReadWrite)?;
        Ok(Self::of(Arc::new(mapping), Source::Known, base))
    }

    /// `len` bytes from `offset` on of the memory that both ends of a bus have in common, a multiple of [`PAGE_SIZE`] each, to be found
    /// at `base`.
    ///
    /// # Errors
    /// [`Error::Mem`] if it is not that long or not mapped here, or there are no such bus addresses.
    pub fn in_common(
        common: &CommonRam,
        offset: u64,
        base: BusAddr,
        len: usize,
    ) -> Result<Self, Error> {
        check(base, len)?;
        let start = usize::try_from(offset).ok();
        let mapping = start
            .zip(common.mapping.as_ref())
            .and_then(|(start, all)| all.part(start, len))
            .ok_or_else(|| bad(base, len))?;
        Ok(Self::of(Arc::new(mapping), Source::Common(offset), base))
    }

    fn of(mapping: Arc<Mapping>, source: Source, base: BusAddr) -> Self {
        let pages = Mutex::new(Pages::new(mapping.len() / PAGE_SIZE));
        Self {
            mapping,
            source,
            base,
            pages,
        }
    }

    /// Bus address of the first byte.
    pub fn base(&self) -> BusAddr {
        self.base
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// False: there is always a page.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// All of the memory.
    pub fn ram(&self) -> RamSlice<'_> {
        self.mapping.ram()
    }

    /// The file that is lent; `None` for memory that both sides have anyway.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Lent(fd) => Some(fd.as_fd()),
            Source::Known | Source::Common(_) => None,
        }
    }

    /// The window that this pool is, by the name `id`, in a file of its own.
    pub fn window(&self, id: u32) -> WindowAdd {
        WindowAdd {
            id,
            writable: true,
            base: self.base,
            len: self.len() as u64,
            file_offset: 0,
            more: false,
        }
    }

    /// The window that this pool is, for a table in this process.
    pub fn table_entry(&self) -> TableEntry {
        TableEntry {
            base: self.base,
            mapping: Arc::clone(&self.mapping),
            offset: 0,
            len: self.len(),
            access: Access::ReadWrite,
        }
    }

    /// Lets `devices` of the other side of `client` reach the pool, in whichever way its memory is shared: once for each connection.
    ///
    /// # Errors
    /// As [`Client::add_window`] and [`Client::add_view`].
    pub fn lend_to<C, W, B>(
        &self,
        client: &mut Client<C, W, B>,
        devices: &[DevNum],
    ) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        if !matches!(self.source, Source::Common(_)) {
            return self.lend(client, 1);
        }
        // There each device has windows of its own.
        for device in devices {
            self.lend(client, window_of_device(*device, 1))?;
        }
        Ok(())
    }

    /// Lends the pool to the other side of `client`, as window `id`; where the other side knows the memory anyway there is nothing to do.
    ///
    /// # Errors
    /// As [`Client::add_window`] and [`Client::add_view`].
    pub fn lend<C, W, B>(&self, client: &mut Client<C, W, B>, id: u32) -> Result<(), Error>
    where
        C: Bus,
        W: Wait<C>,
        B: AsRef<[u8]> + AsMut<[u8]>,
    {
        match &self.source {
            Source::Lent(fd) => client.add_window(self.window(id), fd.as_fd()),
            Source::Known => Ok(()),
            Source::Common(offset) => client.add_view(ViewAdd {
                id,
                writable: true,
                backing: COMMON_BACKING,
                base: self.base,
                len: self.len() as u64,
                offset: *offset,
                more: false,
            }),
        }
    }

    /// Takes at least `len` bytes, zeroed and aligned to [`PAGE_SIZE`], until the buffer is dropped.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn alloc(&self, len: usize) -> Result<DmaBuffer<'_>, Error> {
        let count = len.div_ceil(PAGE_SIZE).max(1);
        let first = self.lock().take(count).ok_or(Error::NoMemory(len))?;
        let buffer = DmaBuffer {
            pool: self,
            first,
            count,
            len,
        };
        buffer.ram().fill(0);
        Ok(buffer)
    }

    /// Bytes that are not taken.
    pub fn free_bytes(&self) -> usize {
        self.lock().free * PAGE_SIZE
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes pages without a guard; gives the offset in bytes of the first.
    #[cfg(feature = "virtio-drivers")]
    pub(crate) fn take_pages(&self, count: usize) -> Option<usize> {
        Some(self.lock().take(count)? * PAGE_SIZE)
    }

    /// Gives back what [`Self::take_pages`] took. False if it was not taken.
    #[cfg(feature = "virtio-drivers")]
    pub(crate) fn give_pages(&self, offset: usize, count: usize) -> bool {
        offset % PAGE_SIZE == 0 && self.lock().give(offset / PAGE_SIZE, count)
    }
}

/// An error about bus addresses.
fn bad(addr: BusAddr, len: usize) -> Error {
    Error::Mem(vmsg_mem::Error::BadWindow {
        addr,
        len: len as u64,
    })
}

fn check(base: BusAddr, len: usize) -> Result<(), Error> {
    let whole = len > 0 && len % PAGE_SIZE == 0 && base.0 % PAGE_SIZE as u64 == 0;
    if whole && base.0 != 0 && base.checked_add(len as u64).is_some() {
        Ok(())
    } else {
        Err(bad(base, len))
    }
}

/// Memory of a [`DmaPool`], given back when dropped. Until then nobody else gets it, but the device side can always reach it.
#[derive(Debug)]
pub struct DmaBuffer<'p> {
    pool: &'p DmaPool,
    first: usize,
    count: usize,
    len: usize,
}

impl<'p> DmaBuffer<'p> {
    /// The memory. It stays mapped as long as the pool.
    pub fn ram(&self) -> RamSlice<'p> {
        self.pool
            .ram()
            .get(self.first * PAGE_SIZE, self.len)
            .expect("the pages are in the pool")
    }

    /// Bus address of the first byte.
    pub fn addr(&self) -> BusAddr {
        BusAddr(self.pool.base.0 + (self.first * PAGE_SIZE) as u64)
    }

    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if no bytes were asked for.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for DmaBuffer<'_> {
    fn drop(&mut self) {
        self.pool.lock().give(self.first, self.count);
    }
}

/// Which pages are taken.
#[derive(Debug)]
struct Pages {
    taken: Vec<bool>,
    free: usize,
    /// Where the last search ended.
    next: usize,
}

impl Pages {
    fn new(count: usize) -> Self {
        Self {
            taken: vec![false; count],
            free: count,
            next: 0,
        }
    }

    /// Finds `count` free pages in a row, from where the last were found on.
    fn take(&mut self, count: usize) -> Option<usize> {
        let all = self.taken.len();
        if count == 0 || count > self.free {
            return None;
        }
        let next = self.next;
        // Twice around the seam: a run does not wrap, but may begin before `next` and end after it.
        let first = self
            .run(next, all, count)
            .or_else(|| self.run(0, (next + count).min(all), count))?;
        self.taken[first..first + count].fill(true);
        self.free -= count;
        self.next = (first + count) % all;
        Some(first)
    }

    /// The first run of `count` free pages from `from` to `to`.
    fn run(&self, from: usize, to: usize, count: usize) -> Option<usize> {
        let mut length = 0;
        for page in from..to {
            length = if self.taken[page] { 0 } else { length + 1 };
            if length == count {
                return Some(page + 1 - count);
            }
        }
        None
    }

    fn give(&mut self, first: usize, count: usize) -> bool {
        let end = first.checked_add(count);
        match end.and_then(|end| self.taken.get_mut(first..end)) {
            Some(pages) if pages.iter().all(|&taken| taken) => {
                pages.fill(false);
                self.free += count;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
#[path = "dma_test.rs"]
mod tests;
