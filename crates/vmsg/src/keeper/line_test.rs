// SPDX-License-Identifier: Apache-2.0 OR MIT

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::super::protocol::receive;
use super::*;

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("socketpair")
}

/// More than a socket's buffer takes.
const MANY: u64 = 2000;

#[test]
fn what_the_keeper_does_not_read_at_once_arrives_later_in_order() {
    let (ours, keepers) = pair();
    let line = Line::start(ours).expect("a line");
    let (one, _other) = pair();
    for key in 1..=MANY {
        line.put("net0", key, &[0; 40], one.as_fd());
    }
    assert!(!line.state().waiting.is_empty(), "the socket took it all");
    // One that the keeper has, and one that it has not.
    line.remove("net0", 1);
    line.remove("net0", MANY);
    for key in 1..MANY {
        let packet = receive(keepers.as_fd()).expect("receive").expect("packet");
        assert_eq!((packet.kind, packet.key), (Kind::Put, key));
        assert!(packet.fd.is_some());
    }
    let packet = receive(keepers.as_fd()).expect("receive").expect("packet");
    assert_eq!((packet.kind, packet.key), (Kind::Remove, 1));
    line.dismiss();
    let packet = receive(keepers.as_fd()).expect("receive").expect("packet");
    assert_eq!(packet.kind, Kind::Dismiss);
}

#[test]
fn connections_that_come_and_go_leave_nothing_behind_while_the_keeper_is_stuck() {
    let (ours, _keepers) = pair();
    let line = Line::start(ours).expect("a line");
    let (one, _other) = pair();
    let mut key = 0;
    while line.state().waiting.is_empty() {
        key += 1;
        line.put("net0", key, &[0; 40], one.as_fd());
    }
    for key in key + 1..key + MANY {
        line.put("net0", key, &[0; 40], one.as_fd());
        line.remove("net0", key);
    }
    assert!(line.state().waiting.len() <= 1);
}

#[test]
fn a_keeper_that_is_gone_is_done_without() {
    let (ours, keepers) = pair();
    let line = Line::start(ours).expect("a line");
    drop(keepers);
    let (one, _other) = pair();
    line.put("net0", 1, &[0; 40], one.as_fd());
    assert!(line.state().lost);
    line.put("net0", 2, &[0; 40], one.as_fd());
    line.remove("net0", 1);
    line.dismiss();
    assert!(line.state().waiting.is_empty());
}
