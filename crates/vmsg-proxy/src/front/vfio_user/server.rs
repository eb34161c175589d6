// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The listening side: one client after another, on a thread of its own.

use crate::front::listener::{BindError, Bound};
use crate::front::stats::{Counts, FrontStats};
use crate::link::SessionHandle;
use crate::log_limit::LogLimit;
use crate::session::Options;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;
use vmsg_mem::Doorbell;

/// How long a client waits for a device that was never seen. QEMU gives up after 5 s.
const FIRST_CONTACT: Duration = Duration::from_secs(4);

/// Memory for copies, bytes.
const SEGMENT: u64 = 64 << 20;

/// The session's times, as clients of vfio-user need them.
pub(crate) fn session_options() -> Options {
    Options {
        first_contact_timeout: FIRST_CONTACT,
        // A client that comes again was started again by somebody.
        second_contact_timeout: FIRST_CONTACT,
        ..Options::default()
    }
}

/// How a front is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VfioUserOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether the device host gets copies, and nothing else of the guest's memory.
    pub isolate: bool,
    /// Bytes of memory for copies.
    pub segment: u64,
}

impl VfioUserOptions {
    /// A front that listens on `socket`, for this user only, and lends the guest's memory.
    pub fn new(socket: impl Into<PathBuf>) -> VfioUserOptions {
        VfioUserOptions {
            socket: socket.into(),
            mode: 0o600,
            isolate: false,
            segment: SEGMENT,
        }
    }
}

/// A running front. Dropping it ends the connection, releases the device and removes the socket.
#[derive(Debug)]
pub struct VfioUserFront {
    stop: Arc<Doorbell>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl VfioUserFront {
    /// Listens, and serves from a thread called `name` in logs. When this returns, clients can connect.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn start(
        name: &str,
        session: SessionHandle,
        options: VfioUserOptions,
    ) -> Result<VfioUserFront, BindError> {
        let socket = options.socket.clone();
        let os = |source| BindError::Os {
            path: socket.clone(),
            source,
        };
        // Clients may truncate the files of their memory while it is looked at here.
        vmsg_mem::fault::install().map_err(os)?;
        let listener = Bound::new(&options.socket, options.mode)?;
        let stop = Arc::new(Doorbell::new().map_err(os)?);
        let counts = Arc::new(Counts::default());
        let server = Server {
            name: name.to_owned(),
            session,
            listener,
            stop: stop.clone(),
            counts: counts.clone(),
            options,
            limit: Arc::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("front {name}"))
            .spawn(move || server.run())
            .map_err(os)?;
        Ok(VfioUserFront {
            stop,
            counts,
            thread: Some(thread),
        })
    }

    /// What has happened so far.
    pub fn stats(&self) -> FrontStats {
        self.counts.get()
    }
}

impl Drop for VfioUserFront {
    fn drop(&mut self) {
        let _ = self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

struct Server {
    name: String,
    session: SessionHandle,
    listener: Bound,
    stop: Arc<Doorbell>,
    counts: Arc<Counts>,
    options: VfioUserOptions,
    /// Whoever connects can connect again and again.
    limit: Arc<LogLimit>,
}

impl Server {
    fn run(mut self) {
        tracing::info!(front = self.name, socket = %self.options.socket.display(), "listening");
        loop {
            let socket = match self.listener.accept() {
                Ok(Some(socket)) => socket,
                Ok(None) => {
                    if !self.wait_for_client(None) {
                        return;
                    }
                    continue;
                }
                Err(error) => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::error!(front = self.name, %error, unsaid, "cannot accept");
                    }
                    // Out of descriptors, most likely; the socket stays readable, so look away for a moment.
                    if !self.wait_for_client(Some(Duration::from_secs(1))) {
                        return;
                    }
                    continue;
                }
            };
            self.counts.connections.fetch_add(1, Ordering::Relaxed);
            self.serve(socket);
        }
    }

    fn serve(&mut self, socket: UnixStream) {
        drop(socket);
    }

    /// With `pause`, only for that long and whether or not anybody comes. False: stop.
    fn wait_for_client(&mut self, pause: Option<Duration>) -> bool {
        let news = self.session.event_fd();
        let mut fds = vec![
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&news, PollFlags::IN),
        ];
        if pause.is_none() {
            fds.push(PollFd::new(&self.listener.listener, PollFlags::IN));
        }
        let timeout = pause.and_then(|pause| Timespec::try_from(pause).ok());
        let waited = poll(&mut fds, timeout.as_ref());
        self.counts.wakeups.fetch_add(1, Ordering::Relaxed);
        if !matches!(waited, Ok(_) | Err(Errno::INTR)) || !fds[0].revents().is_empty() {
            return false;
        }
        // Nobody is there to hear them.
        self.session.clear();
        drop(self.session.take_events());
        true
    }
}
