// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between TCP sockets of the host and guest memory, without a copy in between.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use vmsg_mem::Pieces;

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Copies what the socket holds from `offset` on into guest memory, without taking it from the
/// socket. With `SO_PEEK_OFF` in use `offset` is 0 here, as the kernel does the skipping;
/// otherwise what is to be skipped goes to `scratch`.
pub(crate) fn peek(
    fd: BorrowedFd<'_>,
    offset: usize,
    into: Pieces<'_>,
    scratch: &mut Vec<u8>,
) -> Result<usize, Errno> {
    if scratch.len() < offset {
        scratch.resize(offset, 0);
    }
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let n = into
        .recv_into(fd, &mut scratch[..offset], flags)
        .map_err(|error| errno(&error))?;
    Ok(n.saturating_sub(offset))
}

/// Sends bytes of guest memory; returns how many the kernel took.
pub(crate) fn send(fd: BorrowedFd<'_>, pieces: Pieces<'_>) -> Result<usize, Errno> {
    pieces
        .send_from(fd, &[], SendFlags::DONTWAIT)
        .map_err(|error| errno(&error))
}

/// Takes what waits in the socket, up to `len` bytes, out of it; returns how many there were.
pub(crate) fn discard(fd: BorrowedFd<'_>, len: usize) -> Result<usize, Errno> {
    vmsg_mem::discard(fd, len, RecvFlags::DONTWAIT).map_err(|error| errno(&error))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicU64;

    use vmsg_mem::RamSlice;

    use super::*;

    #[test]
    fn without_peek_offsets_the_beginning_is_skipped_here() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        far.write_all(b"abcdefgh").unwrap();
        near.peek(&mut [0; 8]).unwrap();
        let memory = [const { AtomicU64::new(0) }; 2];
        let pieces = [RamSlice::from_atomics(&memory)];
        let room = Pieces::new(&pieces);
        let mut scratch = Vec::new();
        for (offset, rest) in [(0, &b"abcdefgh"[..]), (3, b"defgh"), (8, b"")] {
            let n = peek(near.as_fd(), offset, room, &mut scratch).unwrap();
            let mut bytes = [0; 16];
            room.read(&mut bytes);
            assert_eq!(&bytes[..n], rest);
        }
        assert_eq!(discard(near.as_fd(), 5).unwrap(), 5);
        assert_eq!(peek(near.as_fd(), 1, room, &mut scratch).unwrap(), 2);
    }
}
