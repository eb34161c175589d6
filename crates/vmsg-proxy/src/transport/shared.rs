// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared-memory regions of a device (virtio 1.3 §2.10).

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// One of them, in a file.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    /// Its number among those of the device.
    pub id: u8,
    /// Bytes.
    pub len: u64,
    /// Where in the file it begins, bytes.
    pub file_offset: u64,
    /// The file. Reading and writing it must not block: it lies in memory.
    pub file: Arc<OwnedFd>,
}
