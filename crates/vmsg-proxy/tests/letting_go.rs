// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When a guest's memory is said to be free: requests of a disk outlive calls and connections.
#![allow(missing_docs)]

mod common;
mod moods;

use common::{Host, MAX};
use moods::{LIVE, Mood, World, bring_up, window};
use std::time::Duration;
use virtio_msg::{DeviceStatus, Message, QueueIndex};
use vmsg_bus::Capabilities;
use vmsg_proxy::session::{Op, OpError, Outcome};

const BOUND: Duration = Duration::from_millis(2001);
/// For news of a host whose connection was just lost.
const GRACE: Duration = Duration::from_millis(200);

fn reset() -> Op {
    Op::SetStatus(DeviceStatus::RESET)
}

/// All that a guest takes back with.
fn taking_back() -> Vec<Op> {
    vec![
        reset(),
        Op::StopQueue(QueueIndex(0)),
        Op::SetWindows(vec![window(0x10_0000)]),
        Op::ChangeWindows {
            remove: vec![0],
            add: Vec::new(),
        },
        Op::Release,
    ]
}

#[test]
fn a_guest_that_ends_at_a_busy_device_is_not_told_that_its_memory_is_free() {
    for asked_before in [None, Some(reset()), Some(Op::StopQueue(QueueIndex(0)))] {
        let mut world = World::live(Host::net());
        world.mood = Mood::Busy;
        if let Some(op) = asked_before {
            assert_eq!(world.op(op).0, Err(OpError::Busy));
        }
        for _ in 0..3 {
            let (result, took) = world.op(Op::Release);
            assert_eq!(result, Err(OpError::Busy));
            assert!(took <= 2 * BOUND, "{took:?}");
        }
        assert!(!world.is_given_up(), "the host lives, and does its part");
        // Another guest.
        assert_eq!(world.op(Op::Claim).0, Err(OpError::Busy));
        assert!(world.host.claimed);
        world.rest();
        while !world.host.windows.is_empty() || world.host.claimed {
            assert!(world.step(), "nothing is left of the guest");
        }
        assert_eq!(world.host.status, DeviceStatus::RESET);
        assert_eq!(world.op(Op::Release).0, Ok(Outcome::Done));
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        assert_eq!(world.host.status, LIVE);
    }
}

#[test]
fn a_guest_that_ends_is_told_when_the_device_is_done_in_time() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Busy;
    let release = world.session.submit(world.now, Op::Release);
    for _ in 0..2 {
        assert!(world.step());
    }
    assert_eq!(world.result(release), None);
    world.rest();
    while world.result(release).is_none() {
        assert!(world.step());
    }
    assert_eq!(world.result(release), Some(Ok(Outcome::Done)));
    assert_eq!(world.session.counters().overdue, 0);
}

#[test]
fn memory_is_not_free_while_the_host_of_a_lost_connection_lives() {
    for op in taking_back() {
        let mut world = World::live(Host::net());
        world.session.handle_link_down(world.now);
        world.session.set_host_seen(true);
        let (result, took) = world.op(op.clone());
        let error = match op {
            Op::Release | Op::ChangeWindows { .. } => OpError::StillInUse,
            _ => OpError::Busy,
        };
        assert_eq!(result, Err(error), "{op:?}");
        assert!(took <= BOUND, "{op:?}: {took:?}");
    }
    for op in taking_back() {
        let mut world = World::live(Host::net());
        world.session.handle_link_down(world.now);
        let id = world.session.submit(world.now, op.clone());
        assert_eq!(world.result(id), None);
        world.session.handle_host_ended(world.now);
        assert!(matches!(world.result(id), Some(Ok(_))), "{op:?}");
        // And from then on at once.
        for op in [reset(), Op::Release, Op::Claim] {
            let (result, took) = world.op(op);
            assert!(result.is_ok());
            assert_eq!(took, Duration::ZERO);
        }
    }
}

