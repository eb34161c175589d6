// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A set of windows that keeps its memory mapped.

use std::fmt;
use std::sync::Arc;

use crate::mapping::extend;
use crate::{Access, AddressSpace, BusAddr, Error, Mapping, Window};

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

/// All windows of one user of a bus, with the mappings behind them.
///
/// It never changes: a new table in a new `Arc` takes its place, and memory is
/// unmapped when the last user of the old one has let go.
#[derive(Default)]
pub struct WindowTable {
    /// Sorted, disjoint, and only handed out for borrows of `self`, which holds the mappings.
    windows: Box<[Window<'static>]>,
    mappings: Box<[Arc<Mapping>]>,
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
        let windows = entries
            .iter()
            .map(|entry| {
                let &TableEntry {
                    base: addr, len, ..
                } = entry;
                if entry.access == Access::ReadWrite && entry.mapping.access() == Access::Read {
                    return Err(Error::ReadOnly { addr, len });
                }
                let ram =
                    extend(&entry.mapping)
                        .get(entry.offset, len)
                        .ok_or(Error::BadWindow {
                            addr,
                            len: len as u64,
                        })?;
                Window::new(addr, ram, entry.access)
            })
            .collect::<Result<Box<[_]>, _>>()?;
        AddressSpace::new(&windows)?;
        Ok(Self {
            windows,
            mappings: entries.into_iter().map(|entry| entry.mapping).collect(),
        })
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

    /// The mappings behind the windows, in the order of the addresses.
    pub fn mappings(&self) -> &[Arc<Mapping>] {
        &self.mappings
    }

    /// True if some memory is gone ([`Mapping::is_lost`]).
    pub fn is_lost(&self) -> bool {
        self.mappings.iter().any(|mapping| mapping.is_lost())
    }
}

impl fmt::Debug for WindowTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.windows).finish()
    }
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
