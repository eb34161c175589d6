// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sending and receiving on a stream socket, with descriptors, never waiting.

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The most descriptors the kernel passes with one send (SCM_MAX_FD): room for them means that none is lost, and none mistaken for another's.
const SCM_MAX_FD: usize = 253;

/// What one read brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// 0 if the other side has closed.
    pub(crate) bytes: usize,
    pub(crate) fds: Vec<OwnedFd>,
    /// Descriptors came that this process had no room for.
    pub(crate) lost_fds: bool,
}

/// Reads what there is, up to the end of `space`, and the descriptors that came with it.
pub(crate) fn receive(socket: BorrowedFd<'_>, space: &mut [u8]) -> rustix::io::Result<Received> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received =
        retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(space)], &mut ancillary, flags))?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(Received {
        bytes: received.bytes,
        fds,
        lost_fds: received.flags.contains(ReturnFlags::CTRUNC),
    })
}

/// Sends as much as goes, with a descriptor at the first byte.
pub(crate) fn transmit(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> rustix::io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let Some(fd) = fd else {
        return retry_on_intr(|| send(socket, bytes, flags));
    };
    let fds = [fd];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags))
}
