// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can go wrong with shared memory.

use crate::BusAddr;

/// An error of this crate. [`Error::is_peer_fault`] tells whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The range is not, or not wholly, backed by windows. The peer misbehaved.
    #[error("{len} bytes at bus address {addr} are outside every window")]
    Unmapped {
        /// First address of the range.
        addr: BusAddr,
        /// Its length in bytes.
        len: usize,
    },
    /// The range is there but read-only. The peer misbehaved.
    #[error("{len} bytes at bus address {addr} are in a read-only window")]
    ReadOnly {
        /// First address of the range.
        addr: BusAddr,
        /// Its length in bytes.
        len: usize,
    },
    /// A structure that must be contiguous in memory crosses from one window into another.
    #[error("{len} bytes at bus address {addr} are not contiguous in memory")]
    Scattered {
        /// First address of the range.
        addr: BusAddr,
        /// Its length in bytes.
        len: usize,
    },
    /// An address is not aligned as its use demands. The peer misbehaved.
    #[error("bus address {addr} is not aligned to {align} bytes")]
    Misaligned {
        /// The address.
        addr: BusAddr,
        /// The required alignment in bytes.
        align: usize,
    },
    /// Two windows claim the same bus addresses, or a window is empty or wraps around.
    #[error("a window of {len} bytes at bus address {addr} is empty, wraps or overlaps another")]
    BadWindow {
        /// First address of the window.
        addr: BusAddr,
        /// Its length in bytes.
        len: u64,
    },
    /// Memory that cannot hold a message queue: too small, too large or misaligned, or
    /// slots of a size that is no multiple of 8.
    #[error("{bytes} bytes cannot hold a message queue with slots of {slot_size} bytes")]
    BadQueue {
        /// Size of the memory in bytes.
        bytes: usize,
        /// Size of a slot in bytes.
        slot_size: usize,
    },
    /// An index in a message queue is out of range. The peer misbehaved.
    #[error("the index {index} in a message queue is impossible with {capacity} slots")]
    CorruptQueue {
        /// What was found.
        index: u32,
        /// Number of slots.
        capacity: u32,
    },
    /// A system call failed: local trouble.
    #[cfg(feature = "std")]
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The error of the system.
        source: std::io::Error,
    },
    /// Memory that is not of the windows it was said to be of: a mistake in this process.
    #[cfg(feature = "std")]
    #[error("{len} bytes are not in the memory of these windows")]
    Foreign {
        /// Length in bytes.
        len: usize,
    },
    /// A file lent by the peer is none whose pages the kernel itself provides.
    #[cfg(feature = "std")]
    #[error(
        "the file is not memory that the kernel itself provides; use a memfd or a file in /dev/shm"
    )]
    ForeignFile,
    /// A file lent by the peer is too short for the window it claims to back.
    #[cfg(feature = "std")]
    #[error("the file behind a window has {have} bytes, {need} are needed")]
    FileTooShort {
        /// Size of the file in bytes.
        have: u64,
        /// Bytes the window needs.
        need: u64,
    },
}

impl Error {
    /// True when the peer gave us something impossible, false for local trouble.
    pub fn is_peer_fault(&self) -> bool {
        match self {
            Self::Unmapped { .. }
            | Self::ReadOnly { .. }
            | Self::Scattered { .. }
            | Self::Misaligned { .. }
            | Self::BadWindow { .. }
            | Self::BadQueue { .. }
            | Self::CorruptQueue { .. } => true,
            #[cfg(feature = "std")]
            Self::Os { .. } | Self::Foreign { .. } => false,
            #[cfg(feature = "std")]
            Self::FileTooShort { .. } | Self::ForeignFile => true,
        }
    }
}
