// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the device side answers.

use super::{ControlError, MAX_NAME, Request, SharedMemory, Status, id, put};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// An answer of the device side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response<'a> {
    /// Which request: the first u32 of its payload (in CLAIM, DEVICE_NAME and SHARED_MEMORY with the upper half 0).
    pub subject: u32,
    /// How it ended.
    pub status: Status,
    /// CLAIM: the holder, if it is another. DEVICE_NAME: the name. Otherwise empty.
    pub name: &'a str,
    /// SHARED_MEMORY: the region, if it was done. Otherwise nothing.
    pub memory: Option<SharedMemory>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ResponseWire {
    subject: U32,
    status: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RegionWire {
    len: U64,
    file_offset: U64,
}

impl<'a> Response<'a> {
    /// Reads the payload of the response `id`.
    ///
    /// # Errors
    /// [`ControlError`]: what is wrong with it.
    pub fn decode(id: u8, payload: &'a [u8]) -> Result<Self, ControlError> {
        if !Request::is_known(id) {
            return Err(ControlError::UnknownId(id));
        }
        let (wire, rest) =
            ResponseWire::read_from_prefix(payload).map_err(|_| ControlError::BadLength {
                id,
                len: payload.len(),
            })?;
        let bad_length = ControlError::BadLength {
            id,
            len: payload.len(),
        };
        let status = Status(wire.status.get());
        let mut memory = None;
        let rest = match id {
            id::CLAIM | id::DEVICE_NAME => rest,
            id::SHARED_MEMORY if status.is_ok() => {
                let wire = RegionWire::read_from_bytes(rest).map_err(|_| bad_length)?;
                memory = Some(SharedMemory {
                    len: wire.len.get(),
                    file_offset: wire.file_offset.get(),
                });
                &[]
            }
            _ if rest.is_empty() => rest,
            _ => return Err(bad_length),
        };
        let name = std::str::from_utf8(rest).map_err(|_| ControlError::BadName(id))?;
        if name.len() > MAX_NAME {
            return Err(ControlError::BadName(id));
        }
        Ok(Self {
            subject: wire.subject.get(),
            status,
            name,
            memory,
        })
    }

    /// Writes the payload to `out` and returns its length. A name for which
    /// there is no room is cut at a character.
    ///
    /// # Errors
    /// [`ControlError::NoRoom`] if not even what stands before the name fits.
    pub fn encode(&self, out: &mut [u8]) -> Result<usize, ControlError> {
        let at = put(
            &ResponseWire {
                subject: self.subject.into(),
                status: self.status.0.into(),
            },
            out,
        )?;
        if let Some(memory) = &self.memory {
            let wire = RegionWire {
                len: memory.len.into(),
                file_offset: memory.file_offset.into(),
            };
            return Ok(at + put(&wire, &mut out[at..])?);
        }
        let room = (out.len() - at).min(MAX_NAME);
        let name = &self.name[..self.name.floor_char_boundary(room)];
        out[at..at + name.len()].copy_from_slice(name.as_bytes());
        Ok(at + name.len())
    }
}
