// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a device host that does not do its part can hold a front up: a VMM stands still for as long as an operation takes.
#![allow(missing_docs)]

mod common;
mod moods;

use common::Host;
use moods::{LIVE, Mood, World, bring_up, set_queue, window};
use std::time::Duration;
use virtio_msg::{DevNum, DeviceStatus, Frame, Message, Token};
use vmsg_proxy::session::{Event, Op, OpError, Options, Outcome, Session, Target};

/// All that a guest's reboot, its end, and its next start ask for.
fn requests() -> Vec<Op> {
    let mut ops = vec![
        Op::ReadConfig { offset: 0, len: 6 },
        Op::StopQueue(virtio_msg::QueueIndex(0)),
        Op::SetStatus(DeviceStatus::RESET),
    ];
    ops.extend(bring_up());
    ops.push(Op::SetWindows((0..40).map(|i| window(i << 20)).collect()));
    ops.push(Op::SetNotify {
        queue: virtio_msg::QueueIndex(0),
        kick: None,
        call: None,
    });
    ops.push(Op::Release);
    ops
}

const BOUND: Duration = Duration::from_millis(2001);
/// And for news of a host whose connection was just lost.
const GRACE: Duration = Duration::from_millis(200);

#[test]
fn a_silent_host_holds_a_front_up_once_and_briefly() {
    for op in requests() {
        let mut world = World::live(Host::net());
        world.mood = Mood::Silent;
        let (result, took) = world.op(op.clone());
        assert!(
            result.is_ok() || may_be_in_use(&result),
            "{op:?}: recorded for the replay: {result:?}"
        );
        assert!(took <= BOUND + GRACE, "{op:?} took {took:?}");
        // The connection is given up, if it was needed: after that nobody stands still for long, and soon not at all.
        let mut took = Duration::ZERO;
        for op in requests() {
            took += world.op(op).1;
        }
        assert!(took <= 2 * BOUND + 3 * GRACE, "all the rest took {took:?}");
        // Nor once it is known to have ended.
        world.session.handle_host_ended(world.now);
        for op in requests() {
            let (result, took) = world.op(op.clone());
            assert!(result.is_ok(), "{op:?}: {result:?}");
            assert_eq!(took, Duration::ZERO, "{op:?}");
        }
    }
}

/// What was taken back may be written to by a host that lives.
fn may_be_in_use(result: &Result<Outcome, OpError>) -> bool {
    matches!(result, Err(OpError::Busy | OpError::StillInUse))
}

#[test]
fn what_a_silent_host_did_not_do_the_next_does() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let windows = Op::SetWindows(vec![window(0x10_0000)]);
    let windows = world.session.submit(world.now, windows);
    while !world.is_given_up() {
        assert!(world.step() && world.result(windows).is_none());
    }
    world.session.handle_host_ended(world.now);
    assert_eq!(world.result(windows), Some(Ok(Outcome::Done)));
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    let windows: Vec<u64> = world.host.windows.values().map(|w| w.base.0).collect();
    assert_eq!(windows, [0x10_0000]);
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn a_guest_that_ends_before_a_silent_host_leaves_nothing_to_replay() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    assert_eq!(world.op(Op::Release).0, Err(OpError::StillInUse));
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty() && !world.host.claimed);
    assert_eq!(world.host.status, DeviceStatus::RESET);
}

/// What is to be taken back waits until a host that was lost knows that it was; a guest that ends meanwhile stands behind that.
#[test]
fn a_guest_that_ends_behind_what_is_held_back_leaves_nothing_to_replay() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let unmap = Op::ChangeWindows {
        remove: vec![0],
        add: Vec::new(),
    };
    let unmapped = world.session.submit(world.now, unmap);
    // Its time is up in the middle of that.
    world.now = world.now + Duration::from_millis(20);
    let (result, took) = world.op(Op::Release);
    assert_eq!(result, Err(OpError::StillInUse));
    assert!(took <= BOUND + GRACE, "{took:?}");
    assert_eq!(world.result(unmapped), Some(Err(OpError::StillInUse)));
    world.mood = Mood::Prompt;
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty() && !world.host.claimed);
    assert_eq!(world.host.status, DeviceStatus::RESET);
}

#[test]
fn a_guest_that_ends_before_its_device_was_seen_leaves_nothing_either() {
    let mut world = World::new(Host::net());
    world
        .op(Op::ChangeWindows {
            remove: Vec::new(),
            add: vec![window(0)],
        })
        .0
        .unwrap();
    let (result, _) = world.op(Op::Release);
    assert_eq!(result, Err(OpError::TimedOut));
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert!(world.host.windows.is_empty());
}

#[test]
fn a_reset_is_not_done_before_the_device_has_done_it() {
    let reset = Op::SetStatus(DeviceStatus::RESET);
    for op in [Op::StopQueue(virtio_msg::QueueIndex(0)), reset.clone()] {
        let mut world = World::live(Host::net());
        world.mood = Mood::Busy;
        let (result, took) = world.op(op.clone());
        assert_eq!(result, Err(OpError::Busy), "{op:?}");
        assert!(took <= BOUND, "{took:?}");
        // As long as it takes: nothing is asked for twice, and the connection stays.
        for _ in 0..20 {
            let (result, took) = world.op(op.clone());
            assert_eq!(result, Err(OpError::Busy));
            assert!(took <= BOUND, "{took:?}");
        }
        assert_eq!(world.session.counters().overdue, 1);
        assert_eq!(world.due.len(), 2, "and once more, if the answer was lost");
        // What needs no device is answered, and nothing else is done.
        let read = Op::ReadConfig { offset: 0, len: 6 };
        assert!(matches!(world.op(read).0, Ok(Outcome::Config(_))));
        assert_eq!(world.op(Op::Claim).0, Ok(Outcome::Done));
        assert_eq!(
            world.op(Op::SetWindows(Vec::new())).0,
            Err(OpError::Busy),
            "memory may be in use"
        );
        assert_eq!(world.op(set_queue()).0, Err(OpError::Busy));
        world.rest();
        assert!(!world.is_given_up());
        let (result, took) = world.op(reset.clone());
        assert_eq!(result, Ok(Outcome::Status(DeviceStatus::RESET)));
        assert_eq!(took, Duration::ZERO);
        for op in bring_up() {
            world.op(op).0.unwrap();
        }
        assert_eq!(world.host.status, LIVE);
    }
}

