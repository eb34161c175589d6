// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which bus addresses are backed by which memory.

use crate::{BusAddr, Error, RamSlice};

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A run of bus addresses and the memory behind it.
#[derive(Clone, Copy, Debug)]
pub struct Window<'m> {
    base: BusAddr,
    ram: RamSlice<'m>,
    access: Access,
}

impl<'m> Window<'m> {
    /// Backs the bus addresses from `base` on with `ram`.
    ///
    /// # Errors
    ///
    /// [`Error::BadWindow`] if `ram` is empty or the addresses would wrap around.
    pub fn new(base: BusAddr, ram: RamSlice<'m>, access: Access) -> Result<Self, Error> {
        let len = ram.len() as u64;
        if len == 0 || base.checked_add(len - 1).is_none() {
            return Err(Error::BadWindow { addr: base, len });
        }
        Ok(Self { base, ram, access })
    }

    /// First bus address.
    pub const fn base(&self) -> BusAddr {
        self.base
    }

    /// The memory behind the window; its length is the window's.
    pub const fn ram(&self) -> RamSlice<'m> {
        self.ram
    }

    /// What the window allows.
    pub const fn access(&self) -> Access {
        self.access
    }
}

/// All windows that one user of a bus can see, sorted by address.
///
/// A borrowed view of two words: the data path passes it by value. Tables
/// change by being replaced, never in place.
#[derive(Clone, Copy, Debug)]
pub struct AddressSpace<'m> {
    windows: &'m [Window<'m>],
}

impl<'m> AddressSpace<'m> {
    /// No memory at all.
    pub const EMPTY: AddressSpace<'static> = AddressSpace { windows: &[] };

    /// Looks through `windows`, which must be sorted by address.
    ///
    /// # Errors
    ///
    /// [`Error::BadWindow`] names the first window that overlaps or precedes the one before it.
    pub fn new(windows: &'m [Window<'m>]) -> Result<Self, Error> {
        for pair in windows.windows(2) {
            let (one, two) = (&pair[0], &pair[1]);
            if two.base < one.base || two.base.0 - one.base.0 < one.ram.len() as u64 {
                return Err(Error::BadWindow {
                    addr: two.base,
                    len: two.ram.len() as u64,
                });
            }
        }
        Ok(Self { windows })
    }

    /// Looks through windows that [`Self::new`] has already found to be sorted and disjoint.
    #[cfg(feature = "std")]
    #[inline]
    pub(crate) const fn from_checked(windows: &'m [Window<'m>]) -> Self {
        Self { windows }
    }

    /// The windows, sorted by address.
    pub const fn windows(&self) -> &'m [Window<'m>] {
        self.windows
    }

    /// The window that holds `addr`, and how far into it that is.
    #[inline]
    fn find(&self, addr: BusAddr) -> Option<(usize, usize)> {
        // Most guests have one to three windows, which a scan finds faster than a search.
        let index = if self.windows.len() <= 4 {
            self.windows
                .iter()
                .rposition(|window| window.base <= addr)?
        } else {
            self.windows
                .partition_point(|window| window.base <= addr)
                .checked_sub(1)?
        };
        let window = &self.windows[index];
        let offset = usize::try_from(addr.0 - window.base.0).ok()?;
        (offset < window.ram.len()).then_some((index, offset))
    }

    /// `len` bytes at `addr` that lie in one piece of memory, or `None` if they
    /// do not: [`Self::slice`] says why.
    #[inline]
    pub fn get(&self, addr: BusAddr, len: usize, access: Access) -> Option<RamSlice<'m>> {
        let (index, offset) = self.find(addr)?;
        let window = &self.windows[index];
        if access == Access::ReadWrite && window.access == Access::Read {
            return None;
        }
        window.ram.get(offset, len)
    }

    /// `len` bytes at `addr` that lie in one piece of memory.
    ///
    /// # Errors
    ///
    /// [`Error::Unmapped`], [`Error::ReadOnly`], or [`Error::Scattered`] when
    /// the range is there but crosses into another window.
    #[inline]
    pub fn slice(&self, addr: BusAddr, len: usize, access: Access) -> Result<RamSlice<'m>, Error> {
        match self.get(addr, len, access) {
            Some(slice) => Ok(slice),
            None => Err(self.explain(addr, len, access)),
        }
    }

    /// Why there is no such slice.
    #[cold]
    fn explain(&self, addr: BusAddr, len: usize, access: Access) -> Error {
        if let Some((index, offset)) = self.find(addr) {
            // An empty range has no pieces, but lies in a window.
            let window = &self.windows[index];
            if window.ram.get(offset, len).is_some() {
                return Error::ReadOnly { addr, len };
            }
        }
        match self.pieces(addr, len, access, |_| true) {
            Ok(()) => Error::Scattered { addr, len },
            Err(error) => error,
        }
    }

    /// Hands `len` bytes at `addr` to `each`, piece by piece in order, going on
    /// into adjacent windows. Stops early when `each` returns false. An empty
    /// range has no pieces, wherever it is.
    ///
    /// # Errors
    ///
    /// [`Error::Unmapped`] or [`Error::ReadOnly`]; `each` may have seen some pieces by then.
    #[inline]
    pub fn pieces(
        &self,
        addr: BusAddr,
        len: usize,
        access: Access,
        mut each: impl FnMut(RamSlice<'m>) -> bool,
    ) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let unmapped = Error::Unmapped { addr, len };
        let Some((mut index, mut offset)) = self.find(addr) else {
            return Err(unmapped);
        };
        let mut left = len;
        loop {
            let window = &self.windows[index];
            if access == Access::ReadWrite && window.access == Access::Read {
                return Err(Error::ReadOnly { addr, len });
            }
            let (_, rest) = window.ram.split_at(offset);
            let (piece, _) = rest.split_at(left);
            left -= piece.len();
            if !each(piece) || left == 0 {
                return Ok(());
            }
            let end = window.base.checked_add(window.ram.len() as u64);
            index += 1;
            offset = 0;
            if end.is_none() || self.windows.get(index).map(Window::base) != end {
                return Err(unmapped);
            }
        }
    }
}

#[cfg(test)]
#[path = "window_test.rs"]
mod tests;
