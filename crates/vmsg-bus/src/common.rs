// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What two ends share that pass each other no descriptors: memory that both know from the start, and doorbells to spare.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use vmsg_mem::{Access, Doorbell, Mapping};

/// Memory that both ends of a bus have in common, of which windows are views ([`COMMON_BACKING`](crate::control::COMMON_BACKING)).
#[derive(Clone, Debug)]
pub struct CommonRam {
    /// What it is of the driver's machine.
    pub mode: CommonMode,
    /// Bytes.
    pub len: u64,
    /// The memory, where this end touches it: always at the device side, at the driver side for copies.
    pub mapping: Option<Arc<Mapping>>,
    /// The file it is at this end, if a VMM here can open it, too.
    pub file: Option<CommonFile>,
    /// Where it lies in the physical addresses of this machine, if the driver's machine is the one whose memory it is.
    pub physical: Option<Physical>,
    /// For messages to people: a path, a PCI address.
    pub name: String,
}

/// What the common memory is of the driver's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommonMode {
    /// All of its memory.
    Whole,
    /// A part of its memory, in which guests have theirs.
    Segment,
    /// Memory for copies; guests have theirs elsewhere.
    Bounce,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonFile {
    /// Number of the file system (`st_dev`).
    pub device: u64,
    /// Number of the file on it (`st_ino`).
    pub inode: u64,
    /// Where in the file the memory begins, bytes.
    pub offset: u64,
}

/// Which physical addresses of the driver's machine the common memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Physical {
    /// All of its memory, from the lowest address on without the holes between.
    Whole,
    /// This NUMA node: its first byte is the memory's first.
    Node(u32),
    /// These addresses.
    Window {
        /// Physical address of the first byte.
        base: u64,
        /// Bytes.
        size: u64,
    },
}

/// Why there is no common memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommonRamError {
    /// The file cannot be opened.
    #[error("cannot open the common memory `{path}`: {source}")]
    Open {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// The file ends before the memory does, or the memory is empty.
    #[error("the common memory `{path}` has {have} bytes, ram-offset= and ram-size= want {need}")]
    TooShort {
        /// The file.
        path: String,
        /// Bytes it has.
        have: u64,
        /// Bytes it should have.
        need: u64,
    },
    /// The memory of the messages is not ordinary memory here.
    #[error(
        "the common memory `{path}`: here it can only be accessed word by word; use another function's, by its resource2_wc \
         (ram=pci:ADDRESS)"
    )]
    WordsOnly {
        /// What it was to be.
        path: String,
    },
    /// It cannot be mapped.
    #[error("cannot map the common memory `{path}`: {source}")]
    Map {
        /// The file.
        path: String,
        /// Why.
        source: vmsg_mem::Error,
    },
}

impl CommonRam {
    /// Maps the file at `path`, which the operator names: any file that can be mapped, such as shared memory or a BAR in sysfs. `len` bytes from
    /// `offset` on; without `len`, up to its end.
    ///
    /// # Errors
    /// [`CommonRamError`], if it is not there, too short, or cannot be mapped.
    pub fn map(
        mode: CommonMode,
        path: &Path,
        offset: u64,
        len: Option<u64>,
    ) -> Result<CommonRam, CommonRamError> {
        let name = path.display().to_string();
        let open = |source| CommonRamError::Open {
            path: name.clone(),
            source,
        };
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let have = metadata.len();
        let need = offset.saturating_add(len.unwrap_or(1));
        if have < need || len == Some(0) {
            return Err(CommonRamError::TooShort {
                path: name,
                have,
                need,
            });
        }
        let len = len.unwrap_or(have - offset);
        let mapping = Mapping::of_fd(file.as_fd(), offset, len, Access::ReadWrite);
        let mapping = mapping.map_err(|source| CommonRamError::Map {
            path: name.clone(),
            source,
        })?;
        Ok(CommonRam {
            mode,
            len,
            mapping: Some(Arc::new(mapping.with_file(Arc::new(file.into()), offset))),
            file: Some(CommonFile {
                device: metadata.dev(),
                inode: metadata.ino(),
                offset,
            }),
            physical: None,
            name,
        })
    }

    /// Memory that is mapped already.
    pub fn of_mapping(mode: CommonMode, mapping: Arc<Mapping>, name: &str) -> CommonRam {
        CommonRam {
            mode,
            len: mapping.len() as u64,
            mapping: Some(mapping),
            file: None,
            physical: None,
            name: name.to_owned(),
        }
    }
}

/// The doorbells of a connection that the bus has no use for itself: queues can have them (QUEUE_VECTORS).
#[derive(Debug, Default)]
pub struct Vectors {
    own: Vec<(u16, OwnedFd)>,
    theirs: Vec<(u16, Doorbell)>,
}

impl Vectors {
    /// `own`: eventfds that the other end rings, by their numbers, which are those that it names; none of them is read here, nor anywhere else.
    /// `theirs`: the other end's, by its numbers.
    pub fn new(own: Vec<(u16, OwnedFd)>, theirs: Vec<(u16, Doorbell)>) -> Vectors {
        Vectors { own, theirs }
    }

    /// Numbers of the vectors that the other end can ring.
    pub fn own(&self) -> impl ExactSizeIterator<Item = u16> {
        self.own.iter().map(|(vector, _)| *vector)
    }

    /// The eventfd of one of them, to be waited for edge-triggered and never read.
    pub fn own_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        let own = self.own.iter().find(|(own, _)| *own == vector);
        own.map(|(_, fd)| fd.as_fd())
    }

    /// Numbers of the vectors of the other end that can be rung.
    pub fn theirs(&self) -> impl ExactSizeIterator<Item = u16> {
        self.theirs.iter().map(|(vector, _)| *vector)
    }

    /// One of them.
    pub fn bell(&self, vector: u16) -> Option<&Doorbell> {
        let theirs = self.theirs.iter().find(|(theirs, _)| *theirs == vector);
        theirs.map(|(_, bell)| bell)
    }
}

#[cfg(test)]
#[path = "common_test.rs"]
mod tests;
