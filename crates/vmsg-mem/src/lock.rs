// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of which there is one holder at a time, who may say in them who it is.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

/// The most that is read of such a file, bytes.
const MAX_TEXT: usize = 4096;

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it; what the file says.
    #[error("somebody else has the lock")]
    Held(String),
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

/// An exclusive `flock` (flock(2)) on a file, held until this is dropped or the process ends.
#[derive(Debug)]
pub struct FileLock {
    path: PathBuf,
    file: File,
    /// The file goes when the lock does.
    remove: bool,
}

impl FileLock {
    /// Takes the lock on `path` if it is free. The file is made if it is not there; what is in it stays. With `remove` it
    /// is removed when the lock is dropped.
    ///
    /// # Errors
    ///
    /// [`LockError`]; a symbolic link, and a file with other names, are no files to be locked.
    pub fn take(path: &Path, remove: bool) -> Result<Self, LockError> {
        let os = |what| {
            move |source: io::Error| LockError::Os {
                what,
                path: path.to_owned(),
                source,
            }
        };
        loop {
            // Opening a pipe must not wait for its other end.
            let flags = OFlags::RDWR
                | OFlags::CREATE
                | OFlags::CLOEXEC
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::NOCTTY;
            let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| {
                os("open the lock file")(match error {
                    Errno::LOOP => io::Error::other("it is a symbolic link; remove it"),
                    error => error.into(),
                })
            })?;
            let file = File::from(fd);
            if !file.metadata().map_err(os("look at"))?.is_file() {
                let why = io::Error::other("it is not a regular file; remove it");
                return Err(os("lock")(why));
            }
            let operation = FlockOperation::NonBlockingLockExclusive;
            match retry_on_intr(|| rustix::fs::flock(&file, operation)) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(LockError::Held(text_of(&file))),
                Err(error) => return Err(os("lock")(error.into())),
            }
            // Who held it before may have removed the file that was opened: then it locks nothing.
            let locked = file.metadata().map_err(os("look at"))?;
            match fs::symlink_metadata(path) {
                Ok(there) if identity(&there) == identity(&locked) => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(os("look at")(error)),
            }
            // What is written over is lost for all its names.
            if locked.nlink() > 1 {
                let why = io::Error::other("it has other names (hard links); remove it");
                return Err(os("lock")(why));
            }
            return Ok(Self {
                path: path.to_owned(),
                file,
                remove,
            });
        }
    }

    /// What is in the file, as far as it can be read: at most 4096 bytes.
    pub fn text(&self) -> String {
        text_of(&self.file)
    }

    /// Replaces what is in the file.
    ///
    /// # Errors
    ///
    /// Those of pwrite(2) and ftruncate(2).
    pub fn write(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// Writes over the beginning of the file.
    ///
    /// # Errors
    ///
    /// Those of pwrite(2).
    pub fn write_over(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), 0)
    }

    /// Has the file removed when the lock is dropped.
    pub fn remove_at_end(&mut self) {
        self.remove = true;
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if !self.remove {
            return;
        }
        // Still locked: nobody else can have taken a lock for its own on this file. One that somebody has put in its place
        // stays.
        let ours = self.file.metadata().map(|file| identity(&file)).ok();
        if fs::symlink_metadata(&self.path).is_ok_and(|file| Some(identity(&file)) == ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the holder of the lock on `path` says there, or `None` if nobody holds it. It takes the lock for a moment: whoever
/// takes it for longer must not do so at the same time.
///
/// # Errors
///
/// [`LockError::Os`]. That the file is not there is none.
pub fn holder(path: &Path) -> Result<Option<String>, LockError> {
    let os = |what| {
        move |source: Errno| LockError::Os {
            what,
            path: path.to_owned(),
            source: source.into(),
        }
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(os("open the lock file")(error)),
    };
    match retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)) {
        Ok(()) => Ok(None),
        Err(Errno::WOULDBLOCK) => Ok(Some(text_of(&file))),
        Err(error) => Err(os("look at the lock of")(error)),
    }
}

/// Device and inode.
fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn text_of(file: &File) -> String {
    let mut bytes = vec![0; MAX_TEXT];
    // What cannot be read only leaves a message without a name.
    let count = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

#[cfg(test)]
#[path = "lock_test.rs"]
mod tests;
