// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that one connection has lent.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmsg_bus::StaticWindow;
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};

/// Windows one connection may have at a time. A guest has a handful; a
/// scattered segment of 2 MiB pages needs one for each.
pub const MAX_WINDOWS: usize = 4096;

/// Windows that each connection may have in any case, and that all of them
/// may have beyond that. Linux lets a process have 65,530 mappings, and one
/// whose file has shrunk takes two.
const FAIR_WINDOWS: usize = 64;
const ALL_WINDOWS: usize = 24 * 1024;

/// Bytes that one connection may lend. Sparse files are cheap, but a process
/// has no more than 128 TiB of addresses.
const MAX_BYTES: u64 = 1 << 40;

/// A window as WINDOW_ADD describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Description {
    pub(super) id: u32,
    pub(super) writable: bool,
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) file_offset: u64,
}

/// Why a window cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("there are as many windows as are admitted")]
    TooMany,
    #[error("more than {MAX_BYTES} bytes are lent")]
    TooMuch,
    #[error("window {0} exists already")]
    Exists(u32),
    #[error("there is no window {0}")]
    NoSuchWindow(u32),
    #[error("the descriptor cannot back a window: {0}")]
    Descriptor(String),
    #[error("windows overlap, wrap around or are empty: {0}")]
    Overlap(vmsg_mem::Error),
}

#[derive(Debug)]
struct Lent {
    base: BusAddr,
    access: Access,
    mapping: Arc<Mapping>,
}

#[derive(Debug)]
enum Change {
    Add(u32, Lent),
    Remove(u32),
}

/// All windows of a connection, and changes that wait for their companions.
#[derive(Debug)]
pub(super) struct Windows {
    live: BTreeMap<u32, Arc<Lent>>,
    staged: Vec<Change>,
    /// Bytes of the windows in `live`, and of those in `staged`.
    live_bytes: u64,
    staged_bytes: u64,
    table: Arc<WindowTable>,
}

impl Windows {
    pub(super) fn new() -> Self {
        Self {
            live: BTreeMap::new(),
            staged: Vec::new(),
            live_bytes: 0,
            staged_bytes: 0,
            table: Arc::new(WindowTable::empty()),
        }
    }

    /// The table as of the last change.
    pub(super) fn table(&self) -> &Arc<WindowTable> {
        &self.table
    }

    /// How many there are, staged ones included.
    pub(super) fn count(&self) -> usize {
        self.live.len() + self.staged.len()
    }

    /// Adds a window; `more` only stages it. All connections have `all`
    /// windows now. True if the table has changed.
    pub(super) fn add(
        &mut self,
        window: Description,
        fd: &OwnedFd,
        more: bool,
        all: usize,
    ) -> Result<bool, Refusal> {
        // Who has many may take half of what is left: nobody can take it all.
        let fair = ALL_WINDOWS.saturating_sub(all).max(FAIR_WINDOWS);
        if self.count() >= fair.min(MAX_WINDOWS) {
            return Err(self.give_up(Refusal::TooMany));
        }
        let bytes = self.live_bytes + self.staged_bytes;
        if bytes.saturating_add(window.len) > MAX_BYTES {
            return Err(self.give_up(Refusal::TooMuch));
        }
        let access = if window.writable {
            Access::ReadWrite
        } else {
            Access::Read
        };
        let mapping = vmsg_mem::check_backing(fd.as_fd())
            .and_then(|()| Mapping::of_fd(fd.as_fd(), window.file_offset, window.len, access))
            .map_err(|error| self.give_up(Refusal::Descriptor(error.to_string())))?;
        let lent = Lent {
            base: BusAddr(window.base),
            access,
            mapping: Arc::new(mapping),
        };
        self.staged_bytes += window.len;
        self.staged.push(Change::Add(window.id, lent));
        self.apply_unless(more)
    }

    /// Removes a window; `more` only stages that. True if the table has changed.
    pub(super) fn remove(&mut self, id: u32, more: bool) -> Result<bool, Refusal> {
        if self.staged.len() >= MAX_WINDOWS {
            return Err(self.give_up(Refusal::TooMany));
        }
        self.staged.push(Change::Remove(id));
        self.apply_unless(more)
    }

    /// A refused change takes those with it that were to be applied together.
    fn give_up(&mut self, why: Refusal) -> Refusal {
        self.staged.clear();
        self.staged_bytes = 0;
        why
    }

    /// Puts memory in place that was not lent by message: `windows` are all there are.
    pub(super) fn set_static(&mut self, windows: &[StaticWindow]) -> Result<(), Refusal> {
        let mut live = BTreeMap::new();
        for (id, window) in (0..).zip(windows) {
            let file = window.file.as_fd();
            let mapping = Mapping::of_fd(file, window.file_offset, window.len, Access::ReadWrite)
                .map_err(|error| Refusal::Descriptor(error.to_string()))?;
            let lent = Lent {
                base: BusAddr(window.base),
                access: Access::ReadWrite,
                mapping: Arc::new(mapping),
            };
            live.insert(id, Arc::new(lent));
        }
        self.staged.clear();
        self.staged_bytes = 0;
        self.put(live)
    }

    fn apply_unless(&mut self, more: bool) -> Result<bool, Refusal> {
        if more {
            return Ok(false);
        }
        let mut live = self.live.clone();
        self.staged_bytes = 0;
        for change in self.staged.drain(..) {
            match change {
                Change::Add(id, lent) => {
                    if live.insert(id, Arc::new(lent)).is_some() {
                        return Err(Refusal::Exists(id));
                    }
                }
                Change::Remove(id) => {
                    live.remove(&id).ok_or(Refusal::NoSuchWindow(id))?;
                }
            }
        }
        self.put(live).map(|()| true)
    }

    fn put(&mut self, live: BTreeMap<u32, Arc<Lent>>) -> Result<(), Refusal> {
        let entries = live
            .values()
            .map(|lent| TableEntry {
                base: lent.base,
                mapping: Arc::clone(&lent.mapping),
                offset: 0,
                len: lent.mapping.ram().len(),
                access: lent.access,
            })
            .collect();
        self.table = Arc::new(WindowTable::new(entries).map_err(Refusal::Overlap)?);
        self.live_bytes = live.values().map(|lent| lent.mapping.len() as u64).sum();
        self.live = live;
        Ok(())
    }
}

#[cfg(test)]
#[path = "windows_test.rs"]
mod tests;
