// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an operator says about a qcow2 image, and why it cannot be had.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::LockError;

/// How an image is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Config {
    /// The image.
    pub path: PathBuf,
    /// Nothing is written.
    pub read_only: bool,
    /// The image may name a backing file, which is then opened for reading. Whoever writes the image's header chooses
    /// which file of this host that is.
    pub backing: bool,
    /// Past the page cache of this host (O_DIRECT).
    pub direct: bool,
    /// How long an image that somebody else has in use is waited for: who used it before may be ending.
    pub patience: Duration,
}

impl Qcow2Config {
    /// The image at `path`, for reading and writing, without backing files, with five seconds of patience.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            backing: false,
            direct: false,
            patience: Duration::from_secs(5),
        }
    }
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Qcow2OpenError {
    /// The file cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else has the image, or a file behind it, in use.
    #[error("{} is in use: {source}", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
        /// By whom, as far as known.
        source: LockError,
    },
    /// The file does not begin as qcow2 images do. What it is instead is not guessed.
    #[error("{} is not a qcow2 image", .0.display())]
    NotQcow2(PathBuf),
    /// The header or the tables are wrong.
    #[error("{} is a damaged qcow2 image: {reason} (qemu-img check tells more)", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Who last wrote the image was killed. That is put in order when it is opened for writing.
    #[error("{} was not closed by who last wrote it: open it for writing once, or use qemu-img check -r all", .0.display())]
    NotClosed(PathBuf),
    /// The image needs something that is not supported.
    #[error("{}: {reason} is not supported", path.display())]
    Unsupported {
        /// Which.
        path: PathBuf,
        /// What.
        reason: &'static str,
    },
    /// The image has a backing file, and none is allowed.
    #[error("{} is backed by {backing:?}: allowed with backing=on only", path.display())]
    BackingNotAllowed {
        /// Which.
        path: PathBuf,
        /// What the header says.
        backing: String,
    },
    /// The backing file's format is not said in the image, and it is not guessed.
    #[error("{} does not say what format its backing file {backing:?} has: qemu-img rebase -u -F FORMAT writes it", path.display())]
    BackingFormat {
        /// Which.
        path: PathBuf,
        /// What the header says.
        backing: String,
    },
    /// The chain of backing files is longer than anyone needs, or a ring.
    #[error("{} has more than {most} backing files behind each other, or they form a ring", path.display())]
    TooManyBackings {
        /// The image it began with.
        path: PathBuf,
        /// How many are taken.
        most: usize,
    },
    /// Something of this host failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}
