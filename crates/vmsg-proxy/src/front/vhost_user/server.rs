// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The listening side: one front end after another, on a thread of its own.

use super::guest::{Guest, GuestError, Reply};
use super::memory::MemoryError;
use super::socket::{Connection, ConnectionError};
use super::wire::Request;
use crate::link::SessionHandle;
use crate::log_limit::LogLimit;
use crate::session::OpError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;
use vmsg_mem::Doorbell;

/// A front end sends its memory table right after its features. One that does not has none to share.
const MEMORY_PATIENCE: Duration = Duration::from_secs(2);

/// Requests taken before news of the device have their turn.
const BUDGET: usize = 64;

/// Why a front cannot listen.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another program listens there.
    #[error("`{}` is in use: another program listens on it", .0.display())]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("`{}` exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// The system said no.
    #[error("cannot listen on `{}`: {source}", path.display())]
    Os {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a front is to be.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// Where it listens.
    pub socket: PathBuf,
    /// Permissions of the socket.
    pub mode: u32,
    /// Whether configuration space is offered; `None`: except for network devices, whose configuration QEMU keeps itself.
    pub config: Option<bool>,
}

/// What a front has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrontStats {
    /// Front ends that connected.
    pub connections: u64,
    /// Requests handled.
    pub requests: u64,
    /// Connections ended because of what came over them.
    pub malformed: u64,
    /// Requests that could not be done.
    pub refused: u64,
    /// Times the thread woke up.
    pub wakeups: u64,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    requests: AtomicU64,
    malformed: AtomicU64,
    refused: AtomicU64,
    wakeups: AtomicU64,
}

/// A running front. Dropping it ends the connection, releases the device and removes the socket.
#[derive(Debug)]
pub struct VhostUserFront {
    stop: Arc<Doorbell>,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl VhostUserFront {
    /// Listens, and serves from a thread called `name` in logs. When this returns, front ends can connect.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn start(
        name: &str,
        session: SessionHandle,
        options: VhostUserOptions,
    ) -> Result<VhostUserFront, BindError> {
        let os = |source| BindError::Os {
            path: options.socket.clone(),
            source,
        };
        // Front ends may truncate the files of their memory while it is looked at here.
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
            config: options.config,
            told_remedy: false,
            limit: Arc::default(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("front {name}"))
            .spawn(move || server.run())
            .map_err(os)?;
        Ok(VhostUserFront {
            stop,
            counts,
            thread: Some(thread),
        })
    }

    /// What has happened so far.
    pub fn stats(&self) -> FrontStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let c = &self.counts;
        FrontStats {
            connections: get(&c.connections),
            requests: get(&c.requests),
            malformed: get(&c.malformed),
            refused: get(&c.refused),
            wakeups: get(&c.wakeups),
        }
    }
}

