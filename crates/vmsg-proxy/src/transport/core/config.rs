// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space: read live, and compared with what the driver has seen, for its generation.

use super::{Backend, Core};

/// How much is remembered: as much as the PCI layout shows.
const MAX_BYTES: usize = 4096;

/// The memory of the configuration.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) generation: u32,
    /// The bytes that the driver has read since the last reset, as they were then.
    bytes: Vec<Option<u8>>,
}

impl Seen {
    pub(super) fn forget(&mut self) {
        self.bytes.clear();
    }

    /// How many bytes from the first one must be looked at to see whether something that was seen has changed.
    pub(super) fn seen(&self, size: u32) -> usize {
        let last = self.bytes.iter().rposition(Option::is_some);
        let len = last.map_or(0, |last| last + 1);
        len.min(usize::try_from(size).unwrap_or(usize::MAX))
    }

    /// Compares with what was seen, and takes over what is there now. What was never seen stays so.
    pub(super) fn compare(&mut self, offset: u32, now: &[u8]) {
        let mut changed = false;
        for (index, &now) in places(offset).zip(now) {
            if let Some(Some(old)) = self.bytes.get_mut(index)
                && std::mem::replace(old, now) != now
            {
                changed = true;
            }
        }
        if changed {
            self.generation = self.generation.wrapping_add(1);
        }
    }

    /// The driver sees these bytes.
    pub(super) fn observe(&mut self, offset: u32, now: &[u8]) {
        self.compare(offset, now);
        for (index, &now) in places(offset).zip(now).take_while(|(i, _)| *i < MAX_BYTES) {
            if self.bytes.len() <= index {
                self.bytes.resize(index + 1, None);
            }
            if let Some(byte) = self.bytes.get_mut(index) {
                *byte = Some(now);
            }
        }
    }

    /// What was seen there, and 0 for what was not.
    pub(super) fn recall(&self, offset: u32, data: &mut [u8]) {
        for (index, out) in places(offset).zip(data) {
            *out = self.bytes.get(index).copied().flatten().unwrap_or(0);
        }
    }

    /// The driver has written there: what it reads next is no change.
    pub(super) fn unsee(&mut self, offset: u32, len: usize) {
        for (index, _) in places(offset).zip(0..len) {
            if let Some(byte) = self.bytes.get_mut(index) {
                *byte = None;
            }
        }
    }
}

fn places(offset: u32) -> impl Iterator<Item = usize> {
    usize::try_from(offset).unwrap_or(usize::MAX)..
}

impl<B: Backend> Core<B> {
    pub(super) fn read_generation(&mut self) -> u32 {
        // What the driver has read until now must be of one piece.
        let size = self.config_size();
        let looked_at = self.config.seen(size);
        if looked_at != 0 && self.is_well() {
            let mut now = vec![0; looked_at];
            match self.backend.read_config(0, &mut now) {
                Ok(()) => self.config.compare(0, &now),
                Err(error) => self.fail("reading the configuration", &error),
            }
        }
        self.config.generation
    }

    /// Reads the configuration; bytes past its end are 0.
    pub(in crate::transport) fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let size = self.config_size();
        let Some((offset, len)) = within(offset, data.len(), size) else {
            return;
        };
        let Some(data) = data.get_mut(..len) else {
            return;
        };
        if self.is_well() {
            match self.backend.read_config(offset, data) {
                Ok(()) => {
                    self.config.observe(offset, data);
                    return;
                }
                Err(error) => self.fail("reading the configuration", &error),
            }
        }
        self.config.recall(offset, data);
    }

    /// Writes the configuration; bytes past its end are ignored.
    pub(in crate::transport) fn write_config(&mut self, offset: u64, data: &[u8]) {
        let size = self.config_size();
        let Some((offset, len)) = within(offset, data.len(), size) else {
            return;
        };
        let Some(data) = data.get(..len).filter(|_| self.is_well()) else {
            return;
        };
        match self.backend.write_config(offset, data) {
            Ok(()) => self.config.unsee(offset, len),
            Err(error) => self.fail("writing the configuration", &error),
        }
    }
}

/// The part of an access that lies within a configuration of `size` bytes: its offset and its length.
fn within(offset: u64, len: usize, size: u32) -> Option<(u32, usize)> {
    let offset = u32::try_from(offset).ok().filter(|&at| at < size)?;
    let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
    Some((offset, len.min(left))).filter(|(_, len)| *len != 0)
}
