// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Doorbells: eventfds shared with others, and registers of devices.

mod watchdog;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::device_region::device_fence;
use crate::{DeviceSlice, QueueMemory};

/// What wakes somebody in this or another process or machine: an eventfd, or a
/// register of a device.
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
///
/// A register can only be rung. As a descriptor it is the file of the device, which is not to
/// be waited for or lent.
#[derive(Debug)]
pub struct Doorbell {
    /// The eventfd, or the file of the device.
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Eventfd {
        /// A write had to be interrupted; there is no point in trying again. The same for all clones: whoever makes one for
        /// each ring must not be held up each time.
        stuck: Arc<AtomicBool>,
    },
    /// `value` is stored in the 4 bytes of the part.
    Register { register: DeviceSlice, value: u32 },
    /// `value` is written to the file at `offset`.
    File { offset: u64, value: u32 },
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
        let stuck = Arc::new(AtomicBool::new(false));
        Self {
            fd,
            kind: Kind::Eventfd { stuck },
        }
    }

    /// A register of 32 bits in mapped memory, which gets `value` for each ring. `device` is the
    /// file that the memory belongs to.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if `register` is not 4 aligned bytes.
    pub fn register(device: OwnedFd, register: DeviceSlice, value: u32) -> io::Result<Self> {
        if QueueMemory::len(&register) != 4 || !register.is_aligned() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a doorbell register is 4 aligned bytes",
            ));
        }
        Ok(Self {
            fd: device,
            kind: Kind::Register { register, value },
        })
    }

    /// A register of 32 bits that cannot be mapped: each ring writes the 4 bytes of `value`, little-endian, to
    /// the file at `offset`, as VFIO has it. The file must be one where that cannot block.
    pub fn register_file(device: OwnedFd, offset: u64, value: u32) -> Self {
        Self {
            fd: device,
            kind: Kind::File { offset, value },
        }
    }

    /// The eventfd; `None` for a register.
    pub fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        matches!(self.kind, Kind::Eventfd { .. }).then(|| self.fd.as_fd())
    }

    /// Wakes who waits for the doorbell. May take some 20 ms when another
    /// holder is hostile, but only once.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    #[inline]
    pub fn ring(&self) -> Result<(), RingError> {
        match &self.kind {
            Kind::Eventfd { stuck } => ring_eventfd(&self.fd, stuck),
            Kind::Register { value, .. } | Kind::File { value, .. } => self.store(*value),
        }
    }

    /// Rings a register with another value than its own; an eventfd has none.
    ///
    /// # Errors
    ///
    /// [`RingError`].
    pub fn ring_with(&self, value: u32) -> Result<(), RingError> {
        match &self.kind {
            Kind::Eventfd { .. } => self.ring(),
            Kind::Register { .. } | Kind::File { .. } => self.store(value),
        }
    }

    /// The same doorbell; a register gets `value` from now on.
    #[must_use]
    pub fn with_value(mut self, new: u32) -> Self {
        match &mut self.kind {
            Kind::Eventfd { .. } => {}
            Kind::Register { value, .. } | Kind::File { value, .. } => *value = new,
        }
        self
    }

    /// Stores a value in the register.
    fn store(&self, value: u32) -> Result<(), RingError> {
        // What was stored in memory before is seen before this is.
        device_fence(Ordering::SeqCst);
        match &self.kind {
            Kind::Register { register, .. } => {
                let stored = register.region().write_u32(0, value);
                debug_assert!(stored);
                if register.is_lost() {
                    return Err(RingError::Os(io::Error::from(Errno::NODEV)));
                }
            }
            Kind::File { offset, .. } => {
                let value = value.to_le_bytes();
                match rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, &value, *offset)) {
                    Ok(4) => {}
                    Ok(_) => return Err(RingError::Os(io::Error::from(Errno::IO))),
                    Err(error) => return Err(RingError::Os(error.into())),
                }
            }
            Kind::Eventfd { .. } => {}
        }
        Ok(())
    }

    /// Sets the counter back to zero and returns what it was. Only for
    /// doorbells that no untrusted process holds: it may block otherwise.
    ///
    /// # Errors
    ///
    /// Those of read(2); an untouched counter is none. `Unsupported` for a register.
    pub fn drain(&self) -> io::Result<u64> {
        if self.eventfd().is_none() {
            return Err(io::ErrorKind::Unsupported.into());
        }
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
        let kind = match &self.kind {
            Kind::Eventfd { stuck } => Kind::Eventfd {
                stuck: Arc::clone(stuck),
            },
            Kind::Register { register, value } => Kind::Register {
                register: register.clone(),
                value: *value,
            },
            &Kind::File { offset, value } => Kind::File { offset, value },
        };
        Ok(Self {
            fd: self.fd.try_clone()?,
            kind,
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

#[inline]
fn ring_eventfd(fd: &OwnedFd, stuck: &AtomicBool) -> Result<(), RingError> {
    if stuck.load(Ordering::Relaxed) {
        return Err(RingError::Stuck);
    }
    match watchdog::guard(|| rustix::io::write(fd, &1u64.to_ne_bytes()))? {
        Ok(_) => Ok(()),
        Err(Errno::AGAIN) => Err(RingError::Full),
        // An eventfd looks at signals only when it has to wait, whoever sent them.
        Err(Errno::INTR) => {
            stuck.store(true, Ordering::Relaxed);
            Err(RingError::Stuck)
        }
        Err(error) => Err(RingError::Os(error.into())),
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
