// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers here, a worker with its thread there: kicks, and who wakes whom.

use std::hint::spin_loop;

use rustix::event::{PollFd, PollFlags, poll};
use vmsg_mem::Doorbell;

use crate::bridge::Bridge;
use crate::floors::{Datagrams, copies_across, most_in_flight};
use crate::frames::{FULL, HEADER, LARGE, SMALL, Shape};
use crate::lan::{Lan, Server};
use crate::measure::{Plan, pace, sample, span};
use crate::through::{head, row};
use crate::two_sides::{Places, eventfd_round_trip, run_on, time};

/// Stations 0 and 1 here, and their worker there.
fn pair(places: &Places, shape: &Shape) -> Lan {
    // Its thread runs where this one does when it starts it.
    run_on(places.there);
    let server = Server::thread();
    run_on(places.here);
    let mut lan = Lan::new(server, 2, shape);
    lan.aim(0, 1);
    lan.aim(1, 0);
    lan
}

/// Writes some frames as a sender, and reads those that have come as their receiver; how many came.
fn turn(
    lan: &mut Lan,
    shape: &Shape,
    frame: &[u8],
    room: &mut [u8],
    under_way: &mut usize,
) -> usize {
    let most = most_in_flight(shape);
    let sender = &mut lan.stations[0];
    sender.reap();
    // So that the receiver always has buffers.
    if (*under_way).max(sender.in_flight()) + shape.batch / 2 <= most {
        *under_way += shape.batch / 2;
        for _ in 0..shape.batch / 2 {
            sender.next().write(HEADER, &frame[HEADER..]);
            assert!(sender.send(), "room");
        }
        sender.publish_transmit();
    }
    let receiver = &mut lan.stations[1];
    let mut at = 0;
    let mut whole = 0;
    let frames = receiver.take(shape.batch / 2, |piece| {
        // The next frame over the last.
        if at + piece.len() > room.len() || whole == shape.len + HEADER {
            (at, whole) = (0, 0);
        }
        at += piece.read(0, &mut room[at..]);
        whole = at;
    });
    if frames > 0 {
        receiver.publish_receive();
        *under_way -= frames;
    }
    frames
}

pub(crate) fn print_rates(plan: &Plan, places: &Places, bridge: &mut Option<Bridge>) {
    head("driver to driver, two threads");
    for shape in [SMALL, FULL, LARGE] {
        let mut lan = pair(places, &shape);
        let frame = shape.bytes(0, 1);
        let mut room = vec![0; HEADER + shape.len];
        let mut datagrams = Datagrams::new(&shape);
        let mut copy = || copies_across(plan, places, &shape);
        let mut datagram = || datagrams.across(plan, places);
        let mut under_way = 0;
        let mut subject = || {
            pace(plan, || {
                turn(&mut lan, &shape, &frame, &mut room, &mut under_way)
            })
        };
        let sampled = match bridge.as_mut() {
            Some(bridge) => {
                bridge.introduce(&shape);
                let mut across = || bridge.across(plan, places, &frame);
                let floors: &mut [&mut dyn FnMut() -> f64] =
                    &mut [&mut copy, &mut datagram, &mut across];
                sample(plan, places, floors, &mut subject)
            }
            None => sample(plan, places, &mut [&mut copy, &mut datagram], &mut subject),
        };
        let lost = lan.dropped();
        let extra = if lost > 2 {
            format!("({lost} lost) ")
        } else {
            String::new()
        };
        row(shape.name, &shape, sampled, bridge.is_some(), &extra);
    }
    println!();
}

fn wait(bell: &Doorbell) {
    let mut fds = [PollFd::new(bell, PollFlags::IN)];
    poll(&mut fds, None).expect("poll");
    let _ = bell.drain();
}

/// One frame, and until it is there.
fn one_frame(lan: &mut Lan, asleep: bool) {
    let sender = &mut lan.stations[0];
    sender.reap();
    assert!(sender.send(), "room");
    sender.publish_transmit();
    let receiver = &mut lan.stations[1];
    while receiver.take(1, |_| {}) == 0 {
        if !asleep {
            spin_loop();
        } else if !receiver.listen() {
            wait(receiver.call.as_ref().expect("a worker with a thread"));
        }
    }
    receiver.publish_receive();
}

pub(crate) fn print_latencies(plan: &Plan, one: &Places, two: Option<&Places>) {
    println!(
        "| one frame of 64 B, kick to receiver | ratio | target (floor to pass) | ours | eventfd round trip | repetitions |"
    );
    println!("|---|---|---|---|---|---|");
    let mut rows = vec![(one, true)];
    if let Some(two) = two {
        rows.extend([(two, true), (two, false)]);
    }
    for (places, asleep) in rows {
        let mut lan = pair(places, &SMALL);
        let sampled = sample(
            plan,
            places,
            &mut [&mut || eventfd_round_trip(places, plan.rounds)],
            &mut || time(plan.rounds, |_| one_frame(&mut lan, asleep)),
        );
        let receiver = if asleep {
            "both sides asleep"
        } else {
            "the receiver polls"
        };
        let name = format!("{receiver}, {}", places.name);
        match sampled {
            Some(sampled) => println!(
                "| {name} | {:.2} | ≤ 1.05 (1.3) | {} | {} | {} |",
                sampled.floors[0].ratio,
                span(sampled.ours),
                span(sampled.floors[0].floor),
                sampled.counted
            ),
            None => println!("| {name} | – | ≤ 1.05 (1.3) | – | – | the machine is too restless |"),
        }
    }
    println!();
}
