// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vhost-user port against a back end, well-behaved and not.

mod back_end;
mod copying;
mod wire;

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use back_end::*;
use copying::{Built, Choices, build};
use tempfile::TempDir;
use vmsg_net::vhost_user::{VhostUser, VhostUserConfig};
use vmsg_net::{Backend, Guest, Offloads, VnetHeader};
use wire::{PATIENCE, receive, send, until};

const ALL: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MRG_RXBUF | EVENT_IDX | PROTOCOL | VERSION_1;

fn guest(offloads: Offloads) -> Guest {
    Guest {
        offloads,
        running: true,
        heads: true,
        ..Guest::NONE
    }
}

struct Setup {
    port: VhostUser,
    folder: TempDir,
}

impl Setup {
    /// A port that listens.
    fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut config = VhostUserConfig::new(folder.path().join("s"), true);
        config.reconnect = Duration::from_millis(100);
        let mut port = VhostUser::open(&config).expect("a port");
        port.set_guest(&guest(Offloads::ALL));
        Self { port, folder }
    }

    fn call(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("s")).expect("a listener")
    }

    /// A back end that offers `features` and has come up.
    fn back_end(&mut self, features: u64) -> BackEnd {
        let mut back = BackEnd::new(self.call(), features);
        until(&mut self.port, "the link is up", |port| {
            back.step();
            port.link_is_up()
        });
        assert!(back.runs());
        back
    }

    /// Polls until the connection has ended by a fault.
    fn fault(&mut self, what: &str) {
        let before = self.port.counters().faults;
        until(&mut self.port, what, |port| {
            receive(port, 66_000);
            port.counters().faults > before
        });
        assert!(!self.port.link_is_up(), "{what}");
    }
}

/// A large segment of `payload` bytes, cut every 1000.
fn large(payload: usize) -> (VnetHeader, Built) {
    let mut built = build(&mut Choices::new(&[]), payload);
    built.finish(true);
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: VnetHeader::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
    };
    (header, built)
}

#[test]
fn frames_go_both_ways_large_ones_whole() {
    for features in [ALL, ALL & !EVENT_IDX, ALL & !PROTOCOL] {
        let mut setup = Setup::new();
        let mut back = setup.back_end(features);
        assert_eq!(back.features, features);
        let (header, built) = large(60_000);
        // More than there are buffers.
        for round in 0..600 {
            assert!(send(&mut setup.port, 0, header, &built.bytes));
            let frames = back.take(9);
            assert_eq!(frames.len(), 1, "round {round}");
            assert_eq!(frames[0].0, header);
            assert!(frames[0].1 == built.bytes);
            assert!(back.give(&header, &built.bytes));
            let mut arrived = Vec::new();
            until(&mut setup.port, "a frame", |port| {
                arrived.extend(receive(port, 66_000));
                !arrived.is_empty()
            });
            assert_eq!(arrived.len(), 1);
            assert_eq!(arrived[0].header, header);
            assert!(arrived[0].frame == built.bytes);
        }
        let counters = setup.port.counters();
        assert_eq!((counters.sent, counters.received), (600, 600));
        assert_eq!(
            (counters.bad, counters.received_bad, counters.faults),
            (0, 0, 0)
        );
    }
}

#[test]
fn a_side_without_offloads_gets_pieces_with_checksums() {
    let mut setup = Setup::new();
    let mut back = setup.back_end(VERSION_1 | MRG_RXBUF);
    let (header, built) = large(2500);
    assert!(send(&mut setup.port, 0, header, &built.bytes));
    let frames = back.take(9);
    let sizes: Vec<usize> = frames.iter().map(|(_, frame)| frame.len()).collect();
    assert_eq!(sizes, [1054, 1054, 554]);
    for (header, frame) in &frames {
        assert_eq!(*header, VnetHeader::default());
        let read = Built::read(frame);
        let pseudo = copying::sum(&[&frame[26..34], &[0, 6], &short(frame.len() - 34)]);
        let all = copying::sum(&[&frame[read.transport..], &pseudo.to_be_bytes()]);
        assert_eq!(all, 0xffff);
    }
    // The other way round: the guest has not agreed to anything.
    let mut back = {
        drop(back);
        until(&mut setup.port, "the link is down", |port| {
            !port.link_is_up()
        });
        setup.back_end(ALL)
    };
    setup.port.set_guest(&guest(Offloads::NONE));
    assert!(back.give(&header, &built.bytes));
    let mut arrived = Vec::new();
    until(&mut setup.port, "pieces", |port| {
        arrived.extend(receive(port, 1600));
        arrived.len() == 3
    });
    for (ours, (_, theirs)) in arrived.iter().zip(&frames) {
        assert!(ours.frame == *theirs, "the same pieces in both directions");
    }
}

