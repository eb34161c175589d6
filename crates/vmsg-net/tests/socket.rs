// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket back ends against peers that the tests play byte by byte.

mod wire;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use vmsg_net::socket::{Dgram, DgramConfig, SocketError, Stream, StreamAddress, StreamConfig};
use vmsg_net::{Backend, Guest, Offloads, VnetHeader};
use wire::{PATIENCE, Sink, memory, receive, send, until, wait};

const PLAIN: VnetHeader = VnetHeader {
    flags: 0,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 0,
    csum_offset: 0,
};

fn running() -> Guest {
    Guest {
        running: true,
        ..Guest::NONE
    }
}

fn unix(path: &Path) -> StreamAddress {
    StreamAddress::Unix(path.to_owned())
}

fn stream(config: &StreamConfig) -> Stream {
    let mut stream = Stream::open(config).expect("a socket");
    stream.set_guest(&running());
    stream
}

/// A frame of `len` bytes that is like no other.
fn frame(len: usize, number: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(number * 2 + 1) >> 2).to_le_bytes()[0])
        .collect()
}

fn message(frame: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(frame);
    bytes
}

fn frames_of(backend: &mut dyn Backend) -> Vec<Vec<u8>> {
    let arrived = receive(backend, 70000).into_iter();
    arrived.map(|arrived| arrived.frame).collect()
}

/// A back end that connects, and the peer's end.
fn joined(dir: &Path) -> (Stream, UnixStream, UnixListener) {
    let path = dir.join("peer");
    let listener = UnixListener::bind(&path).unwrap();
    let mut ours = stream(&StreamConfig::client(unix(&path)));
    let (theirs, _) = listener.accept().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_write_timeout(Some(PATIENCE)).unwrap();
    until(&mut ours, "a link", |ours| ours.link_is_up());
    (ours, theirs, listener)
}

#[test]
fn the_bytes_are_those_that_qemu_sends() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs, _) = joined(dir.path());
    assert_eq!(
        Offloads {
            mtu: 1500,
            ..ours.offloads()
        },
        Offloads::NONE
    );
    assert!(send(&mut ours, 0, PLAIN, &[0xab; 60]));
    let mut bytes = [0; 64];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], [0, 0, 0, 60]);
    assert_eq!(bytes[4..], [0xab; 60]);
    theirs.write_all(&[0, 0, 0, 14]).unwrap();
    theirs.write_all(&[0xcd; 14]).unwrap();
    until(&mut ours, "a frame", |ours| ours.has_frames());
    assert_eq!(frames_of(&mut ours), [vec![0xcd; 14]]);
    assert!(!ours.has_frames());
}

#[test]
fn a_stream_that_drips_gives_the_same_frames() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs, _) = joined(dir.path());
    let sent: Vec<_> = [60, 14, 200, 1514, 15]
        .iter()
        .enumerate()
        .map(|(number, len)| frame(*len, number))
        .collect();
    let mut got = Vec::new();
    for byte in sent.iter().flat_map(|frame| message(frame)) {
        theirs.write_all(&[byte]).unwrap();
        got.extend(frames_of(&mut ours));
    }
    assert_eq!(got, sent);
}

#[test]
fn a_peer_that_does_not_read_holds_the_guest_back_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs, _) = joined(dir.path());
    // Small ones, which are gathered, and large ones, which are not, from the start of either.
    let frames: Vec<_> = (0..600)
        .map(|number| frame([60, 1514, 9014, 65553, 4096, 4097][number % 6], number))
        .collect();
    let expected: Vec<u8> = frames.iter().flat_map(|frame| message(frame)).collect();
    let mut next = 0;
    while next < frames.len() && send(&mut ours, 0, PLAIN, &frames[next]) {
        next += 1;
    }
    assert!((1..500).contains(&next), "{next} frames without a reader");
    // Nothing happens: nothing is taken, nobody is woken.
    for _ in 0..3 {
        ours.poll(Instant::now());
        assert!(!send(&mut ours, 0, PLAIN, &frames[next]));
    }
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        // In small bites, so that every frame is cut somewhere.
        for bite in got.chunks_mut(1009) {
            theirs.read_exact(bite).unwrap();
        }
        assert!(got == expected, "not what was sent");
        theirs
    });
    let start = Instant::now();
    while next < frames.len() {
        if send(&mut ours, 0, PLAIN, &frames[next]) {
            next += 1;
        } else {
            wait(&ours, PATIENCE);
            ours.poll(Instant::now());
        }
        assert!(start.elapsed() < PATIENCE);
    }
    // The last ones are still on their way.
    until(&mut ours, "all", |_| reader.is_finished());
    reader.join().unwrap();
    assert_eq!(ours.counters().sent, 600);
}

