// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two files with the queues: docs/bus-linux-user.md §2.

use super::{Role, Site};
use crate::lock::{self, LockError};
use crate::memory::Part;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use vmsg_mem::spsc::{Consumer, Layout, Producer, clear};
use vmsg_mem::{Access, LeaseError, MappedSlice, Mapping, WriteLease};

/// Bytes of each file: 4096 slots of 64 bytes, and 128 for the indices.
pub const QUEUE_BYTES: u64 = 128 + 4096 * 64;

/// The messages of one slot, whatever they are.
const SLOT: usize = 64;

/// Why the queues cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// An index in a file is none, and the file cannot be begun anew, as somebody uses it.
    #[error("the queue `{}` is damaged ({what}) and in use; end all programs that use it and remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: vmsg_mem::Error,
    },
    /// There is something else in its place.
    #[error("`{}` is not a regular file; remove it or choose another name=", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It is a file that is called something else, too.
    #[error("`{}` has other names (hard links), under which it would be overwritten; remove it or choose another name=", path.display())]
    Linked {
        /// The path.
        path: PathBuf,
    },
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

impl From<LockError> for QueueError {
    fn from(error: LockError) -> Self {
        match error {
            // Not said by locks that are waited for.
            LockError::Held(_) => Self::Os {
                what: "lock",
                path: PathBuf::new(),
                source: io::ErrorKind::WouldBlock.into(),
            },
            LockError::Os { what, path, source } => Self::Os { what, path, source },
        }
    }
}

/// One queue, mapped.
#[derive(Debug)]
struct Queue {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    fd: OwnedFd,
    mapping: Arc<Mapping>,
}

/// Both queues, mapped and in the state they were found in, or zeroed.
#[derive(Debug)]
pub(super) struct Queues {
    to_device: Queue,
    to_driver: Queue,
}

impl Queues {
    /// Opens the files, which are made if they are not there. If nobody else has them open they
    /// begin anew. Waits no longer than `patience` for others who look at them.
    pub(super) fn open(site: &Site, patience: Duration) -> Result<Self, QueueError> {
        vmsg_mem::fault::install().map_err(|source| QueueError::Os {
            what: "guard against the truncation of",
            path: site.queue(Role::Driver),
            source,
        })?;
        // Two programs that open the files at the same time would each think that the other one lives on them.
        let _only_one = lock::wait(&site.short_lock(), patience)?;
        let queues = Self {
            to_device: Queue::open(site.queue(Role::Driver))?,
            to_driver: Queue::open(site.queue(Role::Device))?,
        };
        queues.begin_anew_if_unused();
        Ok(queues)
    }

    fn begin_anew_if_unused(&self) {
        let leases = WriteLease::take(&self.to_device.fd)
            .and_then(|first| Ok((first, WriteLease::take(&self.to_driver.fd)?)));
        match leases {
            // While the leases are held nobody can even open the files.
            Ok(_leases) => {
                clear(&self.to_device.mapping.ram());
                clear(&self.to_driver.mapping.ram());
            }
            Err(LeaseError::InUse) => {}
            Err(error) => tracing::warn!(
                queues = %self.to_device.path.display(),
                %error,
                "the queues go on where they are, for it cannot be told whether they are in use"
            ),
        }
    }

    /// Whether these are still the files that somebody finds who comes now.
    pub(super) fn are_current(&self) -> bool {
        self.to_device.is_current() && self.to_driver.is_current()
    }

    fn sent_by(&self, role: Role) -> &Queue {
        match role {
            Role::Driver => &self.to_device,
            Role::Device => &self.to_driver,
        }
    }

    /// What both lie in.
    pub(super) fn mappings(&self) -> [Arc<Mapping>; 2] {
        [&self.to_device, &self.to_driver].map(|queue| Arc::clone(&queue.mapping))
    }

    /// The queue that `role` fills, from where it stands.
    pub(super) fn producer(&self, role: Role) -> Result<Producer<Part>, QueueError> {
        let queue = self.sent_by(role);
        Producer::resume(queue.part()?, Layout::PLAIN).map_err(|what| queue.damaged(what))
    }

    /// The queue that `role` empties, from where it stands.
    pub(super) fn consumer(&self, role: Role) -> Result<Consumer<Part>, QueueError> {
        let queue = self.sent_by(role.other());
        Consumer::resume(queue.part()?, Layout::PLAIN).map_err(|what| queue.damaged(what))
    }

    /// As [`Self::consumer`], without what is in it now; also returns how many messages that were.
    pub(super) fn emptied(&self, role: Role) -> Result<(Consumer<Part>, u32), QueueError> {
        let mut consumer = self.consumer(role)?;
        let queue = self.sent_by(role.other());
        let mut dropped = 0;
        let mut slot = [0; SLOT];
        // Bounded: whoever fills it all the time must not keep the caller here.
        while dropped < consumer.capacity() {
            let popped = consumer.try_pop(&mut slot);
            if !popped.map_err(|what| queue.damaged(what.into()))? {
                break;
            }
            dropped += 1;
            let _ = consumer.release();
        }
        Ok((consumer, dropped))
    }

    /// Whether the other side has taken everything that `role`, whoever that was, has sent.
    pub(super) fn is_drained(&self, role: Role) -> Result<bool, QueueError> {
        // A consumer of the other side's that takes nothing.
        let queue = self.sent_by(role);
        let mut consumer =
            Consumer::resume(queue.part()?, Layout::PLAIN).map_err(|what| queue.damaged(what))?;
        Ok(consumer.arm())
    }
}

impl Queue {
    fn open(path: PathBuf) -> Result<Self, QueueError> {
        let os = |what: &'static str| {
            let path = path.clone();
            move |source: io::Error| QueueError::Os { what, path, source }
        };
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd = match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => fd,
            // A symbolic link, a directory.
            Err(Errno::LOOP | Errno::ISDIR) => return Err(QueueError::NotAFile { path }),
            Err(error) => return Err(os("open the queue")(error.into())),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|error| os("look at")(error.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(QueueError::NotAFile { path });
        }
        if stat.st_nlink > 1 {
            return Err(QueueError::Linked { path });
        }
        // The other side makes it as long, perhaps just now.
        if u64::try_from(stat.st_size).is_ok_and(|size| size < QUEUE_BYTES) {
            rustix::fs::ftruncate(&fd, QUEUE_BYTES)
                .map_err(|error| os("make room in")(error.into()))?;
        }
        // On a full disk the queue would break later, at the first message for which there is no page.
        match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, QUEUE_BYTES) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INTR) => {}
            Err(error) => return Err(os("make room in")(error.into())),
        }
        let mapping = Mapping::of_fd(fd.as_fd(), 0, QUEUE_BYTES, Access::ReadWrite)
            .map_err(|error| os("map")(io::Error::other(error)))?;
        Ok(Self {
            identity: (stat.st_dev, stat.st_ino),
            path,
            fd,
            mapping: Arc::new(mapping),
        })
    }

    fn is_current(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        std::fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == self.identity)
            && !self.mapping.is_lost()
    }

    fn part(&self) -> Result<Part, QueueError> {
        MappedSlice::new(Arc::clone(&self.mapping), 0, self.mapping.len())
            .map(Part::Mapped)
            .ok_or_else(|| self.damaged(vmsg_mem::Error::FileTooShort { have: 0, need: 0 }))
    }

    fn damaged(&self, what: vmsg_mem::Error) -> QueueError {
        QueueError::Damaged {
            path: self.path.clone(),
            what,
        }
    }
}
