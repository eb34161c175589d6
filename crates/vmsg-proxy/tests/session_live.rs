// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session against a scripted device host: what a guest does and hears while it lives.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::Host;
use virtio_msg::{
    ConfigEvent, DevNum, DeviceStatus, Frame, Generation, Message, QueueIndex, Token,
};
use vmsg_proxy::session::{Event, Op, OpError, Outcome, QueueSetup, ResetReason, Target};
use world::{LIVE, World, setup, window};

#[test]
fn changes_of_the_memory_table_are_atomic_and_leave_the_rest_alone() {
    let mut world = World::net();
    world.bring_up();
    let before: Vec<u32> = world.host.windows.keys().copied().collect();
    let kept = window(0, 0x10_0000, 1);
    world
        .op(Op::SetWindows(vec![
            kept.clone(),
            window(0x1_0010_0000, 0x20_0000, 3),
            window(0x2_0000_0000, 0x1000, 4),
        ]))
        .unwrap();
    assert_eq!(world.host.table_changes, 2);
    assert_eq!(world.host.windows.len(), 3);
    assert!(
        world.host.windows.contains_key(&before[0]),
        "the window that stays was not touched"
    );
    assert!(!world.host.windows.contains_key(&before[1]));
    world.op(Op::SetWindows(vec![kept])).unwrap();
    assert_eq!(world.host.windows.len(), 1);
    let sent = world.sent;
    world
        .op(Op::SetWindows(vec![window(0, 0x10_0000, 1)]))
        .unwrap();
    assert_eq!(world.sent, sent, "nothing to say");
}

#[test]
fn windows_that_overlap_or_wrap_are_not_lent() {
    let mut world = World::net();
    for bad in [
        vec![window(0, 0x2000, 1), window(0x1000, 0x2000, 2)],
        vec![window(0, 0, 1)],
        vec![window(u64::MAX - 10, 0x1000, 1)],
        (0..1000).map(|i| window(i * 0x1000, 0x1000, i)).collect(),
    ] {
        let sent = world.sent;
        assert!(matches!(
            world.op(Op::SetWindows(bad)),
            Err(OpError::Invalid(_))
        ));
        assert_eq!(world.sent, sent);
    }
}

#[test]
fn refused_windows_make_the_session_start_over() {
    let mut world = World::net();
    world.bring_up();
    world.host.refuse_windows = true;
    let result = world.op(Op::SetWindows(vec![window(0x5000_0000, 0x1000, 9)]));
    assert_eq!(
        result,
        Err(OpError::Refused {
            what: "WINDOW_ADD",
            code: 6
        })
    );
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LinkFault(_)))
    );
    world.host.refuse_windows = false;
    world.disconnect();
    world.connect();
    world.assert_host_is_live();
}

#[test]
fn a_device_held_by_another_is_asked_for_until_it_is_free() {
    let mut world = World::net();
    world.host.held_by = Some("vmsg top");
    let claim = world.submit(Op::Claim);
    assert_eq!(world.result(claim), None);
    assert!(world.tick());
    world.host.held_by = None;
    assert!(world.tick());
    assert_eq!(world.result(claim), Some(Ok(Outcome::Done)));

    let mut world = World::net();
    world.host.held_by = Some("vmsg top");
    let claim = world.submit(Op::Claim);
    while world.result(claim).is_none() {
        assert!(world.tick());
    }
    assert_eq!(
        world.result(claim),
        Some(Err(OpError::Held("vmsg top".into())))
    );
}

#[test]
fn a_replay_waits_for_the_claim_and_gives_up_with_the_holder() {
    let mut world = World::net();
    world.bring_up();
    let mut next = world.host.restarted();
    next.held_by = Some("thief");
    world.replace(next);
    assert!(world.tick());
    world.host.held_by = None;
    assert!(world.tick());
    world.assert_host_is_live();

    let mut next = world.host.restarted();
    next.held_by = Some("thief");
    world.replace(next);
    while world.tick() {}
    assert!(
        world
            .events
            .contains(&Event::NeedsReset(ResetReason::Held("thief".into())))
    );
}

