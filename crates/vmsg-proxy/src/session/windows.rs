// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The windows that a device has, and how one table becomes another.
//!
//! A window is lent by itself, with its file, or as a view: a part of a backing, which is a whole file lent once. Which of the two it is
//! matters on a bus that knows views; on others all windows are lent by themselves. On a bus that has memory in common and passes no descriptors
//! each window is as many views of that as it has places there.

use super::types::{FileId, Window};
use crate::places::Found;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_msg::Instant;

/// How long a backing without views is kept: drivers that come again, or use little memory at a time, find it mapped.
const IDLE: Duration = Duration::from_secs(60);
/// And how many of them.
const MAX_IDLE: usize = 8;

/// A window with the id it has on the bus.
#[derive(Clone, Debug)]
pub(super) struct LentWindow {
    pub(super) id: u32,
    pub(super) window: Window,
    /// The backing it is a view of, where the bus knows views.
    pub(super) backing: Option<u32>,
    /// The views of the common memory that it is, on a bus that has such; `id` means nothing then.
    pub(super) views: Option<Arc<Views>>,
}

impl LentWindow {
    /// The ids it has on the bus.
    pub(super) fn ids(&self) -> &[u32] {
        match &self.views {
            Some(views) => &views.ids,
            None => std::slice::from_ref(&self.id),
        }
    }
}

/// Where a window lies in the common memory.
#[derive(Debug)]
pub(super) struct Views {
    /// One for each place.
    ids: Vec<u32>,
    found: Arc<Found>,
}

/// One view of the common memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommonView {
    pub(super) id: u32,
    pub(super) writable: bool,
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) offset: u64,
}

impl Views {
    /// Those of `window`, by their addresses.
    pub(super) fn of<'a>(&'a self, window: &'a Window) -> impl Iterator<Item = CommonView> + 'a {
        let mut base = window.base;
        self.ids
            .iter()
            .zip(&self.found.places)
            .map(move |(&id, place)| {
                let view = CommonView {
                    id,
                    writable: window.writable,
                    base,
                    len: place.len,
                    offset: place.offset_in_common,
                };
                base += place.len;
                view
            })
    }
}

/// A whole file, lent so that windows can be parts of it.
#[derive(Clone, Debug)]
pub(super) struct Backing {
    pub(super) id: u32,
    file: FileId,
    pub(super) fd: Arc<OwnedFd>,
    pub(super) len: u64,
    pub(super) writable: bool,
    views: usize,
    /// Since when there are no views; noted when somebody looks at the clock.
    idle_since: Option<Instant>,
}

/// What turns one table into another, all at once.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    /// Backings that are needed and not there.
    pub(super) backings: Vec<Backing>,
    /// The windows that go.
    pub(super) remove: Vec<LentWindow>,
    /// Those that come.
    pub(super) add: Vec<LentWindow>,
}

/// Windows by bus address.
#[derive(Clone, Debug, Default)]
pub(super) struct Windows {
    by_base: BTreeMap<u64, LentWindow>,
    /// Ids in use: windows, or views of the common memory.
    count: usize,
    backings: BTreeMap<u32, Backing>,
    /// Ids of windows that are gone.
    free: Vec<u32>,
    last_id: u32,
    last_backing: u32,
}

/// The bus address behind a window, if it can be one at all.
fn end(window: &Window) -> Option<u64> {
    window.file_offset.checked_add(window.len)?;
    let end = window.base.checked_add(window.len)?;
    (window.len != 0).then_some(end)
}

/// Whether windows that are sorted by their addresses can be at the same time.
fn are_disjoint<'a>(sorted: impl IntoIterator<Item = &'a Window>) -> bool {
    let mut free_from = 0;
    sorted.into_iter().all(|window| {
        let Some(end) = end(window).filter(|_| window.base >= free_from) else {
            return false;
        };
        free_from = end;
        true
    })
}

/// Bytes of the file, if it has any.
pub(super) fn size(fd: &OwnedFd) -> Option<u64> {
    let stat = rustix::fs::fstat(fd).ok()?;
    u64::try_from(stat.st_size).ok()
}

impl Windows {
    pub(super) fn is_empty(&self) -> bool {
        self.by_base.is_empty()
    }

