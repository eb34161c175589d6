// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::time::Duration;

use ivshmem::server::{Options, Port, Turn};
use ivshmem::{Client, Event, PeerId, RingError};

use crate::support::*;

const ZERO: PeerId = PeerId(0);
const ONE: PeerId = PeerId(1);

#[test]
fn the_bytes_are_those_of_qemus_server() {
    // docs/specs/ivshmem-spec.rst, "On connect, the server sends the following messages in order"; with two vectors.
    let (_dir, path) = place();
    let _server = Running::start(usual(&path));
    let first = Raw::connect(&path);
    let own = [(0, false), (0, false), (-1, true), (0, true), (0, true)];
    assert_eq!(own.map(Some), [(); 5].map(|()| first.number()));
    let second = Raw::connect(&path);
    let bytes: Vec<u8> = (0..7).flat_map(|_| second.message().unwrap().0).collect();
    #[rustfmt::skip]
    assert_eq!(bytes, [
        0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,
    ]);
    assert_eq!([first.number(), first.number()], [Some((1, true)); 2]);
    drop(second);
    assert_eq!(first.number(), Some((1, false)));
}

#[test]
fn two_clients_share_memory_and_ring_each_other() {
    let (_dir, path) = place();
    let server = Running::start(usual(&path));
    let mut first = client(&path);
    let second = client(&path);
    assert_eq!((first.id(), first.vectors()), (ZERO, 2));
    assert_eq!((second.id(), second.vectors()), (ONE, 2));
    assert_eq!(second.peers().collect::<Vec<_>>(), [(ZERO, 2)]);
    sees(&mut first, ONE, 2);
    assert_eq!((first.memory_size(), second.memory_size()), (65536, 65536));
    rustix::io::pwrite(first.memory_fd(), b"hello", 100).unwrap();
    let mut read = [0; 5];
    rustix::io::pread(second.memory_fd(), &mut read, 100).unwrap();
    assert_eq!(&read, b"hello");
    assert!(vmsg_mem::check_seals(first.memory_fd()).unwrap());

    first.ring(ONE, 1).unwrap();
    assert_eq!((rings(&second, 0), rings(&second, 1)), (0, 1));
    second.ring(ZERO, 0).unwrap();
    second.ring(ZERO, 0).unwrap();
    assert_eq!((rings(&first, 0), rings(&first, 1)), (2, 0));
    second.ring(ONE, 0).unwrap();
    assert_eq!(rings(&second, 0), 1, "QEMU's device can ring itself");
    assert!(matches!(
        first.ring(PeerId(7), 0),
        Err(RingError::NoSuchPeer(PeerId(7)))
    ));
    assert!(matches!(
        first.ring(ONE, 2),
        Err(RingError::NoSuchVector {
            vector: 2,
            vectors: 2,
            ..
        })
    ));

    drop(second);
    assert_eq!(next(&mut first), Event::Left(ONE));
    assert!(matches!(first.ring(ONE, 0), Err(RingError::NoSuchPeer(_))));
    let stats = server.stop();
    assert_eq!(next(&mut first), Event::ServerGone);
    assert_eq!((stats.clients(), stats.ports[0].joined), (1, 2));
    assert_eq!(first.poll(), None);
    assert!(!is_readable(first.poll_fd(), Duration::ZERO));
}

#[test]
fn doorbells_go_on_without_a_server() {
    let (_dir, path) = place();
    let server = Running::start(usual(&path));
    let mut first = client(&path);
    let mut second = client(&path);
    sees(&mut first, ONE, 2);
    server.stop();
    assert_eq!(next(&mut first), Event::ServerGone);
    assert_eq!(next(&mut second), Event::ServerGone);
    let bell = first.bell(ONE, 0).unwrap();
    std::thread::spawn(move || bell.ring().unwrap())
        .join()
        .unwrap();
    first.ring(ONE, 0).unwrap();
    assert_eq!(rings(&second, 0), 2);
    second.ring(ZERO, 1).unwrap();
    assert_eq!(rings(&first, 1), 1);
}

#[test]
fn who_does_not_know_its_vectors_waits_for_a_moment() {
    let (_dir, path) = place();
    let _server = Running::start(usual(&path));
    let mut client = Client::connect(&path, LONG).unwrap();
    // One that comes late is told, too.
    let id = client.id();
    while client.vectors() < 2 {
        assert_eq!(next(&mut client), Event::Joined(id));
    }
    assert!(client.vector_fd(1).is_some() && client.vector_fd(2).is_none());
}

/// A server where id 5 has a socket of its own, and three vectors.
fn with_a_seat(path: &std::path::Path) -> (Options, std::path::PathBuf) {
    let seat = path.with_extension("seat");
    let ports = vec![Port::new(path, 2), Port::new(&seat, 3).with_id(PeerId(5))];
    (Options::new(ports, 65536), seat)
}

#[test]
fn the_client_of_a_port_with_an_id_can_go_and_come_back_and_finds_what_was_rung_meanwhile() {
    let (_dir, path) = place();
    let (options, seat) = with_a_seat(&path);
    let server = Running::start(options);
    let mut other = client(&path);
    let five = PeerId(5);
    assert_eq!(
        other.peers().collect::<Vec<_>>(),
        [(five, 3)],
        "before it was ever there"
    );
    other.ring(five, 2).unwrap();
    for round in 0..3 {
        let here = client_of(&seat, 3);
        assert_eq!((here.id(), here.vectors()), (five, 3));
        assert_eq!(here.peers().collect::<Vec<_>>(), [(ZERO, 2)]);
        assert_eq!([0, 1, 2].map(|vector| rings(&here, vector)), [0, round, 1]);
        here.ring(ZERO, 1).unwrap();
        drop(here);
        for _ in 0..=round {
            other.ring(five, 1).unwrap();
        }
        other.ring(five, 2).unwrap();
    }
    assert_eq!(rings(&other, 1), 3);
    // A later client would be told after them.
    let last = client(&path);
    assert_eq!(last.id(), ONE);
    sees(&mut other, ONE, 2);
    assert_eq!(news(&mut other), [], "others see it neither leave nor join");
    assert_eq!(server.stop().ports[1].joined, 3);
}

#[test]
fn a_second_client_of_such_a_port_waits_for_the_end_of_the_first_but_not_for_ever() {
    let (_dir, path) = place();
    let (options, seat) = with_a_seat(&path);
    let server = Running::start(options);
    let first = client_of(&seat, 3);
    let second = Raw::connect(&seat);
    // It is refused after two seconds.
    assert_eq!(second.message().map(|_| ()), None);
    let third = Raw::connect(&seat);
    // The server has seen it when it has served one that came after it.
    drop(client(&path));
    drop(first);
    assert_eq!(third.number(), Some((0, false)));
    assert_eq!(third.number(), Some((5, false)));
    let stats = server.stop();
    assert_eq!((stats.ports[1].joined, stats.ports[1].refused), (2, 1));
}

#[test]
fn a_server_that_is_to_linger_ends_when_nobody_was_there_for_that_long() {
    let (_dir, path) = place();
    let mut options = usual(&path);
    options.linger = Some(Duration::from_secs(2));
    let server = Running::start(options.clone());
    let first = client(&path);
    // Longer than it lingers: it waits for the end of this one.
    assert!(!is_readable(first.poll_fd(), Duration::from_millis(2500)));
    drop(client(&path));
    drop(first);
    assert_eq!(server.wait(), Turn::Deserted);
    assert!(!path.exists());
    assert_eq!(
        Running::start(options).wait(),
        Turn::Deserted,
        "nobody came at all"
    );
}
