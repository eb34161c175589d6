// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packets of a SOCK_SEQPACKET socket, with file descriptors.

use crate::MAX_FDS;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, UCred, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A packet as it came.
pub(crate) struct Received {
    /// Bytes in the buffer. 0: the other side has closed.
    pub(crate) len: usize,
    /// The packet was longer than the buffer.
    pub(crate) truncated: bool,
    /// There were more descriptors than `limit`, or than this process may open.
    pub(crate) fds_lost: bool,
}

/// Sends one packet with up to [`MAX_FDS`] descriptors. False: not now; nothing was sent.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)) {
        Ok(_) => Ok(true),
        // TOOMANYREFS: so many descriptors are on their way that the user has reached a limit.
        Err(Errno::AGAIN | Errno::NOBUFS | Errno::TOOMANYREFS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Receives one packet if there is one. Up to `limit` descriptors (at most
/// [`MAX_FDS`]) are appended to `fds`, further ones are closed.
pub(crate) fn recv(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    limit: usize,
) -> io::Result<Option<Received>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received =
        match retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(buf)], &mut control, flags)) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    let mut fds_lost = received.flags.contains(ReturnFlags::CTRUNC);
    let mut taken = 0;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for fd in rights {
                if taken < limit {
                    fds.push(fd);
                    taken += 1;
                } else {
                    fds_lost = true;
                }
            }
        }
    }
    let truncated = received.flags.contains(ReturnFlags::TRUNC);
    Ok(Some(Received {
        len: received.bytes,
        truncated,
        fds_lost,
    }))
}

/// Whether the other side has ended the connection.
pub(crate) fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match retry_on_intr(|| poll(&mut fds, Some(&now))) {
        Ok(_) => fds[0]
            .revents()
            .intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
        // Out of memory in the kernel: the next sleep looks again.
        Err(_) => false,
    }
}

/// Process and user at the other end, as they were when it connected or listened.
pub(crate) fn credentials(socket: BorrowedFd<'_>) -> (Option<u32>, Option<u32>) {
    match rustix::net::sockopt::socket_peercred(socket) {
        Ok(UCred { pid, uid, .. }) => (u32::try_from(pid.as_raw_pid()).ok(), Some(uid.as_raw())),
        Err(_) => (None, None),
    }
}
