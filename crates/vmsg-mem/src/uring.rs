// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files read and written by the kernel while this thread does something else: io_uring, for memory of peers.
//!
//! A [`Ring`] owns what the kernel works with, memory and files, until the kernel is done with it, whatever becomes of whoever
//! asked. Nothing is registered with the kernel and no thread polls, so that an idle ring costs a few pages; the thread that
//! submits may change.

mod error;

use std::fmt;
use std::io;
use std::mem::{self, ManuallyDrop};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;

use crate::Held;

pub use error::RingError;

/// Most pieces of memory in one operation (IOV_MAX).
const MOST: usize = 1024;
/// Most bytes that Linux moves in one operation.
const MOST_BYTES: usize = 0x7fff_f000;
/// Reads and writes of more bytes are begun by threads of the kernel: what the page cache has is otherwise copied by whoever submits.
const LONG: usize = 2 << 20;
/// Marks completions of what nobody asked for: of cancellations.
const NOBODY: u64 = u64::MAX;
/// How long dropping a ring waits before another thread goes on with that.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is to be done with a file.
#[derive(Debug)]
pub enum Operation {
    /// Read from `offset` on (preadv).
    Read {
        /// In bytes.
        offset: u64,
        /// Where to.
        to: Held,
    },
    /// Write from `offset` on (pwritev2).
    Write {
        /// In bytes.
        offset: u64,
        /// What.
        from: Held,
        /// It is on the medium when it is done (RWF_DSYNC).
        sync: bool,
    },
    /// Bring all data that was written to the medium (fdatasync).
    SyncData,
    /// Change what space the file has (fallocate).
    Allocate {
        /// How.
        mode: FallocateFlags,
        /// In bytes.
        offset: u64,
        /// In bytes.
        len: u64,
    },
}

/// An operation that is done.
#[derive(Debug)]
pub struct Finished {
    /// As it was given to [`Ring::push`].
    pub tag: u64,
    /// The number of bytes moved, which may be less than was asked for. At most 2 GiB − 4 KiB and 1024 pieces are moved at once.
    pub result: io::Result<usize>,
    /// The memory of reads and writes.
    pub memory: Option<Held>,
}

/// An operation under way, with all that the kernel needs for it.
struct Request {
    tag: u64,
    /// Only kept.
    _file: Arc<OwnedFd>,
    memory: Option<Held>,
}

/// A place for an operation under way. The list of pieces is used again.
#[derive(Default)]
struct Slot {
    request: Option<Request>,
    iovecs: Vec<libc::iovec>,
}

/// Operations under way in the kernel.
///
/// Dropping it cancels them and waits until the kernel has let go of their memory: here for a second at most, and beyond that in
/// a thread of its own.
pub struct Ring {
    /// There until dropped.
    ring: ManuallyDrop<IoUring>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    depth: usize,
}

