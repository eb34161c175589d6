// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session against a scripted device host: finding a device, bringing it up, replaying it to another host.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::Host;
use virtio_msg::{
    DevNum, DeviceState, DeviceStatus, FeatureSet, Frame, Message, QueueIndex, Token,
};
use vmsg_bus::control::Resume;
use vmsg_proxy::session::{
    Event, Op, OpError, OpId, Options, Outcome, QueueSetup, ResetReason, ResumeAt, Target,
};
use world::{LIVE, World, setup};

#[test]
fn a_device_is_found_by_its_number_and_described() {
    let mut world = World::net();
    let Ok(Outcome::Device(facts)) = world.op(Op::Describe) else {
        panic!()
    };
    assert_eq!(facts.number, DevNum(3));
    assert_eq!(facts.info.device_id, 1);
    assert_eq!(facts.queue_sizes, [256; 3]);
    assert_eq!(facts.offered, world.host.offered);
    assert!(!world.host.claimed, "looking is not claiming");
}

#[test]
fn a_device_is_found_by_its_name_among_others() {
    let mut world = World::up(Target::Name("net0".into()), Host::net());
    let Ok(Outcome::Device(facts)) = world.op(Op::Describe) else {
        panic!()
    };
    assert_eq!(facts.number, DevNum(3));
}

#[test]
fn a_device_that_is_missing_is_taken_when_it_appears() {
    for target in [Target::Name("net0".into()), Target::Number(DevNum(3))] {
        let mut host = Host::net();
        host.number = DevNum(9);
        host.name = "else".into();
        let mut world = World::up(target, host);
        assert!(world.events.contains(&Event::DeviceAbsent));
        let describe = world.submit(Op::Describe);
        assert_eq!(world.result(describe), None);
        world.host = Host::net();
        let event = Frame::bus(
            Token(0),
            Message::EventDevice {
                device: DevNum(3),
                state: DeviceState::Ready,
            },
        );
        let mut bytes = [0; 64];
        let len = event.encode(&mut bytes).unwrap();
        world.session.handle_message(world.now, &bytes[..len]);
        world.run();
        assert!(matches!(
            world.result(describe),
            Some(Ok(Outcome::Device(_)))
        ));
    }
}

#[test]
fn a_device_that_never_comes_ends_the_wait_with_a_name() {
    let mut world = World::up(Target::Number(DevNum(5)), Host::net());
    let describe = world.submit(Op::Describe);
    while world.result(describe).is_none() {
        assert!(world.tick());
    }
    assert_eq!(world.result(describe), Some(Err(OpError::NoDevice)));
}

#[test]
fn bringing_up_says_everything_in_order() {
    let mut world = World::net();
    world.bring_up();
    world.assert_host_is_live();
    assert_eq!(world.host.table_changes, 1, "both windows at once");
    assert_eq!(world.host.kicks, [0, 1]);
}

#[test]
fn a_new_host_gets_all_that_was_negotiated() {
    let mut world = World::net();
    world.bring_up();
    let next = world.host.restarted();
    world.replace(next);
    world.assert_host_is_live();
    assert_eq!(world.host.resume[&0], Resume::UsedInRing);
    assert_eq!(world.host.resume[&1], Resume::UsedInRing);
    assert_eq!(world.host.table_changes, 1);
    assert_eq!(world.host.kicks, [0, 1]);
    assert_eq!(world.session.counters().replays, 1);
    assert!(world.events.contains(&Event::Ready {
        replayed: true,
        new_host: true
    }));
    // Claim, windows, status, features, queues, and the kicks at the very end.
    let at = |needle: &str| {
        world
            .host
            .log
            .iter()
            .position(|line| line.contains(needle))
            .unwrap_or_else(|| panic!("{needle}: {:?}", world.host.log))
    };
    assert!(at("SET_DEVICE_STATUS") < at("SET_DRIVER_FEATURES"));
    assert!(at("SET_DRIVER_FEATURES") < at("SET_VQUEUE"));
    assert!(at("SET_VQUEUE") < at("EVENT_AVAIL"));
}

#[test]
fn an_explicit_position_is_told_once_and_after_that_the_ring_decides() {
    let mut world = World::net();
    let mut ops = World::bring_up_ops();
    let explicit = ResumeAt::Explicit {
        avail: 17,
        used: 15,
    };
    ops[7] = Op::SetQueue(
        QueueIndex(0),
        QueueSetup {
            resume: explicit,
            ..setup(0x1000)
        },
    );
    for op in ops {
        world.op(op).unwrap();
    }
    assert_eq!(
        world.host.resume[&0],
        Resume::At {
            avail_idx: 17,
            used_idx: 15
        }
    );
    assert!(!world.host.resume.contains_key(&1));
    let next = world.host.restarted();
    world.replace(next);
    assert_eq!(world.host.resume[&0], Resume::UsedInRing);
}

#[test]
fn operations_while_the_host_is_away_are_recorded_and_replayed() {
    let mut world = World::net();
    world.disconnect();
    world.bring_up();
    assert_eq!(
        world.op(Op::ReadConfig { offset: 0, len: 2 }),
        Ok(Outcome::Config(vec![0x52, 0x54]))
    );
    let foreign = FeatureSet::from_bits(&[5]);
    assert_eq!(
        world.op(Op::SetFeatures(foreign)),
        Err(OpError::NotOffered(foreign))
    );
    let write = world.submit(Op::WriteConfig {
        offset: 0,
        data: vec![9],
    });
    assert_eq!(world.result(write), None, "a write waits for the device");
    world.connect();
    world.assert_host_is_live();
    assert_eq!(world.result(write), Some(Ok(Outcome::Done)));
    assert_eq!(world.host.config[0], 9);
}

