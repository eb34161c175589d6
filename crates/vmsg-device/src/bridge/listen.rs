// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a daemon connects, if it is the one that does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, listen};
use vmsg_net::socket::{BoundPath, SocketError};

/// A socket where a daemon connects, as Open vSwitch does for a port of the kind `dpdkvhostuserclient`. One at a time: the next one is taken
/// when the last one is gone.
#[derive(Clone, Debug)]
pub struct Listener(Arc<Bound>);

#[derive(Debug)]
struct Bound {
    socket: OwnedFd,
    _path: BoundPath,
}

impl Listener {
    /// Listens at `path`. What a process that has ended left there is removed.
    ///
    /// # Errors
    /// [`SocketError::InUse`], [`SocketError::NotASocket`], [`SocketError::Os`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let (socket, path) = BoundPath::stream(path, |socket| listen(socket, 1))?;
        Ok(Self(Arc::new(Bound {
            socket,
            _path: path,
        })))
    }

    /// Waits until somebody connects, at most so long.
    pub fn wait(&self, time: Duration) {
        let mut fds = [PollFd::new(&self.0.socket, PollFlags::IN)];
        // However it ends, it is looked at who is there.
        let _ = poll(&mut fds, Timespec::try_from(time).ok().as_ref());
    }

    /// The next one who has connected.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.0.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}
