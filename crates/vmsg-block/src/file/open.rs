// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the file is like.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, OFlags, Stat, StatxFlags};
use rustix::io::Errno;
use vmsg_mem::{Held, block_device};

use super::config::{FileConfig, OpenError};
use super::medium::{Alignment, Kind, Medium};
use crate::Facts;
use crate::in_use::InUse;
use crate::lock::{Image, LockError, Purpose, open_image};

/// Blocks are not larger, bytes.
const LARGEST: u32 = 1 << 20;
/// The smallest blocks, and what sizes are a multiple of (virtio 1.3, 5.2.5).
const SECTOR: u32 = 512;

// Magic numbers of file systems (include/uapi/linux/magic.h, fs/hugetlbfs).
const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58f6;
const HUGETLBFS: u32 = 0x9584_58f6;

/// An open file with what is known of it.
pub(super) struct Opened {
    pub(super) in_use: InUse,
    pub(super) medium: Medium,
    pub(super) facts: Facts,
    /// The file is in memory: nothing is waited for.
    pub(super) in_memory: bool,
    pub(super) details: Vec<(&'static str, String)>,
}

pub(super) fn open(config: &FileConfig) -> Result<Opened, OpenError> {
    let path = &config.path;
    let purpose = if config.read_only {
        Purpose::Read
    } else {
        Purpose::Write
    };
    let Image { file: fd, in_use } =
        open_image(path, purpose, config.patience).map_err(|source| match source {
            LockError::NotADisk => OpenError::NotADisk(path.clone()),
            LockError::Os { what, source } => os(what, path)(source),
            source => OpenError::InUse {
                path: path.clone(),
                source,
            },
        })?;
    let look = |error: Errno| os("look at", path)(error.into());
    let stat = rustix::fs::fstat(&fd).map_err(look)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Kind::Device,
        _ => Kind::Regular,
    };
    let magic = magic(&fd).map_err(look)?;
    let in_memory = kind == Kind::Regular && [TMPFS, RAMFS, HUGETLBFS].contains(&magic);
    // There is no cache to go past in memory.
    let direct = if config.direct && !in_memory {
        Some(make_direct(&fd, kind, path)?)
    } else {
        None
    };
    let medium = Medium::new(fd, kind, direct);
    let facts = facts(&medium, &stat, config).map_err(|error| match error {
        Trouble::Os(error) => os("look at", path)(error),
        Trouble::BlockSize(block_size) => OpenError::BlockSize {
            path: path.clone(),
            block_size,
            least: SECTOR,
        },
    })?;
    if facts.size == 0 {
        return Err(OpenError::TooSmall {
            path: path.clone(),
            size: medium.size().map_err(os("look at", path))?,
            block_size: facts.block_size,
        });
    }
    let page_cache = match medium.direct {
        _ if in_memory => "the file is in memory",
        Some(_) => "bypassed",
        None => "used",
    };
    let details = vec![
        ("path", path.display().to_string()),
        ("format", "raw".to_owned()),
        ("lock", purpose.describe().to_owned()),
        ("page-cache", page_cache.to_owned()),
    ];
    Ok(Opened {
        details,
        in_use,
        medium,
        facts,
        in_memory,
    })
}

/// Of the file system.
fn magic(fd: &OwnedFd) -> Result<u32, Errno> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    // The type of the field differs between architectures; the numbers fit all of them.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation)]
    Ok(magic as u32)
}

/// Whether it is a file of hugetlbfs: those can be read, but not written by system calls.
pub(super) fn is_in_huge_pages(medium: &Medium) -> bool {
    magic(&medium.fd) == Ok(HUGETLBFS)
}

enum Trouble {
    Os(io::Error),
    BlockSize(u32),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Os(error)
    }
}

fn os<'p>(what: &'static str, path: &'p Path) -> impl Fn(io::Error) -> OpenError + 'p {
    move |source| OpenError::Os {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Has the file used past the page cache, and finds out what requests must be aligned to then.
fn make_direct(fd: &OwnedFd, kind: Kind, path: &Path) -> Result<Alignment, OpenError> {
    let set = rustix::fs::fcntl_getfl(fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | OFlags::DIRECT));
    match set {
        Ok(()) => {}
        Err(Errno::INVAL) => return Err(OpenError::NotDirect(path.to_owned())),
        Err(error) => return Err(os("open", path)(error.into())),
    }
    let wanted = StatxFlags::DIOALIGN;
    if let Ok(statx) = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted) {
        let told = StatxFlags::from_bits_retain(statx.stx_mask).contains(wanted);
        if told && statx.stx_dio_offset_align == 0 {
            return Err(OpenError::NotDirect(path.to_owned()));
        }
        let alignment = Alignment {
            offset: statx.stx_dio_offset_align.max(SECTOR),
            memory: statx.stx_dio_mem_align.max(1),
        };
        let sane = alignment.offset.is_power_of_two() && alignment.memory.is_power_of_two();
        if told && sane {
            return Ok(alignment);
        }
    }
    // Kernels before 6.1, and file systems that do not tell.
    let offset = match kind {
        Kind::Device => rustix::fs::ioctl_blksszget(fd)
            .map_err(|error| os("ask for the block size of", path)(error.into()))?,
        Kind::Regular => try_alignment(fd),
    };
    Ok(Alignment {
        offset,
        memory: offset,
    })
}

