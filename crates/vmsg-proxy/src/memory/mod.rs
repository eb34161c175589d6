// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a guest, as a front reaches it.

mod file;

pub use file::FileError;
pub(crate) use file::MemoryFile;
