// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that is handed out.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::options::Source;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The file has another size than was asked for.
    #[error("`{}` has {have} bytes and not {want}; give that size, or remove it when nobody uses it", path.display())]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        have: u64,
        /// Bytes that were asked for.
        want: u64,
    },
    /// A directory, a device, or on a file system that a program provides.
    #[error("`{}` is not a file that can be shared: {why}", path.display())]
    NotAFile {
        /// What it is.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Others may write to the file, or it is theirs.
    #[error("`{}` {what}: whoever is no client could change the memory", path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// What about it.
        what: &'static str,
    },
    /// The system said no.
    #[error("cannot {what} `{}`: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

/// Where memory that has a name lies.
pub(super) fn path_of(source: &Source) -> Option<PathBuf> {
    match source {
        Source::Memfd => None,
        Source::Shm(name) => {
            let name = name.strip_prefix('/').unwrap_or(name);
            Some(Path::new("/dev/shm").join(name))
        }
        Source::File(path) => Some(path.clone()),
    }
}

/// Memory without a name, that nobody can resize.
pub(super) fn anonymous(size: u64) -> Result<OwnedFd, MemoryError> {
    let make = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("ivshmem", flags)?;
        rustix::fs::ftruncate(&fd, size)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals)?;
        Ok(fd)
    };
    make().map_err(|error: Errno| MemoryError::Os {
        what: "make",
        path: "memfd".into(),
        source: error.into(),
    })
}

/// Finds or makes the memory at `path`.
pub(super) fn named(path: &Path, size: u64) -> Result<OwnedFd, MemoryError> {
    let os = |what| {
        move |error: Errno| MemoryError::Os {
            what,
            path: path.to_owned(),
            source: error.into(),
        }
    };
    // Opening a pipe must not wait for its other end.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = match rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::ISDIR) => return Err(not_a_file(path, "it is a directory")),
        result => result.map_err(os("open"))?,
    };
    let stat = rustix::fs::fstat(&fd).map_err(os("look at"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(not_a_file(path, "it is not a regular file"));
    }
    vmsg_mem::check_backing(fd.as_fd()).map_err(|error| not_a_file(path, &error.to_string()))?;
    let wrong = |what| MemoryError::Permissions {
        path: path.to_owned(),
        what,
    };
    let user = rustix::process::geteuid();
    if stat.st_uid != user.as_raw() && !user.is_root() {
        return Err(wrong("belongs to another user"));
    }
    if Mode::from_raw_mode(stat.st_mode).contains(Mode::WOTH) {
        return Err(wrong("can be written by everybody"));
    }
    match u64::try_from(stat.st_size) {
        Ok(0) => rustix::fs::ftruncate(&fd, size).map_err(os("set the size of"))?,
        Ok(have) if have == size => {}
        have => {
            return Err(MemoryError::OtherSize {
                path: path.to_owned(),
                have: have.unwrap_or(0),
                want: size,
            });
        }
    }
    Ok(fd)
}

fn not_a_file(path: &Path, why: &str) -> MemoryError {
    MemoryError::NotAFile {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;
