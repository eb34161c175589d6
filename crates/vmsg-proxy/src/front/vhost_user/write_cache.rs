// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a disk's guest wants its writes cached: what it has written to the configuration (virtio 1.3 §5.2.5.2) holds for as long as its
//! driver runs, and front ends say it once.
//!
//! A front end that pauses its guest stops all rings, which resets the device here; when it goes on, the device must not have forgotten what its
//! guest relies on: a guest that has turned the cache off does not flush. And it must outlive this process: so it is noted behind the records of what
//! is in flight, in memory that the front end gives back to the next process. A front end that goes on in the middle of its rings without such a
//! note gets a disk that does not cache.

use super::guest::{Guest, GuestError, op};
use super::wire::RawInflight;
use crate::session::{InflightMemory, Op};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::FeatureSet;
use vmsg_mem::{Access, Mapping};

/// Virtio id of disks.
const BLOCK: u32 = 2;
/// VIRTIO_BLK_F_CONFIG_WCE.
const F_CONFIG_WCE: u32 = 11;
/// Where the byte `writeback` of the configuration is.
const AT: u32 = 32;

/// Bytes behind the records.
pub(super) const NOTE: u64 = 64;
/// How a note begins; the byte that was written follows, or [`NOTHING`]. So other back ends' memory is not taken for one.
const MAGIC: [u8; 8] = *b"vmsg-wce";
/// The guest has written nothing.
const NOTHING: u8 = 0xff;

/// What is known of the guest's wish.
#[derive(Debug, Default)]
pub(super) struct WriteCache {
    /// As the guest has written it.
    wanted: Option<u8>,
    /// The device has it so since it was reset.
    told: bool,
    note: Option<Mapping>,
}

/// Where the note is in memory for these records.
fn place(records: &RawInflight) -> u64 {
    records.offset + InflightMemory::bytes_for(records.rings, records.entries)
}

impl WriteCache {
    /// The front end has written the configuration.
    pub(super) fn written(&mut self, offset: u32, data: &[u8]) {
        let at = AT
            .checked_sub(offset)
            .and_then(|at| usize::try_from(at).ok());
        if let Some(&byte) = at.and_then(|at| data.get(at)) {
            self.wanted = Some(byte & 1);
            self.told = true;
            self.take_note();
        }
    }

    /// The device was reset.
    pub(super) fn reset(&mut self) {
        self.told = false;
    }

    fn take_note(&self) {
        if let Some(note) = &self.note {
            let mut bytes = [NOTHING; 9];
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8] = self.wanted.unwrap_or(NOTHING);
            note.ram().write(0, &bytes);
        }
    }

    /// The front end keeps `records` in `file`, which has room for a note if it was made here. A note of the process before is believed, unless more
    /// is known.
    fn keep(&mut self, records: &RawInflight, file: &Arc<OwnedFd>) {
        let need = InflightMemory::bytes_for(records.rings, records.entries) + NOTE;
        let note = (records.size >= need)
            .then(|| Mapping::of_fd(file.as_fd(), place(records), NOTE, Access::ReadWrite).ok())
            .flatten();
        self.note = note;
        let Some(note) = &self.note else {
            return;
        };
        let mut bytes = [0; 9];
        note.ram().read(0, &mut bytes);
        if self.wanted.is_none() && bytes[..8] == MAGIC && bytes[8] <= 1 {
            self.wanted = Some(bytes[8]);
        }
        // Who writes nothing there says that there is nothing.
        if bytes[..8] != MAGIC {
            // Memory of another back end, or new.
            let is_new = bytes == [0; 9];
            self.note = self.note.take().filter(|_| is_new);
        }
        self.take_note();
    }
}

impl Guest {
    /// See [`WriteCache::keep`].
    pub(super) fn keep_write_cache(&mut self, records: &RawInflight, file: &Arc<OwnedFd>) {
        if self.facts.info.device_id == BLOCK {
            self.write_cache.keep(records, file);
        }
    }

    /// Tells a disk that was reset what its guest has wanted before; `resumed`: the front end goes on in the middle of a ring.
    pub(super) fn restore_write_cache(&mut self, resumed: bool) -> Result<(), GuestError> {
        let features = FeatureSet::from_u64(self.features.unwrap_or(0));
        let chooses = self.facts.info.device_id == BLOCK && features.bit(F_CONFIG_WCE);
        if !chooses || self.write_cache.told || AT >= self.facts.info.config_size {
            return Ok(());
        }
        let unknown =
            resumed && self.write_cache.wanted.is_none() && self.write_cache.note.is_none();
        // It may have turned the cache off, or not.
        let wanted = self.write_cache.wanted.or(unknown.then_some(0));
        let Some(wanted) = wanted else {
            return Ok(());
        };
        self.session
            .call(Op::WriteConfig {
                offset: AT,
                data: vec![wanted],
            })
            .map_err(op("how writes are cached"))?;
        self.write_cache.told = true;
        Ok(())
    }
}
