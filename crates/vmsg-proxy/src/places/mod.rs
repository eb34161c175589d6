// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a guest's memory lies in the memory that a bus has in common.
//!
//! On a bus that passes no descriptors a device host sees one piece of memory, and windows are parts of that. The driver side has to say which:
//! * [`SameFile`], [`NamedFile`]: the VMM has the very file that the common memory is.
//! * [`Pagemap`]: the common memory is a part of this machine's memory, such as a NUMA node; the kernel says which pages of it a file has.

mod of_bus;
mod pagemap;
mod physical;

pub use of_bus::{NamedFile, file_of_bus, of_bus};
pub use pagemap::{Hold, Pagemap};
pub use physical::PhysicalWindow;

use crate::session::FileId;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use thiserror::Error;

/// A part of the common memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it begins in the common memory, bytes.
    pub offset_in_common: u64,
    /// Bytes; not 0.
    pub len: u64,
}

/// A part of a file, piece by piece in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Together as long as the part of the file; neighbours are one. Empty: it is not in common and can be done without.
    pub places: Vec<Place>,
    /// Keeps the pages from being given to anybody else, for as long as the device host may use them.
    pub hold: Option<Arc<Hold>>,
}

impl Found {
    /// All in one piece.
    pub fn at(offset_in_common: u64, len: u64) -> Found {
        let places = vec![Place {
            offset_in_common,
            len,
        }];
        Found { places, hold: None }
    }
}

/// Finds files in the common memory.
pub trait Places: fmt::Debug + Send + Sync {
    /// Where `len` bytes of a file from `file_offset` on are. `id` is which file it is. May touch each page of it, and take as long.
    ///
    /// # Errors
    /// [`PlaceError`], if they are not in common, or not known to stay.
    fn places(
        &self,
        file: BorrowedFd<'_>,
        id: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError>;
}

/// Why a file is not in the common memory.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// It is another file than the common memory.
    #[error(
        "it is not in `{name}`, which is all that the device host sees; give the VMM that file, with share=on"
    )]
    OtherFile {
        /// What the common memory is.
        name: String,
    },
    /// It is that file, but reaches over the end of what is in common.
    #[error(
        "{len:#x} bytes from {file_offset:#x} of `{name}` are not all in common; ram-offset= and ram-size= say what is"
    )]
    Outside {
        /// What the common memory is.
        name: String,
        /// Where in the file the part begins.
        file_offset: u64,
        /// Bytes of it.
        len: u64,
    },
    /// A page of it is elsewhere in this machine's memory.
    #[error(
        "byte {file_offset:#x} of its file is at the physical address {physical:#x}, which is not in {window}; {remedy}"
    )]
    Elsewhere {
        /// Where in the file.
        file_offset: u64,
        /// Where in the machine.
        physical: u64,
        /// Where it should be.
        window: String,
        /// What to do.
        remedy: String,
    },
    /// Its pages are ordinary ones: the kernel may move them at any time, and the device host would not know.
    #[error(
        "its pages of {page_size} bytes can be moved by the kernel; give it huge pages: a file in hugetlbfs, with prealloc=on"
    )]
    Movable {
        /// Bytes of a page.
        page_size: u64,
    },
    /// A page is not there although it was touched.
    #[error(
        "byte {file_offset:#x} of its file has no page: are there enough huge pages? prealloc=on says so at once"
    )]
    NoPage {
        /// Where in the file.
        file_offset: u64,
    },
    /// The kernel does not say where pages are.
    #[error(
        "the kernel does not tell where pages are: that needs CAP_SYS_ADMIN (run the proxy as root)"
    )]
    NotPermitted,
    /// It is not known which physical addresses are in common.
    #[error("{0}")]
    NoWindow(String),
    /// It cannot be looked at.
    #[error("its file cannot be looked at: {0}")]
    File(String),
}

impl PlaceError {
    /// Whether it is about this one file and not about all there are.
    pub fn is_of_file(&self) -> bool {
        !matches!(self, Self::NotPermitted | Self::NoWindow(_))
    }
}

/// The common memory is a file, and VMMs have that file: a BAR of an ivshmem device, or shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SameFile {
    /// Which file.
    pub id: FileId,
    /// Where in it the common memory begins, bytes.
    pub offset: u64,
    /// Bytes of the common memory.
    pub len: u64,
    /// For messages to people.
    pub name: String,
}

impl Places for SameFile {
    fn places(
        &self,
        _file: BorrowedFd<'_>,
        id: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        let name = || self.name.clone();
        if id != self.id {
            return Err(PlaceError::OtherFile { name: name() });
        }
        let into = file_offset.checked_sub(self.offset).filter(|into| {
            into.checked_add(len)
                .is_some_and(|end| end <= self.len && len != 0)
        });
        let into = into.ok_or_else(|| PlaceError::Outside {
            name: name(),
            file_offset,
            len,
        })?;
        Ok(Found::at(into, len))
    }
}

#[cfg(test)]
#[path = "places_test.rs"]
mod tests;
