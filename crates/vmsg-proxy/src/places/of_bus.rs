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
mod tests {
    use super::*;
    use crate::places;
    use std::os::fd::AsFd;

    fn of(text: &str) -> Option<String> {
        let spec: IvshmemSpec = vmsg_bus::keyval::from_str(text).unwrap();
        of_bus(&spec).map(|places| format!("{places:?}"))
    }

    #[test]
    fn what_the_bus_is_told_says_how_memory_is_found() {
        for text in [
            "",
            "memory=known",
            "memory=bounce,ram=bar",
            "pci=auto,memory=segment,ram=bar",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
        for (text, found) in [
            ("memory=segment,node=1", "Node(1)"),
            ("memory=whole,node=1", "Node(1)"),
            ("memory=whole", "Whole"),
            (
                "memory=segment,window=0x100000000+1G",
                "Window { base: 4294967296, size: 1073741824 }",
            ),
            (
                "memory=segment,ram=/dev/shm/win",
                "NamedFile { path: \"/dev/shm/win\"",
            ),
            (
                "pci=0000:00:04.0,memory=segment,ram=bar",
                "0000:00:04.0/resource2_wc",
            ),
            ("shm=win,memory=segment,ram=bar", "/dev/shm/win"),
            (
                "memory=segment,ram=pci:0000:00:05.0",
                "0000:00:05.0/resource2_wc",
            ),
        ] {
            let places = of(text).unwrap();
            assert!(places.contains(found), "{text}: {places}");
        }
    }

    #[test]
    fn a_bar_is_the_same_by_both_of_its_names_and_a_file_is_the_one_there_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resource2_wc");
        let named = NamedFile {
            path: path.clone(),
            offset: 0x1000,
            len: None,
        };
        let make = |name: &str| {
            let file = fs::File::create(dir.path().join(name)).unwrap();
            file.set_len(0x4000).unwrap();
            file
        };
        let find = |file: &fs::File| {
            let metadata = file.metadata().unwrap();
            let id = FileId {
                device: metadata.dev(),
                inode: metadata.ino(),
            };
            let found = named.places(file.as_fd(), id, 0x2000, 0x2000)?;
            Ok::<_, PlaceError>(found.places)
        };
        let place = places::Place {
            offset_in_common: 0x1000,
            len: 0x2000,
        };
        let plain = make("resource2");
        assert!(matches!(find(&plain), Err(PlaceError::NoWindow(_))));
        let first = make("resource2_wc");
        assert_eq!(
            (find(&plain), find(&first)),
            (Ok(vec![place]), Ok(vec![place]))
        );
        fs::remove_file(&path).unwrap();
        let second = make("resource2_wc");
        assert_eq!(find(&second), Ok(vec![place]));
        assert!(matches!(find(&first), Err(PlaceError::OtherFile { .. })));
    }
}
