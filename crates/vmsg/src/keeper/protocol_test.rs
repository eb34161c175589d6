// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

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

#[test]
fn a_packet_arrives_as_it_was_sent_with_its_descriptor() {
    let (one, two) = pair();
    send(
        one.as_fd(),
        Kind::Put,
        "net0",
        7,
        b"record",
        Some(one.as_fd()),
    )
    .expect("send");
    let packet = receive(two.as_fd()).expect("receive").expect("a packet");
    assert_eq!(
        (packet.kind, packet.device.as_str(), packet.key),
        (Kind::Put, "net0", 7)
    );
    assert_eq!(packet.record, b"record");
    assert!(packet.fd.is_some());
}

#[test]
fn the_end_of_the_other_side_is_none() {
    let (one, two) = pair();
    drop(one);
    assert!(receive(two.as_fd()).expect("receive").is_none());
}

#[test]
fn malformed_packets_are_errors() {
    for bad in [
        &[9; 16][..],
        &[1; 15],
        &[1, 200, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let (one, two) = pair();
        rustix::net::send(&one, bad, SendFlags::empty()).expect("send");
        assert!(receive(two.as_fd()).is_err(), "{bad:?}");
    }
}

#[test]
fn a_record_that_does_not_fit_is_refused() {
    let (one, _two) = pair();
    assert!(send(one.as_fd(), Kind::Put, "net0", 7, &[0; 5000], None).is_err());
}