#[test]
fn a_guest_without_buffers_holds_a_flooding_peer_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut theirs, _) = joined(dir.path());
    theirs.set_nonblocking(true).unwrap();
    let flood: Vec<u8> = (0..3000).flat_map(|n| message(&frame(1514, n))).collect();
    let memory = memory(66000);
    let mut written = 0;
    for _ in 0..50 {
        ours.poll(Instant::now());
        let mut none = Sink::new(&memory, 1514, 0);
        assert_eq!(ours.receive(Instant::now(), &mut none), 0);
        written += theirs.write(&flood[written..]).unwrap_or(0);
    }
    assert!(written < 2 << 20, "{written} bytes were taken");
    assert!(ours.has_frames());
    theirs.set_nonblocking(false).unwrap();
    let writer = std::thread::spawn(move || {
        theirs.write_all(&flood[written..]).unwrap();
        theirs
    });
    let mut got = 0;
    until(&mut ours, "the rest", |ours| {
        for arrived in frames_of(ours) {
            assert_eq!(arrived, frame(1514, got));
            got += 1;
        }
        got == 3000
    });
    writer.join().unwrap();
}

#[test]
fn lengths_that_cannot_be_end_the_connection_and_only_that() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, theirs, listener) = joined(dir.path());
    let mut theirs = Some(theirs);
    for (count, bad) in [0u32, 65554, 0x8000_0000, u32::MAX].into_iter().enumerate() {
        let mut peer = theirs.take().unwrap();
        // What came before it still counts.
        peer.write_all(&message(&[1; 60])).unwrap();
        peer.write_all(&bad.to_be_bytes()).unwrap();
        let mut got = Vec::new();
        until(&mut ours, "the connection to end", |ours| {
            got.extend(frames_of(ours));
            ours.counters().bad_lengths == count as u64 + 1
        });
        assert_eq!(got, [[1; 60]]);
        assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0, "hung up");
        let (again, _) = {
            until(&mut ours, "another attempt", |ours| ours.link_is_up());
            listener.accept().unwrap()
        };
        theirs = Some(again);
    }
    let mut peer = theirs.unwrap();
    // Shorter than Ethernet: dropped, and nothing else.
    for len in 1..14 {
        peer.write_all(&message(&vec![9; len])).unwrap();
    }
    peer.write_all(&message(&[2; 60])).unwrap();
    let mut got = Vec::new();
    until(&mut ours, "a frame", |ours| {
        got.extend(frames_of(ours));
        !got.is_empty()
    });
    assert_eq!(got, [[2; 60]]);
    assert_eq!(ours.counters().rx_dropped, 13);
}

#[test]
fn a_client_s_peer_may_come_late_go_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let mut ours = stream(&StreamConfig {
        reconnect: Some(Duration::from_millis(50)),
        ..StreamConfig::client(unix(&path))
    });
    for round in 0..3 {
        assert!(!ours.link_is_up());
        assert!(ours.next_timeout().is_some());
        // Into the void, as with a cable that is not plugged in.
        assert!(send(&mut ours, 0, PLAIN, &[0; 60]));
        assert_eq!(ours.counters().tx_no_peer, round + 1);
        let listener = UnixListener::bind(&path).unwrap();
        until(&mut ours, "the peer", |ours| ours.link_is_up());
        let (mut peer, _) = listener.accept().unwrap();
        assert!(send(&mut ours, 0, PLAIN, &[5; 60]));
        let mut bytes = [0; 64];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[4..], [5; 60], "nothing old comes through");
        // Half a frame is left behind, and must not spoil the next connection.
        peer.write_all(&message(&[6; 60])).unwrap();
        peer.write_all(&[0, 0, 0]).unwrap();
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        drop(peer);
        let mut got = Vec::new();
        until(&mut ours, "gone", |ours| {
            got.extend(frames_of(ours));
            !ours.link_is_up()
        });
        until(&mut ours, "the last frame", |ours| {
            got.extend(frames_of(ours));
            !got.is_empty()
        });
        assert_eq!(got, [[6; 60]]);
    }
}

#[test]
fn without_reconnect_the_peer_must_be_there_and_its_end_is_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("once");
    let config = StreamConfig {
        reconnect: None,
        ..StreamConfig::client(unix(&path))
    };
    let error = Stream::open(&config).unwrap_err();
    assert!(matches!(error, SocketError::NoPeer { .. }));
    assert!(error.to_string().contains("reconnect="), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let mut ours = stream(&config);
    drop(listener.accept().unwrap());
    until(&mut ours, "gone", |ours| {
        frames_of(ours);
        !ours.link_is_up() && ours.next_timeout().is_none()
    });
    listener.set_nonblocking(true).unwrap();
    ours.poll(Instant::now());
    assert!(listener.accept().is_err(), "another attempt");
}