impl Drop for VhostUserFront {
    fn drop(&mut self) {
        let _ = self.stop.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// A listening socket whose file goes with it.
#[derive(Debug)]
struct Bound {
    listener: UnixListener,
    path: PathBuf,
    /// So that no other program's socket is removed.
    inode: (u64, u64),
}

impl Bound {
    /// Takes the place of a socket nobody listens on, and of nothing else. The file appears when it can be connected.
    fn new(path: &Path, mode: u32) -> Result<Bound, BindError> {
        let os = |source| BindError::Os {
            path: path.to_owned(),
            source,
        };
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(os(error)),
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(BindError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Ok(_) => return Err(BindError::InUse(path.to_owned())),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(os(error)),
            },
        }
        let mut aside = path.as_os_str().to_owned();
        aside.push(format!(".{}", std::process::id()));
        let aside = PathBuf::from(aside);
        let _ = fs::remove_file(&aside);
        let listener = UnixListener::bind(&aside).map_err(os)?;
        let ready = || -> io::Result<(u64, u64)> {
            listener.set_nonblocking(true)?;
            fs::set_permissions(&aside, fs::Permissions::from_mode(mode))?;
            let meta = fs::symlink_metadata(&aside)?;
            fs::rename(&aside, path)?;
            Ok((meta.dev(), meta.ino()))
        };
        match ready() {
            Ok(inode) => Ok(Bound {
                listener,
                path: path.to_owned(),
                inode,
            }),
            Err(error) => {
                let _ = fs::remove_file(&aside);
                Err(os(error))
            }
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a front end is not served any more.
#[derive(Debug, Error)]
enum End {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Guest(GuestError),
    #[error("stopping")]
    Stop,
}

struct Server {
    name: String,
    session: SessionHandle,
    listener: Bound,
    stop: Arc<Doorbell>,
    counts: Arc<Counts>,
    config: Option<bool>,
    told_remedy: bool,
    /// Whoever connects can connect again and again.
    limit: Arc<LogLimit>,
}

impl Server {
    fn run(mut self) {
        tracing::info!(front = self.name, socket = %self.listener.path.display(), "listening");
        loop {
            let socket = match self.listener.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait_for_front_end(None) {
                        return;
                    }
                    continue;
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    if let Some(unsaid) = self.limit.admit() {
                        tracing::error!(front = self.name, %error, unsaid, "cannot accept");
                    }
                    // Out of descriptors, most likely; the socket stays readable, so look away for a moment.
                    if !self.wait_for_front_end(Some(Duration::from_secs(1))) {
                        return;
                    }
                    continue;
                }
            };
            self.counts.connections.fetch_add(1, Ordering::Relaxed);
            // Whoever comes and goes without having been told of leaves no trace but in the counts.
            let told = self.limit.admit();
            if let Some(unsaid) = told {
                tracing::info!(front = self.name, unsaid, "front end connected");
            }
            let end = Connection::new(socket)
                .map_err(|e| End::from(ConnectionError::from(e)))
                .and_then(|c| self.serve(c));
            match end {
                Err(End::Stop) | Ok(()) => return,
                Err(End::Connection(ConnectionError::Closed)) if told.is_some() => {
                    tracing::info!(front = self.name, "front end gone")
                }
                Err(End::Connection(ConnectionError::Closed)) => {}
                Err(end) => {
                    self.counts.malformed.fetch_add(1, Ordering::Relaxed);
                    if told.is_some() {
                        tracing::warn!(front = self.name, %end, "front end dropped");
                    } else {
                        tracing::debug!(front = self.name, %end, "front end dropped");
                    }
                }
            }
        }
    }

    /// With `pause`, only for that long and whether or not anybody comes. False: stop.
    fn wait_for_front_end(&self, pause: Option<Duration>) -> bool {
        let mut fds = vec![PollFd::new(&*self.stop, PollFlags::IN)];
        if pause.is_none() {
            fds.push(PollFd::new(&self.listener.listener, PollFlags::IN));
        }
        let news = self.session.event_fd();
        fds.push(PollFd::new(&news, PollFlags::IN));
        let waited = poll(
            &mut fds,
            pause
                .and_then(|left| Timespec::try_from(left).ok())
                .as_ref(),
        );
        self.counts.wakeups.fetch_add(1, Ordering::Relaxed);
        if !matches!(waited, Ok(_) | Err(Errno::INTR)) || !fds[0].revents().is_empty() {
            return false;
        }
        // Nobody is there to hear them.
        self.session.clear();
        drop(self.session.take_events());
        true
    }

    /// One front end, from its first request to its end.
    fn serve(&mut self, mut connection: Connection) -> Result<(), End> {
        self.session.clear();
        drop(self.session.take_events());
        let mut guest = Guest::new(self.session.clone(), self.config, self.limit.clone())
            .map_err(End::Guest)?;
        let end = self.converse(&mut connection, &mut guest);
        let shared = guest.has_memory() || guest.waits_for_memory.is_none();
        if let Err(End::Guest(GuestError::Memory(MemoryError::NotShared { .. }))) = &end {
            self.tell_remedy();
        } else if !shared && matches!(end, Err(End::Connection(_))) {
            self.tell_remedy();
        }
        drop(connection);
        match guest.release() {
            Ok(()) | Err(OpError::Ended) => {}
            Err(error) => {
                if let Some(unsaid) = self.limit.admit() {
                    tracing::warn!(front = self.name, %error, unsaid, "the device was not released properly");
                }
            }
        }
        end
    }

    fn converse(&mut self, connection: &mut Connection, guest: &mut Guest) -> Result<(), End> {
        loop {
            self.session.clear();
            // Those that are there now: a device host can make new ones faster than they are passed on.
            for event in self.session.take_events() {
                guest.news(&event);
            }
            guest.tell_of_changes();
            connection.flush()?;
            let mut budget = BUDGET;
            while budget > 0 && !connection.is_backed_up() {
                let Some(incoming) = connection.receive()? else {
                    break;
                };
                budget -= 1;
                self.counts.requests.fetch_add(1, Ordering::Relaxed);
                let (id, wants_ack) = (incoming.id, incoming.wants_ack && guest.acks());
                let dispensable = matches!(incoming.request, Request::SetConfig { .. });
                match guest.handle(incoming) {
                    Ok(Reply::Number(number)) => connection.reply(id, &number.to_ne_bytes())?,
                    Ok(Reply::Bytes(bytes)) => connection.reply(id, &bytes)?,
                    Ok(Reply::Done) if wants_ack => connection.reply(id, &0u64.to_ne_bytes())?,
                    Ok(Reply::Done) => {}
                    Err(error) => {
                        self.counts.refused.fetch_add(1, Ordering::Relaxed);
                        if let Some(unsaid) = self.limit.admit() {
                            tracing::warn!(front = self.name, request = id, %error, unsaid, "refused");
                        }
                        if wants_ack {
                            connection.reply(id, &1u64.to_ne_bytes())?;
                        }
                        // Guests can write what they like into configuration space, and a device away cannot be written to.
                        if dispensable {
                            continue;
                        }
                        // A front end that was not told, or goes on all the same, would believe in a device that is not there.
                        return Err(End::Guest(error));
                    }
                }
            }
            if guest
                .waits_for_memory
                .is_some_and(|since| since.elapsed() >= MEMORY_PATIENCE)
            {
                guest.waits_for_memory = None;
                self.tell_remedy();
            }
            if budget > 0 {
                self.wait(connection, guest)?;
            }
        }
    }

    fn wait(&self, connection: &Connection, guest: &Guest) -> Result<(), End> {
        let flags = if connection.is_backed_up() {
            PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let news = self.session.event_fd();
        let mut fds = [
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&news, PollFlags::IN),
            PollFd::from_borrowed_fd(connection.as_fd(), flags),
        ];
        let memory = guest.waits_for_memory.map(|since| since + MEMORY_PATIENCE);
        let patience = memory
            .into_iter()
            .chain(guest.tells_of_changes_at())
            .min()
            .map(|at| at.saturating_duration_since(Instant::now()));
        let waited = poll(
            &mut fds,
            patience
                .and_then(|left| Timespec::try_from(left).ok())
                .as_ref(),
        );
        self.counts.wakeups.fetch_add(1, Ordering::Relaxed);
        match waited {
            Ok(_) | Err(Errno::INTR) if fds[0].revents().is_empty() => Ok(()),
            Ok(_) | Err(Errno::INTR) => Err(End::Stop),
            Err(error) => Err(ConnectionError::Os(error.into()).into()),
        }
    }

    fn tell_remedy(&mut self) {
        if !self.told_remedy {
            self.told_remedy = true;
            tracing::error!(front = self.name, "{}", crate::front::qemu::SHARE_REMEDY);
        }
    }
}
