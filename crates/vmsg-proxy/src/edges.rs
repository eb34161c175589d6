// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Eventfds that others ring, waited on without reading them.
//!
//! Others hold such an eventfd, too, and could make a read block, or take what is there before us. It is watched edge-triggered instead:
//! each write to it is told once, whether or not anybody has read the last one.

use rustix::event::{Timespec, epoll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use virtio_msg::QueueIndex;

/// Eventfds looked at before anything else has its turn.
const BUDGET: usize = 64;

/// A set of eventfds, each of a queue.
#[derive(Debug)]
pub(crate) struct Edges(OwnedFd);

impl Edges {
    pub(crate) fn new() -> io::Result<Edges> {
        Ok(Edges(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `fd` for `queue` from now on; what was written before is told once.
    pub(crate) fn add(&self, queue: QueueIndex, fd: impl AsFd) -> io::Result<()> {
        let data = epoll::EventData::new_u64(queue.0.into());
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.0, fd, data, flags)?)
    }

    /// To be called before `fd` is closed: the file lives on with its other holders, and with it whatever is not taken out here.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // It may never have been there.
        let _ = epoll::delete(&self.0, fd);
    }

    /// Calls `rung` for each queue whose eventfd was rung since the last time.
    pub(crate) fn take(&self, mut rung: impl FnMut(QueueIndex)) -> io::Result<()> {
        let mut space = [const { MaybeUninit::<epoll::Event>::uninit() }; BUDGET];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match epoll::wait(&self.0, &mut space, Some(&now)) {
            Ok((found, _)) => {
                for event in found {
                    let queue = u32::try_from(event.data.u64()).unwrap_or(u32::MAX);
                    rung(QueueIndex(queue));
                }
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Edges {
    /// Readable when there is something to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
