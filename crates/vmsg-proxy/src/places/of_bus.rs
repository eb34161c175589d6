// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What finds a guest's memory on a bus, by what the bus is told.

use super::{Found, Pagemap, PlaceError, Places, SameFile};
use crate::session::FileId;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmsg_bus::ivshmem::{MemoryMode, Place, Ram};
use vmsg_bus::{IvshmemSpec, Physical};

/// For the fronts of a bus whose device host sees the guest's memory in place: `memory=whole` and `memory=segment`. `None`: it is not found but
/// known, or it is copied, or what it is turns out when the bus is connected (`ram=bar`).
pub fn of_bus(spec: &IvshmemSpec) -> Option<Arc<dyn Places>> {
    let offset = spec.common_offset();
    let physical = match (spec.node, spec.window) {
        (Some(node), _) => Some(Physical::Node(node)),
        (None, Some(window)) => Some(Physical::Window {
            base: window.base,
            size: window.size,
        }),
        (None, None) => None,
    };
    match (spec.memory?, physical, file_of_bus(spec)) {
        (MemoryMode::Known | MemoryMode::Bounce, ..) => None,
        (_, Some(physical), _) => Some(Arc::new(Pagemap::new(physical, spec.ram_size))),
        (MemoryMode::Segment, None, Some(path)) => Some(Arc::new(NamedFile {
            path,
            offset,
            len: spec.ram_size,
        })),
        (MemoryMode::Segment, None, None) => None,
        (MemoryMode::Whole, None, _) => {
            Some(Arc::new(Pagemap::new(Physical::Whole, spec.ram_size)))
        }
    }
}

/// The file that the common memory of a bus is, if that is one that a VMM can open, too, and is said.
pub fn file_of_bus(spec: &IvshmemSpec) -> Option<PathBuf> {
    match spec.ram.as_ref()? {
        Ram::Bar => memory_of_messages(spec),
        ram => ram.path(),
    }
}

/// The file that the memory of the messages is, if it is one that a VMM can open, too.
fn memory_of_messages(spec: &IvshmemSpec) -> Option<PathBuf> {
    match spec.place().ok()? {
        Place::Pci(address) if address != "auto" => Ram::Pci(address).path(),
        Place::Shm(name) => Some(Path::new("/dev/shm").join(name.trim_start_matches('/'))),
        Place::File(path) => Some(path),
        _ => None,
    }
}

/// The common memory is the file of this name, whichever that is at the moment.
#[derive(Clone, Debug)]
pub struct NamedFile {
    /// Its path.
    pub path: PathBuf,
    /// Where in it the common memory begins, bytes.
    pub offset: u64,
    /// Bytes of the common memory; otherwise to the end of the file.
    pub len: Option<u64>,
}

/// A BAR is two files in sysfs.
fn other_name(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let other = match name.strip_suffix("_wc") {
        Some(plain) => plain.to_owned(),
        None => format!("{name}_wc"),
    };
    name.starts_with("resource")
        .then(|| path.with_file_name(other))
}

impl Places for NamedFile {
    fn places(
        &self,
        file: BorrowedFd<'_>,
        id: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        let metadata = fs::metadata(&self.path).map_err(|error| {
            PlaceError::NoWindow(format!(
                "cannot look at `{}`, which is to be the common memory: {error}",
                self.path.display()
            ))
        })?;
        let id_of = |metadata: &fs::Metadata| FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        let other = other_name(&self.path).and_then(|other| fs::metadata(other).ok());
        let is_other = other.is_some_and(|other| id_of(&other) == id);
        let same = SameFile {
            id: if is_other { id } else { id_of(&metadata) },
            offset: self.offset,
            len: self
                .len
                .unwrap_or_else(|| metadata.len().saturating_sub(self.offset)),
            name: self.path.display().to_string(),
        };
        same.places(file, id, file_offset, len)
    }
}

#[cfg(test)]
#[path = "of_bus_test.rs"]
mod tests;