fn short(n: usize) -> [u8; 2] {
    u16::try_from(n).expect("short").to_be_bytes()
}

#[test]
fn a_full_ring_takes_no_more_until_the_back_end_has_sent_some() {
    let mut setup = Setup::new();
    let mut back = setup.back_end(ALL);
    let mut built = build(&mut Choices::new(&[]), 100);
    built.finish(false);
    let mut taken = 0;
    while send(&mut setup.port, 0, VnetHeader::default(), &built.bytes) {
        taken += 1;
    }
    assert_eq!(taken, 256);
    assert_eq!(back.take(3).len(), 3);
    // The bell, which was asked for.
    wire::wait(&setup.port, PATIENCE);
    setup.port.poll(Instant::now());
    let more = (0..9).take_while(|_| send(&mut setup.port, 0, VnetHeader::default(), &built.bytes));
    assert_eq!(more.count(), 3);
    assert_eq!(setup.port.counters().sent, 259);
}

#[test]
fn a_frame_waits_for_room_of_the_guest() {
    let mut setup = Setup::new();
    let mut back = setup.back_end(ALL);
    let mut built = build(&mut Choices::new(&[]), 9000);
    built.finish(false);
    for _ in 0..3 {
        assert!(back.give(&VnetHeader::default(), &built.bytes));
    }
    let memory = wire::memory(66_000);
    let now = Instant::now();
    until(&mut setup.port, "frames", |port| port.has_frames());
    for buffers in [0, 1, 0, 1, 0, 5] {
        let mut sink = wire::Sink::new(&memory, 66_000, buffers);
        assert!(setup.port.has_frames());
        assert_eq!(setup.port.receive(now, &mut sink), buffers.min(1));
        assert!(sink.arrived.iter().all(|one| one.frame == built.bytes));
    }
    assert!(!setup.port.has_frames());
    assert_eq!(setup.port.counters().received, 3);
}

#[test]
fn back_ends_come_and_go_and_each_gets_new_memory() {
    let mut setup = Setup::new();
    let mut built = build(&mut Choices::new(&[]), 100);
    built.finish(false);
    for round in 1..=5 {
        assert!(send(
            &mut setup.port,
            0,
            VnetHeader::default(),
            &built.bytes
        ));
        assert_eq!(setup.port.counters().sent_to_nobody, round);
        let mut back = setup.back_end(ALL);
        assert!(send(
            &mut setup.port,
            0,
            VnetHeader::default(),
            &built.bytes
        ));
        assert_eq!(back.take(9).len(), 1, "nothing that others were sent");
        let memory = back.memory.take().expect("memory");
        drop(back);
        until(&mut setup.port, "the link is down", |port| {
            !port.link_is_up()
        });
        assert_eq!(setup.port.counters().connections, round);
        // What is done to it now is nobody's business.
        memory.ram().fill(0xff);
    }
    assert_eq!(setup.port.counters().faults, 0);
}

#[test]
fn a_back_end_that_listens_is_found_when_it_appears() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("s");
    let config = VhostUserConfig::new(path.clone(), false);
    let mut port = VhostUser::open(&config).expect("a port");
    for _ in 0..2 {
        port.poll(Instant::now());
        assert!(!port.link_is_up());
        let listener = UnixListener::bind(&path).expect("a path");
        listener.set_nonblocking(true).expect("a socket");
        let mut back: Option<BackEnd> = None;
        until(&mut port, "the link is up", |port| {
            if let Ok((socket, _)) = listener.accept() {
                back = Some(BackEnd::new(socket, ALL));
            }
            if let Some(back) = &mut back {
                back.step();
            }
            port.link_is_up()
        });
        std::fs::remove_file(&path).expect("there");
        drop((listener, back));
        until(&mut port, "the link is down", |port| !port.link_is_up());
    }
}

#[test]
fn a_back_end_before_virtio_1_is_refused() {
    let mut setup = Setup::new();
    let mut back = BackEnd::new(setup.call(), ALL & !VERSION_1);
    until(&mut setup.port, "a fault", |port| {
        back.step();
        port.counters().faults == 1
    });
}

