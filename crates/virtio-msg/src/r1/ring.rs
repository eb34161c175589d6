// SPDX-License-Identifier: Apache-2.0 OR MIT
//! First in, first out, with a fixed number of places.

#[derive(Clone, Copy, Debug)]
pub(super) struct Ring<T, const N: usize> {
    places: [Option<T>; N],
    head: usize,
    len: usize,
}

impl<T: Copy, const N: usize> Ring<T, N> {
    const HAS_PLACES: () = assert!(N > 0);

    pub(super) fn new() -> Ring<T, N> {
        let () = Self::HAS_PLACES;
        Ring {
            places: [None; N],
            head: 0,
            len: 0,
        }
    }

    /// Places left.
    pub(super) fn room(&self) -> usize {
        N - self.len
    }

    /// Says whether there was a place.
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.len == N {
            return false;
        }
        self.places[(self.head + self.len) % N] = Some(value);
        self.len += 1;
        true
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let value = self.places[self.head].take()?;
        self.head = (self.head + 1) % N;
        self.len -= 1;
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().flatten()
    }
}
