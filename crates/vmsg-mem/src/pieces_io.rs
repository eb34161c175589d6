// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between file descriptors and [`Pieces`], without a copy in between.
//!
//! All calls are one system call, begun again after EINTR. They move at most
//! 2 GiB − 4 KiB and at most the first 1024 pieces (IOV_MAX, one fewer with a
//! head), so like any read or write they may do less than was asked; on
//! sockets that keep messages apart, a run of more pieces is cut off there.
//! Memory that is gone makes them fail with EFAULT. Up to 64 pieces cost no
//! allocation.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

// Offsets have 64 bits in either.
#[cfg(not(target_env = "gnu"))]
use libc::preadv2 as preadv64v2;
#[cfg(target_env = "gnu")]
use libc::preadv64v2;
use rustix::net::{RecvFlags, SendFlags};

use crate::Pieces;

/// Most pieces that one system call takes.
const MOST: usize = 1024;
/// As many are kept on the stack.
const FEW: usize = 64;
/// Most bytes that Linux moves in one call; more than isize::MAX would be refused.
const MOST_BYTES: usize = 0x7fff_f000;

impl Pieces<'_> {
    /// Describes the run for system calls: fills `into` from the beginning and
    /// returns how many entries it took. If those are all of `into`, there may be more pieces.
    ///
    /// The entries are valid as long as the memory behind this run is mapped.
    pub fn fill_iovecs(self, into: &mut [MaybeUninit<libc::iovec>]) -> usize {
        let mut count = 0;
        for (entry, piece) in into.iter_mut().zip(self.iter()) {
            entry.write(libc::iovec {
                iov_base: piece.as_ptr().cast(),
                iov_len: piece.len(),
            });
            count += 1;
        }
        count
    }

    /// Calls `call` with iovecs for `head`, unless it is empty, and the run.
    #[inline]
    fn with_iovecs<R>(self, head: libc::iovec, call: impl FnOnce(&[libc::iovec]) -> R) -> R {
        self.with_iovecs_around(head, NOTHING, call)
    }

    /// Calls `call` with iovecs for `head`, the run, and `tail`, unless there are more pieces than
    /// one call takes; `head` and `tail` only if they are not empty.
    #[inline]
    fn with_iovecs_around<R>(
        self,
        head: libc::iovec,
        tail: libc::iovec,
        call: impl FnOnce(&[libc::iovec]) -> R,
    ) -> R {
        let others = head.iov_len.saturating_add(tail.iov_len);
        let run = self.take(MOST_BYTES.saturating_sub(others));
        let mut few = [const { MaybeUninit::uninit() }; FEW];
        let mut count = run.fill_behind(head, &mut few);
        if count < FEW {
            if tail.iov_len > 0 {
                few[count].write(tail);
                count += 1;
            }
            // SAFETY: the first `count` entries were just written.
            return call(unsafe { initialized(&few, count) });
        }
        let mut many = vec![MaybeUninit::uninit(); MOST];
        let mut count = run.fill_behind(head, &mut many);
        if tail.iov_len > 0 && count < MOST {
            many[count].write(tail);
            count += 1;
        }
        // SAFETY: as above.
        call(unsafe { initialized(&many, count) })
    }

    fn fill_behind(self, head: libc::iovec, into: &mut [MaybeUninit<libc::iovec>]) -> usize {
        if head.iov_len == 0 {
            return self.fill_iovecs(into);
        }
        let Some((first, rest)) = into.split_first_mut() else {
            return 0;
        };
        first.write(head);
        1 + self.fill_iovecs(rest)
    }

    /// Reads from `fd` into this memory (readv); returns the number of bytes, 0 at the end.
    ///
    /// # Errors
    ///
    /// Those of readv(2).
    pub fn read_from(self, fd: impl AsFd) -> io::Result<usize> {
        self.read_with_head(&mut [], fd)
    }

    /// Reads from `fd` into `head` and, once that is full, into this memory (readv).
    ///
    /// # Errors
    ///
    /// Those of readv(2).
    pub fn read_with_head(self, head: &mut [u8], fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with_iovecs(to_fill(head), |iovecs| {
            // SAFETY: the entries describe `head`, which is ours alone, and memory that is mapped
            // and may change at any time.
            retry(|| unsafe { libc::readv(fd, iovecs.as_ptr(), count(iovecs)) })
        })
    }

    /// Reads from `fd` into `head`, once that is full into this memory, and what does not fit
    /// there into `tail` (readv). With more pieces than one call takes `tail` is left alone.
    ///
    /// # Errors
    ///
    /// Those of readv(2).
    pub fn read_between(
        self,
        head: &mut [u8],
        tail: &mut [u8],
        fd: impl AsFd,
    ) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with_iovecs_around(to_fill(head), to_fill(tail), |iovecs| {
            // SAFETY: as in `read_with_head`; `tail` is ours alone, too.
            retry(|| unsafe { libc::readv(fd, iovecs.as_ptr(), count(iovecs)) })
        })
    }

    /// Reads the file `fd` from `offset` on into this memory (preadv).
    ///
    /// # Errors
    ///
    /// Those of preadv(2).
    pub fn read_from_at(self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let offset = file_offset(offset)?;
        self.with_iovecs(NOTHING, |iovecs| {
            // SAFETY: as in `read_with_head`.
            retry(|| unsafe { libc::preadv64(fd, iovecs.as_ptr(), count(iovecs), offset) })
        })
    }

    /// As [`read_from_at`](Self::read_from_at), of what is there at once, in the page cache (preadv2 with RWF_NOWAIT).
    ///
    /// # Errors
    ///
    /// Those of preadv2(2): `EAGAIN` if the medium would be waited for, `EOPNOTSUPP` if the file cannot say so.
    pub fn read_from_at_now(self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let offset = file_offset(offset)?;
        self.with_iovecs(NOTHING, |iovecs| {
            let (at, count) = (iovecs.as_ptr(), count(iovecs));
            // SAFETY: as in `read_with_head`.
            retry(|| unsafe { preadv64v2(fd, at, count, offset, libc::RWF_NOWAIT) })
        })
    }

    /// Writes this memory to `fd` (writev); returns the number of bytes.
    ///
    /// # Errors
    ///
    /// Those of writev(2).
    pub fn write_to(self, fd: impl AsFd) -> io::Result<usize> {
        self.write_with_head(&[], fd)
    }

    /// Writes `head` and then this memory to `fd` (writev).
    ///
    /// # Errors
    ///
    /// Those of writev(2).
    pub fn write_with_head(self, head: &[u8], fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        self.with_iovecs(to_send(head), |iovecs| {
            // SAFETY: the kernel only reads: `head`, and memory that is mapped and may change.
            retry(|| unsafe { libc::writev(fd, iovecs.as_ptr(), count(iovecs)) })
        })
    }

    /// Writes this memory to the file `fd` from `offset` on (pwritev).
    ///
    /// # Errors
    ///
    /// Those of pwritev(2).
    pub fn write_to_at(self, fd: impl AsFd, offset: u64) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let offset = file_offset(offset)?;
        self.with_iovecs(NOTHING, |iovecs| {
            // SAFETY: as in `write_with_head`.
            retry(|| unsafe { libc::pwritev64(fd, iovecs.as_ptr(), count(iovecs), offset) })
        })
    }

    /// Receives from a socket into `head` and, once that is full, into this
    /// memory (recvmsg). Returns the number of bytes, with [`RecvFlags::TRUNC`]
    /// that of the whole datagram, even where it did not fit.
    ///
    /// # Errors
    ///
    /// Those of recvmsg(2).
    pub fn recv_into(self, fd: impl AsFd, head: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let flags = bits(flags.bits());
        self.with_iovecs(to_fill(head), |iovecs| {
            let mut message = message(iovecs);
            // SAFETY: as in `read_with_head`; the header asks for neither address nor control data.
            retry(|| unsafe { libc::recvmsg(fd, &mut message, flags) })
        })
    }

    /// Sends `head` and then this memory through a socket (sendmsg), without SIGPIPE.
    ///
    /// # Errors
    ///
    /// Those of sendmsg(2).
    pub fn send_from(self, fd: impl AsFd, head: &[u8], flags: SendFlags) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        let flags = bits((flags | SendFlags::NOSIGNAL).bits());
        self.with_iovecs(to_send(head), |iovecs| {
            let message = message(iovecs);
            // SAFETY: as in `write_with_head`; the header has neither address nor control data.
            retry(|| unsafe { libc::sendmsg(fd, &message, flags) })
        })
    }
}

