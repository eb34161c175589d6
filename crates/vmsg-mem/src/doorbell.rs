// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Doorbells: eventfds shared with others.

mod watchdog;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// An eventfd that wakes somebody in this or another process.
///
/// All holders of an eventfd share its counter and its flags, so any of them
/// can fill the counter and make the next write block for ever. [`Self::ring`]
/// gets away with that: a thread of this crate, one per process and asleep
/// unless doorbells are rung, interrupts a write that takes more than 10 ms,
/// by a real-time signal that nobody else has a handler for. The signal must
/// not be blocked after the first ring of a thread; after a `fork` the child
/// is on its own.
///
/// A doorbell that others ring is waited for edge-triggered (EPOLLET) and never
/// read, so it needs no trust either.
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
    /// A write had to be interrupted; there is no point in trying again.
    stuck: AtomicBool,
}

/// Why a doorbell was not rung.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The counter is at its end. Whoever waits for it has not read it 2⁶⁴ − 2
    /// times, so somebody filled it on purpose.
    #[error("the doorbell's counter is full")]
    Full,
    /// As [`Self::Full`], and somebody made the eventfd blocking. The doorbell
    /// is dead: from now on this is returned at once.
    #[error("the doorbell's counter is full and writing it blocks")]
    Stuck,
    /// Local trouble.
    #[error(transparent)]
    Os(#[from] io::Error),
}

impl RingError {
    /// True when another holder of the eventfd misbehaved, false for local trouble.
    pub fn is_peer_fault(&self) -> bool {
        match self {
            Self::Full | Self::Stuck => true,
            Self::Os(_) => false,
        }
    }
}

impl Doorbell {
    /// A new doorbell.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self::of(fd))
    }

    /// Takes an eventfd that somebody else made, and makes it non-blocking for
    /// all who hold it.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the file is not an eventfd: writing to other files can
    /// hang where no signal reaches.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if !is_eventfd(fd.as_fd())? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a doorbell that is not an eventfd",
            ));
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self::of(fd))
    }

    fn of(fd: OwnedFd) -> Self {
        Self {
            fd,
            stuck: AtomicBool::new(false),
        }
    }

    /// Wakes who waits for the doorbell. May take some 20 ms when another
    /// holder is hostile, but only once.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    #[inline]
    pub fn ring(&self) -> Result<(), RingError> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(RingError::Stuck);
        }
        match watchdog::guard(|| rustix::io::write(&self.fd, &1u64.to_ne_bytes()))? {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN) => Err(RingError::Full),
            // An eventfd looks at signals only when it has to wait, whoever sent them.
            Err(Errno::INTR) => {
                self.stuck.store(true, Ordering::Relaxed);
                Err(RingError::Stuck)
            }
            Err(error) => Err(RingError::Os(error.into())),
        }
    }

    /// Sets the counter back to zero and returns what it was. Only for
    /// doorbells that no untrusted process holds: it may block otherwise.
    ///
    /// # Errors
    ///
    /// Those of read(2); an untouched counter is none.
    pub fn drain(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut count)) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Another handle of the same doorbell.
    ///
    /// # Errors
    ///
    /// Those of dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            stuck: AtomicBool::new(self.stuck.load(Ordering::Relaxed)),
        })
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Doorbell> for OwnedFd {
    fn from(doorbell: Doorbell) -> Self {
        doorbell.fd
    }
}

/// Whether writing to `fd` can do no more harm than writing to an eventfd.
fn is_eventfd(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // Files without a place in a file system share one inode: this works in any sandbox, and
    // shuts out pipes, sockets, terminals and FUSE.
    let own = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
    let (own, other) = (rustix::fs::fstat(&own)?, rustix::fs::fstat(fd)?);
    if (own.st_dev, own.st_ino) != (other.st_dev, other.st_ino) {
        return Ok(false);
    }
    // Which kind, only /proc tells. Where it is missing, the write will fail.
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(match std::fs::read_link(link) {
        Ok(name) => name.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => true,
    })
}

#[cfg(test)]
#[path = "doorbell_test.rs"]
mod tests;