#[test]
fn nothing_waits_for_ever_and_not_everything_may_wait() {
    let mut world = World::new(Target::Number(DevNum(3)), Host::net());
    let ids: Vec<OpId> = (0..100).map(|_| world.submit(Op::Claim)).collect();
    let refused = ids
        .iter()
        .filter(|id| world.result(**id) == Some(Err(OpError::TooMany)))
        .count();
    assert_eq!(refused, 100 - Options::default().max_waiting);
    while world.tick() {}
    let expired = ids
        .iter()
        .filter(|id| world.result(**id) == Some(Err(OpError::TimedOut)))
        .count();
    assert_eq!(expired, Options::default().max_waiting);
}

#[test]
fn a_host_that_offers_less_needs_a_reset_with_the_reason() {
    type Change = fn(&mut Host);
    let cases: [(Change, ResetReason); 6] = [
        (
            |h| h.offered.remove(29),
            ResetReason::FeaturesMissing(FeatureSet::from_bits(&[29])),
        ),
        (
            |h| h.info.device_id = 2,
            ResetReason::DeviceIdChanged { was: 1, is: 2 },
        ),
        (
            |h| h.info.max_queues = 2,
            ResetReason::QueuesChanged { was: 3, is: 2 },
        ),
        (
            |h| {
                h.config.push(0);
                h.info.config_size += 1;
            },
            ResetReason::ConfigSizeChanged { was: 10, is: 11 },
        ),
        (
            |h| h.queue_sizes[1] = 64,
            ResetReason::QueueTooLarge {
                queue: 1,
                size: 128,
                max: 64,
            },
        ),
        (|h| h.refuse_features = true, ResetReason::FeaturesRefused),
    ];
    for (change, reason) in cases {
        let mut world = World::net();
        world.bring_up();
        let mut next = world.host.restarted();
        change(&mut next);
        world.replace(next);
        assert!(
            world.events.contains(&Event::NeedsReset(reason.clone())),
            "{reason}: {:?}",
            world.events
        );
        assert!(world.session.status().contains(DeviceStatus::NEEDS_RESET));
        assert!(!world.session.is_ready());
        assert!(
            !world.host.status.contains(DeviceStatus::DRIVER_OK),
            "{reason}"
        );
        assert_eq!(
            world.op(Op::SetStatus(LIVE)),
            Err(OpError::NeedsReset(reason.clone()))
        );
        // A reset makes good: on the next connection the device is taken as it is.
        assert_eq!(
            world.op(Op::SetStatus(DeviceStatus::RESET)),
            Ok(Outcome::Status(DeviceStatus::RESET))
        );
        assert!(
            world
                .events
                .iter()
                .any(|e| matches!(e, Event::LinkFault(_)))
        );
        world.host.refuse_features = false;
        world.disconnect();
        world.connect();
        assert!(world.session.is_ready(), "{reason}");
        assert!(
            matches!(world.op(Op::Describe), Ok(Outcome::Device(facts)) if facts.info == world.host.info)
        );
    }
}

#[test]
fn a_host_that_offers_more_is_as_good() {
    let mut world = World::net();
    world.bring_up();
    let mut next = world.host.restarted();
    next.offered.insert(40);
    next.config[6] = 0;
    world.replace(next);
    world.assert_host_is_live();
    assert!(
        world.events.contains(&Event::ConfigChanged),
        "the link status differs"
    );
}

#[test]
fn a_host_that_comes_back_with_the_same_epoch_is_known() {
    let mut world = World::net();
    world.bring_up();
    world.disconnect();
    world.events.clear();
    world.connect();
    world.assert_host_is_live();
    assert!(world.events.contains(&Event::Ready {
        replayed: true,
        new_host: false
    }));
}

#[test]
fn how_a_disk_s_writes_are_cached_is_told_to_the_next_host_before_it_works() {
    const CONFIG_WCE: u32 = 11;
    for (device_id, agreed, told) in [(2, true, true), (2, false, false), (1, true, false)] {
        let mut config = [0; 60];
        config[32] = 1;
        let mut host = Host::new(3, "disk0", device_id, 3, &config);
        host.offered.insert(CONFIG_WCE);
        let mut world = World::up(Target::Number(DevNum(3)), host);
        for op in World::bring_up_ops() {
            let op = match op {
                Op::SetFeatures(features) if agreed => Op::SetFeatures(features.with(CONFIG_WCE)),
                op => op,
            };
            world.op(op).unwrap();
        }
        let (offset, data) = (30, vec![0, 0, 0, 0]);
        world.op(Op::WriteConfig { offset, data }).unwrap();
        let mut next = world.host.restarted();
        next.config[32] = 1;
        world.replace(next);
        assert!(world.session.is_ready());
        assert_eq!(world.host.config[32], u8::from(!told), "{device_id}");
        let at = |needle: &str| {
            world
                .host
                .log
                .iter()
                .rposition(|line| line.contains(needle))
        };
        if told {
            assert!(at("SET_CONFIG").unwrap() < at("SET_VQUEUE").unwrap());
            assert!(at("SET_CONFIG").unwrap() < at("SET_DEVICE_STATUS").unwrap());
            assert!(!world.events.contains(&Event::ConfigChanged), "as it was");
        }
        // A reset forgets it.
        world.op(Op::SetStatus(DeviceStatus::RESET)).unwrap();
        let mut next = world.host.restarted();
        next.config[32] = 1;
        world.replace(next);
        assert_eq!(world.host.config[32], 1);
    }
}
