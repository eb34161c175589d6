// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's memory: a file that both sides know from the start.

use rustix::fs::{FileType, Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the driver's memory is found, and at which bus addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticRam {
    path: PathBuf,
    offset: u64,
    low_size: u64,
    hole: u64,
    /// The part of the file that it is: where it begins, and how long it is at most.
    part: (u64, u64),
}

/// A part of that memory.
#[derive(Clone, Debug)]
pub struct StaticWindow {
    /// Bus address of its first byte.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// The file, open for reading and writing.
    pub file: Arc<OwnedFd>,
    /// Where in the file it begins.
    pub file_offset: u64,
}

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StaticRamError {
    /// The file does not exist.
    #[error("the memory file `{}` does not exist; give ram= the mem-path of the driver's memory-backend-file, and that share=on", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file is shorter than the low part of the memory, or empty.
    #[error("the memory file `{}` has {have} bytes, more than {floor} are needed (mem-low-size= lies below the hole); is it the driver's memory?", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        have: u64,
        /// Bytes it has to exceed.
        floor: u64,
    },
    /// A directory, a device or the like.
    #[error("the memory file `{}` is not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// The addresses do not fit into 64 bits.
    #[error("the memory file `{}` does not fit behind mem-offset={offset:#x}", path.display())]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// Where it was to begin.
        offset: u64,
    },
    /// The system said no.
    #[error("cannot open the memory file `{}`: {source}", path.display())]
    Os {
        /// The file.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

impl StaticRam {
    /// The file `path`, whose first `low_size` bytes lie at bus address `offset` and the rest
    /// behind a hole of `hole` bytes. Without a hole it is all one.
    pub fn new(path: impl Into<PathBuf>, offset: u64, low_size: u64, hole: u64) -> Self {
        Self {
            path: path.into(),
            offset,
            low_size,
            hole,
            part: (0, u64::MAX),
        }
    }

    /// The same, in the part of the file from `offset` on that has `len` bytes, or reaches to the end of the file.
    #[must_use]
    pub fn within(mut self, offset: u64, len: Option<u64>) -> Self {
        self.part = (offset, len.unwrap_or(u64::MAX));
        self
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file as it is now: one window, or two if there is a hole.
    ///
    /// # Errors
    /// [`StaticRamError`]: the driver may not have made the file yet.
    pub fn windows(&self) -> Result<Vec<StaticWindow>, StaticRamError> {
        let path = || self.path.clone();
        let os = |source: rustix::io::Errno| StaticRamError::Os {
            path: path(),
            source: source.into(),
        };
        // Not to hang on a FIFO, which is refused below.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(&self.path, flags, Mode::empty()) {
            Ok(file) => Arc::new(file),
            Err(rustix::io::Errno::NOENT) => return Err(StaticRamError::Missing { path: path() }),
            Err(rustix::io::Errno::ISDIR) => return Err(StaticRamError::NotAFile { path: path() }),
            Err(error) => return Err(os(error)),
        };
        let stat = rustix::fs::fstat(&file).map_err(os)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(StaticRamError::NotAFile { path: path() });
        }
        let (begin, most) = self.part;
        let have = u64::try_from(stat.st_size).unwrap_or(0);
        let have = have.saturating_sub(begin).min(most);
        let floor = if self.hole > 0 { self.low_size } else { 0 };
        if have <= floor {
            return Err(StaticRamError::TooShort {
                path: path(),
                have,
                floor,
            });
        }
        let part = |base: Option<u64>, file_offset: u64, len: u64| {
            let base = base.filter(|base| base.checked_add(len).is_some());
            Ok(StaticWindow {
                base: base.ok_or_else(|| StaticRamError::OutOfRange {
                    path: path(),
                    offset: self.offset,
                })?,
                len,
                file: Arc::clone(&file),
                file_offset: begin + file_offset,
            })
        };
        if self.hole == 0 {
            return Ok(vec![part(Some(self.offset), 0, have)?]);
        }
        let high = self
            .offset
            .checked_add(self.low_size)
            .and_then(|end| end.checked_add(self.hole));
        let mut windows = Vec::new();
        if self.low_size > 0 {
            windows.push(part(Some(self.offset), 0, self.low_size)?);
        }
        windows.push(part(high, self.low_size, have - self.low_size)?);
        Ok(windows)
    }
}

#[cfg(test)]
#[path = "ram_test.rs"]
mod tests;
