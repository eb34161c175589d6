// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A buffer made of several pieces of memory.

use crate::RamSlice;

/// A run of bytes that lies in several pieces of shared memory: one side of a
/// descriptor chain, or a part of it. Cheap to copy and to cut.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'m> {
    /// The pieces that hold the run; the first byte is `skip` bytes into the first one.
    pieces: &'m [RamSlice<'m>],
    skip: usize,
    len: usize,
}

impl<'m> Pieces<'m> {
    /// A run of no bytes.
    pub const EMPTY: Pieces<'static> = Pieces {
        pieces: &[],
        skip: 0,
        len: 0,
    };

    /// All bytes of `pieces`, in order.
    ///
    /// The length saturates: pieces of one address space cannot add up to more
    /// than `usize::MAX` unless the same memory stands in the list many times.
    #[inline]
    pub fn new(pieces: &'m [RamSlice<'m>]) -> Self {
        let len = match pieces {
            [] => 0,
            [only] => only.len(),
            many => many
                .iter()
                .fold(0usize, |sum, piece| sum.saturating_add(piece.len())),
        };
        Self {
            pieces,
            skip: 0,
            len,
        }
    }

    /// Length in bytes.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True for a run of no bytes.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes, or all if there are fewer.
    #[inline]
    #[must_use]
    pub fn take(mut self, len: usize) -> Self {
        self.len = self.len.min(len);
        self
    }

    /// What follows the first `len` bytes; empty if there is nothing.
    #[inline]
    #[must_use]
    pub fn skip(mut self, len: usize) -> Self {
        let len = len.min(self.len);
        self.len -= len;
        self.skip += len;
        while let [first, rest @ ..] = self.pieces {
            if self.skip < first.len() {
                break;
            }
            self.skip -= first.len();
            self.pieces = rest;
        }
        self
    }

    /// The first `mid` bytes and what follows them.
    #[inline]
    #[must_use]
    pub fn split_at(self, mid: usize) -> (Self, Self) {
        (self.take(mid), self.skip(mid))
    }

    /// The memory of this run, piece by piece, without empty pieces.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = RamSlice<'m>> {
        let Self {
            pieces,
            mut skip,
            mut len,
        } = self;
        let mut pieces = pieces.iter();
        core::iter::from_fn(move || {
            while len > 0 {
                let piece = pieces.next()?;
                // Only the first piece is cut at its beginning.
                let offset = core::mem::take(&mut skip);
                let count = piece.len().saturating_sub(offset).min(len);
                if count > 0 {
                    len -= count;
                    return piece.get(offset, count);
                }
            }
            None
        })
    }

    /// Copies bytes from the beginning into `into`; returns how many there were.
    #[inline]
    pub fn read(self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.take(into.len()).iter() {
            done += piece.read(0, &mut into[done..]);
        }
        done
    }

    /// Copies `from` to the beginning; returns how many bytes fitted.
    #[inline]
    pub fn write(self, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.take(from.len()).iter() {
            done += piece.write(0, &from[done..]);
        }
        done
    }

    /// The first `N` bytes, or `None` if there are fewer.
    #[inline]
    pub fn read_array<const N: usize>(self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        if let Some(bytes) = self
            .pieces
            .first()
            .and_then(|first| first.read_array(self.skip))
        {
            return Some(bytes);
        }
        let mut bytes = [0; N];
        (self.read(&mut bytes) == N).then_some(bytes)
    }

    /// Copies `bytes` to the beginning; false if they do not fit, then as many are copied as do.
    #[inline]
    pub fn write_array<const N: usize>(self, bytes: &[u8; N]) -> bool {
        let whole = self.len >= N
            && self
                .pieces
                .first()
                .is_some_and(|first| first.write_array(self.skip, bytes));
        whole || self.write(bytes) == N
    }

    /// Copies this run to the beginning of `to`, as far as both reach; returns
    /// the number of bytes.
    #[inline]
    pub fn copy_to(self, to: Pieces<'_>) -> usize {
        if let ([from, ..], [into, ..]) = (self.pieces, to.pieces) {
            // Most often both lie in one piece.
            let len = self.len.min(to.len);
            if let (Some(from), Some(into)) = (from.get(self.skip, len), into.get(to.skip, len)) {
                return from.copy_to(into);
            }
        }
        self.copy_pieces(to)
    }

    fn copy_pieces(self, to: Pieces<'_>) -> usize {
        let mut to = to.iter();
        let mut target = RamSlice::EMPTY;
        let mut done = 0;
        for mut source in self.iter() {
            while !source.is_empty() {
                if target.is_empty() {
                    let Some(next) = to.next() else { return done };
                    target = next;
                }
                let n = source.copy_to(target);
                (_, source) = source.split_at(n);
                (_, target) = target.split_at(n);
                done += n;
            }
        }
        done
    }
}

#[cfg(test)]
#[path = "pieces_test.rs"]
mod tests;
