// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames in datagrams, against another back end and strangers.

mod wire;

use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Instant;

use vmsg_net::Backend;
use vmsg_net::socket::{Dgram, DgramConfig, SocketError};
use wire::{PLAIN, frame, frames_of, running, send, until};

fn dgram(config: &DgramConfig) -> Dgram {
    let mut dgram = Dgram::open(config).expect("a socket");
    dgram.set_guest(&running());
    dgram
}

/// One frame over, in either direction.
fn over(from: &mut Dgram, to: &mut Dgram, frame: &[u8]) {
    assert!(send(from, 0, PLAIN, frame));
    let mut got = Vec::new();
    until(to, "the datagram", |to| {
        got.extend(frames_of(to));
        !got.is_empty()
    });
    assert_eq!(got, [frame]);
    from.poll(Instant::now());
    assert!(frames_of(from).is_empty(), "its own");
}

#[test]
fn datagrams_over_unix_sockets_whose_peer_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    let config = |local: &Path, remote: &Path| DgramConfig::Unix {
        local: local.to_owned(),
        remote: remote.to_owned(),
    };
    let mut one = dgram(&config(&a, &b));
    assert!(one.link_is_up());
    assert!(send(&mut one, 0, PLAIN, &[0; 60]));
    assert_eq!(one.counters().tx_no_peer, 1);
    for round in 0..3 {
        let mut two = dgram(&config(&b, &a));
        // The peer speaks first, or we do.
        if round % 2 == 0 {
            over(&mut two, &mut one, &frame(1514, round));
        }
        for number in 0..40 {
            over(&mut one, &mut two, &frame(14 + number * 1600, number));
            over(&mut two, &mut one, &frame(60, number));
        }
    }
    // Its queue is full: held back, and told when to try again.
    let slow = UnixDatagram::bind(&b).unwrap();
    let mut sent = 0u8;
    while send(&mut one, 0, PLAIN, &[sent; 1514]) {
        sent += 1;
    }
    assert!(one.next_timeout().is_some());
    let mut bytes = [0; 2000];
    for expected in 0..sent {
        assert_eq!(slow.recv(&mut bytes).unwrap(), 1514);
        assert_eq!(bytes[0], expected);
    }
    assert!(send(&mut one, 0, PLAIN, &[1; 60]));
    // Too short, nothing, too long.
    let hostile = UnixDatagram::unbound().unwrap();
    for len in [0, 13, 65554, 100_000] {
        hostile.send_to(&vec![0; len], &a).unwrap();
    }
    hostile.send_to(&[3; 60], &a).unwrap();
    let mut got = Vec::new();
    until(&mut one, "the good one", |one| {
        got.extend(frames_of(one));
        !got.is_empty()
    });
    assert_eq!((got, one.counters().rx_dropped), (vec![vec![3; 60]], 4));
    drop(one);
    assert!(!a.exists());
}

#[test]
fn datagrams_over_udp_with_the_one_peer_only() {
    let [a, b] = [0, 0].map(|_| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap()
    });
    let mut one = dgram(&DgramConfig::Udp {
        local: a,
        remote: b,
    });
    // Nobody there: what its host says does no harm.
    for _ in 0..3 {
        assert!(send(&mut one, 0, PLAIN, &[0; 60]));
    }
    let mut two = dgram(&DgramConfig::Udp {
        local: b,
        remote: a,
    });
    for number in 0..40 {
        over(&mut one, &mut two, &frame(14 + number * 1600, number));
        over(&mut two, &mut one, &frame(60, number));
    }
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(&[9; 60], a).unwrap();
    over(&mut two, &mut one, &[4; 60]);
    // Longer than a datagram of UDP can be.
    assert!(send(&mut one, 0, PLAIN, &[0; 65553]));
    assert_eq!(one.counters().tx_bad, 1);
    for (local, remote) in [("127.0.0.1:0", "[::1]:9"), ("127.0.0.1:0", "127.0.0.1:0")] {
        let config = DgramConfig::Udp {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        };
        assert!(matches!(
            Dgram::open(&config),
            Err(SocketError::Addresses(_))
        ));
    }
}

#[test]
fn a_multicast_group_hears_all_but_oneself() {
    let port = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let config = DgramConfig::Multicast {
        group: format!("230.0.0.1:{port}").parse().unwrap(),
        interface: Some("127.0.0.1".parse().unwrap()),
    };
    let mut one = dgram(&config);
    let mut two = dgram(&config);
    let mut three = dgram(&config);
    for number in 0..10 {
        let sent = frame(60 + number * 1000, number);
        over(&mut one, &mut two, &sent);
        over(&mut two, &mut one, &sent);
        let mut got = Vec::new();
        until(&mut three, "both", |three| {
            got.extend(frames_of(three));
            got.len() == 2
        });
    }
    let config = DgramConfig::Multicast {
        group: "10.0.0.1:99".parse().unwrap(),
        interface: None,
    };
    assert!(matches!(
        Dgram::open(&config),
        Err(SocketError::Addresses(_))
    ));
}
