// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an operator says about a disk in a file, and why it cannot be had.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::LockError;

/// How a file or a block device is used as a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// Nothing is written.
    pub read_only: bool,
    /// Past the page cache of this host (O_DIRECT).
    pub direct: bool,
    /// Bytes that requests are said to be best aligned to, a power of two from 512 on. `None`: the device's own; for a file what
    /// `direct` needs, else 512.
    pub block_size: Option<u32>,
    /// Who reads and writes.
    pub engine: Engine,
    /// Space that the user does not need any more is given back.
    pub discard: bool,
    /// That the file is a raw image was not said. Then no write makes it begin as a qcow2 image does: whoever looked at the file the
    /// next time would take it for one.
    pub guessed: bool,
    /// How long a file that somebody else has in use is waited for: who used it before may be ending.
    pub patience: Duration,
}

impl Engine {
    /// As operators write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Inline => "inline",
            Self::Threads => "threads",
        }
    }
}

impl FileConfig {
    /// The file at `path` for reading and writing, through the page cache, giving space back, with five seconds of patience.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            direct: false,
            block_size: None,
            engine: Engine::Auto,
            discard: true,
            guessed: false,
            patience: Duration::from_secs(5),
        }
    }
}

/// Who reads and writes a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// Files in memory (tmpfs, ramfs, hugetlbfs): [`Inline`](Self::Inline). Others: [`Uring`](Self::Uring), or
    /// [`Threads`](Self::Threads) where io_uring is not to be had.
    #[default]
    Auto,
    /// The kernel, through io_uring.
    Uring,
    /// The thread that submits, at once: right where no medium is waited for. Requests of more than 2 MiB are for threads.
    Inline,
    /// A few threads of this disk.
    Threads,
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The system said no.
    #[error("cannot {what} {}: {source}", path.display())]
    Os {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What was said.
        source: io::Error,
    },
    /// Somebody else has it in use.
    #[error("{} is in use: {source}", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
        /// By whom, as far as known.
        source: LockError,
    },
    /// It is a directory, a pipe or the like.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// The file is smaller than a block.
    #[error("{} has {size} bytes: a disk of blocks of {block_size} bytes needs one of them", path.display())]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// The file system has no I/O past the page cache.
    #[error("{} cannot be used past the page cache (O_DIRECT): its file system does not know how", .0.display())]
    NotDirect(PathBuf),
    /// The block size is no power of two from 512 to 1 MiB, or less than what the medium or `direct` needs.
    #[error("a block size of {block_size} bytes: {} needs a power of two from {least} to 1048576", path.display())]
    BlockSize {
        /// Which.
        path: PathBuf,
        /// What was asked for, in bytes.
        block_size: u32,
        /// What is possible at least, in bytes.
        least: u32,
    },
    /// io_uring was asked for and is not to be had.
    #[error("{}: {source}", path.display())]
    NoUring {
        /// For which file.
        path: PathBuf,
        /// Why not.
        source: vmsg_mem::uring::RingError,
    },
}
