// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where segments lie: in memory of their own, or in memory that both sides of a bus have from the start.
//!
//! What touches a segment, on either side, are loads and stores: copies of bytes, and words at addresses that are multiples of their size. No
//! instruction reads and writes in one, and none is exclusive (`LDXR`, `LDADD`…, which the architecture does not promise for memory that is not
//! cacheable). So memory in common may be the BAR of an ivshmem device that arm64 maps as Normal Non-cacheable (`resource2_wc`); it must not be
//! Device memory, where copies of bytes fault.

use super::types::NewError;
use crate::session::{FileId, Window};
use rustix::fs::FallocateFlags;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use vmsg_bus::{CommonFile, CommonRam};
use vmsg_mem::{Access, Mapping, RamSlice};

/// Everything begins at a multiple of this, bytes.
const PAGE: u64 = 4096;

/// The most bytes that a front which does not say how much it wants gets of memory in common.
const SHARE: u64 = 64 << 20;

/// Where a segment lies.
#[derive(Clone, Debug)]
pub enum Segment {
    /// In a memfd that cannot shrink, made for it and lent to the device host.
    Sealed {
        /// Bytes. Only what is in use takes memory.
        size: u64,
        /// Bus address, a multiple of 4096.
        base: u64,
    },
    /// In a part of memory that the device host has already. It is wiped when the segment is made, and when it goes.
    Given(Part),
}

impl Segment {
    /// One of its own, of `size` bytes, where nothing else is.
    pub const fn sealed(size: u64) -> Segment {
        Segment::Sealed {
            size,
            base: 1 << 20,
        }
    }
}

impl Default for Segment {
    /// 64 MiB of its own.
    fn default() -> Segment {
        Segment::sealed(SHARE)
    }
}

/// Bus address of the first byte of what a bus has in common.
const COMMON_BASE: u64 = 1 << 20;

/// Memory that both sides of a bus have, mapped here.
#[derive(Debug)]
pub struct Common {
    mapping: Arc<Mapping>,
    file: Arc<OwnedFd>,
    id: FileId,
    /// Where in the file the mapping begins, bytes.
    file_offset: u64,
    /// Bus address of the first byte of the mapping.
    base: u64,
    /// What it is to the bus.
    name: Option<(String, Option<CommonFile>)>,
}

impl Common {
    /// `mapping` is what lies in `file` from `file_offset` on, bytes, and gets the bus addresses from `base` on, a multiple of 4096. Nobody but
    /// this driver writes there, and what it lends it to.
    ///
    /// # Errors
    /// The mapping cannot be written, has no such addresses, or the file cannot be looked at.
    pub fn new(
        mapping: Arc<Mapping>,
        file: Arc<OwnedFd>,
        file_offset: u64,
        base: u64,
    ) -> io::Result<Common> {
        let bad = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        if mapping.access() != Access::ReadWrite {
            return Err(bad("memory in common that cannot be written"));
        }
        let len = mapping.len() as u64;
        if !base.is_multiple_of(PAGE)
            || base.checked_add(len).is_none()
            || file_offset.checked_add(len).is_none()
        {
            return Err(bad("memory in common at impossible addresses"));
        }
        let stat = rustix::fs::fstat(&*file)?;
        Ok(Common {
            mapping,
            file,
            id: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            file_offset,
            base,
            name: None,
        })
    }

    /// What a bus has in common, where this side has it mapped. Its windows are [`FileId::COMMON`].
    ///
    /// # Errors
    /// It is not mapped here, or as [`Self::new`].
    pub fn of_bus(ram: &CommonRam) -> io::Result<Common> {
        let none = || io::Error::new(io::ErrorKind::Unsupported, "it is not mapped at this side");
        let mapping = ram.mapping.clone().ok_or_else(none)?;
        // Windows have a descriptor. Nobody uses this one.
        let file = Arc::new(File::open("/dev/null")?.into());
        let common = Common::new(mapping, file, 0, COMMON_BASE)?;
        Ok(Common {
            id: FileId::COMMON,
            name: Some((ram.name.clone(), ram.file)),
            ..common
        })
    }

