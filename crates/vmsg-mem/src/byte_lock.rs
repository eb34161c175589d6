// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks on single bytes of a file that belong to the open file and not to the process (open file description locks,
//! fcntl(2)).
//!
//! Such a lock is there until the last descriptor of that open file is closed and the kernel has finished what it does with
//! it. The bytes need not exist.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

#[cfg(not(all(target_env = "gnu", target_pointer_width = "32")))]
use libc::flock as Range;
#[cfg(all(target_env = "gnu", target_pointer_width = "32"))]
use libc::flock64 as Range;

/// Takes a shared lock on the byte at `offset`, if nobody has an exclusive one. The file is open for reading. False: somebody
/// has.
///
/// # Errors
///
/// Those of fcntl(2); some network file systems know no such locks.
pub fn try_share(file: impl AsFd, offset: u64) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, range(libc::F_RDLCK, offset)?) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Gives the lock on the byte at `offset` back, if there is one.
///
/// # Errors
///
/// Those of fcntl(2).
pub fn unlock(file: impl AsFd, offset: u64) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, range(libc::F_UNLCK, offset)?).map(drop)
}

/// Whether another open file has a lock on the byte at `offset`.
///
/// # Errors
///
/// Those of fcntl(2).
pub fn is_locked_elsewhere(file: impl AsFd, offset: u64) -> io::Result<bool> {
    let found = call(file, libc::F_OFD_GETLK, range(libc::F_WRLCK, offset)?)?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

fn range(kind: libc::c_int, offset: u64) -> io::Result<Range> {
    let bad = |_| io::Error::from_raw_os_error(libc::EINVAL);
    // SAFETY: plain data for which zeros are valid; `l_pid` must be zero for these locks.
    let mut range: Range = unsafe { MaybeUninit::zeroed().assume_init() };
    // The types of the fields differ between C libraries.
    range.l_type = kind.try_into().map_err(bad)?;
    range.l_whence = libc::SEEK_SET.try_into().map_err(bad)?;
    range.l_start = offset.try_into().map_err(bad)?;
    range.l_len = 1;
    Ok(range)
}

fn call(file: impl AsFd, command: libc::c_int, mut range: Range) -> io::Result<Range> {
    let fd = file.as_fd().as_raw_fd();
    loop {
        // SAFETY: these commands take a lock description, which they may write to.
        if unsafe { libc::fcntl(fd, command, &raw mut range) } >= 0 {
            return Ok(range);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
#[path = "byte_lock_test.rs"]
mod tests;
