// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that one connection has lent: windows, each a mapping, and files mapped once whose parts are windows. On a bus without descriptors
//! there is one such file, the memory in common.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmsg_bus::StaticWindow;
use vmsg_bus::control::{BackingAdd, COMMON_BACKING, Status, ViewAdd};
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};

/// Windows that are mappings, and backings, that one connection may have at a time. A guest
/// has a handful; a scattered segment of 2 MiB pages needs one for each.
pub const MAX_WINDOWS: usize = 4096;

/// Windows that each connection may have in any case, and that all of them
/// may have beyond that. Linux lets a process have 65,530 mappings, and one
/// whose file has shrunk takes two.
const FAIR_WINDOWS: usize = 64;
const ALL_WINDOWS: usize = 24 * 1024;

/// Bytes that one connection may lend. Sparse files are cheap, but a process
/// has no more than 128 TiB of addresses.
const MAX_BYTES: u64 = 1 << 40;

/// Views one connection may have at a time: no mappings, only memory of this process, some 200 bytes for each.
pub const MAX_VIEWS: usize = 16 * 1024;

/// Views that each connection may have in any case, and that all of them may have beyond that.
const FAIR_VIEWS: usize = 1024;
const ALL_VIEWS: usize = 8 * MAX_VIEWS;

/// Descriptors of lent files that are kept for devices whose queues other processes work on: such a process maps 8 to 509 of them. One
/// connection may have so many,
const MAX_FILES: usize = 64;

/// so many in any case,
const FAIR_FILES: usize = 8;

/// and that, if all of them have less than so many.
const ALL_FILES: usize = 1024;

/// Changes that may wait to be applied: as many as replace all there can be.
const MAX_STAGED: usize = 2 * (MAX_WINDOWS + MAX_VIEWS);

/// With more changes than that at once a table is made anew.
const FEW: usize = 16;

/// A window as WINDOW_ADD describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Description {
    pub(super) id: u32,
    pub(super) writable: bool,
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) file_offset: u64,
}

/// What all connections of a bus have at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shares {
    /// Mappings: windows and backings.
    pub(super) mappings: usize,
    /// Views.
    pub(super) views: usize,
    /// Files whose descriptors are kept; `None` where no device has use for any.
    pub(super) files: Option<usize>,
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
    #[error("backing {0} exists already")]
    BackingExists(u32),
    #[error("there is no backing {0}")]
    NoSuchBacking(u32),
    #[error(
        "there is no memory in common with the driver; name it with ram= and memory= of the bus"
    )]
    NoCommonMemory,
    #[error(
        "backing {COMMON_BACKING} is the memory in common, which is neither lent nor taken back"
    )]
    CommonMemory,
    #[error("there are windows in backing {0}")]
    InUse(u32),
    #[error("window {0} is not wholly in its backing")]
    Outside(u32),
    #[error("window {0} would be writable, and its backing is not")]
    ReadOnly(u32),
    #[error("the descriptor cannot back a window: {0}")]
    Descriptor(String),
    #[error("windows overlap, wrap around or are empty: {0}")]
    Overlap(vmsg_mem::Error),
}

impl Refusal {
    /// How the driver is told.
    pub(super) fn status(&self) -> Status {
        match self {
            Self::TooMany | Self::TooMuch => Status::TOO_MANY,
            Self::Exists(_) | Self::BackingExists(_) | Self::Overlap(_) => Status::EXISTS,
            Self::NoSuchWindow(_) | Self::NoSuchBacking(_) => Status::NOT_FOUND,
            Self::InUse(_) => Status::BAD_STATE,
            Self::Outside(_) => Status::MALFORMED,
            Self::ReadOnly(_) | Self::CommonMemory => Status::DENIED,
            Self::NoCommonMemory => Status::UNSUPPORTED,
            Self::Descriptor(_) => Status::BAD_FD,
        }
    }
}

/// A window, and the backing of which it is a part if it has no mapping of its own.
#[derive(Clone, Debug)]
struct Lent {
    entry: TableEntry,
    backing: Option<u32>,
}

#[derive(Debug)]
struct Backing {
    mapping: Arc<Mapping>,
    /// Views in it, staged ones included.
    views: usize,
}

#[derive(Debug)]
enum Change {
    Add(u32, Lent),
    Remove(u32),
}

/// Numbers about the windows in a list.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    mappings: usize,
    views: usize,
    /// Mappings whose files are kept.
    files: usize,
    /// Bytes of the mappings.
    bytes: u64,
}

