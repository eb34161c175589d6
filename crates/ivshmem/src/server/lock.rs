// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of which there is one holder at a time, who says in them who it is.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The most that is read of such a file.
const MAX_TEXT: u64 = 4096;

/// How long the end of a process that is ending is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// In the flags of a task (`include/linux/sched.h`): it is being shut down.
const PF_EXITING: u64 = 0x4;

/// SIGKILL, 9, in the masks of signals of `/proc/PID/status`.
const KILL: u64 = 1 << 8;

/// Why a file was not locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody else holds it; what the file says.
    Held(String),
    /// The system said no.
    Os(io::Error),
}

/// An exclusive `flock` on a file.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    file: File,
    /// The file goes when the lock does.
    remove: bool,
}

impl Lock {
    /// Takes the lock on the file, which is made if it is not there. Who holds it and is ending is waited for: the
    /// first word in the file is the holder's process id.
    pub(super) fn take(path: &Path, remove: bool) -> Result<Self, LockError> {
        match Self::attempt(path, remove) {
            Err(LockError::Held(text)) if has_ended(&text) => Self::attempt(path, remove),
            result => result,
        }
    }

    fn attempt(path: &Path, remove: bool) -> Result<Self, LockError> {
        loop {
            let flags = OFlags::RDWR
                | OFlags::CREATE
                | OFlags::CLOEXEC
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::NOCTTY;
            let file = File::from(
                rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(|error| LockError::Os(error.into()))?,
            );
            let found = file.metadata().map_err(LockError::Os)?;
            if !found.is_file() || found.nlink() > 1 {
                let why = "it is not a regular file, or has other names; remove it";
                return Err(LockError::Os(io::Error::other(why)));
            }
            match retry_on_intr(|| {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            }) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(LockError::Held(text_of(&file))),
                Err(error) => return Err(LockError::Os(error.into())),
            }
            // Who held it before may have removed the file that was opened: then it locks nothing.
            match fs::symlink_metadata(path) {
                Ok(there) if identity(&there) == identity(&found) => {}
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(LockError::Os(error)),
            }
            return Ok(Self {
                path: path.to_owned(),
                file,
                remove,
            });
        }
    }

    /// What is in the file.
    pub(super) fn text(&self) -> String {
        text_of(&self.file)
    }

    /// Replaces what is in the file.
    pub(super) fn write(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// Writes over the beginning of the file.
    pub(super) fn write_over(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), 0)
    }

    /// Has the file removed when the lock is dropped.
    pub(super) fn remove_at_end(&mut self) {
        self.remove = true;
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.remove {
            return;
        }
        // Still locked: nobody can have taken a lock for its own on this file. One that is in its place stays.
        let ours = self.file.metadata().map(|file| identity(&file)).ok();
        if fs::symlink_metadata(&self.path).is_ok_and(|file| Some(identity(&file)) == ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
pub(super) fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn text_of(file: &File) -> String {
    let mut bytes = vec![0; usize::try_from(MAX_TEXT).expect("small")];
    // What cannot be read only leaves a message without a name.
    let count = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

/// The holder that a file names.
pub(super) fn holder(text: &str) -> Option<u32> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// Whether the holder has ended by now, waiting for that if it is about to: a process that was killed keeps its files
/// until its memory is unmapped.
fn has_ended(text: &str) -> bool {
    let Some(pid) = holder(text) else {
        return false;
    };
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    // First: from here on the number cannot become that of another process unseen.
    let process = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(error) => return error == Errno::SRCH,
    };
    let patience = if is_ending(pid) {
        PATIENCE
    } else {
        Duration::ZERO
    };
    let patience = Timespec::try_from(patience).unwrap_or_default();
    // Readable when all threads are gone, and with them all files.
    retry_on_intr(|| poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience)))
        .is_ok_and(|ready| ready > 0)
}

/// Whether a process shuts down, or will because it was killed.
fn is_ending(pid: u32) -> bool {
    let read = |file| {
        let mut text = String::new();
        let file = File::open(format!("/proc/{pid}/{file}"));
        let _ = file.map(|file| file.take(MAX_TEXT).read_to_string(&mut text));
        text
    };
    // In this order: a signal that is no longer pending has had its effect.
    let killed = read("status").lines().any(|line| {
        let mask = line
            .strip_prefix("SigPnd:")
            .or_else(|| line.strip_prefix("ShdPnd:"));
        let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask & KILL != 0)
    });
    // proc(5), fields 3 (state) and 9 (flags); the name before them ends with the last parenthesis.
    let stat = read("stat");
    let mut fields = stat
        .rsplit_once(')')
        .map_or("", |(_, fields)| fields)
        .split_ascii_whitespace();
    let dead = matches!(fields.next(), Some("Z" | "X"));
    let flags = fields.nth(5).and_then(|flags| flags.parse::<u64>().ok());
    killed || dead || flags.is_some_and(|flags| flags & PF_EXITING != 0)
}
