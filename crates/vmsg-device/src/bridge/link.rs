// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connection to a daemon.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair,
};
use vmsg_vhost_user::channel::{self, Call};
use vmsg_vhost_user::{
    Done, Fault, FrontEnd, Greeting, Offer, Protocol, Request, Stream, Ticket, Wanted,
};

use super::Settings;
use super::kind::Kind;

/// Features of the protocol that are used.
const PROTOCOL: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::STATUS);

/// Messages that a daemon may send by itself in one turn, and in a second.
const CALLS_A_TURN: usize = 16;
const CALLS_A_SECOND: u32 = 100;

/// A connection to a daemon.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    front: FrontEnd,
    /// Where the daemon asks by itself.
    channel: Stream,
    /// It has closed that.
    channel_closed: bool,
    /// Since when messages there are counted, and how many there were.
    calls: (Instant, u32),
}

/// What a daemon has said by itself in a turn.
#[derive(Debug, Default)]
pub(super) struct Calls {
    pub(super) config_changed: bool,
    /// The number of a message that was refused.
    pub(super) refused: Option<u32>,
}

impl Link {
    /// Connects, or takes the next one who has connected, which never waits, and asks the first question.
    ///
    /// # Errors
    /// [`Errno::AGAIN`]: nobody has connected.
    pub(super) fn open(settings: &Settings, kind: &Kind) -> Result<(Self, Greeting), Errno> {
        let (unix, stream) = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = match &settings.listener {
            Some(listener) => listener.accept()?,
            None => {
                let address = SocketAddrUnix::new(&settings.socket)?;
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = socket_with(unix, stream, flags, None)?;
                connect(&socket, &address)?;
                socket
            }
        };
        let (ours, theirs) = socketpair(unix, stream, SocketFlags::CLOEXEC, None)?;
        // Of rings of a driver before, libvhost-user keeps the addresses, and wants to find them in the memory of the next one, in each
        // region for itself. A daemon that cannot be called anew is given all of it at once.
        let not_for_good = match kind.reconnects {
            true => Protocol::empty(),
            false => Protocol::CONFIGURE_MEM_SLOTS,
        };
        let wanted = Wanted {
            protocol: PROTOCOL - not_for_good,
            config_len: kind.config_len,
            config_len_fixed: settings.config_size,
        };
        let mut front = FrontEnd::new(settings.patience);
        let greeting = Greeting::begin(wanted, Some(theirs), &mut front);
        let this = Self {
            stream: Stream::new(socket),
            front,
            channel: Stream::new(ours),
            channel_closed: false,
            calls: (Instant::now(), 0),
        };
        Ok((this, greeting))
    }

    /// Waits until the daemon is known, at most until `end`.
    pub(super) fn greet(
        &mut self,
        greeting: &mut Greeting,
        patience: Duration,
    ) -> Result<Offer, Fault> {
        let end = Instant::now() + patience;
        loop {
            let now = Instant::now();
            self.transmit(now)?;
            while let Some(done) = self.receive()? {
                if let Some(offer) = greeting.handle(done, &mut self.front)? {
                    return Ok(offer);
                }
                self.transmit(now)?;
            }
            let due = self.front.deadline().map_or(end, |due| due.min(end));
            self.front.check_time(now)?;
            if end <= now {
                return Err(Fault::Silent {
                    request: "the first questions",
                    time: patience,
                });
            }
            wait(self.stream.as_fd(), due.saturating_duration_since(now));
        }
    }

    pub(super) fn ask(&mut self, request: Request) -> Ticket {
        self.front.ask(request)
    }

    pub(super) fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    pub(super) fn is_idle(&self) -> bool {
        self.front.is_idle()
    }

    pub(super) fn under_way(&self) -> usize {
        self.front.under_way()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.front.deadline()
    }

    pub(super) fn check_time(&self, now: Instant) -> Result<(), Fault> {
        self.front.check_time(now)
    }

    /// Sends as far as the daemon answers and reads.
    pub(super) fn transmit(&mut self, now: Instant) -> Result<(), Fault> {
        loop {
            self.stream.flush()?;
            if !self.stream.is_ready() {
                return Ok(());
            }
            match self.front.poll_transmit(now) {
                Some(message) => self.stream.send(message)?,
                None => return Ok(()),
            }
        }
    }

    /// The next answer.
    pub(super) fn receive(&mut self) -> Result<Option<Done>, Fault> {
        match self.stream.receive()? {
            Some(message) => self.front.handle(message).map(Some),
            None => Ok(None),
        }
    }

    /// Hears what the daemon says by itself, and answers.
    ///
    /// # Errors
    /// [`Fault`]: it says too much, or does not take the answers.
    pub(super) fn hear(&mut self, now: Instant) -> Result<Calls, Fault> {
        let mut calls = Calls::default();
        if self.channel_closed {
            return Ok(calls);
        }
        self.channel.flush()?;
        if !self.channel.is_ready() {
            // Something more is there, and there is no room for the answer to what came before: whoever asks on and reads nothing
            // would be looked at for ever.
            return Err(Fault::Deaf);
        }
        for _ in 0..CALLS_A_TURN {
            if !self.channel.is_ready() {
                break;
            }
            let message = match self.channel.receive() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(Fault::Closed) => {
                    self.channel_closed = true;
                    break;
                }
                Err(fault) => return Err(fault),
            };
            if now.saturating_duration_since(self.calls.0) >= Duration::from_secs(1) {
                self.calls = (now, 0);
            }
            self.calls.1 += 1;
            let (call, answer) = channel::handle(&message);
            match call {
                Call::ConfigChanged => calls.config_changed = true,
                Call::Other { id } => {
                    calls.refused = Some(id);
                    if self.calls.1 > CALLS_A_SECOND {
                        return Err(Fault::Unasked { id });
                    }
                }
            }
            if self.calls.1 > CALLS_A_SECOND {
                return Err(Fault::Unasked { id: 2 });
            }
            if let Some(answer) = answer {
                self.channel.send(answer)?;
            }
        }
        Ok(calls)
    }

    /// The connection without what was said on it.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.stream.into_socket()
    }

    pub(super) fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether nothing will come from there any more, so that it is not to be watched.
    pub(super) const fn is_channel_closed(&self) -> bool {
        self.channel_closed
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Why nobody will ever listen at the daemon's path, as far as that can be seen.
pub(super) fn never_a_socket(settings: &Settings) -> Option<&'static str> {
    if settings.listener.is_some() {
        return None;
    }
    if SocketAddrUnix::new(&settings.socket) == Err(Errno::NAMETOOLONG) {
        return Some("the path is too long for a socket");
    }
    let kind = std::fs::metadata(&settings.socket).ok()?.file_type();
    if kind.is_socket() {
        None
    } else if kind.is_dir() {
        Some("this is a directory and no socket; the daemon's socket may be in it")
    } else if kind.is_file() {
        Some("this is a regular file and no socket")
    } else {
        Some("this is no socket")
    }
}

fn wait(fd: BorrowedFd<'_>, time: Duration) {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    // However it ends, the socket is looked at.
    let _ = poll(&mut fds, Timespec::try_from(time).ok().as_ref());
}

/// A file of its own for the same eventfd.
pub(super) fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0)
}
