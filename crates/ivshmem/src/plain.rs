// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory without doorbells, on the host: what an `ivshmem-plain` shows its guest.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::memory::Memory;

/// File system magic of sysfs (linux/magic.h).
const SYSFS_MAGIC: u32 = 0x6265_6572;

/// Where memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plain {
    /// POSIX shared memory by this name, in /dev/shm.
    Shm(String),
    /// A file. A resource of a PCI function in sysfs (`resource2_wc`) is one too.
    File(PathBuf),
}

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(name) => write!(f, "shared memory {name}"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Why memory without a server is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlainError {
    /// It is not there and its size was not given.
    #[error("{0} does not exist; it is made where its size is given")]
    Missing(Plain),
    /// It is shorter than asked for.
    #[error("{what} has {have} bytes, not {want}")]
    Short {
        /// The file.
        what: Plain,
        /// Its size in bytes.
        have: u64,
        /// Bytes that were asked for.
        want: u64,
    },
    /// It has no bytes, or does not tell how many.
    #[error("{0} does not say how large it is, or is empty")]
    NoSize(Plain),
    /// A directory, a pipe, a socket.
    #[error("{0} is no file that can be mapped")]
    NoFile(Plain),
    /// It could not be opened.
    #[error("open {what}: {source}")]
    Open {
        /// The file.
        what: Plain,
        /// The error of the system.
        source: io::Error,
    },
    /// It could not be mapped.
    #[error("{what}: {source}")]
    Map {
        /// The file.
        what: Plain,
        /// Why.
        source: vmsg_mem::Error,
    },
}

/// Opens and maps memory: its first `size` bytes, or all. With a size it is made if it is not there.
pub(crate) fn open(what: &Plain, size: Option<u64>) -> Result<Memory, PlainError> {
    let failed = |source: Errno| PlainError::Open {
        what: what.clone(),
        source: source.into(),
    };
    let file = match open_file(what, false) {
        Err(Errno::NOENT) => {
            let Some(size) = size.filter(|size| *size > 0) else {
                return Err(PlainError::Missing(what.clone()));
            };
            create(what, size).map_err(failed)?
        }
        other => other.map_err(failed)?,
    };
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    let have = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
        // Such as /dev/dax0.0, which does not tell.
        FileType::CharacterDevice => size.unwrap_or(0),
        _ => return Err(PlainError::NoFile(what.clone())),
    };
    let want = size.unwrap_or(have);
    if want == 0 {
        return Err(PlainError::NoSize(what.clone()));
    }
    if have < want {
        let what = what.clone();
        return Err(PlainError::Short { what, have, want });
    }
    let memory = match what {
        Plain::File(path) if is_sysfs(&file) => {
            Memory::of_pci(file.as_fd(), 0, want, is_write_combining(path), None)
        }
        _ => Memory::of_file(file.as_fd(), want),
    };
    memory.map_err(|source| PlainError::Map {
        what: what.clone(),
        source,
    })
}

fn open_file(what: &Plain, create: bool) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    match what {
        Plain::Shm(name) => {
            use rustix::shm::OFlags;
            let mut flags = OFlags::RDWR;
            if create {
                flags |= OFlags::CREATE | OFlags::EXCL;
            }
            rustix::shm::open(name.as_str(), flags, mode)
        }
        Plain::File(path) => {
            // Opening a pipe must not wait for its other end.
            let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
            if create {
                flags |= OFlags::CREATE | OFlags::EXCL;
            }
            rustix::fs::open(path, flags, mode)
        }
    }
}

fn create(what: &Plain, size: u64) -> Result<OwnedFd, Errno> {
    let file = match open_file(what, true) {
        // Somebody else was quicker, and has made it or is about to.
        Err(Errno::EXIST) => open_file(what, false)?,
        other => other?,
    };
    let stat = rustix::fs::fstat(&file)?;
    if stat.st_size == 0 {
        rustix::fs::ftruncate(&file, size)?;
    }
    Ok(file)
}

fn is_sysfs(file: &OwnedFd) -> bool {
    // The type of the field differs between architectures; the magic fits all of them.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation)]
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type as u32 == SYSFS_MAGIC)
}

fn is_write_combining(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.ends_with("_wc"))
}

#[cfg(test)]
#[path = "plain_test.rs"]
mod tests;