#[test]
fn a_front_that_asks_again_by_itself_is_told_at_once_that_the_device_is_busy() {
    let mut world = World::live(Host::net());
    let options = Options {
        overdue_timeout: Duration::ZERO,
        ..Options::default()
    };
    world.session = Session::new(Target::Number(DevNum(3)), options);
    world.connect();
    for op in bring_up() {
        world.op(op).0.unwrap();
    }
    world.mood = Mood::Busy;
    let reset = Op::SetStatus(DeviceStatus::RESET);
    assert_eq!(world.op(reset.clone()).0, Err(OpError::Busy));
    let begin = world.now;
    for _ in 0..1000 {
        assert_eq!(
            world.op(reset.clone()),
            (Err(OpError::Busy), Duration::ZERO)
        );
    }
    assert_eq!(world.now, begin);
    world.rest();
    assert!(world.op(reset).0.is_ok());
}

#[test]
fn a_busy_host_that_falls_silent_is_given_up() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Busy;
    let reset = Op::SetStatus(DeviceStatus::RESET);
    assert_eq!(world.op(reset.clone()).0, Err(OpError::Busy));
    world.mood = Mood::Silent;
    let mut took = Duration::ZERO;
    while !world.is_given_up() {
        took += world.op(reset.clone()).1;
        assert!(took <= 2 * BOUND, "{took:?}");
    }
    // It may live.
    for _ in 0..10 {
        assert_eq!(world.op(reset.clone()).0, Err(OpError::Busy));
    }
    world.session.handle_host_ended(world.now);
    assert_eq!(world.op(reset).0, Ok(Outcome::Status(DeviceStatus::RESET)));
    world.mood = Mood::Prompt;
    world.connect();
    for op in bring_up() {
        world.op(op).0.unwrap();
    }
    assert_eq!(world.host.status, LIVE);
}

#[test]
fn answers_to_pings_that_were_not_asked_for_change_nothing() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let reset = world
        .session
        .submit(world.now, Op::SetStatus(DeviceStatus::RESET));
    let out = world.session.poll_transmit().unwrap();
    let token = virtio_msg::decode(&out.bytes, common::MAX).unwrap().token;
    let mut pong = |token, data| {
        let mut bytes = [0; 64];
        let frame = Frame::new(DevNum(0), token, Message::Pong { data });
        let len = frame.encode(&mut bytes).unwrap();
        world.session.handle_message(world.now, &bytes[..len]);
    };
    // Before it is asked, of another request, with other data.
    pong(token, 0);
    pong(Token(token.0 + 1), 0);
    pong(token, 7);
    while world.result(reset).is_none() {
        assert!(world.step());
    }
    assert!(world.is_given_up());
    assert_eq!(world.session.counters().overdue, 0);
}

#[test]
fn a_write_of_configuration_fails_in_time() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Silent;
    let write = Op::WriteConfig {
        offset: 0,
        data: vec![1],
    };
    let (result, took) = world.op(write.clone());
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took <= BOUND, "{took:?}");
    let (result, took) = world.op(write);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took <= BOUND, "{took:?}");
}

#[test]
fn a_host_that_answers_each_request_just_in_time_gains_nothing() {
    for delay in [300, 900, 1900] {
        for op in requests() {
            let mut world = World::live(Host::net());
            world.mood = Mood::Slow(Duration::from_millis(delay));
            let (result, took) = world.op(op.clone());
            // Of many windows those that go may not be taken back in time.
            let late = matches!(op, Op::SetWindows(_)) && may_be_in_use(&result);
            assert!(result.is_ok() || late, "{op:?}: {result:?}");
            assert!(
                took <= BOUND + GRACE + Duration::from_millis(delay),
                "{op:?} took {took:?}"
            );
        }
    }
}

#[test]
fn a_host_that_takes_its_time_to_attach_does_not_hold_a_front_up() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Slow(Duration::from_millis(900));
    world.connect();
    let (result, took) = world.op(Op::StopQueue(virtio_msg::QueueIndex(0)));
    assert_eq!(result, Err(OpError::Busy));
    assert!(took <= BOUND + Duration::from_secs(1), "{took:?}");
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LinkFault(_)))
    );
}

#[test]
fn news_of_the_configuration_without_end_do_not_keep_a_front_waiting() {
    let mut world = World::live(Host::net());
    world.mood = Mood::Talkative;
    for op in requests() {
        let (result, took) = world.op(op.clone());
        assert!(result.is_ok(), "{op:?}: {result:?}");
        assert!(took == Duration::ZERO, "{op:?} took {took:?}");
    }
}

#[test]
fn a_device_that_was_never_seen_is_waited_for_once() {
    let mut world = World::new(Host::net());
    let (result, took) = world.op(Op::Describe);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took >= Duration::from_secs(2) && took <= Duration::from_secs(5));
    let (result, took) = world.op(Op::Describe);
    assert_eq!(result, Err(OpError::TimedOut));
    assert!(took < Duration::from_millis(500), "{took:?}");
    world.connect();
    world.op(Op::Describe).0.unwrap();
    assert_eq!(world.session.device().unwrap().number, DevNum(3));
}
