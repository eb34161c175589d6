// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all disks have in common.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vmsg_mem::{Pieces, WindowTable};

/// Something with blocks, used by one device.
///
/// Requests may be done in any order. None of the methods blocks for longer than memory or the page cache needs.
pub trait Disk: Send + fmt::Debug {
    /// What it is like at the moment; asked again after [`poll`](Self::poll) has said that it is another.
    fn facts(&self) -> Facts;

    /// Begins `request`, which its owner knows by `tag`: no other request under way has the same one. Offsets and lengths are
    /// inside the disk; whoever calls has looked. `memory` holds what the request's pieces lie in, and a request that is under way
    /// keeps it mapped.
    fn submit(&mut self, tag: u32, request: Request<'_>, memory: &Arc<WindowTable>) -> Submitted;

    /// Has everything begun that was submitted since the last call: one system call for many requests.
    fn commit(&mut self) {}

    /// Moves what is done since the last call to the end of `done`.
    fn completed(&mut self, done: &mut Vec<Completion>);

    /// Readable when [`completed`](Self::completed) or [`poll`](Self::poll) have something to do.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// When [`poll`](Self::poll) is to be called at the latest.
    fn next_timeout(&self) -> Option<Instant> {
        None
    }

    /// Does what is to be done beside requests. True if [`facts`](Self::facts) are others than before: the disk was resized.
    fn poll(&mut self, now: Instant) -> bool {
        let _ = now;
        false
    }

    /// The next [`poll`](Self::poll) at `now` or later looks whether the size has changed, if the disk looks now and then only.
    fn look_soon(&mut self, now: Instant) {
        let _ = now;
    }

    /// Gives up what has not been begun, and makes what is under way end as soon as possible: its results are of no interest any
    /// more. They are still told, as [`Failure::Canceled`] or whatever came out.
    fn cancel(&mut self) {}

    /// Requests that were submitted and are not yet told as completed.
    fn in_flight(&self) -> usize;

    /// Of those, the ones for which something beside this thread touches the memory that was lent for them.
    fn touching_memory(&self) -> usize {
        self.in_flight()
    }

    /// Whether a write may be told as done before it is on the medium (virtio 1.3, 5.2.6.2). False: each write is followed by
    /// what a [`Request::Flush`] does before it is told.
    fn set_write_back(&mut self, on: bool);

    /// Whether dropping it waits for nothing. False: that may wait for the medium, and is not for a thread that must not.
    fn ends_at_once(&self) -> bool {
        true
    }

    /// What operators may want to know of how it is used, by names in lower case. It stays the same.
    fn details(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Names and values of counters, for operators.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// What a disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Size in bytes; a multiple of 512.
    pub size: u64,
    /// Bytes that requests must be aligned to: a power of two, 512 or more.
    pub block_size: u32,
    /// Bytes that are best written together, a power of two and not less than `block_size`: the medium's own blocks.
    pub physical_block_size: u32,
    /// Where the first of the medium's own blocks begins, in bytes.
    pub alignment_offset: u32,
    /// Bytes that requests are best a multiple of; 0: nothing is known.
    pub optimal_io_size: u32,
    /// Nothing can be written.
    pub read_only: bool,
    /// [`Request::Discard`] does something.
    pub discard: bool,
    /// Bytes that discards are best aligned to, and a multiple of; 0 is `block_size`.
    pub discard_granularity: u32,
    /// [`Request::WriteZeroes`] needs not write each block.
    pub write_zeroes: bool,
}

/// What is wanted of a disk. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Request<'m> {
    /// Fill `to` with what is at `offset`.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to.
        to: Pieces<'m>,
    },
    /// Put `from` at `offset`.
    Write {
        /// Where on the disk.
        offset: u64,
        /// What.
        from: Pieces<'m>,
    },
    /// All writes that were told as completed before this was submitted are on the medium when this is told as completed.
    Flush,
    /// The contents are not needed any more; what is read afterwards is not specified.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Zeroes are read afterwards.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// The medium may give the space up.
        unmap: bool,
    },
}

/// What became of a request at once.
#[derive(Debug)]
pub enum Submitted {
    /// It is done; it will not be told by [`Disk::completed`].
    Done(Result<(), Failure>),
    /// It is under way.
    Pending,
    /// There are too many under way: again when some are completed. Nothing was begun.
    Full,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// Whose.
    pub tag: u32,
    /// How it went.
    pub result: Result<(), Failure>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The medium could not.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The disk cannot be written.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The disk cannot do that.
    #[error("the disk has no such operation")]
    Unsupported,
    /// It would make a raw disk look like an image, and that it is a raw one was not said.
    #[error("it would make the disk look like a qcow2 image, which only format=raw allows")]
    Image,
    /// What the disk is on has gone away.
    #[error("{0}")]
    Gone(String),
    /// [`Disk::cancel`].
    #[error("canceled")]
    Canceled,
}
