// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Records of what is in flight, kept by the front end: so they outlive the device host and this process.
//!
//! The front end asks for memory once for each start of the guest's driver, gives it back each time before it sets rings up, and throws it
//! away with a reset. One queue's record after another, each at a multiple of 64 bytes, as QEMU's and DPDK's back ends have it.

use super::guest::{Guest, GuestError, Reply, op};
use super::wire::RawInflight;
use super::write_cache::NOTE;
use crate::memory::{FileError, MemoryFile};
use crate::session::{InflightMemory, Op};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Entries for which there is room at least. QEMU asks for as many as a queue has by its own account, but on virtio-mmio it lets the guest's driver
/// make each queue as large as any can be.
const ROOM: u16 = 1024;

/// The same memory by the entries for which it was made, which its size tells: QEMU says what it had asked for.
fn as_made(raw: RawInflight) -> RawInflight {
    let entries = raw.entries.max(ROOM);
    let made_here = raw.size == InflightMemory::bytes_for(raw.rings, entries) + NOTE;
    RawInflight {
        entries: if made_here { entries } else { raw.entries },
        ..raw
    }
}

fn check(raw: &RawInflight) -> Result<(), GuestError> {
    if raw.rings == 0 || raw.rings > 256 {
        return Err(GuestError::Invalid(
            "in-flight memory for an impossible number of rings",
        ));
    }
    if !raw.entries.is_power_of_two() {
        return Err(GuestError::Invalid(
            "in-flight memory for rings of an impossible size",
        ));
    }
    Ok(())
}

impl Guest {
    /// GET_INFLIGHT_FD.
    pub(super) fn make_inflight(&self, wanted: RawInflight) -> Result<Reply, GuestError> {
        check(&wanted)?;
        let entries = wanted.entries.max(ROOM);
        let memory = InflightMemory::with_room(wanted.rings, entries, NOTE)
            .map_err(|error| super::MemoryError::File(FileError::Look(error)))?;
        let reply = RawInflight {
            size: InflightMemory::bytes_for(wanted.rings, entries) + NOTE,
            offset: 0,
            padding: 0,
            ..wanted
        };
        Ok(Reply::Memory(
            reply.as_bytes().to_vec(),
            Arc::clone(memory.file()),
        ))
    }

    /// SET_INFLIGHT_FD.
    pub(super) fn keep_inflight(
        &mut self,
        kept: RawInflight,
        fd: OwnedFd,
    ) -> Result<(), GuestError> {
        check(&kept)?;
        let kept = as_made(kept);
        let need = kept.offset.checked_add(kept.size);
        let need = need.filter(|_| {
            kept.offset.is_multiple_of(8)
                && kept.size >= InflightMemory::bytes_for(kept.rings, kept.entries)
        });
        let need = need.ok_or(GuestError::Invalid(
            "in-flight memory that is too small or not aligned",
        ))?;
        let file = MemoryFile::new(fd, need).map_err(super::MemoryError::File)?;
        self.keep_write_cache(&kept, &file.fd);
        let memory = InflightMemory::of_file(file.fd, kept.offset, kept.rings, kept.entries);
        if let Some(copies) = &mut self.copies {
            copies.inflight = Some(memory);
            return Ok(());
        }
        self.session
            .call(Op::KeepInflight(Some(memory)))
            .map(drop)
            .map_err(op("keeping what is in flight"))
    }
}