// SAFETY: the iovecs point into memory that the requests hold, which may be used by any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for up to `depth` operations at a time; at least 1.
    ///
    /// # Errors
    ///
    /// [`RingError`]: io_uring is often forbidden.
    pub fn new(depth: u32) -> Result<Self, RingError> {
        // Half of them fit in what is submitted at once; the others do when that is on its way.
        let entries = depth.div_ceil(2).max(1).next_power_of_two();
        let ring = IoUring::builder()
            .dontfork()
            .build(entries)
            .map_err(|error| RingError::new("make a ring", error))?;
        // Without, completions could be lost when more come than fit.
        if !ring.params().is_feature_nodrop() {
            return Err(RingError::TooOld { what: "NODROP" });
        }
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => RingError::TooOld { what: "probe" },
                _ => RingError::new("ask what it can", error),
            })?;
        let needed = [
            (opcode::Readv::CODE, "readv"),
            (opcode::Writev::CODE, "writev"),
            (opcode::Read::CODE, "read"),
            (opcode::Write::CODE, "write"),
            (opcode::Fsync::CODE, "fsync"),
            (opcode::Fallocate::CODE, "fallocate"),
            (opcode::AsyncCancel::CODE, "cancel"),
        ];
        if let Some((_, what)) = needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
            return Err(RingError::TooOld { what });
        }
        // A filter may allow to make rings and not to use them.
        ring.submit()
            .map_err(|error| RingError::new("submit", error))?;
        let depth = depth.max(1) as usize;
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            slots: Vec::new(),
            free: (0..depth).rev().collect(),
            depth,
        })
    }

    /// Has `operation` done with `file` after the next [`submit`](Self::submit). [`pop`](Self::pop) tells when it is
    /// done, by `tag`.
    ///
    /// # Errors
    ///
    /// The operation itself, if there are too many.
    #[expect(clippy::result_large_err, reason = "it is given back")]
    pub fn push(
        &mut self,
        tag: u64,
        file: &Arc<OwnedFd>,
        operation: Operation,
    ) -> Result<(), Operation> {
        if self.ring.submission().is_full() {
            // They are in order: what does not go now would not go later.
            let _ = self.submit();
            if self.ring.submission().is_full() {
                return Err(operation);
            }
        }
        let Some(index) = self.free.pop() else {
            return Err(operation);
        };
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, Slot::default);
        }
        let slot = &mut self.slots[index];
        let fd = types::Fd(file.as_raw_fd());
        let (entry, memory) = match operation {
            Operation::Read { offset, to } => (slot.read(fd, offset, &to), Some(to)),
            Operation::Write { offset, from, sync } => {
                (slot.write(fd, offset, &from, sync), Some(from))
            }
            Operation::SyncData => {
                let flags = types::FsyncFlags::DATASYNC;
                (opcode::Fsync::new(fd).flags(flags).build(), None)
            }
            Operation::Allocate { mode, offset, len } => {
                let mode = i32::from_ne_bytes(mode.bits().to_ne_bytes());
                let allocate = opcode::Fallocate::new(fd, len).offset(offset).mode(mode);
                (allocate.build(), None)
            }
        };
        let is_long = memory.as_ref().is_some_and(|memory| memory.len() > LONG);
        let flags = if is_long {
            squeue::Flags::ASYNC
        } else {
            squeue::Flags::empty()
        };
        slot.request = Some(Request {
            tag,
            _file: Arc::clone(file),
            memory,
        });
        let entry = entry.flags(flags).user_data(index as u64);
        // SAFETY: the memory and the file are kept in the slot, and the list of pieces is not touched, until the operation is
        // done: `pop` takes them away then, and dropping the ring waits for it or forgets them.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "there was room");
        Ok(())
    }

    /// Gives all to the kernel that was pushed: one system call, most often.
    ///
    /// # Errors
    ///
    /// Those of io_uring_enter(2): what was pushed goes with the next call then.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// An operation that is done, if there is one. No system call, unless so many were done at once that they did not fit.
    pub fn pop(&mut self) -> Option<Finished> {
        loop {
            let entry = self.ring.completion().next();
            let Some(entry) = entry else {
                if !self.ring.submission().cq_overflow() {
                    return None;
                }
                // The kernel keeps them until it is asked. What is to be submitted goes with it.
                if self.ring.submit().is_err() || self.ring.completion().is_empty() {
                    return None;
                }
                continue;
            };
            if entry.user_data() == NOBODY {
                continue;
            }
            let index = usize::try_from(entry.user_data()).expect("as it was pushed");
            let request = self.slots[index].request.take();
            let request = request.expect("each is done once");
            self.free.push(index);
            let result = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
            return Some(Finished {
                tag: request.tag,
                result,
                memory: request.memory,
            });
        }
    }

    /// Readable when there is something for [`pop`](Self::pop).
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring has it open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// Operations that were pushed and not yet told as done.
    pub fn in_flight(&self) -> usize {
        self.depth - self.free.len()
    }

    /// Has the kernel give up what it can: those operations fail with `ECANCELED`, or `EINTR`. What a medium is busy with goes on.
    pub fn cancel_all(&mut self) {
        for index in 0..self.slots.len() {
            if self.slots[index].request.is_none() {
                continue;
            }
            if self.ring.submission().is_full() && self.submit().is_err() {
                return;
            }
            let entry = opcode::AsyncCancel::new(index as u64)
                .build()
                .user_data(NOBODY);
            // SAFETY: it has no memory.
            let _ = unsafe { self.ring.submission().push(&entry) };
        }
        let _ = self.submit();
    }

    /// Waits until nothing is under way any more; false if that takes longer than until `deadline`, or cannot be found out.
    fn drain(&mut self, deadline: Option<Instant>) -> bool {
        loop {
            while self.pop().is_some() {}
            if self.in_flight() == 0 {
                return true;
            }
            let wait = match deadline {
                None => Duration::from_secs(60),
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            };
            if wait.is_zero() || self.submit().is_err() {
                return false;
            }
            let timeout = Timespec::try_from(wait).ok();
            let fd = self.event_fd();
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl Slot {
    fn read(&mut self, fd: types::Fd, offset: u64, to: &Held) -> squeue::Entry {
        match self.describe(to) {
            Ok((at, len)) => opcode::Read::new(fd, at, len).offset(offset).build(),
            Err(count) => opcode::Readv::new(fd, self.iovecs.as_ptr(), count)
                .offset(offset)
                .build(),
        }
    }

    fn write(&mut self, fd: types::Fd, offset: u64, from: &Held, sync: bool) -> squeue::Entry {
        let flags = if sync { libc::RWF_DSYNC } else { 0 };
        match self.describe(from) {
            Ok((at, len)) => opcode::Write::new(fd, at, len)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            Err(count) => opcode::Writev::new(fd, self.iovecs.as_ptr(), count)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    /// Address and length of memory in one piece; that of several is put into the list, whose length is told.
    fn describe(&mut self, memory: &Held) -> Result<(*mut u8, u32), u32> {
        let mut pieces = memory.pieces().take(MOST_BYTES).iter();
        let (first, second) = (pieces.next(), pieces.next());
        let Some(second) = second else {
            let at = first.map_or(std::ptr::null_mut(), |piece| piece.as_ptr());
            let len = first.map_or(0, |piece| piece.len());
            return Ok((at, u32::try_from(len).expect("taken from less")));
        };
        self.iovecs.clear();
        let all = first.into_iter().chain([second]).chain(pieces);
        self.iovecs.extend(all.take(MOST).map(|piece| libc::iovec {
            iov_base: piece.as_ptr().cast(),
            iov_len: piece.len(),
        }));
        Err(u32::try_from(self.iovecs.len()).expect("few"))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Forgotten, unless the kernel has let go of everything.
        let mut rest = ManuallyDrop::new(Self {
            // SAFETY: taken once: `self` is gone after this.
            ring: ManuallyDrop::new(unsafe { ManuallyDrop::take(&mut self.ring) }),
            slots: mem::take(&mut self.slots),
            free: mem::take(&mut self.free),
            depth: self.depth,
        });
        if rest.in_flight() > 0 {
            rest.cancel_all();
        }
        if rest.drain(Some(Instant::now() + PATIENCE)) {
            free(rest);
            return;
        }
        // A medium that does not answer must hold up nobody.
        let wait = move || {
            if rest.drain(None) {
                free(rest);
            }
        };
        let _ = thread::Builder::new()
            .name("vmsg-io-end".into())
            .stack_size(64 << 10)
            .spawn(wait);
    }
}

/// Gives back what a ring has that nothing is under way in any more.
fn free(mut ring: ManuallyDrop<Ring>) {
    // SAFETY: not used after.
    unsafe { ManuallyDrop::drop(&mut ring.ring) };
    ring.slots = Vec::new();
    ring.free = Vec::new();
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "uring_test.rs"]
mod tests;
