// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Servers that are not what they should be.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

/// A server by hand, and a client of it that is about to connect.
fn pair() -> (UnixStream, Box<Connecting>) {
    pair_with(Limits::default())
}

fn pair_with(limits: Limits) -> (UnixStream, Box<Connecting>) {
    let (server, client) = UnixStream::pair().unwrap();
    client.set_nonblocking(true).unwrap();
    server.set_nonblocking(true).unwrap();
    let connecting = Connecting::over(client.into(), Path::new("test.sock"), limits);
    (server, Box::new(connecting))
}

fn send_bytes(server: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        server,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .is_ok()
}

fn send(server: &UnixStream, number: i64, fd: Option<BorrowedFd<'_>>) {
    let fds: Vec<_> = fd.into_iter().collect();
    assert!(send_bytes(server, &number.to_le_bytes(), &fds));
}

fn memory(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

fn bell() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Long after everything has settled.
fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn finish(connecting: Box<Connecting>) -> Result<Client, ConnectError> {
    // What has come is heard in the first, and settled in the second.
    let Advance::Pending(connecting) = connecting.advance(Instant::now())? else {
        panic!("there may be more");
    };
    match connecting.advance(later())? {
        Advance::Done(client) => Ok(*client),
        Advance::Pending(_) => panic!("it has had enough time"),
    }
}

/// A client with the id 3 and one vector.
fn connected(limits: Limits) -> (UnixStream, Client) {
    let (server, connecting) = pair_with(Limits {
        vectors: Some(1),
        ..limits
    });
    greet(&server);
    send(&server, 3, Some(bell().as_fd()));
    match connecting.advance(Instant::now()).unwrap() {
        Advance::Done(client) => (server, *client),
        Advance::Pending(_) => panic!("it has all that it wants"),
    }
}

fn greet(server: &UnixStream) {
    send(server, 0, None);
    send(server, 3, None);
    send(server, -1, Some(memory(4096).as_fd()));
}

#[test]
fn a_message_in_pieces_is_one_message() {
    let (server, mut client) = connected(Limits::default());
    let bell = bell();
    let bytes = 0x0102i64.to_le_bytes();
    assert!(send_bytes(&server, &bytes[..3], &[bell.as_fd()]));
    assert_eq!(client.poll(), None);
    assert!(send_bytes(&server, &bytes[3..7], &[]));
    assert_eq!(client.poll(), None);
    assert!(send_bytes(&server, &bytes[7..], &[]));
    assert_eq!(client.poll(), Some(Event::Joined(PeerId(0x0102))));
    client.ring(PeerId(0x0102), 0).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&bell, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn the_last_of_its_own_vectors_is_told_by_silence() {
    let (server, connecting) = pair();
    greet(&server);
    send(&server, 3, Some(bell().as_fd()));
    let now = Instant::now();
    let Advance::Pending(connecting) = connecting.advance(now).unwrap() else {
        panic!("there may be more");
    };
    let due = connecting.due().unwrap();
    assert!(due > now && due < now + Duration::from_secs(1));
    send(&server, 3, Some(bell().as_fd()));
    let Advance::Pending(connecting) = connecting.advance(due).unwrap() else {
        panic!("there may be more again");
    };
    let due = connecting.due().unwrap();
    let Advance::Done(mut client) = connecting.advance(due).unwrap() else {
        panic!("that was all");
    };
    assert_eq!(client.vectors(), 2);
    // It was not.
    send(&server, 3, Some(bell().as_fd()));
    assert_eq!(client.poll(), Some(Event::Joined(PeerId(3))));
    assert_eq!(client.vectors(), 3);
    assert!(client.vector_fd(2).is_some());
}

#[test]
fn memory_must_be_a_file_with_something_in_it() {
    let pipe = rustix::pipe::pipe().unwrap().0;
    let device = std::fs::File::open("/dev/zero").unwrap();
    for fd in [memory(0), pipe, device.into(), bell()] {
        let (server, connecting) = pair();
        send(&server, 0, None);
        send(&server, 3, None);
        send(&server, -1, Some(fd.as_fd()));
        let error = finish(connecting).unwrap_err();
        assert!(matches!(error, ConnectError::Memory { .. }), "{error}");
    }
}

#[test]
fn a_huge_memory_is_not_touched() {
    let (server, connecting) = pair();
    send(&server, 0, None);
    send(&server, 3, None);
    send(&server, -1, Some(memory(i64::MAX as u64).as_fd()));
    assert_eq!(finish(connecting).unwrap().memory_size(), i64::MAX as u64);
}

#[test]
fn a_doorbell_that_is_none_is_not_rung() {
    let (server, connecting) = pair();
    greet(&server);
    send(&server, 3, Some(memory(4096).as_fd()));
    let error = finish(connecting).unwrap_err();
    let source = ProtocolError::NotADoorbell;
    assert!(matches!(&error, ConnectError::Protocol { source: found, .. } if *found == source));
    let (server, mut client) = connected(Limits::default());
    send(&server, 9, Some(memory(4096).as_fd()));
    assert_eq!(client.poll(), Some(Event::ServerGone));
    assert!(!client.has_server());
    client.ring(PeerId(3), 0).unwrap();
}

#[test]
fn several_descriptors_with_one_message_are_the_end() {
    let (server, mut client) = connected(Limits::default());
    let bells = [bell(), bell()];
    let fds = [bells[0].as_fd(), bells[1].as_fd()];
    assert!(send_bytes(&server, &9i64.to_le_bytes(), &fds));
    assert_eq!(client.poll(), Some(Event::ServerGone));
    let (server, mut client) = connected(Limits::default());
    for byte in 9i64.to_le_bytes() {
        send_bytes(&server, &[byte], &[bells[0].as_fd()]);
    }
    assert_eq!(client.poll(), Some(Event::ServerGone));
}

#[test]
fn peers_and_vectors_are_bounded() {
    let (server, mut client) = connected(Limits {
        max_bells: 300,
        vectors: None,
    });
    let bell = bell();
    let mut events = 0;
    for peer in 0..1000 {
        send(&server, 1000 + peer, Some(bell.as_fd()));
        events += usize::from(client.poll().is_some());
    }
    assert_eq!((events, client.peers().count()), (299, 299));
    assert_eq!(client.ignored(), 701);
    // Its own are taken all the same, as many as there can be.
    for _ in 0..1000 {
        send(&server, 3, Some(bell.as_fd()));
        client.poll();
    }
    assert_eq!(client.vectors(), 256);
    assert!(client.has_server());
}

#[test]
fn who_leaves_without_having_been_there_is_no_news() {
    let (server, mut client) = connected(Limits::default());
    send(&server, 9, None);
    assert_eq!(client.poll(), None);
    assert_eq!(client.ignored(), 1);
    drop(server);
    assert_eq!(client.poll(), Some(Event::ServerGone));
    assert_eq!(client.poll(), None);
}

#[test]
fn a_server_that_never_stops_does_not_keep_its_client() {
    let (server, mut client) = connected(Limits {
        max_bells: 1,
        vectors: None,
    });
    let bell = bell();
    let flood = std::thread::spawn(move || {
        server.set_nonblocking(false).unwrap();
        while send_bytes(&server, &9i64.to_le_bytes(), &[bell.as_fd()]) {}
    });
    for _ in 0..10 {
        assert_eq!(client.poll(), None);
    }
    drop(client);
    flood.join().unwrap();
}

proptest! {
    #[test]
    fn whatever_a_server_sends_is_survived(
        messages in proptest::collection::vec(
            (prop_oneof![-2i64..5, Just(65535), Just(65536), any::<i64>()], 0usize..4, 1usize..9), 0..60),
        greeted in any::<bool>(),
    ) {
        let (server, mut connecting) = pair();
        if greeted {
            greet(&server);
        }
        let kinds = [bell(), memory(4096), memory(0)];
        let mut client = None;
        for (number, kind, cut) in messages {
            let fds: Vec<_> = kinds.get(kind).map(|fd| fd.as_fd()).into_iter().collect();
            let bytes = number.to_le_bytes();
            send_bytes(&server, &bytes[..cut], &fds);
            send_bytes(&server, &bytes[cut..], &[]);
            match client.as_mut() {
                None => match connecting.advance(Instant::now()) {
                    Err(_) => return Ok(()),
                    Ok(Advance::Done(done)) => {
                        client = Some(done);
                        (_, connecting) = pair();
                    }
                    Ok(Advance::Pending(still)) => connecting = still,
                },
                Some(client) => while client.poll().is_some() {},
            }
        }
    }
}
