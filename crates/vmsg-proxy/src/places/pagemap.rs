// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files whose pages lie in a part of this machine's memory, as the kernel says in `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst).

use super::{Found, PhysicalWindow, Place, PlaceError, Places};
use crate::session::FileId;
use rustix::fs::fstatfs;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use vmsg_bus::Physical;
use vmsg_mem::{Access, Mapping};

/// `HUGETLBFS_MAGIC` (linux/magic.h).
const HUGETLBFS: u32 = 0x9584_58f6;
/// An entry of pagemap: the page is there.
const PRESENT: u64 = 1 << 63;
/// And where: the number of the frame.
const FRAME: u64 = (1 << 55) - 1;
/// Files remembered at a time.
const FILES: usize = 64;
/// Pages of a file that are looked up at most: 16 TiB in pages of 2 MiB.
const MAX_PAGES: u64 = 1 << 23;

/// Says which bytes a page at an address of this process has, as an entry of pagemap; the second number counts the pages of the file.
type Lookup = dyn Fn(u64, u64) -> io::Result<u64> + Send + Sync;

/// Finds files by their physical pages.
///
/// A file is mapped here, and each of its pages touched; the mapping stays as long as windows are made of it, so that no page becomes
/// anybody else's while a device host can still write to it. Only huge pages (hugetlbfs) are accepted: the kernel moves ordinary ones whenever
/// it likes, locked or not.
pub struct Pagemap {
    root: PathBuf,
    physical: Physical,
    len: Option<u64>,
    /// Bytes of the ordinary pages, which are the unit of frames.
    unit: u64,
    lookup: Box<Lookup>,
    page_size: fn(BorrowedFd<'_>) -> Option<u64>,
    files: Mutex<Vec<(FileId, Weak<Hold>)>>,
}

/// A file that stays mapped, and where its pages are.
pub struct Hold {
    _mapping: Mapping,
    file_offset: u64,
    len: u64,
    page: u64,
    /// Offset in the common memory of each page.
    pages: Vec<u64>,
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("file_offset", &self.file_offset)
            .field("len", &self.len)
            .field("page", &self.page)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Pagemap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pagemap")
            .field("physical", &self.physical)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Pagemap {
    /// For common memory that is `physical` on this machine, and has `len` bytes if that is known.
    pub fn new(physical: Physical, len: Option<u64>) -> Pagemap {
        Self::below(Path::new("/"), physical, len)
    }

    /// The same, where `/proc` and `/sys` are below `root`.
    pub fn below(root: &Path, physical: Physical, len: Option<u64>) -> Pagemap {
        let unit = rustix::param::page_size() as u64;
        let path = root.join("proc/self/pagemap");
        let lookup = move |address: u64, _| {
            let mut entry = [0; 8];
            let file = File::open(&path)?;
            file.read_exact_at(&mut entry, address / unit * 8)?;
            Ok(u64::from_ne_bytes(entry))
        };
        Pagemap {
            root: root.to_owned(),
            physical,
            len,
            unit,
            lookup: Box::new(lookup),
            page_size: huge_page_size,
            files: Mutex::new(Vec::new()),
        }
    }

    /// For tests: `lookup` stands for the kernel's pagemap, and all files have pages of `page_size` bytes that do not move. `lookup` gets the address
    /// of a page and its position in the part of the file that is looked at.
    #[doc(hidden)]
    #[must_use]
    pub fn with_lookup(
        mut self,
        lookup: impl Fn(u64, u64) -> io::Result<u64> + Send + Sync + 'static,
        page_size: fn(BorrowedFd<'_>) -> Option<u64>,
    ) -> Pagemap {
        self.lookup = Box::new(lookup);
        self.with_page_size(page_size)
    }

    /// For tests: all files have pages of so many bytes that do not move.
    #[doc(hidden)]
    #[must_use]
    pub fn with_page_size(mut self, page_size: fn(BorrowedFd<'_>) -> Option<u64>) -> Pagemap {
        self.page_size = page_size;
        self
    }

    /// What is known of a part of a file already.
    fn known(&self, id: FileId, file_offset: u64, end: u64) -> Option<Arc<Hold>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|(_, hold)| hold.strong_count() != 0);
        let mut holds = files
            .iter()
            .filter(|(file, _)| *file == id)
            .filter_map(|(_, hold)| hold.upgrade());
        holds.find(|hold| hold.file_offset <= file_offset && end <= hold.file_offset + hold.len)
    }

    fn find(&self, file: BorrowedFd<'_>, file_offset: u64, end: u64) -> Result<Hold, PlaceError> {
        let window = PhysicalWindow::new(&self.root, self.physical, self.len)?;
        let page = (self.page_size)(file).ok_or(PlaceError::Movable {
            page_size: self.unit,
        })?;
        let begin = file_offset / page * page;
        let end = end
            .checked_next_multiple_of(page)
            .ok_or_else(|| PlaceError::File("it is too long".to_owned()))?;
        let count = (end - begin) / page;
        if count > MAX_PAGES {
            return Err(PlaceError::File("it has too many pages".to_owned()));
        }
        let mapping = Mapping::of_fd(file, begin, end - begin, Access::ReadWrite)
            .map_err(|error| PlaceError::File(error.to_string()))?;
        // Its loads are made though nobody wants to know what they give.
        let region = mapping.device_region();
        let first = mapping.ram().as_ptr().addr() as u64;
        let mut pages = Vec::new();
        for number in 0..count {
            let into = usize::try_from(number * page).expect("within what is mapped");
            // A page that is looked at is there.
            let _ = region.read_u8(into);
            let at = begin + number * page;
            if mapping.is_lost() {
                return Err(PlaceError::NoPage { file_offset: at });
            }
            let address = first + number * page;
            let entry = (self.lookup)(address, number).map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => PlaceError::NotPermitted,
                _ => PlaceError::NoWindow(format!("cannot read /proc/self/pagemap: {error}")),
            })?;
            if entry & PRESENT == 0 {
                return Err(PlaceError::NoPage { file_offset: at });
            }
            let frame = entry & FRAME;
            if frame == 0 {
                // Frame 0 is nobody's; who may not know gets it for all.
                return Err(PlaceError::NotPermitted);
            }
            let physical = frame.saturating_mul(self.unit);
            let offset = window.offset_of(physical, page);
            let offset = offset.filter(|_| physical.is_multiple_of(page));
            pages.push(offset.ok_or_else(|| window.elsewhere(at, physical))?);
        }
        let mut sorted = pages.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[1] - pair[0] < page) {
            // Then what the kernel says is not what it seems to be.
            return Err(PlaceError::File("two of its pages are one".to_owned()));
        }
        if let Some(offset) = sorted.last().filter(|offset| {
            self.len
                .is_some_and(|len| offset.saturating_add(page) > len)
        }) {
            return Err(PlaceError::NoWindow(format!(
                "a page at {offset:#x} of the common memory, which has only {:#x} bytes (ram-size=)",
                self.len.unwrap_or(0)
            )));
        }
        Ok(Hold {
            _mapping: mapping,
            file_offset: begin,
            len: end - begin,
            page,
            pages,
        })
    }
}