    /// How many windows and views of the common memory the device host has.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// How many of these begin at `bases`.
    pub(super) fn len_of(&self, bases: &[u64]) -> usize {
        let lent = bases.iter().filter_map(|base| self.by_base.get(base));
        lent.map(|lent| lent.ids().len()).sum()
    }

    /// Whether each of them is one of `table`.
    pub(super) fn are_all_in(&self, table: &[Window]) -> bool {
        self.iter()
            .all(|lent| table.iter().any(|window| window.is_same(&lent.window)))
    }

    /// Whether each has its place in the common memory.
    pub(super) fn are_in_common(&self) -> bool {
        self.iter().all(|lent| lent.views.is_some())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &LentWindow> {
        self.by_base.values()
    }

    pub(super) fn backings(&self) -> impl Iterator<Item = &Backing> {
        self.backings.values()
    }

    /// How to come to exactly the windows `wanted`; those that are there already stay as they are. `places`: where each is in the common memory;
    /// nowhere if it is shorter. `None` if one is empty, wraps, or overlaps another.
    pub(super) fn plan_table(
        &mut self,
        wanted: &[Window],
        places: &[Option<Arc<Found>>],
    ) -> Option<Change> {
        let place = |at: usize| places.get(at).cloned().flatten();
        let mut sorted: Vec<(usize, &Window)> = wanted.iter().enumerate().collect();
        sorted.sort_unstable_by_key(|(_, window)| window.base);
        if !are_disjoint(sorted.iter().map(|(_, window)| *window)) {
            return None;
        }
        let stays = |lent: &&LentWindow| {
            let at = sorted.binary_search_by_key(&lent.window.base, |(_, window)| window.base);
            at.is_ok_and(|at| {
                let (index, window) = sorted[at];
                let found = place(index).map(|found| found.places.clone());
                let before = lent.views.as_ref().map(|views| &views.found.places);
                window.is_same(&lent.window) && before == found.as_ref()
            })
        };
        let kept: BTreeSet<u64> = self
            .iter()
            .filter(stays)
            .map(|lent| lent.window.base)
            .collect();
        let remove = self.iter().filter(|lent| !stays(lent)).cloned().collect();
        let new = wanted.iter().enumerate();
        let new = new.filter(|(_, window)| !kept.contains(&window.base));
        let add = new
            .map(|(at, window)| self.lend(window.clone(), None, place(at)))
            .collect();
        Some(Change {
            backings: Vec::new(),
            remove,
            add,
        })
    }

    /// How to take back the windows that begin at `remove` and lend `add`, as views where that is possible. `None` if there is no such window, or
    /// one that is added is empty, wraps, or overlaps another. `places` as with [`Self::plan_table`].
    pub(super) fn plan_change(
        &mut self,
        remove: &[u64],
        add: &[Window],
        places: &[Option<Arc<Found>>],
    ) -> Option<Change> {
        let gone: BTreeSet<u64> = remove.iter().copied().collect();
        if gone.len() != remove.len() {
            return None;
        }
        let mut change = Change {
            remove: remove
                .iter()
                .map(|base| self.by_base.get(base).cloned())
                .collect::<Option<_>>()?,
            ..Change::default()
        };
        let mut sorted: Vec<&Window> = add.iter().collect();
        sorted.sort_unstable_by_key(|window| window.base);
        if !are_disjoint(sorted.iter().copied()) {
            return None;
        }
        for window in sorted {
            // Those that overlap, from behind: all of them have to go.
            let mut before = self.by_base.range(..end(window)?).rev();
            let overlaps =
                |lent: &LentWindow| end(&lent.window).is_none_or(|end| end > window.base);
            let in_the_way = before.by_ref().take_while(|(_, lent)| overlaps(lent));
            if !in_the_way.into_iter().all(|(base, _)| gone.contains(base)) {
                return None;
            }
        }
        for (at, window) in add.iter().enumerate() {
            let found = places.get(at).cloned().flatten();
            let backing = match found {
                Some(_) => None,
                None => self.backing_of(window, &mut change.backings),
            };
            let lent = self.lend(window.clone(), backing, found);
            change.add.push(lent);
        }
        Some(change)
    }

    fn new_id(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.last_id = self.last_id.wrapping_add(1);
            self.last_id
        })
    }

    fn lend(
        &mut self,
        window: Window,
        backing: Option<u32>,
        found: Option<Arc<Found>>,
    ) -> LentWindow {
        let views = found.map(|found| {
            let ids = found.places.iter().map(|_| self.new_id()).collect();
            Arc::new(Views { ids, found })
        });
        let id = match views {
            Some(_) => 0,
            None => self.new_id(),
        };
        LentWindow {
            id,
            window,
            backing,
            views,
        }
    }

    /// The backing that a window can be a part of, made in `new` if there is none. `None` if its file is not one that can be lent whole.
    fn backing_of(&mut self, window: &Window, new: &mut Vec<Backing>) -> Option<u32> {
        let end = window.file_offset.checked_add(window.len)?;
        let holds = |backing: &&Backing| {
            backing.file == window.file
                && backing.len >= end
                && (backing.writable || !window.writable)
        };
        if let Some(backing) = self.backings.values().chain(new.iter()).find(holds) {
            return Some(backing.id);
        }
        let len = size(&window.fd).filter(|len| *len >= end)?;
        while {
            self.last_backing = self.last_backing.wrapping_add(1);
            self.backings.contains_key(&self.last_backing)
        } {}
        new.push(Backing {
            id: self.last_backing,
            file: window.file,
            fd: Arc::clone(&window.fd),
            len,
            writable: window.writable,
            views: 0,
            idle_since: None,
        });
        Some(self.last_backing)
    }

    /// All that must be lent anew on another connection.
    pub(super) fn replay(&self) -> Change {
        let used = self.backings.values().filter(|backing| backing.views != 0);
        Change {
            backings: used.cloned().collect(),
            remove: Vec::new(),
            add: self.iter().cloned().collect(),
        }
    }

    /// What takes everything back.
    pub(super) fn takeback(&self) -> Change {
        Change {
            remove: self.iter().cloned().collect(),
            ..Change::default()
        }
    }

    /// The device host has this backing now.
    pub(super) fn backing_added(&mut self, backing: Backing) {
        self.backings.entry(backing.id).or_insert(backing);
    }

    /// The device host has it no more.
    pub(super) fn backing_removed(&mut self, id: u32) {
        self.backings.remove(&id);
    }

    pub(super) fn apply(&mut self, change: Change) {
        for backing in change.backings {
            self.backing_added(backing);
        }
        for lent in change.remove {
            self.by_base.remove(&lent.window.base);
            self.free.extend(lent.ids());
            self.count -= lent.ids().len();
            if let Some(backing) = lent.backing.and_then(|id| self.backings.get_mut(&id)) {
                backing.views -= 1;
            }
        }
        for lent in change.add {
            if let Some(backing) = lent.backing.and_then(|id| self.backings.get_mut(&id)) {
                backing.views += 1;
                backing.idle_since = None;
            }
            self.count += lent.ids().len();
            self.by_base.insert(lent.window.base, lent);
        }
    }

    /// The change will not be made.
    pub(super) fn abandon(&mut self, change: Change) {
        self.free
            .extend(change.add.iter().flat_map(LentWindow::ids));
    }

    /// The connection is gone, and with it what the device host had: backings without views are not lent again.
    pub(super) fn forget_idle(&mut self) {
        self.backings.retain(|_, backing| backing.views != 0);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Backings to be taken back, because there was no view of them for some time or there are too many such.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<u32> {
        let mut idle = Vec::new();
        for backing in self.backings.values_mut().filter(|b| b.views == 0) {
            idle.push((*backing.idle_since.get_or_insert(now), backing.id));
        }
        idle.sort_unstable();
        let too_many = idle.len().saturating_sub(MAX_IDLE);
        let old =
            |(at, (since, _)): &(usize, (Instant, u32))| *at < too_many || *since + IDLE <= now;
        let expired = idle.into_iter().enumerate().take_while(old);
        expired.map(|(_, (_, id))| id).collect()
    }

    /// When [`Self::expired`] has something next.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let idle = self.backings.values().filter(|backing| backing.views == 0);
        idle.filter_map(|backing| backing.idle_since)
            .min()
            .map(|since| since + IDLE)
    }
}

#[cfg(test)]
#[path = "windows_test.rs"]
mod tests;
