// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What this process has open as a disk itself: who waits for that waits for himself.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Stat};

/// Images of this process, each as often as it is open.
static OURS: Mutex<Vec<Identity>> = Mutex::new(Vec::new());

/// Which file or block device, whatever its names are (stat(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The device number of its file system, and its inode.
    File(u64, u64),
    /// Its own number.
    Device(u64),
}

impl Identity {
    /// Which one is at `path`, behind symbolic links.
    ///
    /// # Errors
    /// As stat(2).
    pub fn of_path(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&rustix::fs::stat(path)?))
    }

    #[allow(
        clippy::useless_conversion,
        reason = "the types of the fields differ between architectures"
    )]
    pub(crate) fn of(stat: &Stat) -> Self {
        if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
            Self::Device(stat.st_rdev.into())
        } else {
            Self::File(stat.st_dev.into(), stat.st_ino.into())
        }
    }

    pub(crate) fn is_file(self) -> bool {
        matches!(self, Self::File(..))
    }

    /// Whether a disk of this process has it, and is not just ending.
    pub(crate) fn is_ours(self) -> bool {
        ours().contains(&self)
    }
}

/// An image that a disk of this process has. It goes when the disk begins to end, which may be some time before the lock does.
#[derive(Debug)]
pub(crate) struct InUse(Identity);

impl InUse {
    pub(crate) fn new(identity: Identity) -> Self {
        ours().push(identity);
        Self(identity)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut ours = ours();
        if let Some(at) = ours.iter().position(|known| *known == self.0) {
            ours.swap_remove(at);
        }
    }
}

fn ours() -> MutexGuard<'static, Vec<Identity>> {
    // Each statement leaves it whole.
    OURS.lock().unwrap_or_else(PoisonError::into_inner)
}
