// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread of a front, and what every front does there in the same way.

use super::listener::{BindError, Bound};
use super::stats::{Counts, FrontStats};
use crate::link::SessionHandle;
use crate::log_limit::LogLimit;
use crate::session::{Event, OpError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use vmsg_mem::Doorbell;

/// How long nobody is let in after that has failed.
const LOOK_AWAY: Duration = Duration::from_secs(1);

/// A front's thread. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct FrontThread {
    stop: Arc<Doorbell>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl FrontThread {
    /// Listens at `socket` with these permissions, and calls `run` on a thread of its own. When this returns, VMMs can connect.
    pub(crate) fn start(
        name: &str,
        session: SessionHandle,
        (socket, mode): (&Path, u32),
        run: impl FnOnce(Desk, Bound) + Send + 'static,
    ) -> Result<FrontThread, BindError> {
        let os = |source| BindError::Os {
            path: socket.to_owned(),
            source,
        };
        // VMMs may truncate the files of their memory while it is looked at here.
        vmsg_mem::fault::install().map_err(os)?;
        let listener = Bound::new(socket, mode)?;
        let stop = Arc::new(Doorbell::new().map_err(os)?);
        let counts = Arc::new(Counts::default());
        let desk = Desk {
            name: name.to_owned(),
            session,
            stop: stop.clone(),
            counts: counts.clone(),
            limit: Arc::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("front {name}"))
            .spawn(move || {
                tracing::info!(front = desk.name, socket = %listener.path.display(), "listening");
                run(desk, listener);
            })
            .map_err(os)?;
        Ok(FrontThread {
            stop,
            counts,
            thread: Some(thread),
        })
    }

    /// What has happened so far.
    pub(crate) fn stats(&self) -> FrontStats {
        self.counts.get()
    }
}

impl Drop for FrontThread {
    fn drop(&mut self) {
        let _ = self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// What the thread of any front has.
pub(crate) struct Desk {
    /// In logs.
    pub(crate) name: String,
    pub(crate) session: SessionHandle,
    stop: Arc<Doorbell>,
    pub(crate) counts: Arc<Counts>,
    /// Whoever connects can connect again and again.
    pub(crate) limit: Arc<LogLimit>,
}

/// Who is at the door.
pub(crate) enum Visit {
    /// A VMM has connected.
    Vmm(UnixStream),
    /// Nobody, until somebody comes.
    Nobody,
    /// Nobody can be let in, and it is not to be tried again for so long.
    NotNow(Duration),
}

impl Desk {
    /// Lets the next one in, if there is one.
    pub(crate) fn accept(&self, listener: &Bound) -> Visit {
        match listener.accept() {
            Ok(Some(socket)) => {
                self.counts.connections.fetch_add(1, Ordering::Relaxed);
                Visit::Vmm(socket)
            }
            Ok(None) => Visit::Nobody,
            Err(error) => {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::error!(front = self.name, %error, unsaid, "cannot accept");
                }
                // Out of descriptors, most likely; the socket stays readable, so look away for a moment.
                Visit::NotNow(LOOK_AWAY)
            }
        }
    }

    /// Waits until one of `fds` has something, or for so long. What they have stands in them then. False: the thread is to end.
    pub(crate) fn wait<'a>(
        &'a self,
        fds: &mut Vec<PollFd<'a>>,
        left: Option<Duration>,
    ) -> io::Result<bool> {
        fds.push(PollFd::new(&*self.stop, PollFlags::IN));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let waited = poll(fds, timeout.as_ref());
        self.counts.wakeups.fetch_add(1, Ordering::Relaxed);
        let stop = fds.pop().is_some_and(|stop| !stop.revents().is_empty());
        match waited {
            Ok(_) | Err(Errno::INTR) => Ok(!stop),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for somebody at `listener`, if there is one, for news of the session, or for so long. Gives the news; `None`: the thread is to end.
    pub(crate) fn wait_for_vmm(
        &self,
        listener: Option<&Bound>,
        left: Option<Duration>,
    ) -> Option<VecDeque<Event>> {
        let news = self.session.event_fd();
        let mut fds = vec![PollFd::new(&news, PollFlags::IN)];
        fds.extend(listener.map(|bound| PollFd::new(&bound.listener, PollFlags::IN)));
        let go_on = self.wait(&mut fds, left);
        go_on.unwrap_or(false).then(|| self.take_news())
    }

    /// What the session has to tell.
    pub(crate) fn take_news(&self) -> VecDeque<Event> {
        self.session.clear();
        self.session.take_events()
    }

    /// Says so if a device could not be let go.
    pub(crate) fn released<T>(&self, result: Result<T, OpError>) {
        match result {
            Ok(_) | Err(OpError::Ended) => {}
            Err(error) => {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(front = self.name, %error, unsaid, "the device was not released properly");
                }
            }
        }
    }
}