impl Sum {
    fn add(&mut self, lent: &Lent) {
        match lent.backing {
            Some(_) => self.views += 1,
            None => {
                self.mappings += 1;
                self.files += usize::from(lent.entry.mapping.file().is_some());
                self.bytes += lent.entry.mapping.len() as u64;
            }
        }
    }

    fn remove(&mut self, lent: &Lent) {
        match lent.backing {
            Some(_) => self.views -= 1,
            None => {
                self.mappings -= 1;
                self.files -= usize::from(lent.entry.mapping.file().is_some());
                self.bytes -= lent.entry.mapping.len() as u64;
            }
        }
    }
}

/// All windows of a connection, and changes that wait for their companions.
#[derive(Debug, Default)]
pub(super) struct Windows {
    live: HashMap<u32, Lent>,
    staged: Vec<Change>,
    backings: HashMap<u32, Backing>,
    /// Of `live`, and of what `staged` adds.
    sum: Sum,
    staged_sum: Sum,
    backing_bytes: u64,
    backing_files: usize,
    table: Arc<WindowTable>,
}

impl Windows {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// The table as of the last change.
    pub(super) fn table(&self) -> &Arc<WindowTable> {
        &self.table
    }

    /// How many there are, staged ones included.
    pub(super) fn count(&self) -> usize {
        self.live.len() + self.staged.len()
    }

    /// What others cannot have.
    pub(super) fn shares(&self) -> Shares {
        Shares {
            mappings: self.sum.mappings + self.staged_sum.mappings + self.backings.len(),
            views: self.sum.views + self.staged_sum.views,
            files: Some(self.sum.files + self.staged_sum.files + self.backing_files),
        }
    }

    /// Maps a part of a file that a driver has lent, and keeps the file if it may be of use.
    fn map(
        &self,
        fd: &OwnedFd,
        offset: u64,
        len: u64,
        access: Access,
        all: Shares,
    ) -> Result<Arc<Mapping>, Refusal> {
        let mapping = map(fd, offset, len, access)?;
        let own = self.shares().files.unwrap_or(0);
        let keep = all
            .files
            .is_some_and(|all| own < FAIR_FILES || own < MAX_FILES && all < ALL_FILES);
        // Without a descriptor left the memory is as good as ever for all that work on it here.
        let file = keep.then(|| fd.try_clone().ok()).flatten();
        Ok(Arc::new(match file {
            Some(file) => mapping.with_file(Arc::new(file), offset),
            None => mapping,
        }))
    }

    /// Whether one more mapping of `len` bytes may be made. All connections have `all` now.
    fn admit(&self, len: u64, all: Shares) -> Result<(), Refusal> {
        // Who has many may take half of what is left: nobody can take it all.
        let fair = ALL_WINDOWS.saturating_sub(all.mappings).max(FAIR_WINDOWS);
        if self.shares().mappings >= fair.min(MAX_WINDOWS) || self.staged.len() >= MAX_STAGED {
            return Err(Refusal::TooMany);
        }
        let bytes = self.sum.bytes + self.staged_sum.bytes + self.backing_bytes;
        if bytes.saturating_add(len) > MAX_BYTES {
            return Err(Refusal::TooMuch);
        }
        Ok(())
    }

    /// Adds a window; `more` only stages it. All connections have `all` now. True if the table has changed.
    pub(super) fn add(
        &mut self,
        window: Description,
        fd: &OwnedFd,
        more: bool,
        all: Shares,
    ) -> Result<bool, Refusal> {
        let access = access(window.writable);
        let mapping = self
            .admit(window.len, all)
            .and_then(|()| self.map(fd, window.file_offset, window.len, access, all))
            .map_err(|refusal| self.give_up(refusal))?;
        let entry = TableEntry {
            base: BusAddr(window.base),
            offset: 0,
            len: mapping.ram().len(),
            mapping,
            access,
        };
        self.stage(
            window.id,
            Lent {
                entry,
                backing: None,
            },
        );
        self.apply_unless(more, all)
    }

    /// Makes `mapping` the memory in common: windows can be parts of it from now on.
    pub(super) fn set_common(&mut self, mapping: Arc<Mapping>) {
        self.backings
            .insert(COMMON_BACKING, Backing { mapping, views: 0 });
    }