#[test]
fn answers_that_are_none_end_the_connection() {
    let answer = |words: [u32; 3]| words.map(u32::to_ne_bytes).concat();
    for (what, bytes) in [
        ("another request", answer([2, 5, 8])),
        ("no mark of an answer", answer([1, 1, 8])),
        ("another version", answer([1, 6, 8])),
        ("another length", answer([1, 5, 4])),
        ("a huge length", answer([1, 5, u32::MAX])),
        ("nonsense", vec![0xff; 4000]),
    ] {
        let mut setup = Setup::new();
        let back = BackEnd::new(setup.call(), ALL);
        back.say(&bytes);
        setup.fault(what);
    }
}

#[test]
fn answers_may_come_byte_by_byte() {
    let mut setup = Setup::new();
    let back = BackEnd::new(setup.call(), ALL);
    let bytes = [1u32, 5, 8].map(u32::to_ne_bytes).concat();
    for byte in bytes {
        back.say(&[byte]);
        setup.port.poll(Instant::now());
        setup.port.poll(Instant::now());
    }
    assert_eq!(setup.port.counters().faults, 0);
}

#[test]
fn nonsense_in_the_queues_ends_the_connection_and_the_next_one_works() {
    type Spoil = fn(&mut BackEnd, &mut VhostUser);
    let spoilt: &[(&str, Spoil)] = &[
        ("a used index far ahead", |back, _| {
            back.used(0).write(2, &9999u16.to_le_bytes());
            back.ring(0);
        }),
        ("a chain that is not there", |back, _| {
            back.used(0).write(4, &700u32.to_le_bytes());
            back.used(0).write(2, &1u16.to_le_bytes());
            back.ring(0);
        }),
        ("more bytes than there is room for", |back, _| {
            back.used(0).write(8, &5000u32.to_le_bytes());
            back.used(0).write(2, &1u16.to_le_bytes());
            back.ring(0);
        }),
        ("less than a header", |back, _| {
            back.used(0).write(8, &11u32.to_le_bytes());
            back.used(0).write(2, &1u16.to_le_bytes());
            back.ring(0);
        }),
        ("a frame in no buffers", |back, _| {
            back.used(0).write(8, &100u32.to_le_bytes());
            back.used(0).write(2, &1u16.to_le_bytes());
            back.ring(0);
        }),
        ("frames sent that never were", |back, _| {
            back.used(1).write(2, &1u16.to_le_bytes());
            back.ring(1);
        }),
        ("a word that nobody asked for", |back, _| back.say(b"hello")),
        ("a bell that blocks", |back, port| {
            // Full, and blocking for all who have it.
            let kick = back.kick(1);
            let full = (u64::MAX - 1).to_ne_bytes();
            let _ = rustix::io::read(kick, &mut [0; 8]);
            rustix::io::write(kick, &full).expect("room");
            rustix::fs::fcntl_setfl(kick, rustix::fs::OFlags::empty()).expect("flags");
            let mut built = build(&mut Choices::new(&[]), 100);
            built.finish(false);
            send(port, 0, VnetHeader::default(), &built.bytes);
        }),
    ];
    let mut setup = Setup::new();
    for (what, spoil) in spoilt {
        let mut back = setup.back_end(ALL);
        let before = setup.port.counters().faults;
        spoil(&mut back, &mut setup.port);
        if setup.port.counters().faults == before {
            setup.fault(what);
        }
    }
    let mut back = setup.back_end(ALL);
    let mut built = build(&mut Choices::new(&[]), 100);
    built.finish(false);
    assert!(send(
        &mut setup.port,
        0,
        VnetHeader::default(),
        &built.bytes
    ));
    assert_eq!(back.take(9).len(), 1);
}

#[test]
fn frames_that_make_no_sense_are_dropped_and_counted() {
    let mut setup = Setup::new();
    let mut back = setup.back_end(ALL);
    let (mut header, built) = large(5000);
    header.gso_size = 0;
    assert!(back.give(&header, &built.bytes));
    assert!(back.give(&VnetHeader::default(), &[1; 5]));
    header.csum_start = u16::MAX;
    header.gso_type = 0;
    assert!(back.give(&header, &built.bytes));
    until(&mut setup.port, "three frames", |port| {
        assert!(receive(port, 66_000).is_empty());
        port.counters().received_bad == 3
    });
    header.gso_type = VnetHeader::GSO_UDP;
    assert!(send(&mut setup.port, 0, header, &built.bytes), "taken");
    assert_eq!(setup.port.counters().bad, 1);
    assert!(setup.port.link_is_up());
    assert!(back.take(9).is_empty());
}
