// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file of a trace: found, locked, continued.

use super::block::{BYTE_ORDER, FRAME, INTERFACE, SECTION};
use super::reader::MAX_BLOCK;
use super::writer::Sink;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why messages cannot be recorded to a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Two processes cannot write one trace.
    #[error("another process records to `{}`; give each its own file", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A pipe, a directory, a device.
    #[error("`{}` is no regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Something else is in the file; it is left alone.
    #[error("`{}` is no trace (pcapng) that can be continued: {why} at offset {offset}", path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
        /// And where.
        offset: u64,
    },
    /// The system said no.
    #[error("cannot {what} the trace `{}`: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
}

/// A file that is open but not locked yet.
pub(super) struct Opened {
    file: File,
    path: PathBuf,
    /// Device and inode.
    pub(super) id: (u64, u64),
}

/// Opens a file, which is made if it is not there.
pub(super) fn open(path: &Path) -> Result<Opened, OpenError> {
    let os = |what| {
        move |source| OpenError::Os {
            what,
            path: path.to_owned(),
            source,
        }
    };
    let not_a_file = || OpenError::NotAFile {
        path: path.to_owned(),
    };
    // Opening a pipe would wait for its other end.
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(not_a_file());
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(os("open"))?;
    let metadata = file.metadata().map_err(os("look at"))?;
    if !metadata.is_file() {
        return Err(not_a_file());
    }
    Ok(Opened {
        file,
        path: path.to_owned(),
        id: (metadata.dev(), metadata.ino()),
    })
}

impl Opened {
    /// Locks the file and finds where to go on.
    pub(super) fn output(self) -> Result<Output, OpenError> {
        let path = || self.path.clone();
        let os = |what| {
            move |source| OpenError::Os {
                what,
                path: path(),
                source,
            }
        };
        match self.file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse { path: path() }),
            Err(TryLockError::Error(source)) => return Err(os("lock")(source)),
        }
        let len = self.file.metadata().map_err(os("look at"))?.len();
        let (end, interfaces) = match whole(&self.file, len).map_err(os("read"))? {
            Ok(found) => found,
            Err((why, offset)) => {
                return Err(OpenError::Foreign {
                    path: path(),
                    why,
                    offset,
                });
            }
        };
        if end < len {
            tracing::warn!(file = %self.path.display(), bytes = len - end, "cutting off an unfinished block of the trace");
            self.file.set_len(end).map_err(os("cut"))?;
        }
        Ok(Output {
            file: self.file,
            end,
            interfaces,
        })
    }
}

/// What is wrong with a file, and where.
type Fault = (&'static str, u64);

/// Where the last whole block ends, and how many interfaces there are.
fn whole(mut file: &File, len: u64) -> io::Result<Result<(u64, u32), Fault>> {
    file.seek(SeekFrom::Start(0))?;
    let mut input = BufReader::with_capacity(1 << 18, file);
    let mut at = 0;
    let mut big_endian = false;
    let mut interfaces = 0u32;
    while len - at >= FRAME as u64 {
        let mut head = [0; FRAME];
        input.read_exact(&mut head)?;
        let word = |i: usize, big: bool| {
            let bytes = [head[i], head[i + 1], head[i + 2], head[i + 3]];
            if big {
                u32::from_be_bytes(bytes)
            } else {
                u32::from_le_bytes(bytes)
            }
        };
        // The type of a section reads the same both ways, and is followed by the byte order.
        if word(0, false) == SECTION {
            big_endian = match (word(8, false), word(8, true)) {
                (BYTE_ORDER, _) => false,
                (_, BYTE_ORDER) => true,
                _ => return Ok(Err(("a section without byte order", at))),
            };
        } else if at == 0 {
            return Ok(Err(("no section header", 0)));
        }
        let size = word(4, big_endian);
        if (size as usize) < FRAME || size % 4 != 0 {
            return Ok(Err(("a block of impossible length", at)));
        }
        // What is cut off as unfinished must not be the better part of somebody's file.
        if size as usize > MAX_BLOCK {
            return Ok(Err(("a block of more than 1 MiB", at)));
        }
        let size = u64::from(size);
        if size > len - at {
            return Ok(Ok((at, interfaces)));
        }
        // The length stands behind the block again.
        input.seek_relative(i64::try_from(size).expect("32 bits") - (FRAME + 4) as i64)?;
        let mut again = [0; 4];
        input.read_exact(&mut again)?;
        let again = if big_endian {
            u32::from_be_bytes(again)
        } else {
            u32::from_le_bytes(again)
        };
        if u64::from(again) != size {
            return Ok(Err(("a block with two different lengths", at)));
        }
        at += size;
        if word(0, big_endian) == INTERFACE {
            interfaces = interfaces.saturating_add(1);
        }
    }
    // Too short even for the first block's head: only if it is the beginning of one.
    if at == 0 && len > 0 {
        let mut kind = [0; 4];
        let got = file.read_at(&mut kind, 0)?;
        if !SECTION.to_le_bytes().starts_with(&kind[..got.min(4)]) {
            return Ok(Err(("no section header", 0)));
        }
    }
    Ok(Ok((at, interfaces)))
}

/// The file, and where it ends.
pub(super) struct Output {
    file: File,
    end: u64,
    interfaces: u32,
}

impl Output {
    /// Interfaces in the file.
    pub(super) fn interfaces(&self) -> u32 {
        self.interfaces
    }
}

impl Sink for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let result = self.file.write_all_at(bytes, self.end);
        if result.is_ok() {
            self.end += bytes.len() as u64;
        } else {
            // Readers find whole blocks; if this fails as well, a later attempt writes over it.
            let _ = self.file.set_len(self.end);
        }
        result
    }
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
