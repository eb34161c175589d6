// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The side that has the file.

use std::io::Read;

use sha2::{Digest, Sha256};

use super::layout::{Area, CopyError, Cursor, State};
use super::{CHUNK, Step};

pub(crate) struct Sender<R> {
    area: Area,
    source: R,
    /// Bytes of the file that are not yet in the ring.
    left: u64,
    cursor: Cursor,
    hash: Sha256,
    digest: Option<[u8; 32]>,
    buffer: Vec<u8>,
}

impl<R: Read> Sender<R> {
    /// Sends `size` bytes of `source`.
    pub(crate) fn new(area: Area, source: R, size: u64) -> Self {
        Self {
            area,
            source,
            left: size,
            cursor: Cursor::default(),
            hash: Sha256::new(),
            digest: None,
            buffer: vec![0; CHUNK],
        }
    }

    pub(crate) fn area(&self) -> &Area {
        &self.area
    }

    /// The digest of what was sent, once all was.
    pub(crate) fn digest(&self) -> Option<[u8; 32]> {
        self.digest
    }

    /// Does what can be done now.
    pub(crate) fn step(&mut self) -> Result<Step, CopyError> {
        let news = self.area.look()?;
        if !self.area.is_together() {
            return Ok(if news { Step::Moved } else { Step::Idle });
        }
        match self.area.state()? {
            State::Busy => {}
            State::Done if self.digest.is_some() => return Ok(Step::Done),
            State::Done => return Err(CopyError::Nonsense("it is done before all was sent")),
            State::Wrong => return Err(CopyError::Wrong),
            State::GivenUp => return Err(CopyError::GivenUp),
        }
        let room = self.area.room();
        let there = self.cursor.position.wrapping_sub(self.area.position());
        let Some(free) = room.checked_sub(there) else {
            return Err(CopyError::Nonsense("it has taken what was not there"));
        };
        if self.digest.is_some() || (self.left > 0 && free == 0) {
            return Ok(if news { Step::Moved } else { Step::Idle });
        }
        let bytes = free.min(self.area.until_end(self.cursor.place));
        let bytes = self.left.min(u64::from(bytes)).min(CHUNK as u64);
        let chunk = &mut self.buffer[..usize::try_from(bytes).expect("at most CHUNK")];
        self.source
            .read_exact(chunk)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => CopyError::Changed,
                _ => CopyError::File("read", error),
            })?;
        self.area.write(self.cursor.place, chunk);
        self.hash.update(&*chunk);
        self.left -= bytes;
        let bytes = u32::try_from(bytes).expect("at most CHUNK");
        self.cursor.advance(bytes, room);
        self.area.set_position(self.cursor.position);
        if self.left == 0 {
            let digest = self.hash.finalize_reset().into();
            self.area.set_digest(&digest);
            self.area.set_state(State::Done);
            self.digest = Some(digest);
        }
        Ok(Step::Moved)
    }
}
