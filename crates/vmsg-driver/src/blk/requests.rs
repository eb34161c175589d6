// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The requests of one queue: their headers and status bytes in lent memory, and what the driver keeps about them in its own.

use vmsg_mem::{BusAddr, RamSlice};
use vmsg_queue::{Buffer, DriverQueue, DriverSlot, QueueError};

use super::request::{Completion, ID_LEN, NO_STATUS, Request, kind, status};

/// Bytes of lent memory for each entry of a queue, for what belongs to a request beside its data:
///
/// | offset | |
/// |---|---|
/// | 0 | header: le32 type, le32 reserved, le64 sector |
/// | 16 | segment of DISCARD and WRITE_ZEROES: le64 sector, le32 sectors, le32 flags |
/// | 32 | status |
/// | 36 | what GET_ID brings |
pub const CELL: usize = 64;

const SEGMENT: usize = 16;
const STATUS: usize = 32;
const ID: usize = 36;

/// Bytes of a header.
const HEADER_LEN: u32 = 16;
const SEGMENT_LEN: u32 = 16;
/// Bytes of a name, as descriptors count them.
const NAME_LEN: u32 = 20;
const _: () = assert!(NAME_LEN as usize == ID_LEN);

/// The flag of a segment that lets the device give the space up.
const UNMAP: u32 = 1;

/// Data buffers that a request can have at most, here.
pub const MAX_SEGMENTS: usize = 254;
/// Buffers of a request for which little room is enough.
const FEW: usize = 4;

/// What is kept about a request under way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pending {
    tag: u64,
    kind: u32,
    writable: u32,
}

/// The requests of one queue. `P` holds one [`Pending`] for each entry of the queue: a `Vec`, an array, a borrowed slice.
///
/// The queue itself is given to each call, always the same one.
#[derive(Debug)]
pub struct Requests<'m, P> {
    cells: RamSlice<'m>,
    base: BusAddr,
    pending: P,
    in_flight: usize,
}

