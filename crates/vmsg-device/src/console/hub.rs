// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everybody who watches one console, and types on it.
//!
//! Output is never held up: who does not read in time loses it, alone, and is told so in the stream. Input waits in a
//! queue of limited length, and behind it in the sockets of those who type.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType, accept_with};
use vmsg_bus::unix::{Address, BindError};
use vmsg_mem::Doorbell;

use super::backlog::Backlog;
use super::client::Client;
use super::handle::{Counters, Handle, Orders, Shared, Size, absolute, open_log};
use super::pty::Pty;

/// Output that is kept for who comes later, in bytes.
pub const BACKLOG: usize = 64 * 1024;

/// Clients of one console on its socket.
pub const MAX_CLIENTS: usize = 32;

/// Input that waits for the guest, in bytes.
pub const MAX_INPUT: usize = 4096;

/// Events handled in one [`Hub::poll`].
const EVENTS: usize = 32;

const BELL: u64 = 0;
const LISTENER: u64 = 1;
const PTY: u64 = 2;
const PTY_WATCH: u64 = 3;
const CLIENTS: u64 = 16;

/// Where a console can be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubConfig {
    /// What it is called.
    pub name: String,
    /// A Unix stream socket for any number of clients, for this user alone.
    pub socket: Option<PathBuf>,
    /// A symbolic link to a pseudoterminal.
    pub pty: Option<PathBuf>,
    /// A file that all output is appended to.
    pub log: Option<PathBuf>,
}

