// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cable goes in and out; announcements.

use super::bench::{Bench, Incoming, MAC};
use crate::device::{Link, Operation};
use crate::net::packets::{tagged, to};
use crate::net::{Mac, Settings, bits};
use crate::worker::Resume;

const STATUS: usize = 6;
const FRAME: [u8; 60] = [0xff; 60];

fn up_and_down(bench: &mut Bench, set: impl Fn(&mut Bench, bool)) {
    bench.give(0, 8, 2048);
    set(bench, false);
    assert_eq!(bench.config_notice(STATUS), Some(vec![0, 0]));
    bench.wire.push(Incoming::new(&FRAME));
    bench.poll();
    bench.send(1, &FRAME);
    assert_eq!(bench.received(0), []);
    assert_eq!(bench.reclaim(1), 1, "the frame is taken");
    assert!(bench.wire.state().sent.is_empty(), "and dropped");
    assert!(bench.wire.state().incoming.is_empty());
    assert_eq!(bench.counter("rx_link_down"), 1);
    assert_eq!(bench.pair_counter(0, "tx_link_down"), 1);
    set(bench, true);
    assert_eq!(bench.config_notice(STATUS), Some(vec![1, 0]));
    bench.wire.push(Incoming::new(&FRAME));
    bench.poll();
    bench.send(1, &FRAME);
    assert_eq!(bench.frames(0), [FRAME]);
    assert_eq!(bench.wire.state().sent.len(), 1);
    assert_eq!(bench.counter("link_changes"), 2);
}

#[test]
fn the_operator_takes_the_cable_out_and_the_driver_is_told() {
    let mut bench = Bench::running(1, &[bits::STATUS], &[0, 1]);
    up_and_down(&mut bench, |bench, up| {
        bench.operate(Operation::SetLink(up)).expect("a cable");
        bench
            .operate(Operation::SetLink(up))
            .expect("the same again");
    });
}

#[test]
fn a_back_end_that_leads_nowhere_takes_the_link_down() {
    let mut bench = Bench::running(1, &[bits::STATUS], &[0, 1]);
    up_and_down(&mut bench, |bench, up| {
        bench.wire.state().link = up;
        bench.poll();
    });
}

#[test]
fn the_link_is_up_when_both_ends_are() {
    let mut bench = Bench::running(1, &[bits::STATUS], &[0, 1]);
    bench.operate(Operation::SetLink(false)).expect("a cable");
    bench.wire.state().link = false;
    bench.poll();
    bench.operate(Operation::SetLink(true)).expect("a cable");
    assert_eq!(bench.config_notice(STATUS), Some(vec![0, 0]));
    let link = Link {
        up: true,
        carrier: false,
    };
    assert_eq!(
        bench.monitor.as_ref().expect("counters").snapshot().link,
        Some(link)
    );
    bench.wire.state().link = true;
    bench.poll();
    assert_eq!(bench.config_notice(STATUS), Some(vec![1, 0]));
}

#[test]
fn the_link_outlives_the_driver() {
    let settings = Settings {
        link_up: false,
        ..Settings::new(Mac(MAC))
    };
    let mut bench = Bench::with(&settings);
    bench.bring_up(&[bits::STATUS], &[0, 1]);
    bench.send(1, &FRAME);
    assert_eq!(bench.pair_counter(0, "tx_link_down"), 1);
    bench.tell(crate::worker::Command::Reset).expect("reset");
    let config = bench.config_notice(0).expect("all of it");
    assert_eq!(config[STATUS..STATUS + 2], [0, 0]);
    bench.operate(Operation::SetLink(true)).expect("a cable");
    assert_eq!(bench.config_notice(STATUS), Some(vec![1, 0]));
}

#[test]
fn a_driver_that_can_is_asked_to_announce_itself_and_says_that_it_did() {
    let mut bench = Bench::running(1, &[bits::STATUS], &[0, 1]);
    assert!(
        bench.operate(Operation::Announce).is_err(),
        "not negotiated"
    );
    bench.tell(crate::worker::Command::Reset).expect("reset");
    // Without a control queue it could not answer.
    bench.bring_up(&[bits::STATUS, bits::GUEST_ANNOUNCE], &[0, 1]);
    assert!(bench.operate(Operation::Announce).is_err());
    bench.tell(crate::worker::Command::Reset).expect("reset");
    bench.bring_up(
        &[bits::STATUS, bits::CTRL_VQ, bits::GUEST_ANNOUNCE],
        &[0, 1, 2],
    );
    bench.operate(Operation::Announce).expect("it can");
    assert_eq!(bench.config_notice(STATUS), Some(vec![3, 0]));
    assert_eq!(bench.control(2, 3, 0, &[]), 0);
    assert_eq!(bench.config_notice(STATUS), Some(vec![1, 0]));
    assert_eq!(bench.counter("announcements"), 1);
    // It goes away with the driver.
    bench.operate(Operation::Announce).expect("it can");
    bench.tell(crate::worker::Command::Reset).expect("reset");
    let config = bench.config_notice(0).expect("all of it");
    assert_eq!(config[STATUS..STATUS + 2], [1, 0]);
}

#[test]
fn a_driver_whose_queues_go_on_is_asked_to_announce_itself() {
    let mut bench = Bench::new(1);
    bench
        .negotiate(&[bits::STATUS, bits::CTRL_VQ, bits::GUEST_ANNOUNCE])
        .expect("features");
    for queue in 0..3 {
        let resume = Some(Resume::FromUsedRing);
        bench.set_up(queue, resume).expect("a queue");
    }
    bench.driver_ok();
    assert_eq!(bench.config_notice(STATUS), Some(vec![3, 0]));
}

#[test]
fn queues_that_go_on_get_frames_of_all_vlans() {
    for (resume, expected) in [(None, 0), (Some(Resume::FromUsedRing), 1)] {
        let mut bench = Bench::new(1);
        bench
            .negotiate(&[bits::CTRL_VQ, bits::CTRL_RX, bits::CTRL_VLAN])
            .expect("features");
        for queue in 0..3 {
            bench.set_up(queue, resume).expect("a queue");
        }
        bench.driver_ok();
        bench.give(0, 4, 2048);
        bench.wire.push(Incoming::new(&tagged(&to(MAC, &FRAME), 5)));
        bench.poll();
        assert_eq!(bench.frames(0).len(), expected);
    }
}
