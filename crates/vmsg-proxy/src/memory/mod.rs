// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a guest, as a front reaches it.

mod dma;
mod file;
mod table;

pub(crate) use dma::{DmaMemory, MapError, Range};
pub use file::FileError;
pub(crate) use file::MemoryFile;
pub(crate) use table::TableMemory;

use thiserror::Error;
use vmsg_mem::BusAddr;
use vmsg_queue::remote::Memory;

/// A guest's memory that is reached by copies: mapped in this process, by messages to its VMM, or partly this, partly that.
///
/// It may change at any time; an access sees it as it is then. Accesses may take long, and are not done on the thread that
/// reads what the VMM says.
pub trait GuestMemory: Memory<Error = MemoryError> + Send + Sync {
    /// Ends the accesses that wait for the VMM at this moment with [`MemoryError::Cancelled`]. Those that begin later are not
    /// concerned, so who wants a thread back calls it again until the thread has come. Does nothing where nothing ever waits.
    fn cancel(&self);
}

/// Why an access to a guest's memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Not, or not wholly, memory of the guest.
    #[error("{len} bytes at {addr} are not mapped")]
    Unmapped {
        /// First address.
        addr: BusAddr,
        /// Bytes.
        len: usize,
    },
    /// Not writable, or not readable.
    #[error("{len} bytes at {addr} may not be accessed so")]
    Denied {
        /// First address.
        addr: BusAddr,
        /// Bytes.
        len: usize,
    },
    /// A ring is not aligned.
    #[error("{addr} is not aligned")]
    Misaligned {
        /// Its address.
        addr: BusAddr,
    },
    /// The VMM refused it.
    #[error("the VMM refused access to {addr} with error {errno}")]
    Refused {
        /// First address.
        addr: BusAddr,
        /// The errno in its answer.
        errno: i32,
    },
    /// The VMM did not answer.
    #[error("the VMM did not answer in time")]
    TimedOut,
    /// The VMM is gone.
    #[error("the VMM is gone")]
    Gone,
    /// [`GuestMemory::cancel`] was called. Whoever still needs it does it again.
    #[error("cancelled")]
    Cancelled,
}

impl From<vmsg_mem::Error> for MemoryError {
    /// For memory that is mapped in this process.
    fn from(error: vmsg_mem::Error) -> Self {
        use vmsg_mem::Error as E;
        match error {
            E::ReadOnly { addr, len } => MemoryError::Denied { addr, len },
            E::Misaligned { addr, .. } => MemoryError::Misaligned { addr },
            E::Unmapped { addr, len } | E::Scattered { addr, len } => {
                MemoryError::Unmapped { addr, len }
            }
            _ => MemoryError::Gone,
        }
    }
}
