// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process of a device host, as far as it can be seen: whether it has ended decides who may still use what was lent to it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A process at the other end of a connection.
#[derive(Debug)]
pub(super) struct HostProcess(OwnedFd);

impl HostProcess {
    /// The process with this number. `None` if it cannot be seen (another machine or name space), is this one, or has ended although there is a connection:
    /// then somebody else serves what it listens for.
    pub(super) fn new(pid: Option<u32>) -> Option<HostProcess> {
        let pid = Pid::from_raw(i32::try_from(pid?).ok()?)?;
        if pid == getpid() {
            return None;
        }
        let process = HostProcess(pidfd_open(pid, PidfdFlags::empty()).ok()?);
        (!process.has_ended()).then_some(process)
    }

    /// Whether it has ended, with all its threads. What it had asked the kernel for may still be under way.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for HostProcess {
    /// Readable when it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
#[path = "process_test.rs"]
mod tests;