    /// Whether it is this memory, though the mapping may be another one.
    fn is(&self, ram: &CommonRam) -> bool {
        let name = self.name.as_ref();
        let same =
            |(name, file): &(String, Option<CommonFile>)| (name, file) == (&ram.name, &ram.file);
        // Of a file that was truncated and made longer again there are two: nobody else sees the old mapping.
        !self.mapping.is_lost() && ram.len == self.len() && name.is_some_and(same)
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Divides the bytes `within` of it among fronts that want so many, in this order: who asks for the same gets the same. Those that do not say
    /// how much they want share what the others leave, in equal parts of 64 MiB at most. Wipes each part.
    ///
    /// # Errors
    /// [`DivideError`].
    pub fn divide(
        self: &Arc<Self>,
        within: Range<u64>,
        wanted: &[Option<u64>],
    ) -> Result<Vec<Part>, DivideError> {
        let places = divide(within.start..within.end.min(self.len()), wanted)?;
        let parts = places.into_iter().map(|place| Part {
            common: self.clone(),
            place,
            state: Arc::default(),
        });
        let parts: Vec<Part> = parts.collect();
        // Of a process before, which may have ended in the middle of something.
        parts.iter().for_each(Part::wipe);
        Ok(parts)
    }
}

fn divide(within: Range<u64>, wanted: &[Option<u64>]) -> Result<Vec<Range<u64>>, DivideError> {
    let start = within.start.next_multiple_of(PAGE);
    let have = (within.end / PAGE * PAGE).saturating_sub(start);
    let fixed = wanted.iter().flatten().try_fold(0u64, |sum, &want| {
        sum.checked_add(want.checked_next_multiple_of(PAGE)?)
    });
    let open = wanted.iter().filter(|want| want.is_none()).count() as u64;
    let need = fixed.map(|fixed| fixed.saturating_add(open * PAGE));
    let left = fixed.and_then(|fixed| have.checked_sub(fixed));
    let share = left.and_then(|left| left.checked_div(open)).unwrap_or(0);
    let share = share.min(SHARE) / PAGE * PAGE;
    if left.is_none() || (open > 0 && share == 0) {
        let (need, fronts) = (need.unwrap_or(u64::MAX), wanted.len());
        return Err(DivideError { have, need, fronts });
    }
    let mut at = start;
    let place = |want: &Option<u64>| {
        let len = want.map_or(share, |want| want.next_multiple_of(PAGE));
        let range = at..at + len;
        at = range.end;
        range
    };
    Ok(wanted.iter().map(place).collect())
}

/// Memory in common is too small for the fronts that are to have parts of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "the segments of {fronts} fronts take {need} bytes or more of the memory in common, which has {have} for them: \
make segment= of the fronts smaller, or the memory larger"
)]
pub struct DivideError {
    /// Bytes that there are.
    pub have: u64,
    /// Bytes that are needed at least.
    pub need: u64,
    /// How many fronts.
    pub fronts: usize,
}

/// Why memory in common is of no use to fronts.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProvideError {
    /// It is too small.
    #[error(transparent)]
    Divide(#[from] DivideError),
    /// It is not mapped here, or cannot be written.
    #[error("the memory in common: {0}")]
    Os(#[from] io::Error),
}

/// A part of memory in common, for one segment at a time.
#[derive(Clone)]
pub struct Part {
    common: Arc<Common>,
    place: Range<u64>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// A segment is there.
    taken: AtomicBool,
    /// The bus has other memory now.
    outdated: AtomicBool,
}

impl Part {
    /// Where in the mapping it is, bytes.
    pub fn place(&self) -> Range<u64> {
        self.place.clone()
    }

    fn window(&self) -> Window {
        Window {
            base: self.common.base + self.place.start,
            len: self.place.end - self.place.start,
            file_offset: self.common.file_offset + self.place.start,
            writable: true,
            fd: self.common.file.clone(),
            file: self.common.id,
        }
    }

    fn ram(&self) -> RamSlice<'_> {
        let [start, end] = [self.place.start, self.place.end]
            .map(|at| usize::try_from(at).expect("it is in a mapping"));
        let ram = self.common.mapping.ram().get(start, end - start);
        ram.expect("divided from what is there")
    }

    /// The bus has other memory now.
    fn outdate(&self) {
        self.state.outdated.store(true, Ordering::Release);
    }

    /// Unless a segment is there, which wipes it when it goes.
    fn wipe(&self) {
        if !self.state.taken.load(Ordering::Acquire) {
            self.ram().fill(0);
        }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Part").field(&self.place).finish()
    }
}

/// The parts that the fronts of one bus have of the memory in common, once it is known.
#[derive(Debug)]
pub struct Parts {
    wanted: Vec<Option<u64>>,
    parts: Mutex<Vec<Part>>,
}

impl Parts {
    /// For fronts that want so many bytes each; `None`: a share of what the others leave.
    pub fn new(wanted: Vec<Option<u64>>) -> Parts {
        Parts {
            wanted,
            parts: Mutex::default(),
        }
    }

    /// This is the memory in common: the bytes `within` of it are divided, and wiped. The same memory again changes nothing; another one is for
    /// segments that are made from now on.
    ///
    /// # Errors
    /// [`DivideError`]; then there are no parts.
    pub fn provide(&self, common: &Arc<Common>, within: Range<u64>) -> Result<(), DivideError> {
        let mut parts = self.parts();
        if parts
            .first()
            .is_some_and(|part| Arc::ptr_eq(&part.common, common))
        {
            return Ok(());
        }
        parts.iter().for_each(Part::outdate);
        parts.clear();
        *parts = common.divide(within, &self.wanted)?;
        Ok(())
    }