#[test]
fn a_host_that_is_seen_to_live_is_waited_for_without_end_and_one_that_is_not_seen_for_half_a_minute()
 {
    for seen in [false, true] {
        let mut world = World::new(Host::net());
        world.session.set_host_seen(seen);
        world.connect();
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        world.session.handle_link_down(world.now);
        let begin = world.now;
        let mut tries = 0;
        while world.op(reset()).0.is_err() && tries < 10_000 {
            tries += 1;
        }
        let took = Duration::from_nanos(world.now.0 - begin.0);
        if seen {
            assert_eq!(tries, 10_000);
            assert!(took > Duration::from_secs(900), "{took:?}");
            world.session.handle_host_ended(world.now);
            assert!(world.op(reset()).0.is_ok());
        } else {
            assert_eq!(took, Duration::from_secs(30));
        }
    }
}

#[test]
fn the_same_host_on_the_next_connection_says_when_it_has_let_go() {
    let mut world = World::live(Host::net());
    world.session.handle_link_down(world.now);
    assert_eq!(world.op(Op::Release).0, Err(OpError::StillInUse));
    // It is asked, though there is no guest.
    world.mood = Mood::HoldsClaims;
    world.connect();
    let (result, took) = world.op(Op::Claim);
    assert_eq!(result, Err(OpError::Busy), "the one before is not done");
    assert!(took <= BOUND + GRACE, "{took:?}");
    assert!(!world.is_given_up(), "it answers PING");
    world.rest();
    while world.host.claimed {
        assert!(world.step(), "it was only asked");
    }
    for op in bring_up() {
        world.op(op).0.unwrap();
    }
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn another_host_at_the_same_place_stands_for_the_end_of_the_one_before() {
    let mut world = World::live(Host::net());
    world.session.handle_link_down(world.now);
    let release = world.session.submit(world.now, Op::Release);
    world.host = Host::net();
    let caps = Capabilities::all(MAX);
    world.session.handle_link_up(world.now, caps, 8);
    while world.result(release).is_none() {
        assert!(world.step());
    }
    assert_eq!(world.result(release), Some(Ok(Outcome::Done)));
    assert!(world.host.windows.is_empty() && !world.host.claimed);
}

#[test]
fn memory_that_no_queue_was_ever_in_is_free_at_once() {
    for op in taking_back() {
        let mut world = World::new(Host::net());
        world.connect();
        for op in bring_up().into_iter().take(4) {
            world.op(op).0.unwrap();
        }
        world.session.handle_link_down(world.now);
        if matches!(op, Op::StopQueue(_)) {
            continue;
        }
        let (result, took) = world.op(op.clone());
        assert!(result.is_ok(), "{op:?}: {result:?}");
        assert_eq!(took, Duration::ZERO);
    }
}

#[test]
fn after_a_reset_that_was_done_memory_is_free_at_once() {
    let mut world = World::live(Host::net());
    world.op(reset()).0.unwrap();
    world.session.handle_link_down(world.now);
    for op in [reset(), Op::Release, Op::Claim] {
        let (result, took) = world.op(op);
        assert!(result.is_ok());
        assert_eq!(took, Duration::ZERO);
    }
}

/// A host that has no claims is reset instead.
#[test]
fn a_host_without_claims_says_it_with_the_answer_to_a_reset() {
    let mut world = World::live(Host::net());
    let mut caps = Capabilities::all(MAX);
    caps.claims = false;
    world.session.handle_link_down(world.now);
    assert_eq!(world.op(Op::Release).0, Err(OpError::StillInUse));
    world.mood = Mood::Busy;
    world.host.end_of_connection();
    world.session.handle_link_up(world.now, caps, 7);
    assert_eq!(world.op(Op::Claim).0, Err(OpError::Busy));
    let is_reset = |bytes: &Vec<u8>| {
        let frame = virtio_msg::decode(bytes, MAX).unwrap();
        matches!(frame.message, Message::DeviceStatusSet(status) if status.is_empty())
    };
    assert!(world.due.iter().any(is_reset));
    world.rest();
    assert_eq!(world.op(Op::Claim).0, Ok(Outcome::Done));
}
