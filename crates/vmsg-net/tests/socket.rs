// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket back ends against peers that the tests play byte by byte.

mod wire;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use vmsg_net::socket::{SocketError, Stream, StreamAddress, StreamConfig};
use vmsg_net::{Backend, Guest, Offloads, VnetHeader};
use wire::{PATIENCE, PLAIN, Sink, frame, frames_of, memory, running, send, until, wait};

fn unix(path: &Path) -> StreamAddress {
    StreamAddress::Unix(path.to_owned())
}

fn stream(config: &StreamConfig) -> Stream {
    let mut stream = Stream::open(config).expect("a socket");
    stream.set_guest(&running());
    stream
}

fn message(frame: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(frame.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(frame);
    bytes
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
fn whatever_bytes_come_the_next_peer_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server");
    let mut ours = stream(&StreamConfig::server(unix(&path)));
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..400 {
        let mut peer = UnixStream::connect(&path).unwrap();
        // Lengths of all magnitudes, so that some are possible.
        for _ in 0..next() % 6 {
            let length = u32::try_from(next() >> 32).unwrap() >> (next() % 32);
            let _ = peer.write_all(&length.to_be_bytes());
            let bytes = vec![1; usize::try_from(next() % 3000).unwrap()];
            let _ = peer.write_all(&bytes);
            frames_of(&mut ours);
            assert!(send(&mut ours, 0, PLAIN, &[7; 600]));
        }
        drop(peer);
        until(&mut ours, "gone", |ours| {
            frames_of(ours);
            !ours.link_is_up()
        });
    }
    let mut peer = UnixStream::connect(&path).unwrap();
    peer.write_all(&message(&[1; 60])).unwrap();
    let mut got = Vec::new();
    until(&mut ours, "a frame", |ours| {
        got.extend(frames_of(ours));
        !got.is_empty()
    });
    assert_eq!(got, [[1; 60]]);
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
fn a_peer_that_appears_is_noticed_before_the_next_attempt_is_due() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late");
    let mut ours = stream(&StreamConfig {
        reconnect: Some(Duration::from_secs(3600)),
        ..StreamConfig::client(unix(&path))
    });
    const LONG_PAUSE: Duration = Duration::from_secs(3);
    // Until the pauses are long.
    until(&mut ours, "long pauses", |ours| {
        let pause = ours.next_timeout().map(|at| at - Instant::now());
        pause.is_some_and(|pause| pause > LONG_PAUSE)
    });
    let listener = UnixListener::bind(&path).unwrap();
    let appeared = Instant::now();
    until(&mut ours, "the peer", |ours| ours.link_is_up());
    assert!(appeared.elapsed() < LONG_PAUSE);
    listener.accept().unwrap();
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
