// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Between sockets of the host and guest memory.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmsg_mem::Pieces;

/// Bytes that one call moves at most.
const BOUNCE: usize = 64 * 1024;

/// Copies what the socket holds from `offset` on into guest memory, without taking it from the
/// socket. With `SO_PEEK_OFF` in use `offset` is 0 here, as the kernel does the skipping.
pub(crate) fn peek(
    fd: BorrowedFd<'_>,
    offset: usize,
    into: Pieces<'_>,
    scratch: &mut Vec<u8>,
) -> Result<usize, Errno> {
    let len = into.len().min(BOUNCE);
    scratch.resize(offset + len, 0);
    let (n, _) = recv(
        fd.as_fd(),
        scratch.as_mut_slice(),
        RecvFlags::PEEK | RecvFlags::DONTWAIT,
    )?;
    Ok(scratch.get(offset..n).map_or(0, |bytes| into.write(bytes)))
}

/// Sends bytes of guest memory; returns how many the kernel took.
pub(crate) fn send_pieces(
    fd: BorrowedFd<'_>,
    pieces: Pieces<'_>,
    scratch: &mut Vec<u8>,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < pieces.len() {
        scratch.resize(BOUNCE, 0);
        let n = pieces.skip(done).read(scratch);
        match send(
            fd.as_fd(),
            &scratch[..n],
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(sent) => {
                done += sent;
                if sent < n {
                    break;
                }
            }
            Err(Errno::INTR) => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
