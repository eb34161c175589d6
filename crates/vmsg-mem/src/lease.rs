// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a file is in use by anybody else.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// `fcntl` command (asm-generic/fcntl.h) that libc does not name: the signal that tells the holder.
const F_SETSIG: libc::c_int = 10;

/// A write lease on a file (`F_SETLEASE` in fcntl(2)): nobody else has it open or mapped, and who
/// opens it waits until this is dropped, or until the system's `lease-break-time` (45 s) is over.
///
/// The one who takes the lease is told of others by a signal; here that is SIGURG, which a
/// process ignores unless it asked for it, and not SIGIO, which would end it.
#[derive(Debug)]
pub struct WriteLease<'fd> {
    fd: BorrowedFd<'fd>,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Somebody has the file open or mapped, which may be this process through another descriptor.
    #[error("somebody else has the file open")]
    InUse,
    /// The file system knows no leases, or the file belongs to another user.
    #[error("the file system does not tell who has the file open: {0}")]
    Unknown(io::Error),
}

impl<'fd> WriteLease<'fd> {
    /// Takes the lease. `fd` must be open for writing, and be the only description of the file in
    /// this process.
    ///
    /// # Errors
    ///
    /// [`LeaseError`].
    pub fn take<F: AsFd>(fd: &'fd F) -> Result<Self, LeaseError> {
        let fd = fd.as_fd();
        control(fd, F_SETSIG, libc::SIGURG).map_err(LeaseError::Unknown)?;
        match control(fd, libc::F_SETLEASE, libc::F_WRLCK) {
            Ok(()) => Ok(Self { fd }),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Err(LeaseError::InUse),
            Err(error) => Err(LeaseError::Unknown(error)),
        }
    }
}

impl Drop for WriteLease<'_> {
    fn drop(&mut self) {
        // Fails if it was broken meanwhile, and then there is none to give back.
        let _ = control(self.fd, libc::F_SETLEASE, libc::F_UNLCK);
    }
}

fn control(fd: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open while it is borrowed; these commands take an integer and touch no memory.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
#[path = "lease_test.rs"]
mod tests;
