// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much a port may send and be sent, and what its receiver takes.

use std::time::Duration;

use vmsg_net::switch::{PortChange, PortConfig, Reason};
use vmsg_net::{Backend, Closed, Guest, Offloads};

use crate::net::{Net, all, open, plain, to};
use crate::switching::{EVERYBODY, Mood, everything, frame, mac, segment};

#[test]
fn a_storm_is_held_back_and_nothing_else_is() {
    let stormy = PortConfig {
        storm: Some(100),
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![stormy, plain(1), plain(2)]);
    net.send(1, &[all(1, 0)]);
    net.numbers();
    for n in 0..1000 {
        net.send(0, &[all(0, n), to(99, 0, n), to(1, 0, n)]);
        net.send(2, &[all(2, n)]);
    }
    assert_eq!(net.dropped_in(0, Reason::Storm), 1900);
    assert_eq!(net.got(1).len(), 100 + 1000 + 1000);
    assert_eq!(net.got(2).len(), 100);
    net.bench.pass(Duration::from_millis(500));
    for n in 0..100 {
        net.send(0, &[all(0, n)]);
    }
    assert_eq!(net.got(2).len(), 50);
}

#[test]
fn what_a_port_may_not_send_yet_waits_with_it() {
    let slow = PortConfig {
        rate_in: Some("8M".parse().unwrap()),
        ..plain(0)
    };
    let mut net = Net::new(open(), vec![slow, plain(1)]);
    let frames = vec![frame(mac(1), mac(0), &[], 0, 1000); 32];
    let start = net.bench.now;
    let mut sent = 0;
    while net.bench.now - start < Duration::from_secs(2) {
        let taken = net.bench.send(&mut net.ports[0], &frames);
        sent += taken;
        if taken < frames.len() {
            let until = net.ports[0].next_timeout().expect("it says when");
            assert!(until > net.bench.now);
            net.bench.now = until;
            net.ports[0].poll(until);
        }
    }
    assert_eq!(net.got(1).len(), sent);
    assert!(
        (2000..2100).contains(&sent),
        "1000 frames each second: {sent}"
    );
    assert!(net.report(0).waits > 100);
    let free = PortChange {
        rate_in: Some(None),
        ..PortChange::default()
    };
    net.set(0, free).unwrap();
    for _ in 0..100 {
        net.send(0, &frames);
    }
    assert_eq!(net.got(1).len(), 3200);
}

#[test]
fn what_a_port_is_sent_too_much_is_dropped() {
    let slow = PortConfig {
        rate_out: Some("8M".parse().unwrap()),
        ..plain(1)
    };
    let mut net = Net::new(open(), vec![plain(0), slow, plain(2)]);
    let frames = vec![frame(EVERYBODY, mac(0), &[], 0, 1000); 20];
    for _ in 0..1000 {
        net.send(0, &frames);
        net.bench.pass(Duration::from_millis(1));
    }
    let got = net.got(1).len();
    assert!((1000..1100).contains(&got), "{got}");
    assert_eq!(net.dropped_out(1, Reason::RateOut), 20_000 - got as u64);
    assert_eq!(net.got(2).len(), 20_000);
}

#[test]
fn a_receiver_loses_its_own_frames_only() {
    let mut net = Net::open(7);
    for port in 1..7 {
        net.send(port, &[all(port, 0)]);
    }
    net.numbers();
    let moods = [
        Mood::Buffers(3),
        Mood::Closed(Closed::NoDriver),
        Mood::Closed(Closed::LinkDown),
        Mood::Breaks,
        Mood::Closed(Closed::Gone),
    ];
    for (port, mood) in (1..).zip(moods) {
        let key = net.keys[port];
        net.bench.world.receivers.get_mut(&key).unwrap().mood = mood;
    }
    let frames: Vec<Vec<u8>> = (0..10).map(|n| all(0, n)).collect();
    net.send(0, &frames);
    let numbers = net.numbers();
    assert_eq!(numbers[1], [0, 1, 2]);
    assert_eq!(numbers[6], (0..10).collect::<Vec<u32>>());
    assert_eq!(net.dropped_out(1, Reason::NoBuffers), 7);
    assert_eq!(net.dropped_out(2, Reason::NoDriver), 10);
    assert_eq!(net.dropped_out(3, Reason::LinkDown), 10);
    assert_eq!(net.dropped_out(4, Reason::Broken), 10);
    assert_eq!(net.dropped_out(5, Reason::Gone), 10);
    // Those who went by themselves.
    net.ports[6].set_guest(&Guest::NONE);
    assert_eq!(net.report(6).macs, 0, "its addresses are forgotten");
    net.send(0, &[all(0, 11)]);
    assert_eq!(net.dropped_out(6, Reason::NoDriver), 1);
}

#[test]
fn more_frames_than_one_turn_has_buffers_for_arrive_in_order() {
    let mut net = Net::open(2);
    let key = net.keys[1];
    net.bench.world.receivers.get_mut(&key).unwrap().turn = 5;
    let frames: Vec<Vec<u8>> = (0..200).map(|n| all(0, n)).collect();
    net.send(0, &frames);
    assert_eq!(net.numbers()[1], (0..200).collect::<Vec<u32>>());
}

#[test]
fn a_large_segment_is_cut_for_one_who_cannot_take_it_and_crosses_whole_to_others() {
    let mut net = Net::open(3);
    let small = Guest {
        offloads: Offloads::NONE,
        ..everything()
    };
    net.ports[2].set_guest(&small);
    let (header, bytes) = segment(EVERYBODY, 4000, 1000);
    let sent = net
        .bench
        .send_with(&mut net.ports[0], &[(header, bytes.clone())]);
    assert_eq!(sent, 1);
    let key = net.keys[1];
    let whole = &net.bench.world.receivers[&key].got;
    assert_eq!(whole.len(), 1);
    assert_eq!((whole[0].0.gso_type, &whole[0].1[54..]), (1, &bytes[54..]));
    let cut = net.got(2);
    assert_eq!(cut.len(), 4);
    assert!(cut.iter().all(|frame| frame.len() == 1054));
    let report = net.report(2);
    assert_eq!((report.segmented, report.segments), (1, 4));
    assert_eq!(report.output.broadcast.frames, 1);
}