impl Hold {
    /// Where a part of it is.
    fn places(&self, file_offset: u64, end: u64) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::new();
        let mut at = file_offset;
        while at < end {
            let into = at - self.file_offset;
            let number = usize::try_from(into / self.page).unwrap_or(usize::MAX);
            let Some(page) = self.pages.get(number) else {
                break;
            };
            let skip = into % self.page;
            let len = (self.page - skip).min(end - at);
            let offset_in_common = page + skip;
            match places.last_mut() {
                Some(last) if last.offset_in_common + last.len == offset_in_common => {
                    last.len += len;
                }
                _ => places.push(Place {
                    offset_in_common,
                    len,
                }),
            }
            at += len;
        }
        places
    }
}

impl Places for Pagemap {
    fn places(
        &self,
        file: BorrowedFd<'_>,
        id: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        let end = file_offset.checked_add(len).filter(|_| len != 0);
        let end = end.ok_or_else(|| PlaceError::File("no bytes of it are asked for".to_owned()))?;
        let hold = match self.known(id, file_offset, end) {
            Some(hold) => hold,
            None => {
                let hold = Arc::new(self.find(file, file_offset, end)?);
                let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                if files.len() < FILES {
                    files.push((id, Arc::downgrade(&hold)));
                }
                hold
            }
        };
        Ok(Found {
            places: hold.places(file_offset, end),
            hold: Some(hold),
        })
    }
}

/// Bytes of the pages of a file of hugetlbfs; of no other: their pages may move.
fn huge_page_size(file: BorrowedFd<'_>) -> Option<u64> {
    let stat = fstatfs(file).ok()?;
    // The type of the field differs between architectures; the magic fits all of them.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation)]
    let is_huge = stat.f_type as u32 == HUGETLBFS;
    let size = u64::try_from(stat.f_bsize).ok()?;
    (is_huge && size.is_power_of_two()).then_some(size)
}