/// Takes up to `len` received bytes off a TCP socket without copying them
/// anywhere; returns how many there were, 0 at the end of the stream.
/// Other kinds of sockets fail with EFAULT when something is there.
///
/// # Errors
///
/// Those of recv(2).
pub fn discard(fd: impl AsFd, len: usize, flags: RecvFlags) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    let flags = bits((flags | RecvFlags::TRUNC).bits());
    let len = len.min(MOST_BYTES);
    // SAFETY: nothing of ours lies at the null address: TCP does not write with MSG_TRUNC
    // (tcp(7)), and what others write there fails.
    retry(|| unsafe { libc::recv(fd, ptr::null_mut(), len, flags) })
}

const NOTHING: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

fn to_fill(head: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: head.as_mut_ptr().cast(),
        iov_len: head.len(),
    }
}

/// For calls that only read.
fn to_send(head: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    }
}

/// # Safety
///
/// The first `count` entries have been written.
unsafe fn initialized(entries: &[MaybeUninit<libc::iovec>], count: usize) -> &[libc::iovec] {
    // SAFETY: the caller's promise; MaybeUninit has the same layout.
    unsafe { std::slice::from_raw_parts(entries[..count].as_ptr().cast(), count) }
}

/// Never more than [`MOST`].
fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

fn message(iovecs: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data for which zeros are valid: nothing there.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    // The type is int or size_t, depending on the C library.
    message.msg_iovlen = iovecs.len() as _;
    message
}

/// Flags as the C library takes them.
const fn bits(flags: u32) -> libc::c_int {
    libc::c_int::from_ne_bytes(flags.to_ne_bytes())
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[inline]
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
#[path = "pieces_io_test.rs"]
mod tests;
