// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies of a server, without I/O.
//!
//! Heads of replies are looked at here; data passes by: the caller is told how many of the next bytes belong where. Nothing is
//! kept between calls but what part of a reply was begun.

use super::ProtocolError;
use super::wire::{self, be16, be32, be64};

/// The longest head: an error with its text. As much must fit in the buffer whose front [`Replies::next`] looks at.
pub const LONGEST_HEAD: usize = wire::CHUNK_LEN + LONGEST_ERROR;
/// Longest payload of an error, in bytes: number, length and text, and something of kinds that are not known.
const LONGEST_ERROR: usize = 6 + wire::LONGEST_TEXT + 64;
/// Errors in the reply to one request that are taken.
const MOST_ERRORS: u8 = 16;

/// A request that is under way, as far as replies to it go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Where its data is on the export, in bytes.
    pub offset: u64,
    /// How much data is wanted, in bytes; 0 for all but reads.
    pub len: u32,
    /// How much of it has come.
    pub got: u32,
    /// Errors that have come.
    pub errors: u8,
}

impl Expected {
    /// `len` bytes wanted from `offset` on.
    pub const fn new(offset: u64, len: u32) -> Self {
        Self {
            offset,
            len,
            got: 0,
            errors: 0,
        }
    }
}

/// The requests that are under way.
pub trait UnderWay {
    /// The one with that cookie.
    fn get(&mut self, cookie: u64) -> Option<&mut Expected>;
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The next `len` bytes are data of this request, from its byte `at` on. To be taken off the stream before the next call.
    Data {
        /// Whose.
        cookie: u64,
        /// Where in the request's data.
        at: u32,
        /// How many bytes.
        len: u32,
    },
    /// Data of this request that is all zeroes.
    Zeroes {
        /// Whose.
        cookie: u64,
        /// Where in the request's data.
        at: u32,
        /// How many bytes.
        len: u32,
    },
    /// The request has failed; its reply goes on until [`Event::Done`].
    Failed {
        /// Which.
        cookie: u64,
        /// The protocol's number for the error.
        error: u32,
        /// The server's words; may be empty.
        text: String,
    },
    /// The reply to this request is complete.
    Done {
        /// Which.
        cookie: u64,
    },
}

/// The stream of replies.
#[derive(Debug)]
pub struct Replies {
    /// Reads get structured replies.
    structured: bool,
    /// What follows the head or the data that was told last.
    next: Option<Event>,
}

impl Replies {
    /// For a connection on which structured replies were agreed on, or not.
    pub fn new(structured: bool) -> Self {
        Self {
            structured,
            next: None,
        }
    }

    /// What comes next, of the bytes at the front of `bytes`, and how many of them are done with. `None`: more are needed,
    /// though never more than [`LONGEST_HEAD`].
    ///
    /// # Errors
    ///
    /// The server does not keep to the protocol; the stream makes no sense any more.
    pub fn next(
        &mut self,
        bytes: &[u8],
        requests: &mut impl UnderWay,
    ) -> Result<Option<(usize, Event)>, ProtocolError> {
        if let Some(event) = self.next.take() {
            if let Event::Done { cookie } = event {
                let expected = requests.get(cookie).ok_or(ProtocolError::Cookie(cookie))?;
                check_done(expected)?;
            }
            return Ok(Some((0, event)));
        }
        match be32(bytes, 0) {
            None => Ok(None),
            Some(wire::SIMPLE_MAGIC) => self.simple(bytes, requests),
            Some(wire::STRUCTURED_MAGIC) => self.chunk(bytes, requests),
            Some(other) => Err(ProtocolError::Magic(other)),
        }
    }

    fn simple(
        &mut self,
        bytes: &[u8],
        requests: &mut impl UnderWay,
    ) -> Result<Option<(usize, Event)>, ProtocolError> {
        let Some((error, cookie)) = be32(bytes, 4).zip(be64(bytes, 8)) else {
            return Ok(None);
        };
        let expected = requests.get(cookie).ok_or(ProtocolError::Cookie(cookie))?;
        let head = wire::SIMPLE_LEN;
        // A read has a length; nothing else does.
        if self.structured && expected.len > 0 {
            return Err(ProtocolError::Form("simple"));
        }
        // Parts of a structured reply that are complete must not be followed by this.
        if expected.errors > 0 {
            return Err(ProtocolError::Form("simple"));
        }
        let done = Event::Done { cookie };
        if error != 0 {
            expected.errors = 1;
            self.next = Some(done);
            let text = String::new();
            return Ok(Some((
                head,
                Event::Failed {
                    cookie,
                    error,
                    text,
                },
            )));
        }
        if expected.len == 0 {
            return Ok(Some((head, done)));
        }
        expected.got = expected.len;
        self.next = Some(done);
        let (at, len) = (0, expected.len);
        Ok(Some((head, Event::Data { cookie, at, len })))
    }