impl<'m, P: AsRef<[Pending]> + AsMut<[Pending]>> Requests<'m, P> {
    /// For a queue of `size` entries, none of which is in use. `cells` is memory that the device finds at `base`, [`CELL`] bytes for each
    /// entry.
    ///
    /// # Errors
    /// [`QueueError::BadMemory`] if the memory is too short or leaves the bus's addresses, or there are not as many `pending` as entries.
    pub fn new(
        size: u16,
        (cells, base): (RamSlice<'m>, BusAddr),
        pending: P,
    ) -> Result<Self, QueueError> {
        let need = CELL * usize::from(size);
        if cells.len() < need
            || base.checked_add(cells.len() as u64).is_none()
            || pending.as_ref().len() != usize::from(size)
        {
            return Err(QueueError::BadMemory { size });
        }
        Ok(Self {
            cells,
            base,
            pending,
            in_flight: 0,
        })
    }

    /// Requests that were added and have not come back.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Adds `request` to the queue; the device sees it after [`DriverQueue::publish`] and may use its buffers until it comes back from
    /// [`pop`](Self::pop), by its `tag`.
    ///
    /// # Errors
    /// [`QueueError::Full`] for now; [`QueueError::BadChain`] for good: too many buffers for the queue or more than [`MAX_SEGMENTS`], an empty
    /// one; [`QueueError::Broken`].
    pub fn add<S: AsRef<[DriverSlot]> + AsMut<[DriverSlot]>>(
        &mut self,
        ring: &mut DriverQueue<'_, S>,
        tag: u64,
        request: Request<'_>,
    ) -> Result<(), QueueError> {
        let Some(token) = ring.next_token() else {
            return Err(if ring.is_broken() {
                QueueError::Broken
            } else {
                QueueError::Full
            });
        };
        let cell = self
            .cells
            .get(token.index() * CELL, CELL)
            .expect("as many cells as entries");
        let at = |offset: usize| BusAddr(self.base.0 + (token.index() * CELL + offset) as u64);
        let segment = [(at(SEGMENT), SEGMENT_LEN)];
        let name = [(at(ID), NAME_LEN)];
        let (sector, readable, writable): (u64, &[Buffer], &[Buffer]) = match request {
            Request::Read { sector, to } => (sector, &[], to),
            Request::Write { sector, from } => (sector, from, &[]),
            Request::Flush => (0, &[], &[]),
            Request::Discard { sector, sectors } => {
                write_segment(cell, sector, sectors, 0);
                (0, &segment, &[])
            }
            Request::WriteZeroes {
                sector,
                sectors,
                unmap,
            } => {
                write_segment(cell, sector, sectors, if unmap { UNMAP } else { 0 });
                (0, &segment, &[])
            }
            Request::GetId => (0, &[], &name),
            Request::Other {
                sector,
                readable,
                writable,
                ..
            } => (sector, readable, writable),
        };
        let mut header = [0; HEADER_LEN as usize];
        header[..4].copy_from_slice(&request.kind().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        cell.write_array(0, &header);
        cell.write(STATUS, &[NO_STATUS]);

        let (header, status) = ((at(0), HEADER_LEN), (at(STATUS), 1));
        let most = readable.len().max(writable.len());
        let added = if most < FEW {
            let (mut first, mut last) = ([status; FEW], [status; FEW]);
            ring.add(
                put(&mut first, &[header], readable),
                put(&mut last, writable, &[status]),
            )?
        } else if most <= MAX_SEGMENTS {
            let mut first = [status; MAX_SEGMENTS + 1];
            let mut last = [status; MAX_SEGMENTS + 1];
            ring.add(
                put(&mut first, &[header], readable),
                put(&mut last, writable, &[status]),
            )?
        } else {
            let buffers = readable.len() + writable.len() + 2;
            return Err(QueueError::BadChain { buffers, bytes: 0 });
        };
        debug_assert_eq!(added, token);
        let room = writable.iter().map(|&(_, len)| u64::from(len)).sum::<u64>() + 1;
        self.pending.as_mut()[token.index()] = Pending {
            tag,
            kind: request.kind(),
            writable: u32::try_from(room).unwrap_or(u32::MAX),
        };
        self.in_flight += 1;
        Ok(())
    }

    /// Takes a request that is done, if there is one.
    ///
    /// # Errors
    /// As [`DriverQueue::pop_used`]: faults of the device, which break the queue.
    pub fn pop<S: AsRef<[DriverSlot]> + AsMut<[DriverSlot]>>(
        &mut self,
        ring: &mut DriverQueue<'_, S>,
    ) -> Result<Option<Completion>, QueueError> {
        let Some(used) = ring.pop_used()? else {
            return Ok(None);
        };
        let at = used.token.index();
        let Pending {
            tag,
            kind,
            writable,
        } = self.pending.as_ref()[at];
        let cell = self
            .cells
            .get(at * CELL, CELL)
            .expect("as many cells as entries");
        let mut byte = [NO_STATUS];
        cell.read(STATUS, &mut byte);
        let result = status(byte[0]);
        let id = (kind == kind::GET_ID && result.is_ok())
            .then(|| cell.read_array(ID))
            .flatten();
        self.in_flight = self.in_flight.saturating_sub(1);
        Ok(Some(Completion {
            tag,
            result,
            written: used.written,
            writable,
            id,
        }))
    }
}

/// `a` and `b` one after another in `room`, which is long enough.
fn put<'r>(room: &'r mut [Buffer], a: &[Buffer], b: &[Buffer]) -> &'r [Buffer] {
    let len = a.len() + b.len();
    room[..a.len()].copy_from_slice(a);
    room[a.len()..len].copy_from_slice(b);
    &room[..len]
}

fn write_segment(cell: RamSlice<'_>, sector: u64, sectors: u32, flags: u32) {
    let mut bytes = [0; SEGMENT_LEN as usize];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    cell.write_array(SEGMENT, &bytes);
}

#[cfg(test)]
#[path = "requests_test.rs"]
mod tests;
