// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One image is not written by two.
//!
//! The locks are those of QEMU (block/file-posix.c): each permission of its block layer has two bytes far inside the file, one that
//! is locked by who uses it, and one that is locked by who does not share it. All locks are shared ones; who has taken his own looks
//! for those of others. So QEMU, qemu-img and qemu-storage-daemon stay away from what is in use here, and the other way round.
//!
//! A lock belongs to the open file. It is there until the last descriptor is closed and the kernel is done with all requests
//! of that file, and so longer than a process that is killed: whoever comes next waits a while.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use vmsg_mem::byte_lock;

use crate::in_use::{Identity, InUse};
use crate::loops;

/// The byte for the first permission in use (RAW_LOCK_PERM_BASE).
const IN_USE: u64 = 100;
/// The byte for the first permission that is not shared (RAW_LOCK_SHARED_BASE).
const NOT_SHARED: u64 = 200;

// Permissions (BLK_PERM_*), as the number of their bit.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// About how often a lock is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// What somebody wants of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Read it, while others may read it too and nobody writes.
    Read,
    /// Write it, while nobody else uses it.
    Write,
}

impl Purpose {
    /// For operators.
    pub(crate) const fn describe(self) -> &'static str {
        match self {
            Self::Read => "shared with other readers",
            Self::Write => "exclusive",
        }
    }

    const fn used(self) -> &'static [u64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    const fn not_shared(self) -> &'static [u64] {
        &[WRITE, RESIZE]
    }
}

/// Why an image was not had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else uses it.
    #[error("{0}")]
    Held(Holder),
    /// The system uses the block device, or another process has claimed it (O_EXCL).
    #[error("the block device is mounted, part of another device, or claimed by another process")]
    Claimed,
    /// The file is behind a loop device, which takes no locks.
    #[error("the loop device {} is on it (`losetup --detach` takes it away)", .0.display())]
    Loop(PathBuf),
    /// The contents of the block device are in a file that somebody else uses.
    #[error("its contents are in {}, and {holder}", file.display())]
    Below {
        /// Which.
        file: PathBuf,
        /// By whom that is used.
        holder: Holder,
    },
    /// It is a directory, a pipe or the like.
    #[error("it is neither a regular file nor a block device")]
    NotADisk,
    /// The system said no.
    #[error("cannot {what} it: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// What was said.
        source: io::Error,
    },
}

/// Who uses an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// This process.
    Ourselves,
    /// Another process.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, as far as known.
        name: String,
    },
    /// Nobody who can be seen.
    Unseen,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ourselves => f.write_str("this process uses it already"),
            Self::Process { pid, name } => write!(f, "process {pid} ({name}) uses it"),
            Self::Unseen => f.write_str(
                "a process that cannot be seen from here uses it, or one that was killed and whose last requests are not done yet",
            ),
        }
    }
}

/// Opens the image at `path` and takes the locks. What somebody else has in use is waited for as long as `patience`: it may be a
/// process that is ending. What a disk of this process has is not waited for, unless that is ending.
///
/// Two who use a file by different names (links, mounts) know of each other: locks belong to the file. Loop devices take none: a file
/// with one on it is not opened for writing, and for reading only if the loop device writes nothing; and a loop device not if its file
/// is in use. The system has no way to tell it that a loop device is put on an image that is open.
///
/// # Errors
///
/// [`LockError`].
pub fn open_image(path: &Path, purpose: Purpose, patience: Duration) -> Result<Image, LockError> {
    let deadline = Instant::now() + patience;
    let mut said = false;
    loop {
        let error = match open_once(path, purpose) {
            Ok(image) => return Ok(image),
            Err(error) => error,
        };
        let may_end = match &error {
            LockError::Held(Holder::Ourselves)
            | LockError::Below {
                holder: Holder::Ourselves,
                ..
            } => false,
            LockError::Held(_)
            | LockError::Claimed
            | LockError::Loop(_)
            | LockError::Below { .. } => true,
            LockError::NotADisk | LockError::Os { .. } => false,
        };
        if !may_end {
            return Err(error);
        }
        if Instant::now() >= deadline {
            return Err(match error {
                LockError::Held(_) => LockError::Held(find_holder(path)),
                LockError::Below { file, .. } => {
                    let holder = find_holder(&file);
                    LockError::Below { file, holder }
                }
                error => error,
            });
        }
        if !said {
            said = true;
            tracing::info!(path = %path.display(), "an image is in use: waiting for its holder to end");
        }
        pause();
    }
}

/// An open image with its locks.
#[derive(Debug)]
pub struct Image {
    /// The locks are there until the last descriptor of this open file is closed, and the kernel is done with it.
    pub file: OwnedFd,
    /// For others of this process.
    pub(crate) in_use: InUse,
}

fn os(what: &'static str) -> impl Fn(io::Error) -> LockError {
    move |source| LockError::Os { what, source }
}

/// Opens it and takes the locks, if that can be at once. Who has them is not looked for.
fn open_once(path: &Path, purpose: Purpose) -> Result<Image, LockError> {
    let (file, stat) = open_file(path, purpose)?;
    let identity = Identity::of(&stat);
    if !try_lock(&file, purpose).map_err(os("lock"))? {
        return Err(LockError::Held(in_use_by(identity)));
    }
    if identity.is_file() {
        match loops::over(identity) {
            Some(found) if found.writes || purpose == Purpose::Write => {
                return Err(LockError::Loop(found.device));
            }
            _ => {}
        }
    }
    for below in loops::below(&stat) {
        // Who can use a device need not be one who can read what is below it, and that may be out of sight.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let Ok(lower) = rustix::fs::open(&below, flags, Mode::empty()) else {
            continue;
        };
        let is_used = is_refused(&lower, purpose).unwrap_or(false);
        if is_used {
            let stat = rustix::fs::fstat(&lower).map_err(|error| os("look at")(error.into()))?;
            return Err(LockError::Below {
                file: below,
                holder: in_use_by(Identity::of(&stat)),
            });
        }
    }
    Ok(Image {
        file,
        in_use: InUse::new(identity),
    })
}

