// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lock files: who holds one is written in it.

use std::path::Path;
#[cfg(feature = "linux-user")]
use std::{
    io,
    time::{Duration, Instant},
};

#[cfg(feature = "linux-user")]
pub(crate) use vmsg_mem::lock::holder;
pub(crate) use vmsg_mem::lock::{FileLock, LockError};

/// Takes the lock on `path` if it is free, and writes `text` and a newline into the file, which is there as long as the
/// lock is held.
pub(crate) fn take(path: &Path, text: &str) -> Result<FileLock, LockError> {
    let lock = FileLock::take(path, true)?;
    let text = match text {
        "" => String::new(),
        text => format!("{text}\n"),
    };
    lock.write(&text).map_err(|source| LockError::Os {
        what: "write",
        path: path.to_owned(),
        source,
    })?;
    Ok(lock)
}

/// As [`take`], after who holds the lock, if that takes no longer than `patience`: only for locks that are held for
/// moments.
#[cfg(feature = "linux-user")]
pub(crate) fn wait(path: &Path, patience: Duration) -> Result<FileLock, LockError> {
    const LONGEST: Duration = Duration::from_millis(10);
    let begin = Instant::now();
    let mut pause = Duration::from_micros(100);
    loop {
        match take(path, "") {
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