#[test]
fn a_server_serves_one_peer_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server");
    let mut ours = stream(&StreamConfig::server(unix(&path)));
    assert!(!ours.link_is_up());
    let peers: Vec<_> = (0..3)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    for (number, mut peer) in peers.into_iter().enumerate() {
        until(&mut ours, "a peer", |ours| {
            frames_of(ours);
            ours.link_is_up()
        });
        peer.write_all(&message(&frame(60, number))).unwrap();
        let mut got = Vec::new();
        until(&mut ours, "its frame", |ours| {
            got.extend(frames_of(ours));
            !got.is_empty()
        });
        assert_eq!(got, [frame(60, number)]);
        assert!(send(&mut ours, 0, PLAIN, &frame(61, number)));
        let mut bytes = [0; 65];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[4..], frame(61, number));
        // Dropped with what it did not read.
        assert!(send(&mut ours, 0, PLAIN, &[0; 60]));
    }
    until(&mut ours, "nobody", |ours| {
        frames_of(ours);
        !ours.link_is_up()
    });
    drop(ours);
    assert!(!path.exists(), "the socket's path is gone with it");
}

#[test]
fn without_a_driver_the_peer_is_not_held_up_and_nothing_is_kept_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut peer, _listener) = joined(dir.path());
    ours.set_guest(&Guest::NONE);
    peer.set_nonblocking(true).unwrap();
    let flood: Vec<u8> = (0..2000).flat_map(|n| message(&frame(1514, n))).collect();
    let mut written = 0;
    until(&mut ours, "taken and thrown away", |_| {
        written += peer.write(&flood[written..]).unwrap_or(0);
        written == flood.len()
    });
    until(&mut ours, "all", |ours| ours.counters().rx_dropped == 2000);
    ours.set_guest(&running());
    assert!(frames_of(&mut ours).is_empty());
    // A peer that goes meanwhile is noticed, too.
    ours.set_guest(&Guest::NONE);
    drop(peer);
    until(&mut ours, "gone", |ours| !ours.link_is_up());
}

#[test]
fn tcp_in_both_roles() {
    let mut server = stream(&StreamConfig::server(StreamAddress::Tcp(
        "127.0.0.1".to_owned(),
        0,
    )));
    let port = server.local_addr().unwrap().port();
    let mut client = stream(&StreamConfig::client(StreamAddress::Tcp(
        "localhost".to_owned(),
        port,
    )));
    until(&mut client, "connected", |client| {
        server.poll(Instant::now());
        client.link_is_up() && server.link_is_up()
    });
    for number in 0..50 {
        let sent = frame(14 + number * 1300, number);
        assert!(send(&mut client, 0, PLAIN, &sent));
        let mut got = Vec::new();
        until(&mut server, "the frame", |server| {
            client.poll(Instant::now());
            got.extend(frames_of(server));
            !got.is_empty()
        });
        assert_eq!(got, [sent]);
    }
    drop(client);
    until(&mut server, "gone", |server| {
        frames_of(server);
        !server.link_is_up()
    });
    // As QEMU would connect.
    let mut peer = TcpStream::connect(("127.0.0.1", port)).unwrap();
    peer.write_all(&message(&[1; 60])).unwrap();
    let mut got = Vec::new();
    until(&mut server, "the frame", |server| {
        got.extend(frames_of(server));
        !got.is_empty()
    });
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let address = StreamAddress::Tcp("127.0.0.1".to_owned(), port);
    let error = Stream::open(&StreamConfig::server(address)).unwrap_err();
    assert!(error.to_string().contains(&port.to_string()), "{error}");
    // Refused at first, there later.
    drop(taken);
    let address = StreamAddress::Tcp("127.0.0.1".to_owned(), port);
    let mut late = stream(&StreamConfig::client(address));
    until(&mut late, "refused", |late| late.next_timeout().is_some());
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    until(&mut late, "there", |late| late.link_is_up());
    listener.accept().unwrap();
}

#[test]
fn frames_that_no_wire_can_carry_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ours, mut peer, _listener) = joined(dir.path());
    for len in [0, 1, 13, 65554, 70000] {
        assert!(send(&mut ours, 0, PLAIN, &vec![0; len]));
    }
    for (flags, gso_type) in [(1, 0), (0, 1), (3, 5), (0, 0x80)] {
        let header = VnetHeader {
            flags,
            gso_type,
            ..PLAIN
        };
        assert!(send(&mut ours, 0, header, &[0; 60]));
    }
    assert_eq!(ours.counters().tx_bad, 9);
    assert!(send(&mut ours, 0, PLAIN, &[1; 14]));
    let mut bytes = [0; 18];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..5], [0, 0, 0, 14, 1]);
}

#[test]
fn paths_in_use_are_left_alone_and_those_of_the_dead_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("path");
    let config = StreamConfig::server(unix(&path));
    std::fs::write(&path, "a letter").unwrap();
    assert!(matches!(
        Stream::open(&config),
        Err(SocketError::NotASocket(_))
    ));
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    assert!(matches!(Stream::open(&config), Err(SocketError::InUse(_))));
    // It does not remove its path when it goes.
    drop(other);
    assert!(path.exists());
    let ours = Stream::open(&config).unwrap();
    std::fs::remove_file(&path).unwrap();
    let new = UnixListener::bind(&path).unwrap();
    drop(ours);
    assert!(path.exists(), "somebody else's by now");
    drop(new);
    let long = StreamConfig::server(unix(Path::new(&"x".repeat(200))));
    assert!(Stream::open(&long).unwrap_err().to_string().contains("xxx"));
}

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
