// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory for work that goes on after the call that began it.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::{Error, Pieces, RamSlice, WindowTable};

/// As many pieces are kept without an allocation.
const FEW: usize = 4;

/// A run of bytes with what keeps it mapped, to be given to other threads and to the kernel.
///
/// [`Pieces`] are borrowed; this is owned. The memory is that of a peer as ever: it can change at any time. Pieces that follow
/// each other in memory are one piece here.
pub struct Held {
    /// Valid as long as `owner`, and only handed out for borrows of `self`.
    pieces: List,
    /// Bytes of the first piece that are not part of the run any more.
    skip: usize,
    /// Length of the run in bytes.
    len: usize,
    owner: Owner,
}

#[derive(Clone)]
enum List {
    Few([RamSlice<'static>; FEW], usize),
    Many(Vec<RamSlice<'static>>),
}

#[derive(Clone)]
enum Owner {
    Table(Arc<WindowTable>),
    /// Not a `Box`: that would claim that nobody else writes there.
    Buffer(Arc<[AtomicU64]>),
    /// The first bytes are in the buffer.
    Both(
        Arc<WindowTable>,
        #[expect(dead_code, reason = "only kept")] Arc<[AtomicU64]>,
    ),
}

impl List {
    fn as_slice(&self) -> &[RamSlice<'static>] {
        match self {
            Self::Few(pieces, count) => &pieces[..*count],
            Self::Many(pieces) => pieces,
        }
    }

    fn last_mut(&mut self) -> Option<&mut RamSlice<'static>> {
        match self {
            Self::Few(pieces, count) => pieces[..*count].last_mut(),
            Self::Many(pieces) => pieces.last_mut(),
        }
    }

    fn push(&mut self, piece: RamSlice<'static>) {
        match self {
            Self::Few(pieces, count) if *count < FEW => {
                pieces[*count] = piece;
                *count += 1;
            }
            Self::Few(pieces, _) => {
                let mut many = Vec::with_capacity(4 * FEW);
                many.extend_from_slice(pieces);
                many.push(piece);
                *self = Self::Many(many);
            }
            Self::Many(pieces) => pieces.push(piece),
        }
    }
}

impl Held {
    /// Holds `pieces`, which lie in the memory of `table`.
    ///
    /// # Errors
    ///
    /// [`Error::Foreign`] if some of them do not.
    pub fn new(pieces: Pieces<'_>, table: &Arc<WindowTable>) -> Result<Self, Error> {
        let mut list = List::Few([RamSlice::EMPTY; FEW], 0);
        // Where the mapping of the last piece ends.
        let mut end = 0;
        let mut len = 0usize;
        for piece in pieces.iter() {
            len = len.saturating_add(piece.len());
            let at = piece.as_ptr();
            if let Some(last) = list.last_mut() {
                let joint = at.addr() == last.as_ptr().addr() + last.len();
                if joint && piece.len() <= end - at.addr() {
                    // SAFETY: both are parts of one mapping of `table`, which is kept below.
                    *last = unsafe { keep(last.as_ptr(), last.len() + piece.len()) };
                    continue;
                }
            }
            end = table
                .end_of_mapping(piece)
                .ok_or(Error::Foreign { len: piece.len() })?;
            // SAFETY: part of a mapping of `table`, which is kept below.
            list.push(unsafe { keep(at, piece.len()) });
        }
        Ok(Self {
            pieces: list,
            skip: 0,
            len,
            owner: Owner::Table(Arc::clone(table)),
        })
    }

    /// New zeroed memory of `len` bytes that belongs to nobody else and begins at a multiple of `align`, a power of two.
    ///
    /// # Panics
    ///
    /// If `align` is no power of two.
    pub fn buffer(len: usize, align: usize) -> Self {
        assert!(align.is_power_of_two(), "an alignment");
        let words = (len + align).div_ceil(size_of::<AtomicU64>());
        let memory: Arc<[AtomicU64]> = (0..words).map(|_| AtomicU64::new(0)).collect();
        let whole = RamSlice::from_atomics(&memory);
        let skip = whole.as_ptr().addr().wrapping_neg() & (align - 1);
        let part = whole.get(skip, len).expect("room for the alignment");
        // SAFETY: part of `memory`, which is kept below.
        let part = unsafe { keep(part.as_ptr(), len) };
        let mut pieces = List::Few([RamSlice::EMPTY; FEW], 0);
        if len > 0 {
            pieces.push(part);
        }
        Self {
            pieces,
            skip: 0,
            len,
            owner: Owner::Buffer(memory),
        }
    }

    /// The run.
    pub fn pieces(&self) -> Pieces<'_> {
        Pieces::new(self.pieces.as_slice())
            .skip(self.skip)
            .take(self.len)
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for a run of no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the first `len` bytes, or all if there are fewer.
    pub fn advance(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        self.skip += len;
    }

    /// Forgets all behind the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Has the first `len` bytes, or all if there are fewer, be a copy in memory that belongs to nobody else and begins at a multiple
    /// of `align`, a power of two: what is looked at there is what is used afterwards. Nothing happens to [`Self::buffer`].
    ///
    /// # Panics
    ///
    /// If `align` is no power of two.
    pub fn settle(&mut self, len: usize, align: usize) {
        let Owner::Table(table) = &self.owner else {
            return;
        };
        let len = len.min(self.len);
        let head = Self::buffer(len, align);
        self.pieces().take(len).copy_to(head.pieces());
        let Owner::Buffer(buffer) = head.owner else {
            unreachable!("just made")
        };
        let mut pieces = head.pieces;
        for piece in self.pieces().skip(len).iter() {
            // SAFETY: part of a mapping of the table, which is kept below.
            pieces.push(unsafe { keep(piece.as_ptr(), piece.len()) });
        }
        *self = Self {
            owner: Owner::Both(Arc::clone(table), buffer),
            pieces,
            skip: 0,
            len: self.len,
        };
    }

    /// The windows whose memory this is; `None` for [`Self::buffer`].
    pub fn table(&self) -> Option<&Arc<WindowTable>> {
        match &self.owner {
            Owner::Table(table) | Owner::Both(table, _) => Some(table),
            Owner::Buffer(_) => None,
        }
    }
}

/// Two for the same memory.
impl Clone for Held {
    fn clone(&self) -> Self {
        Self {
            pieces: self.pieces.clone(),
            skip: self.skip,
            len: self.len,
            owner: self.owner.clone(),
        }
    }
}

/// # Safety
///
/// The bytes stay mapped as long as the caller hands the slice out.
unsafe fn keep(at: *mut u8, len: usize) -> RamSlice<'static> {
    // SAFETY: the caller's promise; slices never begin at null.
    unsafe { RamSlice::from_raw_parts(NonNull::new_unchecked(at), len) }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.pieces().iter()).finish()
    }
}

#[cfg(test)]
#[path = "held_test.rs"]
mod tests;
