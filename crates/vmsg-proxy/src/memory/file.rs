// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files that VMMs lend their guests' memory in.

use crate::session::FileId;
use rustix::process::Pid;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;

/// Why a file is not taken for memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// A page fault in such a file lasts as long as somebody else likes, or does what a device likes.
    #[error("it is not memory that the kernel itself provides; use a memfd or a file in /dev/shm")]
    Foreign,
    /// It is not long enough.
    #[error("it has {have} bytes, {need} are needed")]
    TooShort {
        /// Bytes of the file.
        have: u64,
        /// Where the memory ends in it.
        need: u64,
    },
    /// It cannot be looked at.
    #[error("cannot look at it: {0}")]
    Os(#[from] rustix::io::Errno),
    /// The system does not say what it is.
    #[error("cannot look at it: {0}")]
    Look(vmsg_mem::Error),
}

/// A file that was looked at.
#[derive(Clone, Debug)]
pub(crate) struct MemoryFile {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) id: FileId,
    /// Bytes.
    pub(crate) len: u64,
}

impl MemoryFile {
    /// Takes a file of at least `need` bytes.
    pub(crate) fn new(fd: OwnedFd, need: u64) -> Result<MemoryFile, FileError> {
        // First: of a file system that is another program's this is all that can be asked without waiting for that program.
        vmsg_mem::check_backing(fd.as_fd()).or_else(|error| match error {
            vmsg_mem::Error::ForeignFile if is_of_ivshmem(fd.as_fd()) => Ok(()),
            vmsg_mem::Error::ForeignFile => Err(FileError::Foreign),
            other => Err(FileError::Look(other)),
        })?;
        let stat = rustix::fs::fstat(&fd)?;
        let have = u64::try_from(stat.st_size).unwrap_or(0);
        if have < need {
            return Err(FileError::TooShort { have, need });
        }
        Ok(MemoryFile {
            fd: Arc::new(fd),
            len: have,
            id: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        })
    }
}

/// Whether it is the memory of an ivshmem function, as sysfs shows it: the kernel itself answers there, nobody else can make
/// such a file, and behind it is memory and no register.
fn is_of_ivshmem(fd: BorrowedFd<'_>) -> bool {
    const SYSFS: u32 = 0x6265_6572;
    // The type of the field differs between architectures; the magic fits all of them.
    #[allow(clippy::unnecessary_cast, clippy::cast_possible_truncation)]
    let in_sysfs = rustix::fs::fstatfs(fd).is_ok_and(|stat| stat.f_type as u32 == SYSFS);
    // The path of a file of sysfs is what the kernel calls it, wherever it is mounted.
    in_sysfs
        && std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .is_ok_and(|path| is_memory_of_ivshmem(&path))
}

/// Whether `path` is BAR 2 (`resource2`, `resource2_wc`) in the directory of a PCI function 1af4:1110 (QEMU, ivshmem-spec).
fn is_memory_of_ivshmem(path: &Path) -> bool {
    let is_bar = path
        .file_name()
        .is_some_and(|name| name == "resource2" || name == "resource2_wc");
    let says = |file: &str, id: &str| {
        let text = std::fs::read_to_string(path.with_file_name(file));
        text.is_ok_and(|text| text.trim() == id)
    };
    is_bar && says("vendor", "0x1af4") && says("device", "0x1110")
}

/// More than the map of any process takes, as text.
const MAPS: u64 = 16 << 20;

/// Whether a process has mapped a file for itself alone, so that what it writes there is not seen in the file. False if that cannot be known.
pub(crate) fn has_private(process: Pid, file: FileId) -> bool {
    let path = format!("/proc/{}/maps", process.as_raw_pid());
    let mut maps = String::new();
    let read = File::open(path).and_then(|maps_of| maps_of.take(MAPS).read_to_string(&mut maps));
    read.is_ok() && is_only_private(&maps, file)
}

/// The same, by the text of proc_pid_maps(5).
fn is_only_private(maps: &str, file: FileId) -> bool {
    let device = (
        rustix::fs::major(file.device),
        rustix::fs::minor(file.device),
    );
    let mut private = false;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (rights, place, inode) = (fields.next(), fields.nth(1), fields.next());
        let place = place.and_then(|place| place.split_once(':'));
        let place = place.and_then(|(major, minor)| {
            let hex = |text| u32::from_str_radix(text, 16).ok();
            Some((hex(major)?, hex(minor)?))
        });
        if place != Some(device) || inode.and_then(|inode| inode.parse().ok()) != Some(file.inode) {
            continue;
        }
        match rights.and_then(|rights| rights.chars().nth(3)) {
            Some('s') => return false,
            _ => private = true,
        }
    }
    private
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
