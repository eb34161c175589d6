// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ivshmem::client::ConnectError;
use ivshmem::server::{Options, Port};
use ivshmem::{Client, Event, PeerId};

use crate::support::*;

#[test]
fn who_never_reads_is_dropped_and_nobody_waits_for_it() {
    let (_dir, path) = place();
    // More than a socket holds.
    let mut options = Options::new(vec![Port::new(&path, 128)], 65536);
    options.stall = Duration::from_secs(1);
    let server = Running::start(options);
    let mut good: Vec<Client> = (0..2).map(|_| client_of(&path, 128)).collect();
    let silent = Raw::connect(&path);
    sees(&mut good[0], PeerId(2), 128);
    while next(&mut good[0]) != Event::Left(PeerId(2)) {}
    // What was on its way is there, and then the end.
    silent.ends();
    let last = client_of(&path, 128);
    sees(&mut good[0], last.id(), 128);
    good[0].ring(last.id(), 127).unwrap();
    assert_eq!(rings(&last, 127), 1);
    assert_eq!(server.stop().ports[0].stalled, 1);
}

#[test]
fn who_says_something_or_half_closes_is_dropped() {
    let (_dir, path) = place();
    let server = Running::start(usual(&path));
    let mut good = client(&path);
    let mut talks = Raw::connect(&path);
    assert_eq!(talks.number(), Some((0, false)));
    talks.0.write_all(&[0; 8]).unwrap();
    talks.ends();
    let half = Raw::connect(&path);
    assert_eq!(half.number(), Some((0, false)));
    half.0.shutdown(Shutdown::Write).unwrap();
    half.ends();
    while next(&mut good) != Event::Left(PeerId(2)) {}
    assert_eq!(good.peers().count(), 0);
    let stats = server.stop();
    assert_eq!((stats.ports[0].spoke, stats.ports[0].joined), (1, 3));
}

#[test]
fn thousands_of_connections_come_and_go_and_leave_nothing_behind() {
    let (_dir, path) = place();
    let server = Running::start(usual(&path));
    let mut good = client(&path);
    for round in 0..3000 {
        let socket = loop {
            // A full backlog.
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        };
        if round % 3 == 0 {
            Raw(socket).number();
        }
    }
    let last = client(&path);
    sees(&mut good, last.id(), 2);
    while good.peers().count() > 1 {
        next(&mut good);
    }
    drop(last);
    while good.peers().count() > 0 {
        next(&mut good);
    }
    let stats = server.stop();
    assert_eq!(stats.clients(), 1);
    assert!(stats.ports[0].joined >= 1000, "{stats}");
    assert_eq!(next(&mut good), Event::ServerGone);
}

#[test]
fn more_than_there_may_be_are_refused_until_one_goes() {
    let (_dir, path) = place();
    let mut options = usual(&path);
    options.max_clients = 2;
    let server = Running::start(options);
    let mut first = client(&path);
    let second = client(&path);
    sees(&mut first, PeerId(1), 2);
    let error = Client::connect(&path, LONG).unwrap_err();
    assert!(matches!(error, ConnectError::Closed { .. }), "{error}");
    drop(second);
    assert_eq!(next(&mut first), Event::Left(PeerId(1)));
    assert_eq!(client(&path).id(), PeerId(2));
    assert_eq!(server.stop().ports[0].refused, 1);
}