    /// Maps a file for views.
    pub(super) fn add_backing(
        &mut self,
        backing: BackingAdd,
        fd: &OwnedFd,
        all: Shares,
    ) -> Result<(), Refusal> {
        if backing.id == COMMON_BACKING {
            return Err(Refusal::CommonMemory);
        }
        if self.backings.contains_key(&backing.id) {
            return Err(Refusal::BackingExists(backing.id));
        }
        self.admit(backing.len, all)?;
        let access = access(backing.writable);
        let mapping = self.map(fd, backing.file_offset, backing.len, access, all)?;
        self.backing_files += usize::from(mapping.file().is_some());
        self.backing_bytes += mapping.len() as u64;
        self.backings
            .insert(backing.id, Backing { mapping, views: 0 });
        Ok(())
    }

    /// Lets go of a file that no view is in. It is unmapped when no table has it any more.
    pub(super) fn remove_backing(&mut self, id: u32) -> Result<(), Refusal> {
        if id == COMMON_BACKING {
            return Err(Refusal::CommonMemory);
        }
        let backing = self.backings.get(&id).ok_or(Refusal::NoSuchBacking(id))?;
        if backing.views != 0 {
            return Err(Refusal::InUse(id));
        }
        self.backing_bytes -= backing.mapping.len() as u64;
        self.backing_files -= usize::from(backing.mapping.file().is_some());
        self.backings.remove(&id);
        Ok(())
    }

    /// Adds a window that is a part of a backing; `more` only stages it. All connections have `all` now. True if the table has changed.
    pub(super) fn add_view(&mut self, view: ViewAdd, all: Shares) -> Result<bool, Refusal> {
        let entry = self.view(&view).map_err(|refusal| self.give_up(refusal))?;
        let backing = self.backings.get_mut(&view.backing);
        backing.expect("the view is in it").views += 1;
        let backing = Some(view.backing);
        self.stage(view.id, Lent { entry, backing });
        self.apply_unless(view.more, all)
    }

    fn view(&self, view: &ViewAdd) -> Result<TableEntry, Refusal> {
        // Staged ones may take the place of others: how many are left is looked at when they are applied.
        if self.staged_sum.views >= MAX_VIEWS || self.staged.len() >= MAX_STAGED {
            return Err(Refusal::TooMany);
        }
        let backing = self.backings.get(&view.backing);
        let Backing { mapping, .. } = backing.ok_or(match view.backing {
            COMMON_BACKING => Refusal::NoCommonMemory,
            other => Refusal::NoSuchBacking(other),
        })?;
        let end = view.offset.checked_add(view.len);
        if view.len == 0 || end.is_none_or(|end| end > mapping.len() as u64) {
            return Err(Refusal::Outside(view.id));
        }
        if view.writable && mapping.access() == Access::Read {
            return Err(Refusal::ReadOnly(view.id));
        }
        if mapping.is_lost() {
            return Err(Refusal::Descriptor("its file has shrunk".to_owned()));
        }
        let part = |value| usize::try_from(value).map_err(|_| Refusal::Outside(view.id));
        Ok(TableEntry {
            base: view.base,
            mapping: Arc::clone(mapping),
            offset: part(view.offset)?,
            len: part(view.len)?,
            access: access(view.writable),
        })
    }

    /// Removes a window; `more` only stages that. All connections have `all` now. True if the table has changed.
    pub(super) fn remove(&mut self, id: u32, more: bool, all: Shares) -> Result<bool, Refusal> {
        if self.staged.len() >= MAX_STAGED {
            return Err(self.give_up(Refusal::TooMany));
        }
        self.staged.push(Change::Remove(id));
        self.apply_unless(more, all)
    }

    fn stage(&mut self, id: u32, lent: Lent) {
        self.staged_sum.add(&lent);
        self.staged.push(Change::Add(id, lent));
    }

    /// A refused change takes those with it that were to be applied together.
    fn give_up(&mut self, why: Refusal) -> Refusal {
        for change in std::mem::take(&mut self.staged) {
            if let Change::Add(_, lent) = change {
                self.leave(&lent);
            }
        }
        self.staged_sum = Sum::default();
        why
    }

    /// A view is gone from its backing.
    fn leave(&mut self, lent: &Lent) {
        if let Some(backing) = lent.backing.and_then(|id| self.backings.get_mut(&id)) {
            backing.views -= 1;
        }
    }

