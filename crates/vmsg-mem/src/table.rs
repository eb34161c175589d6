// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A set of windows that keeps its memory mapped.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::mapping::extend;
use crate::{Access, AddressSpace, BusAddr, Error, Mapping, RamSlice, Window};

/// A window to be: bus addresses and the part of a mapping behind them.
#[derive(Clone, Debug)]
pub struct TableEntry {
    /// First bus address.
    pub base: BusAddr,
    /// What holds the memory.
    pub mapping: Arc<Mapping>,
    /// Where the window begins in the mapping, in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
    /// What the window allows; not more than the mapping does.
    pub access: Access,
}

/// A window of a table, and where its memory is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// First bus address.
    pub base: BusAddr,
    /// Its length in bytes.
    pub len: usize,
    /// What the window allows.
    pub access: Access,
    /// What holds the memory.
    pub mapping: &'a Arc<Mapping>,
    /// Where the window begins in the mapping, in bytes.
    pub offset: usize,
}

/// Where the memory behind a window is.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Which of the mappings.
    mapping: u32,
    /// Where in it, in bytes.
    offset: usize,
}

/// All windows of one user of a bus, with the mappings behind them.
///
/// It never changes: a new table in a new `Arc` takes its place, and memory is
/// unmapped when the last user of the old one has let go. Windows that follow each
/// other in the addresses and in one mapping are one window in the table, so what was
/// lent page by page is as contiguous as it is in memory.
#[derive(Default)]
pub struct WindowTable {
    /// Sorted, disjoint, and only handed out for borrows of `self`, which holds the mappings.
    windows: Vec<Window<'static>>,
    /// For each window.
    parts: Vec<Part>,
    /// Each once; all that `parts` names, and in the order of the addresses as far as they were there from the start.
    mappings: Vec<Arc<Mapping>>,
    /// First address and end of each of them in this process, sorted; those that overlap are one. Made when first asked for.
    extents: OnceLock<Vec<(usize, usize)>>,
}

impl WindowTable {
    /// A table of these windows, in any order.
    ///
    /// # Errors
    ///
    /// [`Error::BadWindow`] for a window that is empty, overlaps another, wraps
    /// around or reaches out of its mapping; [`Error::ReadOnly`] for one that
    /// allows more than its mapping.
    pub fn new(mut entries: Vec<TableEntry>) -> Result<Self, Error> {
        entries.sort_by_key(|entry| entry.base);
        let mut table = Self {
            windows: Vec::with_capacity(entries.len()),
            parts: Vec::with_capacity(entries.len()),
            mappings: Vec::new(),
            extents: OnceLock::new(),
        };
        let mut known = HashMap::new();
        for entry in entries {
            let (window, offset) = check(&entry)?;
            let mapping = *known.entry(Arc::as_ptr(&entry.mapping)).or_insert_with(|| {
                table.mappings.push(Arc::clone(&entry.mapping));
                index(table.mappings.len() - 1)
            });
            let end = table.windows.len();
            table.put(end, window, Part { mapping, offset })?;
        }
        Ok(table)
    }

    /// A table that differs from this one in a few windows: first `remove` goes, each a range of addresses within one window, then
    /// `add` comes. Costs a copy of the table, and no system call.
    ///
    /// # Errors
    ///
    /// [`Error::Unmapped`] for addresses to be removed that are not in one window; those of [`Self::new`] for what is added.
    pub fn changed(
        &self,
        remove: &[(BusAddr, usize)],
        add: Vec<TableEntry>,
    ) -> Result<Self, Error> {
        let room = self.windows.len() + remove.len() + add.len();
        let mut table = Self {
            windows: Vec::with_capacity(room),
            parts: Vec::with_capacity(room),
            mappings: self.mappings.clone(),
            extents: OnceLock::new(),
        };
        table.windows.extend_from_slice(&self.windows);
        table.parts.extend_from_slice(&self.parts);
        let mut gone = Vec::new();
        for &(addr, len) in remove {
            gone.extend(table.cut(addr, len)?);
        }
        for entry in add {
            let (window, offset) = check(&entry)?;
            let known = |known: &Arc<Mapping>| Arc::ptr_eq(known, &entry.mapping);
            let mapping = table.mappings.iter().position(known);
            let mapping = index(mapping.unwrap_or_else(|| {
                table.mappings.push(entry.mapping.clone());
                table.mappings.len() - 1
            }));
            let at = table.after(window.base());
            table.put(at, window, Part { mapping, offset })?;
        }
        table.forget(gone);
        Ok(table)
    }

