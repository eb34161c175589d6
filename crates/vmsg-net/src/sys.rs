// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The few system calls on sockets that rustix does not wrap.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Where a TCP socket of the host stands: the fields of `struct tcp_info`
/// (include/uapi/linux/tcp.h) that say which bytes went through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcpInfo {
    /// `tcpi_state`, one of the `TCP_` states of include/net/tcp_states.h.
    pub(crate) state: u8,
    /// `tcpi_bytes_acked`: bytes sent that the peer has acknowledged; a FIN counts as one, and so
    /// does the SYN of a socket that connected (not of one that was accepted).
    pub(crate) bytes_acked: u64,
    /// `tcpi_bytes_received`: bytes received in order; a FIN counts as one, the SYN does not.
    pub(crate) bytes_received: u64,
}

/// Offsets in `struct tcp_info`, which only ever grows at its end.
mod tcp_info_offset {
    pub(super) const STATE: usize = 0;
    pub(super) const BYTES_ACKED: usize = 120;
    pub(super) const BYTES_RECEIVED: usize = 128;
    pub(super) const END: usize = 136;
}

/// Size of an int, as socket options want it.
const INT: libc::socklen_t = 4;
const _: () = assert!(size_of::<libc::c_int>() == 4);

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// `TCP_INFO` of a TCP socket. Needs Linux 4.1 for the byte counts.
pub(crate) fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    use tcp_info_offset as at;
    let mut bytes = [0u8; 256];
    let mut len: libc::socklen_t = 256;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of the buffer, and the
    // number it wrote to `len`; both are alive and writable during the call.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut len,
        )
    } as isize)?;
    if (len as usize) < at::END {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let word = |offset: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[offset..offset + 8]);
        u64::from_ne_bytes(word)
    };
    Ok(TcpInfo {
        state: bytes[at::STATE],
        bytes_acked: word(at::BYTES_ACKED),
        bytes_received: word(at::BYTES_RECEIVED),
    })
}

/// `SIOCOUTQ`: bytes that were written to a TCP socket and are not acknowledged yet; a FIN counts
/// as one.
pub(crate) fn unacknowledged(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (which is TIOCOUTQ) stores one int, and `value` is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut value) } as isize)?;
    Ok(u64::from(value.max(0).unsigned_abs()))
}

/// Sets `SO_PEEK_OFF`: from how far behind the next unread byte the next peek reads. The kernel
/// moves it forward with each peek and back with each read. TCP has it since Linux 6.9.
pub(crate) fn set_peek_offset(fd: BorrowedFd<'_>, offset: u32) -> io::Result<()> {
    let value = libc::c_int::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads one int of the given size from `value`.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const value).cast(),
            INT,
        )
    } as isize)?;
    Ok(())
}

/// Sets `UDP_SEGMENT`: what is sent at once leaves in datagrams of so many bytes; 0 for one
/// datagram as long as it is. Linux has it since 4.18.
pub(crate) fn set_udp_segment(fd: BorrowedFd<'_>, bytes: u16) -> io::Result<()> {
    let value = libc::c_int::from(bytes);
    // SAFETY: the kernel reads one int of the given size from `value`.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const value).cast(),
            INT,
        )
    } as isize)?;
    Ok(())
}