#[test]
fn configuration_longer_than_a_message_is_read_in_one_generation() {
    let config: Vec<u8> = (0..600).map(|i| i as u8).collect();
    let mut world = World::up(
        Target::Number(DevNum(2)),
        Host::new(2, "big", 2, 1, &config),
    );
    world.host.unstable_reads = 2;
    assert_eq!(
        world.op(Op::ReadConfig {
            offset: 10,
            len: 580
        }),
        Ok(Outcome::Config(config[10..590].to_vec()))
    );
    assert_eq!(
        world.op(Op::ReadConfig { offset: 10, len: 0 }),
        Ok(Outcome::Config(Vec::new()))
    );
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: 10,
            len: 591
        }),
        Err(OpError::Invalid(_))
    ));
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: u32::MAX,
            len: 2
        }),
        Err(OpError::Invalid(_))
    ));
    // One that never stops changing is read all the same.
    world.host.unstable_reads = u32::MAX;
    assert!(matches!(
        world.op(Op::ReadConfig {
            offset: 0,
            len: 600
        }),
        Ok(Outcome::Config(_))
    ));
}

#[test]
fn a_write_with_an_old_generation_is_repeated_with_the_new_one() {
    let mut world = World::net();
    world.host.generation += 5;
    assert_eq!(
        world.op(Op::WriteConfig {
            offset: 2,
            data: vec![0xaa, 0xbb]
        }),
        Ok(Outcome::Done)
    );
    assert_eq!(&world.host.config[2..4], [0xaa, 0xbb]);
}

#[test]
fn changes_of_configuration_and_status_are_passed_on() {
    let mut world = World::net();
    world.bring_up();
    let mut bytes = [0; 64];
    let event = |status, data: &'static [u8]| ConfigEvent {
        status,
        generation: Generation(9),
        offset: 6,
        len: data.len() as u32,
        data,
    };
    let len = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventConfig(event(LIVE, &[0, 0])),
    )
    .encode(&mut bytes)
    .unwrap();
    let sent = world.sent;
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(world.events.contains(&Event::ConfigChanged));
    assert_eq!(world.sent, sent, "the event carried the data");
    world.disconnect();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 6, len: 2 }),
        Ok(Outcome::Config(vec![0, 0]))
    );
    world.connect();

    world.events.clear();
    world.host.config[7] = 0x77;
    let len = Frame::new(DevNum(3), Token(0), Message::EventConfig(event(LIVE, &[])))
        .encode(&mut bytes)
        .unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(
        world.events.contains(&Event::ConfigChanged),
        "it was read again"
    );
    world.disconnect();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 7, len: 1 }),
        Ok(Outcome::Config(vec![0x77]))
    );
    world.connect();

    let sick = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventConfig(event(LIVE | DeviceStatus::NEEDS_RESET, &[])),
    );
    let len = sick.encode(&mut bytes).unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
    assert!(
        world
            .events
            .contains(&Event::NeedsReset(ResetReason::DeviceReported))
    );
}

#[test]
fn the_end_of_a_guest_leaves_nothing_behind() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::Release).unwrap();
    assert!(!world.host.claimed);
    assert!(world.host.windows.is_empty());
    assert_eq!(world.host.status, DeviceStatus::RESET);
    let next = world.host.restarted();
    world.replace(next);
    assert!(!world.host.claimed && world.host.windows.is_empty());
    world.bring_up();
    world.assert_host_is_live();
}

#[test]
fn a_queue_that_was_not_taken_is_noticed_although_the_answer_is_the_same() {
    let mut world = World::net();
    world.bring_up();
    world.host.refuse_queues = true;
    let refused = OpError::Refused {
        what: "SET_VQUEUE",
        code: 0,
    };
    assert_eq!(
        world.op(Op::SetQueue(QueueIndex(2), setup(0x2_0000))),
        Err(refused)
    );
    let mut next = world.host.restarted();
    next.refuse_queues = true;
    world.replace(next);
    // It was in use.
    let reason = ResetReason::CannotResume { queue: 0 };
    assert!(world.events.contains(&Event::NeedsReset(reason)));
}

#[test]
fn queues_stop_and_start_while_others_run() {
    let mut world = World::net();
    world.bring_up();
    world.op(Op::StopQueue(QueueIndex(0))).unwrap();
    assert_eq!(world.host.queues.keys().copied().collect::<Vec<_>>(), [1]);
    world.host.kicks.clear();
    world
        .op(Op::SetQueue(QueueIndex(0), setup(0x1_0000)))
        .unwrap();
    assert_eq!(world.host.kicks, [0], "started late, kicked at once");
    for bad in [
        QueueSetup {
            size: 512,
            ..setup(0)
        },
        QueueSetup {
            size: 0,
            ..setup(0)
        },
        QueueSetup {
            size: 100,
            ..setup(0)
        },
    ] {
        assert!(matches!(
            world.op(Op::SetQueue(QueueIndex(2), bad)),
            Err(OpError::Invalid(_))
        ));
    }
    assert!(matches!(
        world.op(Op::SetQueue(QueueIndex(3), setup(0))),
        Err(OpError::Invalid(_))
    ));
}