    /// Index of the first window that begins behind `addr`.
    fn after(&self, addr: BusAddr) -> usize {
        self.windows.partition_point(|window| window.base() <= addr)
    }

    /// Puts a window in its place, `at`, and makes it one with what it continues there.
    fn put(&mut self, at: usize, window: Window<'static>, part: Part) -> Result<(), Error> {
        let (base, len) = (window.base(), window.ram().len());
        let bad = Error::BadWindow {
            addr: base,
            len: len as u64,
        };
        let distance = |from: BusAddr, to: BusAddr| to.0.checked_sub(from.0);
        let before = at.checked_sub(1).map(|i| (i, self.windows[i]));
        if before.is_some_and(|(_, before)| {
            distance(before.base(), base).is_none_or(|d| d < before.ram().len() as u64)
        }) {
            return Err(bad);
        }
        let behind = self.windows.get(at).copied();
        if behind.is_some_and(|behind| distance(base, behind.base()).is_none_or(|d| d < len as u64))
        {
            return Err(bad);
        }
        let continues = |(one, a): (Window<'_>, Part), (two, b): (Window<'_>, Part)| {
            a.mapping == b.mapping
                && one.access() == two.access()
                && one.base().0 + one.ram().len() as u64 == two.base().0
                && a.offset + one.ram().len() == b.offset
        };
        let (mut base, mut part, mut len) = (base, part, len);
        let mut replaced = at..at;
        let before =
            before.filter(|(i, before)| continues((*before, self.parts[*i]), (window, part)));
        if let Some((i, before)) = before {
            (base, part) = (before.base(), self.parts[i]);
            len += before.ram().len();
            replaced.start = i;
        }
        let behind = behind.filter(|behind| {
            let offset = part.offset + len - window.ram().len();
            let mapping = part.mapping;
            continues(
                (window, Part { mapping, offset }),
                (*behind, self.parts[at]),
            )
        });
        if let Some(behind) = behind {
            len += behind.ram().len();
            replaced.end = at + 1;
        }
        let mapping = &self.mappings[part.mapping as usize];
        let ram = extend(mapping).get(part.offset, len).ok_or(bad)?;
        let window = Window::new(base, ram, window.access())?;
        self.windows.splice(replaced.clone(), [window]);
        self.parts.splice(replaced, [part]);
        Ok(())
    }

    /// Takes addresses out of the window that has them. Gives its mapping if the whole window is gone.
    fn cut(&mut self, addr: BusAddr, len: usize) -> Result<Option<u32>, Error> {
        let unmapped = || Error::Unmapped { addr, len };
        let at = self.after(addr).checked_sub(1).ok_or_else(unmapped)?;
        let (window, part) = (self.windows[at], self.parts[at]);
        let into = usize::try_from(addr.0 - window.base().0).map_err(|_| unmapped())?;
        let end = into
            .checked_add(len)
            .filter(|end| len != 0 && *end <= window.ram().len())
            .ok_or_else(unmapped)?;
        let (left, rest) = window.ram().split_at(into);
        let (_, right) = rest.split_at(len);
        let mut windows = Vec::with_capacity(2);
        let mut parts = Vec::with_capacity(2);
        for (skip, ram) in [(0, left), (end, right)] {
            if ram.is_empty() {
                continue;
            }
            let base = BusAddr(window.base().0 + skip as u64);
            windows.push(Window::new(base, ram, window.access())?);
            parts.push(Part {
                mapping: part.mapping,
                offset: part.offset + skip,
            });
        }
        let gone = windows.is_empty().then_some(part.mapping);
        self.windows.splice(at..=at, windows);
        self.parts.splice(at..=at, parts);
        Ok(gone)
    }