    /// A bus is connected, and this is what it has in common. The same memory as before changes nothing.
    ///
    /// # Errors
    /// [`ProvideError`]; then there are no parts.
    pub fn provide_ram(&self, ram: &CommonRam) -> Result<(), ProvideError> {
        let known = self.parts().first().map(|part| part.common.clone());
        if known.is_some_and(|known| known.is(ram)) {
            return Ok(());
        }
        self.parts().iter().for_each(Part::outdate);
        self.parts().clear();
        let common = Arc::new(Common::of_bus(ram)?);
        Ok(self.provide(&common, 0..common.len())?)
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of one of the fronts, by its position; `None` as long as the memory is not known.
    pub fn get(&self, front: usize) -> Option<Part> {
        self.parts().get(front).cloned()
    }
}

/// Where a front gets its segments.
#[derive(Clone, Debug)]
pub enum Source {
    /// Memory of their own, of so many bytes, lent to the device host.
    Own {
        /// Bytes.
        size: u64,
    },
    /// Its part of the memory that the bus has in common.
    Common {
        /// The parts of all fronts.
        parts: Arc<Parts>,
        /// Which of them.
        front: usize,
    },
}

impl Source {
    /// Where the next segment lies.
    ///
    /// # Errors
    /// [`NewError::NotKnown`].
    pub fn segment(&self) -> Result<Segment, NewError> {
        match self {
            Source::Own { size } => Ok(Segment::sealed(*size)),
            Source::Common { parts, front } => match parts.get(*front) {
                Some(part) => Ok(Segment::Given(part)),
                None => Err(NewError::NotKnown),
            },
        }
    }

    /// Whether it is memory that the bus has in common.
    pub fn is_common(&self) -> bool {
        matches!(self, Source::Common { .. })
    }
}

impl Default for Source {
    fn default() -> Source {
        Source::Own { size: SHARE }
    }
}

/// The memory of a segment, as long as there is one.
pub(super) enum Plot {
    Sealed { mapping: Mapping, window: Window },
    Given(Part),
}

impl Plot {
    /// Takes the memory. All of it is zero then.
    pub(super) fn new(name: &str, segment: &Segment) -> Result<Plot, NewError> {
        match segment {
            Segment::Sealed { size, base } => sealed(name, *size, *base),
            Segment::Given(part) => {
                if part.state.taken.swap(true, Ordering::AcqRel) {
                    return Err(NewError::InUse);
                }
                part.ram().fill(0);
                Ok(Plot::Given(part.clone()))
            }
        }
    }

    /// All that the device host is to see.
    pub(super) fn window(&self) -> Window {
        match self {
            Plot::Sealed { window, .. } => window.clone(),
            Plot::Given(part) => part.window(),
        }
    }

    pub(super) fn ram(&self) -> RamSlice<'_> {
        match self {
            Plot::Sealed { mapping, .. } => mapping.ram(),
            Plot::Given(part) => part.ram(),
        }
    }

    /// Whether the device host does not see it any more: it was truncated, or the bus has other memory now.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Plot::Sealed { mapping, .. } => mapping.is_lost(),
            Plot::Given(part) => {
                part.state.outdated.load(Ordering::Acquire) || part.common.mapping.is_lost()
            }
        }
    }

    /// Makes all of it zero; `used` are the ranges where this side ever wrote. Where memory can be given back to the system, it is.
    pub(super) fn wipe(&self, used: impl IntoIterator<Item = Range<usize>>) {
        let ram = self.ram();
        if let Plot::Sealed { window, .. } = self
            && punch(&window.fd, window.len).is_ok()
        {
            return;
        }
        for range in used {
            if let Some(part) = ram.get(range.start, range.len()) {
                part.fill(0);
            }
        }
    }
}

impl Drop for Plot {
    fn drop(&mut self) {
        if let Plot::Given(part) = self {
            part.ram().fill(0);
            part.state.taken.store(false, Ordering::Release);
        }
    }
}

fn sealed(name: &str, size: u64, base: u64) -> Result<Plot, NewError> {
    let bad_base = NewError::BadBase { base, len: size };
    let Some(len) = size.checked_next_multiple_of(PAGE) else {
        return Err(bad_base);
    };
    if !base.is_multiple_of(PAGE)
        || base.checked_add(len).is_none()
        || usize::try_from(len).is_err()
    {
        return Err(bad_base);
    }
    let os = |source| NewError::Os {
        what: "a segment",
        source,
    };
    let made = Mapping::memfd(name, len, true);
    let (mapping, file) = made.map_err(|error| os(io::Error::other(error)))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| os(error.into()))?;
    let window = Window {
        base,
        len,
        file_offset: 0,
        writable: true,
        fd: Arc::new(file),
        file: FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
    };
    Ok(Plot::Sealed { mapping, window })
}

/// Gives the memory of a segment back to the system: it reads as zero then.
fn punch(file: &OwnedFd, len: u64) -> io::Result<()> {
    let holes = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, holes, 0, len)?)
}

#[cfg(test)]
#[path = "segment_test.rs"]
mod tests;