    fn chunk(
        &mut self,
        bytes: &[u8],
        requests: &mut impl UnderWay,
    ) -> Result<Option<(usize, Event)>, ProtocolError> {
        if !self.structured {
            return Err(ProtocolError::Form("structured"));
        }
        let fields = (
            be16(bytes, 4),
            be16(bytes, 6),
            be64(bytes, 8),
            be32(bytes, 16),
        );
        let (Some(flags), Some(kind), Some(cookie), Some(len)) = fields else {
            return Ok(None);
        };
        let expected = requests.get(cookie).ok_or(ProtocolError::Cookie(cookie))?;
        let payload = &bytes[wire::CHUNK_LEN..];
        let bad_length = Err(ProtocolError::ChunkLength { kind, len });
        let last = flags & wire::REPLY_DONE != 0;
        let done = Event::Done { cookie };
        let (head, event) = match kind {
            wire::CHUNK_NONE => {
                if len != 0 || !last {
                    return bad_length;
                }
                check_done(expected)?;
                return Ok(Some((wire::CHUNK_LEN, done)));
            }
            wire::CHUNK_DATA => {
                if len < 9 {
                    return bad_length;
                }
                let Some(offset) = be64(payload, 0) else {
                    return Ok(None);
                };
                let len = len - 8;
                let at = place(expected, offset, len)?;
                (8, Event::Data { cookie, at, len })
            }
            wire::CHUNK_HOLE => {
                if len != 12 {
                    return bad_length;
                }
                let Some((offset, len)) = be64(payload, 0).zip(be32(payload, 8)) else {
                    return Ok(None);
                };
                let at = place(expected, offset, len)?;
                (12, Event::Zeroes { cookie, at, len })
            }
            _ if kind & wire::CHUNK_ERROR != 0 => {
                let whole = match usize::try_from(len) {
                    Ok(whole) if (6..=LONGEST_ERROR).contains(&whole) => whole,
                    _ => return bad_length,
                };
                let Some(payload) = payload.get(..whole) else {
                    return Ok(None);
                };
                let error = be32(payload, 0).unwrap_or(0);
                let text = usize::from(be16(payload, 4).unwrap_or(0));
                let Some(text) = payload[6..].get(..text) else {
                    return bad_length;
                };
                expected.errors += 1;
                if error == 0 || expected.errors > MOST_ERRORS {
                    return Err(ProtocolError::Errors);
                }
                let text = wire::words(text);
                (
                    whole,
                    Event::Failed {
                        cookie,
                        error,
                        text,
                    },
                )
            }
            _ => return Err(ProtocolError::ChunkKind(kind)),
        };
        if last {
            self.next = Some(done);
        }
        Ok(Some((wire::CHUNK_LEN + head, event)))
    }
}

/// Where in the request's data `len` bytes at `offset` are.
///
/// That pieces overlap is not looked for: together they are never more than was asked for, and the data is the server's word
/// anyhow.
fn place(expected: &mut Expected, offset: u64, len: u32) -> Result<u32, ProtocolError> {
    let bad = ProtocolError::Data { offset, len };
    let at = offset
        .checked_sub(expected.offset)
        .and_then(|at| u32::try_from(at).ok())
        .filter(|at| at.checked_add(len).is_some_and(|end| end <= expected.len));
    let missing = expected.len - expected.got;
    match at {
        Some(at) if len > 0 && len <= missing => {
            expected.got += len;
            Ok(at)
        }
        _ => Err(bad),
    }
}

fn check_done(expected: &Expected) -> Result<(), ProtocolError> {
    let missing = expected.len - expected.got;
    if missing > 0 && expected.errors == 0 {
        return Err(ProtocolError::Short { missing });
    }
    Ok(())
}
