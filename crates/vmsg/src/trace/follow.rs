// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for a file to grow.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// Watches a file.
pub(super) struct Follow(OwnedFd);

/// Why waiting is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// Something happened to the file.
    Changed,
    /// The reader of stdout has left.
    NobodyReads,
}

impl Follow {
    /// Watches `path` from now on.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, path, WatchFlags::MODIFY)?;
        Ok(Self(watch))
    }

    /// Until the file was changed since the last call.
    pub(super) fn wait(&self) -> io::Result<Woken> {
        let stdout = io::stdout();
        loop {
            // Errors of a pipe are told unasked.
            let mut fds = [
                PollFd::new(&self.0, PollFlags::IN),
                PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [changed, out] = fds.map(|fd| fd.revents());
            if changed.contains(PollFlags::IN) {
                self.drain()?;
                return Ok(Woken::Changed);
            }
            if out.intersects(PollFlags::ERR | PollFlags::HUP) {
                return Ok(Woken::NobodyReads);
            }
        }
    }

    /// Takes the events; what they say is known.
    fn drain(&self) -> io::Result<()> {
        let mut space = [const { MaybeUninit::uninit() }; 4096];
        let mut events = inotify::Reader::new(&self.0, &mut space);
        loop {
            match events.next() {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