/// What is known without a long look.
fn in_use_by(identity: Identity) -> Holder {
    if identity.is_ours() {
        Holder::Ourselves
    } else {
        Holder::Unseen
    }
}

fn open_file(path: &Path, purpose: Purpose) -> Result<(OwnedFd, Stat), LockError> {
    let is_device = |mode| FileType::from_raw_mode(mode) == FileType::BlockDevice;
    let before = rustix::fs::stat(path).map_err(|error| os("look at")(error.into()))?;
    // Opening what is something else may do something: wake who waits at the other end of a pipe, rewind a tape.
    let is_disk = |mode| {
        let kind = FileType::from_raw_mode(mode);
        matches!(kind, FileType::RegularFile | FileType::BlockDevice)
    };
    if !is_disk(before.st_mode) {
        return Err(LockError::NotADisk);
    }
    // It may be replaced by a pipe meanwhile, and opening must not wait for its other end.
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= match purpose {
        Purpose::Read => OFlags::RDONLY,
        Purpose::Write => OFlags::RDWR,
    };
    let claims = is_device(before.st_mode) && purpose == Purpose::Write;
    if claims {
        // Block devices know of each other: a partition and the whole, a device by two names, what is mounted.
        flags |= OFlags::EXCL;
    }
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
        Errno::BUSY if claims && Identity::of(&before).is_ours() => {
            LockError::Held(Holder::Ourselves)
        }
        Errno::BUSY if claims => LockError::Claimed,
        error => os("open")(error.into()),
    })?;
    let stat = rustix::fs::fstat(&file).map_err(|error| os("look at")(error.into()))?;
    if !is_disk(stat.st_mode) {
        return Err(LockError::NotADisk);
    }
    if is_device(stat.st_mode) != is_device(before.st_mode) {
        let source = io::Error::other("it was replaced meanwhile");
        return Err(os("open")(source));
    }
    // Requests must wait for the medium.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| os("open")(error.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)
        .map_err(|error| os("open")(error.into()))?;
    Ok((file, stat))
}

fn try_lock(file: impl AsFd, purpose: Purpose) -> io::Result<bool> {
    let used = purpose.used().iter().map(|bit| IN_USE + bit);
    let not_shared = purpose.not_shared().iter().map(|bit| NOT_SHARED + bit);
    for byte in used.chain(not_shared) {
        // Nobody who keeps to the rules takes an exclusive one.
        if !byte_lock::try_share(&file, byte)? {
            return Ok(false);
        }
    }
    // Only now: of two at the same time at least one sees the other.
    Ok(!is_refused(file, purpose)?)
}

/// Whether others have locks that stand against this use.
fn is_refused(file: impl AsFd, purpose: Purpose) -> io::Result<bool> {
    let refused = purpose.used().iter().map(|bit| NOT_SHARED + bit);
    let disliked = purpose.not_shared().iter().map(|bit| IN_USE + bit);
    for byte in refused.chain(disliked) {
        if byte_lock::is_locked_elsewhere(&file, byte)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// No event says that these locks are free. Two that try at the same time must not go on doing so.
fn pause() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let noise = now.map_or(0, |now| now.subsec_nanos()) % 8;
    thread::sleep(AGAIN / 2 + AGAIN * noise / 8);
}

/// Who has a lock on a file, as /proc tells (proc(5), fdinfo).
fn find_holder(path: &Path) -> Holder {
    let Ok(ours) = rustix::fs::stat(path) else {
        return Holder::Unseen;
    };
    let identity = (ours.st_dev, ours.st_ino);
    let mut ourselves = false;
    for process in entries("/proc") {
        let Ok(pid) = process.parse::<u32>() else {
            continue;
        };
        let holds = entries(&format!("/proc/{pid}/fdinfo")).any(|fd| {
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"));
            info.is_ok_and(|info| has_lock(&info, ours.st_ino))
                && fs::metadata(format!("/proc/{pid}/fd/{fd}"))
                    .is_ok_and(|there| (there.dev(), there.ino()) == identity)
        });
        if !holds {
            continue;
        }
        if pid == process::id() {
            // Another may have it too: of which there is more to say.
            ourselves = true;
            continue;
        }
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let name = name.trim_end().to_owned();
        return Holder::Process { pid, name };
    }
    if ourselves {
        Holder::Ourselves
    } else {
        Holder::Unseen
    }
}

/// Whether the text of an open file says that it has one of the locks on the inode.
fn has_lock(info: &str, inode: u64) -> bool {
    info.lines().any(|line| {
        let Some(lock) = line.strip_prefix("lock:") else {
            return false;
        };
        // lock: 1: OFDLCK ADVISORY READ -1 08:01:1234 101 101
        let mut words = lock.split_whitespace().skip(5);
        let place = words.next().and_then(|place| place.rsplit(':').next());
        let first = words.next().and_then(|first| first.parse::<u64>().ok());
        let ours = first.is_some_and(|first| (IN_USE..NOT_SHARED + IN_USE).contains(&first));
        ours && place.and_then(|place| place.parse().ok()) == Some(inode)
    })
}

fn entries(directory: &str) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
#[path = "lock_test.rs"]
mod tests;