    /// Lets go of those of the mappings that no window is in any more.
    fn forget(&mut self, mut mappings: Vec<u32>) {
        // From the end: the last one takes the place of one that goes, and none of those still to be looked at moves.
        mappings.sort_unstable();
        mappings.dedup();
        for gone in mappings.into_iter().rev() {
            if self.parts.iter().any(|part| part.mapping == gone) {
                continue;
            }
            self.mappings.swap_remove(gone as usize);
            let last = index(self.mappings.len());
            for part in &mut self.parts {
                if part.mapping == last {
                    part.mapping = gone;
                }
            }
        }
    }

    /// A table without windows.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The windows as the data path uses them; costs nothing.
    #[inline]
    pub fn space(&self) -> AddressSpace<'_> {
        AddressSpace::from_checked(&self.windows)
    }

    /// The mappings behind the windows, each once.
    pub fn mappings(&self) -> &[Arc<Mapping>] {
        &self.mappings
    }

    /// The windows in the order of their addresses, neighbours in one mapping put together.
    pub fn places(&self) -> impl ExactSizeIterator<Item = Place<'_>> {
        let windows = self.windows.iter().zip(&self.parts);
        windows.map(|(window, part)| Place {
            base: window.base(),
            len: window.ram().len(),
            access: window.access(),
            mapping: &self.mappings[part.mapping as usize],
            offset: part.offset,
        })
    }

    /// True if everything that `other` has is here too: at the same addresses, in the same memory, and allowed as much. Then whatever
    /// `other` was used for can go on. Looks at each window of both once.
    pub fn has_all_of(&self, other: &Self) -> bool {
        // The first window that begins behind the place that is looked at.
        let mut behind = 0;
        other.places().all(|place| {
            let later = |window: &&Window<'_>| window.base() <= place.base;
            behind += self.windows[behind..].iter().take_while(later).count();
            let Some(at) = behind.checked_sub(1) else {
                return false;
            };
            let (window, part) = (self.windows[at], self.parts[at]);
            let fits = |into: usize| {
                let end = into.checked_add(place.len);
                end.is_some_and(|end| end <= window.ram().len())
                    && part.offset + into == place.offset
            };
            usize::try_from(place.base.0 - window.base().0).is_ok_and(fits)
                && (window.access() == place.access || window.access() == Access::ReadWrite)
                && Arc::ptr_eq(&self.mappings[part.mapping as usize], place.mapping)
        })
    }

    /// Where the mapping ends that has all of `piece`, as an address in this process; `None` if there is none.
    pub(crate) fn end_of_mapping(&self, piece: RamSlice<'_>) -> Option<usize> {
        let extents = self.extents.get_or_init(|| {
            let mut extents: Vec<(usize, usize)> = self.mappings.iter().map(extent).collect();
            extents.sort_unstable();
            // Parts of one mapping may overlap.
            extents.dedup_by(|next, before| {
                let overlaps = next.0 < before.1;
                if overlaps {
                    before.1 = before.1.max(next.1);
                }
                overlaps
            });
            extents
        });
        let start = piece.as_ptr().addr();
        let at = extents.partition_point(|extent| extent.0 <= start);
        let end = extents[at.checked_sub(1)?].1;
        (piece.len() <= end.checked_sub(start)?).then_some(end)
    }

    /// True if some memory is gone ([`Mapping::is_lost`]).
    pub fn is_lost(&self) -> bool {
        self.mappings.iter().any(|mapping| mapping.is_lost())
    }
}

/// The window that an entry stands for, and where in its mapping it begins.
fn check(entry: &TableEntry) -> Result<(Window<'static>, usize), Error> {
    let &TableEntry {
        base: addr, len, ..
    } = entry;
    if entry.access == Access::ReadWrite && entry.mapping.access() == Access::Read {
        return Err(Error::ReadOnly { addr, len });
    }
    let ram = extend(&entry.mapping)
        .get(entry.offset, len)
        .ok_or(Error::BadWindow {
            addr,
            len: len as u64,
        })?;
    Ok((Window::new(addr, ram, entry.access)?, entry.offset))
}

/// Where a mapping lies in this process.
fn extent(mapping: &Arc<Mapping>) -> (usize, usize) {
    let start = mapping.ram().as_ptr().addr();
    (start, start + mapping.len())
}

/// There are no more mappings in a process than fit.
fn index(at: usize) -> u32 {
    u32::try_from(at).expect("Linux has fewer mappings in a process")
}

impl fmt::Debug for WindowTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.windows).finish()
    }
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
