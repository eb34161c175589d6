// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server in a thread, and ways to look at what it does.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ivshmem::client::Limits;
use ivshmem::server::{Options, Port, Server, Stats, Turn};
use ivshmem::{Client, Event, PeerId};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Much more than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A server in a thread.
pub(crate) struct Running {
    stop: OwnedFd,
    thread: Option<JoinHandle<(Turn, Stats)>>,
}

impl Running {
    pub(crate) fn start(options: Options) -> Self {
        let mut server = Server::bind(options).expect("a server");
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let ear = stop.try_clone().unwrap();
        let thread = std::thread::spawn(move || {
            let turn = server.run(ear.as_fd()).expect("it serves");
            (turn, server.stats())
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it in an orderly way.
    pub(crate) fn stop(mut self) -> Stats {
        self.end().1
    }

    /// Waits for its own end.
    pub(crate) fn wait(mut self) -> Turn {
        self.thread.take().unwrap().join().unwrap().0
    }

    fn end(&mut self) -> (Turn, Stats) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

/// A directory with a socket in it.
pub(crate) fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("iv.sock");
    (dir, path)
}

/// A server of 64 KiB with two vectors for each client.
pub(crate) fn usual(path: &Path) -> Options {
    Options::new(vec![Port::new(path, 2)], 65536)
}

/// A client of a port whose clients have two vectors.
pub(crate) fn client(path: &Path) -> Client {
    client_of(path, 2)
}

/// A client that has all its `vectors`, however long the server takes for them.
pub(crate) fn client_of(path: &Path, vectors: u16) -> Client {
    let limits = Limits {
        vectors: Some(vectors),
        ..Limits::default()
    };
    Client::connect_with(path, limits, LONG).expect("a client")
}

/// The next thing that the server tells.
pub(crate) fn next(client: &mut Client) -> Event {
    let until = Instant::now() + LONG;
    loop {
        if let Some(event) = client.poll() {
            return event;
        }
        assert!(Instant::now() < until, "the server tells nothing");
        assert!(
            is_readable(client.poll_fd(), LONG),
            "the server tells nothing"
        );
    }
}

/// All that the server has told.
pub(crate) fn news(client: &mut Client) -> Vec<Event> {
    std::iter::from_fn(|| client.poll()).collect()
}

pub(crate) fn is_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).unwrap();
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    )
    .unwrap()
        > 0
}

/// How often an eventfd was rung since the last time.
pub(crate) fn rings(client: &Client, vector: u16) -> u64 {
    let fd = client.vector_fd(vector).expect("an own vector");
    if !is_readable(fd, Duration::ZERO) {
        return 0;
    }
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

/// Waits until `client` knows `peer` with this many vectors.
pub(crate) fn sees(client: &mut Client, peer: PeerId, vectors: u16) {
    while !client.peers().any(|known| known == (peer, vectors)) {
        assert_ne!(next(client), Event::ServerGone);
    }
}

/// A client that is nothing but a socket.
pub(crate) struct Raw(pub(crate) UnixStream);

impl Raw {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self(socket)
    }

    /// The next message: its bytes, and whether there was a descriptor. `None` at the end.
    pub(crate) fn message(&self) -> Option<([u8; 8], Option<OwnedFd>)> {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        let count = match received {
            Ok(received) => received.bytes,
            Err(rustix::io::Errno::CONNRESET) => 0,
            Err(error) => panic!("{error}"),
        };
        if count == 0 {
            return None;
        }
        assert_eq!(count, 8);
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        assert!(fds.len() <= 1);
        Some((bytes, fds.pop()))
    }

    /// The number of the next message, and whether there was a descriptor.
    pub(crate) fn number(&self) -> Option<(i64, bool)> {
        let (bytes, fd) = self.message()?;
        Some((i64::from_le_bytes(bytes), fd.is_some()))
    }

    /// Waits until the server has closed the connection.
    pub(crate) fn ends(&self) {
        while self.message().is_some() {}
    }
}
