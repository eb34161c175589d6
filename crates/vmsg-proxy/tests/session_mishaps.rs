// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The session against a scripted device host: something goes wrong at each step.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::Host;
use std::time::Duration;
use virtio_msg::{DevNum, Frame, Message, QueueIndex, Token};
use vmsg_proxy::session::{Event, Target};
use world::{Mishap, World};

/// How many messages attaching and bringing up take.
fn whole_length() -> usize {
    let mut world = World::net();
    world.bring_up();
    world.sent
}

/// Whatever goes wrong at whichever message: nothing panics, every operation ends, and on a connection that works everything is
/// set up as it was accepted.
#[test]
fn a_mishap_at_every_step_ends_well() {
    let length = whole_length();
    let mut cases = 0;
    for mishap in [
        Mishap::Never,
        Mishap::Late,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 1..=length {
            let mut world = World::new(Target::Number(DevNum(3)), Host::net());
            world.mishap = Some((at, mishap));
            world.connect();
            let mut failed = 0;
            for op in World::bring_up_ops() {
                // A front repeats what failed until it works.
                for attempt in 0.. {
                    assert!(attempt < 4, "{mishap:?} at {at}: {op:?} never works");
                    let id = world.submit(op.clone());
                    while world.result(id).is_none() {
                        let faulty = world
                            .events
                            .iter()
                            .any(|e| matches!(e, Event::LinkFault(_)));
                        if faulty
                            || !world.tick()
                            || !world.session.is_ready() && world.session.poll_timeout().is_none()
                        {
                            reconnect(&mut world);
                        }
                        if world.session.device().is_none()
                            && matches!(mishap, Mishap::LinkLost | Mishap::LinkLostAfter)
                        {
                            reconnect(&mut world);
                        }
                    }
                    if world.result(id).unwrap().is_ok() {
                        break;
                    }
                    failed += 1;
                }
            }
            if !world.session.is_ready() {
                reconnect(&mut world);
            }
            for late in std::mem::take(&mut world.late) {
                let before = world.session.counters().late;
                world.session.handle_message(world.now, &late);
                world.run();
                assert_eq!(world.session.counters().late, before + 1);
            }
            assert!(
                failed <= 1,
                "{mishap:?} at {at}: {failed} operations failed"
            );
            world.assert_host_is_live();
            cases += 1;
        }
    }
    assert_eq!(cases, 6 * length);
}

/// The same for a replay: the second host stumbles, the third takes over.
#[test]
fn a_mishap_at_every_step_of_a_replay_ends_well() {
    let mut world = World::net();
    world.bring_up();
    let first = world.sent;
    let next = world.host.restarted();
    world.replace(next);
    let length = world.sent - first;
    for mishap in [
        Mishap::Never,
        Mishap::Late,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 1..=length {
            let mut world = World::net();
            world.bring_up();
            world.mishap = Some((world.sent + at, mishap));
            world.events.clear();
            let next = world.host.restarted();
            world.replace(next);
            while !world.session.is_ready()
                && !world
                    .events
                    .iter()
                    .any(|e| matches!(e, Event::LinkFault(_) | Event::NeedsReset(_)))
                && world.tick()
            {}
            if matches!(mishap, Mishap::Never | Mishap::Late | Mishap::Garbage)
                && !world.session.is_ready()
            {
                assert!(world.session.counters().timeouts == 1, "{mishap:?} at {at}");
            }
            if world
                .events
                .iter()
                .any(|e| matches!(e, Event::NeedsReset(_)))
            {
                // Only a host that lies about what it is gets that far.
                assert_eq!(mishap, Mishap::OtherAnswer);
                continue;
            }
            if !world.session.is_ready() {
                let next = world.host.restarted();
                world.replace(next);
            }
            world.assert_host_is_live();
        }
    }
}

fn reconnect(world: &mut World) {
    world.events.retain(|e| !matches!(e, Event::LinkFault(_)));
    world.disconnect();
    world.connect();
}

#[test]
fn a_flood_of_nonsense_is_counted_and_costs_no_memory() {
    let mut world = World::net();
    world.bring_up();
    let mut bytes = [0; 64];
    let used = Frame::new(
        DevNum(3),
        Token(0),
        Message::EventUsed {
            queue: QueueIndex(1),
        },
    );
    let len = used.encode(&mut bytes).unwrap();
    for i in 0..10_000u32 {
        world.session.handle_message(world.now, &i.to_le_bytes());
        world.session.handle_message(world.now, &bytes[..len]);
        let mut ping = [0; 64];
        let n = Frame::bus(Token(5), Message::Ping { data: i })
            .encode(&mut ping)
            .unwrap();
        world.session.handle_message(world.now, &ping[..n]);
    }
    let mut out = 0;
    while world.session.poll_transmit().is_some() {
        out += 1;
    }
    assert!(out <= 16, "{out} answers to pings");
    let mut events = 0;
    while world.session.poll_event().is_some() {
        events += 1;
    }
    assert_eq!(events, 1, "one for the used queue");
    assert!(world.session.counters().malformed >= 10_000);
    assert!(world.now + Duration::from_secs(1) > world.now);
}
