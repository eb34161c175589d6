// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that sends anything, in pieces, with any descriptors, for the client. The story is told by bytes: for tests and for `fuzz/`.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use ivshmem::client::{Advance, Client, Connecting, Limits};
use ivshmem::{Event, PeerId};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};

const MAX_BELLS: usize = 8;
/// The most that is sent: no more than fits into a socket.
const STEPS: usize = 100;

/// Sends; false once the client has closed the connection.
fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
}

enum Stage {
    Connecting(Box<Connecting>),
    Connected(Box<Client>),
}

impl Stage {
    /// False: it is over.
    fn advance(self, now: Instant) -> Option<Self> {
        match self {
            Self::Connecting(connecting) => match connecting.advance(now) {
                Ok(Advance::Pending(connecting)) => Some(Self::Connecting(connecting)),
                Ok(Advance::Done(client)) => {
                    assert!(client.memory_size() > 0);
                    Some(Self::Connected(client))
                }
                Err(error) => {
                    assert!(!error.to_string().contains('\n'));
                    None
                }
            },
            Self::Connected(mut client) => {
                let mut gone = false;
                // More than was sent there cannot be.
                for _ in 0..=STEPS {
                    match client.poll() {
                        None => break,
                        Some(Event::ServerGone) => gone = true,
                        Some(_) => assert!(!gone, "news of nobody"),
                    }
                }
                assert_eq!(client.poll(), None);
                assert_eq!(client.has_server(), !gone);
                check(&client);
                (!gone).then_some(Self::Connected(client))
            }
        }
    }
}

fn check(client: &Client) {
    let mut bells = 0;
    for (peer, vectors) in client.peers() {
        assert!(vectors > 0 && peer != client.id());
        bells += usize::from(vectors);
        client.ring(peer, vectors - 1).expect("an eventfd");
        assert!(client.ring(peer, vectors).is_err());
    }
    assert!(bells <= MAX_BELLS);
    assert!(client.vectors() <= 256);
    assert!(client.vector_fd(client.vectors()).is_none());
    let nobody = (0..)
        .map(PeerId)
        .find(|id| *id != client.id() && client.peers().all(|(peer, _)| peer != *id));
    assert!(client.ring(nobody.expect("there are more"), 0).is_err());
    assert!(client.poll_fd().try_clone_to_owned().is_ok());
}

/// Tells the story.
pub(crate) fn client(mut bytes: &[u8]) {
    let mut next = || {
        let (first, rest) = bytes.split_first()?;
        bytes = rest;
        Some(*first)
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let (server, socket) = pair.expect("a pair");
    let memory = memfd_create("any", MemfdFlags::CLOEXEC).expect("a memfd");
    ftruncate(&memory, u64::from(next().unwrap_or(1)) * 1024).expect("a size");
    let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let vectors = next()
        .filter(|first| first & 1 == 0)
        .map(|n| u16::from(n >> 1) % 5);
    let limits = Limits {
        max_bells: MAX_BELLS,
        vectors,
    };
    let mut now = Instant::now();
    let connecting = Connecting::over(socket, Path::new("a server"), limits);
    let mut stage = Stage::Connecting(Box::new(connecting));
    // A beginning as it should be lets the story get on.
    let proper = next().unwrap_or(0);
    let beginning = [(0, None), (3, None), (-1, Some(memory.as_fd()))];
    for (number, fd) in beginning.into_iter().take(usize::from(proper % 4)) {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let number: i64 = number;
        send(&server, &number.to_le_bytes(), &fds);
    }
    for _ in 0..STEPS {
        let Some(step) = next() else { break };
        let number: i64 = match next().unwrap_or(0) {
            id @ 0..16 => id.into(),
            255 => -1,
            254 => i64::MIN,
            253 => 65_535,
            252 => 65_536,
            id => i64::from(id) << 33,
        };
        let fds: &[BorrowedFd<'_>] = match step & 7 {
            0 | 1 => &[],
            2..=4 => &[bell.as_fd()],
            5 => &[memory.as_fd()],
            6 => &[server.as_fd()],
            _ => &[bell.as_fd(), bell.as_fd(), memory.as_fd()],
        };
        let message = number.to_le_bytes();
        // In two pieces, perhaps with something to each.
        let cut = if step & 8 == 0 {
            8
        } else {
            usize::from(step >> 5)
        };
        let mut sent = cut == 0 || send(&server, &message[..cut], fds);
        if step & 16 != 0 {
            now += Duration::from_millis(30);
            match stage.advance(now) {
                Some(next) => stage = next,
                None => return,
            }
        }
        if cut < 8 {
            sent &= send(&server, &message[cut..], if cut == 0 { fds } else { &[] });
        }
        if !sent {
            break;
        }
    }
    // Silence, which ends lists of vectors; then the end.
    for _ in 0..3 {
        now += Duration::from_secs(2);
        match stage.advance(now) {
            Some(next) => stage = next,
            None => return,
        }
    }
    drop(server);
    assert!(stage.advance(now).is_none(), "it has not heard the end");
}
