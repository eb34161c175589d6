// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The side that gets the file.

use std::io::Write;

use sha2::{Digest, Sha256};

use super::layout::{Area, CopyError, Cursor, State};
use super::{CHUNK, Step};

pub(crate) struct Receiver<W> {
    area: Area,
    sink: W,
    /// The size of the file and how much of it is there, once somebody sends one.
    file: Option<(u64, u64)>,
    limit: u64,
    cursor: Cursor,
    hash: Sha256,
    digest: Option<[u8; 32]>,
    buffer: Vec<u8>,
}

impl<W: Write> Receiver<W> {
    /// Writes at most `limit` bytes to `sink`.
    pub(crate) fn new(area: Area, sink: W, limit: u64) -> Self {
        Self {
            area,
            sink,
            file: None,
            limit,
            cursor: Cursor::default(),
            hash: Sha256::new(),
            digest: None,
            buffer: vec![0; CHUNK],
        }
    }

    pub(crate) fn area(&self) -> &Area {
        &self.area
    }

    /// Bytes of the file so far.
    pub(crate) fn received(&self) -> u64 {
        self.file.map_or(0, |(_, received)| received)
    }

    /// The digest of the file, once it is there and right.
    pub(crate) fn digest(&self) -> Option<[u8; 32]> {
        self.digest
    }

    /// What was written.
    #[cfg(test)]
    pub(crate) fn into_sink(self) -> W {
        self.sink
    }

    /// Does what can be done now. When it is done, the sender has not been told yet.
    pub(crate) fn step(&mut self) -> Result<Step, CopyError> {
        if self.digest.is_some() {
            return Ok(Step::Done);
        }
        let news = self.area.look()?;
        if !self.area.is_together() {
            return Ok(if news { Step::Moved } else { Step::Idle });
        }
        let (size, received) = match self.file {
            Some(file) => file,
            None => {
                let size = self.area.file_size();
                let limit = self.limit;
                if size > limit {
                    return Err(CopyError::TooLarge { size, limit });
                }
                self.file = Some((size, 0));
                (size, 0)
            }
        };
        let state = match self.area.state()? {
            state @ (State::Busy | State::Done) => state,
            State::Wrong => return Err(CopyError::Nonsense("its state")),
            State::GivenUp => return Err(CopyError::GivenUp),
        };
        let room = self.area.room();
        let there = self.area.position().wrapping_sub(self.cursor.position);
        if there > room {
            return Err(CopyError::Nonsense("more than the ring holds"));
        }
        if u64::from(there) > size - received {
            return Err(CopyError::Nonsense("more than the file has"));
        }
        if there == 0 {
            if state == State::Done && received == size {
                let digest: [u8; 32] = self.hash.finalize_reset().into();
                if digest != self.area.digest() {
                    return Err(CopyError::Wrong);
                }
                self.sink
                    .flush()
                    .map_err(|error| CopyError::File("write", error))?;
                self.digest = Some(digest);
                return Ok(Step::Done);
            }
            if state == State::Done {
                return Err(CopyError::Nonsense("it is done before all was sent"));
            }
            return Ok(if news { Step::Moved } else { Step::Idle });
        }
        let bytes = there
            .min(self.area.until_end(self.cursor.place))
            .min(u32::try_from(CHUNK).expect("small"));
        let chunk = &mut self.buffer[..usize::try_from(bytes).expect("at most CHUNK")];
        // Once: what is written to the file is what was hashed, whatever the other side does meanwhile.
        self.area.read(self.cursor.place, chunk);
        self.hash.update(&*chunk);
        self.sink
            .write_all(chunk)
            .map_err(|error| CopyError::File("write", error))?;
        self.file = Some((size, received + u64::from(bytes)));
        self.cursor.advance(bytes, room);
        self.area.set_position(self.cursor.position);
        Ok(Step::Moved)
    }
}