/// A console cannot be reached as it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// The pseudoterminal.
    #[error("cannot make the pseudoterminal `{}`: {source}", path.display())]
    Pty {
        /// Where its link was to be.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The log.
    #[error("cannot log to `{}`: {source}", path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Something else.
    #[error("cannot make a console: {0}")]
    Os(#[from] io::Error),
}

/// One console: what a guest writes goes to all, what anybody types goes to the guest.
///
/// It has no thread: whoever owns it calls [`poll`](Self::poll) when [`event_fd`](Self::event_fd) is readable.
#[derive(Debug)]
pub struct Hub {
    epoll: OwnedFd,
    shared: Arc<Shared>,
    listener: Option<Address>,
    /// No descriptor was left for a client that waits; looked at again when one has gone, or another one comes.
    resting: bool,
    clients: Vec<Option<Client>>,
    pty: Option<(Pty, Client)>,
    log: Option<Log>,
    backlog: Backlog,
    input: VecDeque<u8>,
    /// Whose turn it is to type.
    next: usize,
}

#[derive(Debug)]
struct Log {
    file: File,
    failing: bool,
}

impl Hub {
    /// A console with all that `config` wants.
    ///
    /// # Errors
    ///
    /// [`HubError`]: it cannot be had.
    pub fn open(config: &HubConfig) -> Result<Self, HubError> {
        let log = config.log.as_deref().map(|path| {
            open_log(path).map_err(|source| HubError::Log {
                path: path.to_owned(),
                source,
            })
        });
        let log = log.transpose()?;
        let listener = config.socket.as_deref();
        let listener = listener
            .map(|path| Address::bind(path, 0o600, SocketType::STREAM))
            .transpose()?;
        let pty = config.pty.as_deref().map(|path| {
            Pty::open(path).map_err(|source| HubError::Pty {
                path: path.to_owned(),
                source,
            })
        });
        let pty = pty.transpose()?.map(|(pty, master)| {
            let mut client = Client::new(master);
            client.receives = pty.is_used();
            (pty, client)
        });
        let paths = |path: &Option<PathBuf>| path.as_deref().map(absolute);
        let shared = Arc::new(Shared {
            name: config.name.clone(),
            socket: paths(&config.socket),
            pty: paths(&config.pty),
            bell: Doorbell::new()?,
            orders: Mutex::new(Orders {
                log: None,
                log_path: paths(&config.log),
            }),
            counters: Counters::default(),
            ordered: AtomicBool::new(false),
            size: AtomicU32::new(0),
            clients: AtomicUsize::new(0),
            guest_open: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let watch = |fd: BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, EventData::new_u64(token), EventFlags::IN)
                .map_err(io::Error::from)
        };
        if let Some(bell) = shared.bell.eventfd() {
            watch(bell, BELL)?;
        }
        if let Some(listener) = &listener {
            watch(listener.as_fd(), LISTENER)?;
        }
        if let Some((pty, _)) = &pty
            && let Some(news) = pty.watch()
        {
            watch(news, PTY_WATCH)?;
        }
        let mut hub = Self {
            epoll,
            shared,
            listener,
            resting: false,
            clients: Vec::new(),
            pty,
            log: log.map(Log::new),
            backlog: Backlog::new(BACKLOG),
            input: VecDeque::new(),
            next: 0,
        };
        hub.look_at_pty();
        Ok(hub)
    }

    /// A way to it from other threads.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Readable when [`poll`](Self::poll) has work.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The terminal's size, if somebody has said it.
    pub fn size(&self) -> Option<Size> {
        self.shared.size()
    }

    /// Notes whether the guest has the console open, for [`Report`](super::Report).
    pub fn set_guest_open(&self, open: bool) {
        self.shared.guest_open.store(open, Ordering::Relaxed);
    }

    /// The guest has written `bytes`. Never blocks.
    pub fn output(&mut self, bytes: &[u8]) {
        self.obey();
        let counters = &self.shared.counters;
        counters
            .output
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if let Some(log) = &mut self.log {
            let failed = log.write(bytes, &self.shared.name);
            counters.log_failed.fetch_add(failed, Ordering::Relaxed);
        }
        self.backlog.push(bytes);
        let mut lost = 0;
        let all = self.clients.iter_mut().flatten();
        for client in all.chain(self.pty.as_mut().map(|(_, client)| client)) {
            lost += client.feed(bytes);
        }
        if lost > 0 {
            counters.lost.fetch_add(lost as u64, Ordering::Relaxed);
        }
        self.tidy();
    }

    /// What waits for the guest.
    pub fn input(&self) -> &VecDeque<u8> {
        &self.input
    }

    /// The guest has taken the first `count` bytes of the input.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn consume(&mut self, count: usize) {
        self.input.drain(..count);
        let counters = &self.shared.counters;
        counters.input.fetch_add(count as u64, Ordering::Relaxed);
        self.read();
        self.tidy();
    }

    /// Takes in what has happened: clients who come and go, type, or have room again.
    pub fn poll(&mut self) {
        let mut room = [MaybeUninit::<Event>::uninit(); EVENTS];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut room, Some(&at_once)) else {
            return;
        };
        // Before that of clients: a place may be given to another one below.
        for event in &*events {
            // Copied out: the structure is packed.
            let (flags, token) = (event.flags, event.data.u64());
            match token {
                PTY => {
                    if flags.contains(EventFlags::HUP) {
                        self.look_at_pty();
                    } else if let Some((_, client)) = &mut self.pty {
                        client.flush();
                    }
                }
                token => {
                    let place = usize::try_from(token.wrapping_sub(CLIENTS)).ok();
                    let client = place.and_then(|place| self.clients.get_mut(place));
                    if let Some(Some(client)) = client {
                        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
                            client.stop_receiving();
                        }
                        client.flush();
                    }
                }
            }
        }
        let has = |wanted: u64| events.iter().any(|event| event.data.u64() == wanted);
        let (bell, listener, pty) = (has(BELL), has(LISTENER), has(PTY_WATCH));
        if bell {
            let _ = self.shared.bell.drain();
            self.obey();
        }
        if pty {
            self.look_at_pty();
        }
        self.read();
        self.tidy();
        if listener {
            self.accept();
        }
        self.tidy();
    }

    /// Does what handles want.
    fn obey(&mut self) {
        if !self.shared.ordered.swap(false, Ordering::Acquire) {
            return;
        }
        let log = self.shared.orders().log.take();
        if let Some(log) = log {
            self.log = log.map(Log::new);
        }
    }

    /// Replays to who has just opened the pseudoterminal.
    fn look_at_pty(&mut self) {
        let Some((pty, client)) = &mut self.pty else {
            return;
        };
        pty.look(client.as_fd());
        let used = pty.is_used();
        if used && !client.receives {
            client.sends = true;
            client.receives = true;
            client.replay(self.backlog.replay());
        } else if !used {
            client.sends = false;
            client.stop_receiving();
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        // A flood of clients must not keep the worker here.
        for _ in 0..EVENTS {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match accept_with(listener.as_fd(), flags) {
                Ok(socket) => {
                    let mut client = Client::new(socket);
                    let taken = self.clients.iter().flatten().count();
                    if taken >= MAX_CLIENTS {
                        let words = format!("[vmsg: there are {MAX_CLIENTS} clients already]\r\n");
                        client.replay(words.bytes());
                        continue;
                    }
                    client.replay(self.backlog.replay());
                    match self.clients.iter_mut().find(|place| place.is_none()) {
                        Some(place) => *place = Some(client),
                        None => self.clients.push(Some(client)),
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    // Out of descriptors, most likely: who waits would wake us again and again. So only who comes after this
                    // does, and lets in those before as well.
                    if !std::mem::replace(&mut self.resting, true) {
                        tracing::warn!(console = self.shared.name, %error, "cannot accept");
                        watch_listener(&self.epoll, listener, EventFlags::IN | EventFlags::ET);
                    }
                    return;
                }
            }
        }
        if std::mem::take(&mut self.resting) {
            watch_listener(&self.epoll, listener, EventFlags::IN);
        }
    }

    /// Takes what was typed, as far as there is room for it; each has its turn.
    fn read(&mut self) {
        let count = self.clients.len();
        for turn in 0..count {
            if self.input.len() >= MAX_INPUT {
                break;
            }
            let place = (self.next + turn) % count;
            if let Some(client) = &mut self.clients[place]
                && client.read(&mut self.input, MAX_INPUT) > 0
            {
                self.next = place + 1;
            }
        }
        if let Some((pty, client)) = &mut self.pty
            && pty.is_used()
        {
            client.read(&mut self.input, MAX_INPUT);
        }
    }

    /// Forgets who has gone, and watches the others for what they can do next.
    fn tidy(&mut self) {
        let room = self.input.len() < MAX_INPUT;
        let mut present = 0;
        for (place, slot) in self.clients.iter_mut().enumerate() {
            let Some(client) = slot else {
                continue;
            };
            if client.is_gone() {
                let _ = epoll::delete(&self.epoll, client.as_fd());
                *slot = None;
                if std::mem::take(&mut self.resting)
                    && let Some(listener) = &self.listener
                {
                    watch_listener(&self.epoll, listener, EventFlags::IN);
                }
                continue;
            }
            present += 1;
            // One that only leaves something to be read says so without end: not while there is no room for it.
            let wanted = client.interest(room);
            let idle = !client.receives && wanted.is_empty();
            let wanted = (!idle).then_some(wanted);
            update(&self.epoll, client, CLIENTS + place as u64, wanted);
        }
        while self.clients.last().is_some_and(Option::is_none) {
            self.clients.pop();
        }
        self.shared.clients.store(present, Ordering::Relaxed);
        if let Some((pty, client)) = &mut self.pty {
            let wanted = pty.is_used().then(|| client.interest(room));
            update(&self.epoll, client, PTY, wanted);
        }
    }
}

/// Has the listener watched in another way.
fn watch_listener(epoll: &OwnedFd, listener: &Address, flags: EventFlags) {
    let data = EventData::new_u64(LISTENER);
    // It is watched already: nothing is needed for it that could be lacking.
    let _ = epoll::modify(epoll, listener.as_fd(), data, flags);
}

/// Has `client` watched for `wanted`, or not at all.
fn update(epoll: &OwnedFd, client: &mut Client, token: u64, wanted: Option<EventFlags>) {
    if client.watched == wanted {
        return;
    }
    let data = EventData::new_u64(token);
    let done = match (client.watched, wanted) {
        (None, Some(flags)) => epoll::add(epoll, &*client, data, flags),
        (Some(_), Some(flags)) => epoll::modify(epoll, &*client, data, flags),
        (_, None) => epoll::delete(epoll, &*client),
    };
    match done {
        Ok(()) => client.watched = wanted,
        // Out of memory: without being watched it would be stuck.
        Err(_) => {
            client.sends = false;
            client.stop_receiving();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
    }
}

impl Log {
    fn new(file: File) -> Self {
        Self {
            file,
            failing: false,
        }
    }

    /// Appends `bytes`; returns how many of them are not in the file.
    fn write(&mut self, bytes: &[u8], name: &str) -> u64 {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(count) if count > 0 => {
                    rest = &rest[count..];
                    self.failing = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => {
                    if !std::mem::replace(&mut self.failing, true) {
                        let error =
                            result.map_or_else(|error| error.to_string(), |_| "full".into());
                        tracing::warn!(console = name, error, "output cannot be logged");
                    }
                    break;
                }
            }
        }
        rest.len() as u64
    }
}

/// Whether `name` can be part of a file's name and of a command line.
pub fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// The socket that belongs to the console `name` of the program that has the control socket `control`.
pub fn default_socket(control: &Path, name: &str) -> PathBuf {
    let mut path = control.as_os_str().to_owned();
    path.push(format!(".{name}.console"));
    path.into()
}

#[cfg(test)]
#[path = "hub_test.rs"]
mod tests;
