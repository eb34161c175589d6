// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lock files: who holds one is written in it.

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
#[cfg(feature = "linux-user")]
use std::time::{Duration, Instant};

/// The most that is read of what a lock file says.
const MAX_TEXT: u64 = 256;

/// Why a lock was not taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Somebody else has it; what the file says.
    Held(String),
    /// The system said no.
    Os {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// An exclusive `flock` on a file that is there as long as the lock is held.
#[derive(Debug)]
pub(crate) struct FileLock {
    path: PathBuf,
    /// Device and inode, to remove no other file.
    identity: (u64, u64),
    _file: File,
}

impl FileLock {
    /// Takes the lock on `path` if it is free, and writes `text` and a newline into the file.
    pub(crate) fn take(path: &Path, text: &str) -> Result<Self, LockError> {
        let os = |what| {
            move |source: io::Error| LockError::Os {
                what,
                path: path.to_owned(),
                source,
            }
        };
        loop {
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
            let mut file = File::from(fd);
            let found = file.metadata().map_err(os("look at"))?;
            if !found.is_file() {
                let why = io::Error::other("it is not a regular file; remove it");
                return Err(os("lock")(why));
            }
            let operation = FlockOperation::NonBlockingLockExclusive;
            match retry_on_intr(|| rustix::fs::flock(&file, operation)) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(LockError::Held(text_of(&mut file))),
                Err(error) => return Err(os("lock")(error.into())),
            }
            // Who held it before may have removed the file that we opened: then it locks nothing.
            let locked = file.metadata().map_err(os("look at"))?;
            match fs::symlink_metadata(path) {
                Ok(there) if identity(&there) == identity(&locked) => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(os("look at")(error)),
            }
            // What is in it is lost, for all its names.
            if locked.nlink() > 1 {
                let why = io::Error::other("it has other names (hard links); remove it");
                return Err(os("lock")(why));
            }
            let write = || -> io::Result<()> {
                file.set_len(0)?;
                if text.is_empty() {
                    return Ok(());
                }
                writeln!(&file, "{text}")
            };
            write().map_err(os("write"))?;
            return Ok(Self {
                path: path.to_owned(),
                identity: identity(&locked),
                _file: file,
            });
        }
    }

    /// As [`Self::take`], after who holds the lock, if that takes no longer than `patience`: only for locks that are
    /// held for moments.
    #[cfg(feature = "linux-user")]
    pub(crate) fn wait(path: &Path, patience: Duration) -> Result<Self, LockError> {
        const LONGEST: Duration = Duration::from_millis(10);
        let begin = Instant::now();
        let mut pause = Duration::from_micros(100);
        loop {
            match Self::take(path, "") {
                Err(LockError::Held(_)) if begin.elapsed() < patience => {}
                Err(LockError::Held(_)) => {
                    let why = "another process keeps it locked; end that one (/proc/locks has it)";
                    return Err(LockError::Os {
                        what: "lock",
                        path: path.to_owned(),
                        source: io::Error::new(io::ErrorKind::TimedOut, why),
                    });
                }
                result => return result,
            }
            // There is no way to wait for such a lock that has an end.
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST);
        }
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Still locked: nobody else can take a lock for its own on this file now. A file that
        // somebody has put in its place stays.
        if fs::symlink_metadata(&self.path).is_ok_and(|file| identity(&file) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the holder of the lock on `path` says there, or `None` if nobody holds it. It takes the
/// lock for a moment: whoever takes it for longer must not do so at the same time.
#[cfg(feature = "linux-user")]
pub(crate) fn holder(path: &Path) -> Result<Option<String>, LockError> {
    let os = |what| {
        move |source: Errno| LockError::Os {
            what,
            path: path.to_owned(),
            source: source.into(),
        }
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(os("open the lock file")(error)),
    };
    match retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)) {
        Ok(()) => Ok(None),
        Err(Errno::WOULDBLOCK) => Ok(Some(text_of(&mut file))),
        Err(error) => Err(os("look at the lock of")(error)),
    }
}

fn text_of(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What cannot be read only leaves a message without a name.
    let _ = file.take(MAX_TEXT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}
