// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests that outlive the call that brought them.

use std::io;
use std::sync::Arc;

use vmsg_mem::{Held, Pieces, WindowTable};

use super::medium::Medium;
use crate::{Failure, Request};

/// A request with its memory.
#[derive(Debug)]
pub(super) enum Work {
    Read {
        offset: u64,
        to: Held,
    },
    Write {
        offset: u64,
        from: Held,
        /// It is on the medium when it is done.
        sync: bool,
    },
    Flush,
    Discard {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
        sync: bool,
    },
}

impl Work {
    /// Takes hold of the memory of `request`.
    pub(super) fn new(
        request: Request<'_>,
        memory: &Arc<WindowTable>,
        sync: bool,
    ) -> Result<Self, Failure> {
        let hold = |pieces: Pieces<'_>| {
            Held::new(pieces, memory)
                .map_err(|error| Failure::Io(io::Error::new(io::ErrorKind::InvalidInput, error)))
        };
        Ok(match request {
            Request::Read { offset, to } => Self::Read {
                offset,
                to: hold(to)?,
            },
            Request::Write { offset, from } => Self::Write {
                offset,
                from: hold(from)?,
                sync,
            },
            Request::Flush => Self::Flush,
            Request::Discard { offset, len } => Self::Discard { offset, len },
            Request::WriteZeroes { offset, len, unmap } => Self::Zero {
                offset,
                len,
                unmap,
                sync,
            },
        })
    }

    /// Has the first block of a write stay as it is now, whatever a peer does with its memory; gives the first bytes of it.
    pub(super) fn settle(&mut self, medium: &Medium) -> [u8; 4] {
        let mut first = [0; 4];
        if let Self::Write { from, .. } = self {
            let (len, align) = medium
                .direct
                .map_or((512, 1), |direct| (direct.offset, direct.memory));
            from.settle(len as usize, align as usize);
            from.pieces().read(&mut first);
        }
        first
    }

    /// Does it, and waits for that.
    pub(super) fn run(&self, medium: &Medium) -> Result<(), Failure> {
        match self {
            Self::Read { offset, to } => medium.read(*offset, to.pieces()),
            Self::Write { offset, from, sync } => run(medium, write(*offset, from.pieces()), *sync),
            Self::Flush => medium.sync(),
            Self::Discard { offset, len } => medium.discard(*offset, *len),
            Self::Zero {
                offset,
                len,
                unmap,
                sync,
            } => {
                let request = Request::WriteZeroes {
                    offset: *offset,
                    len: *len,
                    unmap: *unmap,
                };
                run(medium, request, *sync)
            }
        }
    }

    /// It must not be done beside anything else: the blocks at its ends are read, changed and written.
    pub(super) fn is_exclusive(&self, medium: &Medium) -> bool {
        match *self {
            Self::Write {
                offset, ref from, ..
            } => !medium.is_aligned(offset, from.len() as u64),
            Self::Zero { offset, len, .. } => !medium.is_aligned(offset, len),
            Self::Read { .. } | Self::Flush | Self::Discard { .. } => false,
        }
    }

    /// It has memory of a peer.
    pub(super) fn has_memory(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Write { .. })
    }
}

fn write(offset: u64, from: Pieces<'_>) -> Request<'_> {
    Request::Write { offset, from }
}

/// Does a request and waits for that. With `sync` what it has written is on the medium then.
pub(super) fn run(medium: &Medium, request: Request<'_>, sync: bool) -> Result<(), Failure> {
    match request {
        Request::Read { offset, to } => return medium.read(offset, to),
        Request::Flush => return medium.sync(),
        Request::Discard { offset, len } => return medium.discard(offset, len),
        Request::Write { offset, from } => medium.write(offset, from)?,
        Request::WriteZeroes { offset, len, unmap } => medium.zero(offset, len, unmap)?,
    }
    if sync { medium.sync() } else { Ok(()) }
}
