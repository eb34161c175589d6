// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors, copied in runs.

use alloc::vec::Vec;

use vmsg_mem::BusAddr;

use super::Memory;
use crate::config::{DESCRIPTOR_LEN, DESCRIPTOR_SIZE};
use crate::ring::Descriptor;

/// No run is longer, whatever a memory likes to read ahead.
const MOST: u32 = 4096;

/// A run of descriptors of one table, copied from the driver's memory.
#[derive(Debug, Default)]
pub(super) struct Run {
    bytes: Vec<u8>,
    /// Index of the first one.
    first: u32,
    /// How many there are.
    count: u32,
}

/// Where a table is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) addr: BusAddr,
    /// Descriptors, at most 65,536; the whole of it does not wrap around.
    pub(super) len: u32,
}

impl Run {
    /// Forgets what was copied: the driver may have written something else there.
    pub(super) fn forget(&mut self) {
        self.count = 0;
    }

    /// Descriptor `index` of the table at hand, or `None` outside of it. [`forget`](Self::forget) lies between two tables.
    #[inline]
    pub(super) fn get<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
        place: Place,
        index: u16,
    ) -> Result<Option<Descriptor>, M::Error> {
        let index = u32::from(index);
        if index >= place.len {
            return Ok(None);
        }
        if index.wrapping_sub(self.first) >= self.count {
            self.fetch(memory, place, index)?;
        }
        let at = (index - self.first) as usize * DESCRIPTOR_SIZE;
        Ok(self.bytes.get(at..at + DESCRIPTOR_SIZE).map(descriptor))
    }

    /// Copies the run around `index`.
    fn fetch<M: Memory + ?Sized>(
        &mut self,
        memory: &M,
        place: Place,
        index: u32,
    ) -> Result<(), M::Error> {
        let wish = memory.read_ahead() / DESCRIPTOR_SIZE;
        let most = u32::try_from(wish).unwrap_or(MOST).clamp(1, MOST);
        let first = index - index % most;
        let count = most.min(place.len - first);
        let len = count as usize * DESCRIPTOR_SIZE;
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        self.count = 0;
        let at = BusAddr(place.addr.0 + u64::from(first * DESCRIPTOR_LEN));
        memory.read(at, &mut self.bytes[..len])?;
        (self.first, self.count) = (first, count);
        Ok(())
    }
}

#[inline]
fn descriptor(bytes: &[u8]) -> Descriptor {
    let [addr, rest] = [0, 8].map(|at| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(word)
    });
    crate::ring::Words { addr, rest }.take_apart()
}