    /// Puts memory in place that was not lent by message: `windows` are all there are. Their files are kept if `keep`.
    pub(super) fn set_static(
        &mut self,
        windows: &[StaticWindow],
        keep: bool,
    ) -> Result<(), Refusal> {
        let mut new = Self::new();
        for (id, window) in (0..).zip(windows) {
            let file = window.file.as_fd();
            let mapping = Mapping::of_fd(file, window.file_offset, window.len, Access::ReadWrite)
                .map_err(|error| Refusal::Descriptor(error.to_string()))?;
            let mapping = if keep {
                mapping.with_file(Arc::clone(&window.file), window.file_offset)
            } else {
                mapping
            };
            let entry = TableEntry {
                base: BusAddr(window.base),
                offset: 0,
                len: mapping.ram().len(),
                mapping: Arc::new(mapping),
                access: Access::ReadWrite,
            };
            new.stage(
                id,
                Lent {
                    entry,
                    backing: None,
                },
            );
        }
        new.apply(Shares::default())?;
        *self = new;
        Ok(())
    }

    fn apply_unless(&mut self, more: bool, all: Shares) -> Result<bool, Refusal> {
        if more {
            return Ok(false);
        }
        self.apply(all).map(|()| true)
    }

    /// Applies what is staged, all of it or nothing.
    fn apply(&mut self, all: Shares) -> Result<(), Refusal> {
        let views = self.sum.views;
        let staged = std::mem::take(&mut self.staged);
        self.staged_sum = Sum::default();
        // What stood in the place of each id before, in the order of the changes.
        let mut undo: Vec<(u32, Option<Lent>)> = Vec::with_capacity(staged.len());
        let mut refusal = None;
        for change in staged {
            match change {
                // Also those behind a change that cannot be: their backings are to be left.
                Change::Add(id, lent) if refusal.is_some() || self.live.contains_key(&id) => {
                    self.leave(&lent);
                    refusal.get_or_insert(Refusal::Exists(id));
                }
                Change::Add(id, lent) => {
                    self.sum.add(&lent);
                    self.live.insert(id, lent);
                    undo.push((id, None));
                }
                Change::Remove(_) if refusal.is_some() => {}
                Change::Remove(id) => match self.live.remove(&id) {
                    Some(lent) => {
                        self.sum.remove(&lent);
                        undo.push((id, Some(lent)));
                    }
                    None => refusal = Some(Refusal::NoSuchWindow(id)),
                },
            }
        }
        let table = match refusal {
            Some(refusal) => Err(refusal),
            None if self.sum.views > views.max(fair_views(all)) => Err(Refusal::TooMany),
            None => self.make_table(&undo).map_err(Refusal::Overlap),
        };
        match table {
            Ok(table) => {
                self.table = Arc::new(table);
                for (_, before) in undo {
                    before.iter().for_each(|lent| self.leave(lent));
                }
                Ok(())
            }
            Err(refusal) => {
                for (id, before) in undo.into_iter().rev() {
                    if let Some(added) = self.live.remove(&id) {
                        self.sum.remove(&added);
                        self.leave(&added);
                    }
                    if let Some(before) = before {
                        self.sum.add(&before);
                        self.live.insert(id, before);
                    }
                }
                Err(refusal)
            }
        }
    }

    /// The table of what is live now; `changed` has what stood in the place of each id that was changed.
    fn make_table(&self, changed: &[(u32, Option<Lent>)]) -> Result<WindowTable, vmsg_mem::Error> {
        // An id that was changed twice: what comes of it is not only what stood there at first and what does now.
        let twice = |(at, (id, _)): (usize, &(u32, Option<Lent>))| {
            changed[..at].iter().any(|(other, _)| other == id)
        };
        if changed.len() > FEW || changed.iter().enumerate().any(twice) {
            return WindowTable::new(self.live.values().map(|lent| lent.entry.clone()).collect());
        }
        let mut remove = Vec::new();
        let mut add = Vec::new();
        for (id, before) in changed {
            remove.extend(before.iter().map(|old| (old.entry.base, old.entry.len)));
            add.extend(self.live.get(id).map(|new| new.entry.clone()));
        }
        self.table.changed(&remove, add)
    }
}

/// Views that one connection may have, if all of them have `all`.
fn fair_views(all: Shares) -> usize {
    ALL_VIEWS
        .saturating_sub(all.views)
        .clamp(FAIR_VIEWS, MAX_VIEWS)
}

fn access(writable: bool) -> Access {
    if writable {
        Access::ReadWrite
    } else {
        Access::Read
    }
}

/// Maps a part of a file that a driver has lent.
fn map(fd: &OwnedFd, offset: u64, len: u64, access: Access) -> Result<Mapping, Refusal> {
    vmsg_mem::check_backing(fd.as_fd())
        .and_then(|()| Mapping::of_fd(fd.as_fd(), offset, len, access))
        .map_err(|error| Refusal::Descriptor(error.to_string()))
}

#[cfg(test)]
#[path = "windows_test.rs"]
mod tests;
