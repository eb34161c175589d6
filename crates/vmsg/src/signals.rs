// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ending in an orderly way on SIGINT and SIGTERM.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};

/// A file that becomes larger than this process may make one (RLIMIT_FSIZE) is an error for who writes it from now on, and not the
/// end of the process: a guest chooses where in its disk it writes.
pub(crate) fn outlive_file_limits() -> std::io::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    Ok(())
}

/// Becomes readable when the user wants the program to end.
#[derive(Debug)]
pub(crate) struct Interrupt {
    signal: UnixStream,
}

impl Interrupt {
    /// From now on SIGINT and SIGTERM only make this readable.
    pub(crate) fn new() -> std::io::Result<Self> {
        let (signal, write) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(SIGINT, write.try_clone()?)?;
        signal_hook::low_level::pipe::register(SIGTERM, write)?;
        Ok(Self { signal })
    }

    /// Waits for a signal.
    pub(crate) fn wait(&self) -> std::io::Result<()> {
        self.poll(None).map(|_| ())
    }

    /// Waits until `due`; true if a signal came first.
    pub(crate) fn wait_until(&self, due: Instant) -> std::io::Result<bool> {
        self.poll(Some(due))
    }

    /// Takes one signal, so that the next one is seen; there must be one.
    pub(crate) fn take(&self) -> std::io::Result<()> {
        use std::io::Read;
        (&self.signal).read_exact(&mut [0])
    }

    fn poll(&self, due: Option<Instant>) -> std::io::Result<bool> {
        loop {
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let fd = self.signal.as_fd();
            match poll(
                &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
                timeout.as_ref(),
            ) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Readable once the user wants the program to end.
impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}