/// What reads must be aligned to, by trying.
fn try_alignment(fd: &OwnedFd) -> u32 {
    let buffer = Held::buffer(4096, 4096);
    [512u32, 1024, 2048]
        .into_iter()
        .find(|size| {
            let part = buffer.pieces().take(*size as usize);
            // At the second one: the first is aligned to everything.
            part.read_from_at(fd.as_fd(), u64::from(*size)).is_ok()
        })
        .unwrap_or(4096)
}

fn facts(medium: &Medium, stat: &Stat, config: &FileConfig) -> Result<Facts, Trouble> {
    let device = match medium.kind {
        Kind::Device => Some(Device::ask(medium, stat)?),
        Kind::Regular => None,
    };
    let aligned = medium.direct.map_or(SECTOR, |direct| direct.offset);
    let natural = device.as_ref().map_or(aligned, |device| device.logical);
    let block_size = config.block_size.unwrap_or(natural.max(SECTOR));
    if !block_size.is_power_of_two() || !(SECTOR..=LARGEST).contains(&block_size) {
        return Err(Trouble::BlockSize(block_size));
    }
    let files = u32::try_from(stat.st_blksize).unwrap_or(0);
    let physical = device.as_ref().map_or(files, |device| device.physical);
    let usual = physical.is_power_of_two() && physical <= LARGEST;
    let size = medium.size()?;
    let writable = !config.read_only;
    let mut facts = Facts {
        size: 0,
        block_size,
        physical_block_size: if usual { physical } else { 0 }.max(block_size),
        alignment_offset: device.as_ref().map_or(0, |device| device.alignment),
        optimal_io_size: device.as_ref().map_or(0, |device| device.optimal),
        read_only: config.read_only,
        discard: writable && config.discard,
        discard_granularity: device
            .as_ref()
            .map_or(files, |device| device.discard_granularity),
        write_zeroes: writable,
    };
    if facts.discard {
        facts.discard = match &device {
            Some(device) => device.discards,
            None => medium.try_punch(size),
        };
    }
    facts.size = usable(medium, block_size, size);
    if facts.size != size {
        tracing::warn!(
            path = %config.path.display(),
            size,
            used = facts.size,
            "the file is no multiple of its blocks: what is behind the last one is left alone",
        );
    }
    Ok(facts)
}

/// So many bytes of the file are the disk: a part of a block at the end is not, for it could only be written by making the
/// file longer.
pub(super) fn usable(medium: &Medium, block_size: u32, size: u64) -> u64 {
    let aligned = medium.direct.map_or(1, |direct| direct.offset);
    let unit = u64::from(block_size.max(aligned));
    // As file offsets go.
    let size = size.min(i64::MAX.unsigned_abs());
    size - size % unit
}

/// What a block device says of itself.
struct Device {
    logical: u32,
    physical: u32,
    alignment: u32,
    optimal: u32,
    discards: bool,
    discard_granularity: u32,
}

impl Device {
    fn ask(medium: &Medium, stat: &Stat) -> io::Result<Self> {
        let fd = &medium.fd;
        let logical = rustix::fs::ioctl_blksszget(fd)?;
        let queue = Queue::of(stat);
        let discards = queue.number("discard_max_bytes");
        let granularity = queue.number("discard_granularity");
        Ok(Self {
            logical,
            physical: rustix::fs::ioctl_blkpbszget(fd)?,
            // Not aligned at all: nothing that is of use can be said.
            alignment: block_device::alignment_offset(fd)?.unwrap_or(0),
            optimal: block_device::optimal_io_size(fd)?,
            // Where /sys cannot be seen: it can be tried.
            discards: discards != Some(0),
            discard_granularity: granularity
                .and_then(|bytes| u32::try_from(bytes).ok())
                .unwrap_or(0),
        })
    }
}

/// A block device's directory in /sys.
struct Queue(String);

impl Queue {
    fn of(stat: &Stat) -> Self {
        let (major, minor) = (
            rustix::fs::major(stat.st_rdev),
            rustix::fs::minor(stat.st_rdev),
        );
        Self(format!("/sys/dev/block/{major}:{minor}"))
    }

    fn number(&self, name: &str) -> Option<u64> {
        // A partition has that of the whole.
        ["queue", "../queue"].iter().find_map(|place| {
            let text = fs::read_to_string(format!("{}/{place}/{name}", self.0)).ok()?;
            text.trim().parse().ok()
        })
    }
}
