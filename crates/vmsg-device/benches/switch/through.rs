// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From driver to driver, all in one thread: the work, without waking anybody.

use std::time::Duration;

use crate::bridge::Bridge;
use crate::floors::{Copies, Datagrams};
use crate::frames::{FULL, LARGE, QUEUE, SINGLE, SMALL, Shape};
use crate::lan::{Lan, Server};
use crate::measure::{Plan, Sampled, sample, span, work, worked};
use crate::two_sides::Places;

/// Of so many rounds the time of the device side and the switch is taken in one, as looking at the clock takes time.
const SELDOM: usize = 64;

/// The device side and the switch alone.
#[derive(Default)]
struct Served {
    rounds: usize,
    time: Duration,
    frames: usize,
}

/// Every station sends a batch to the next one, and everybody takes what came; how many frames that were.
fn round(lan: &mut Lan, shape: &Shape, served: &mut Served) -> usize {
    let ports = lan.stations.len();
    // One way between two; around in a circle otherwise.
    let senders = if ports == 2 { 1 } else { ports };
    for from in 0..senders {
        for _ in 0..shape.batch {
            assert!(lan.stations[from].send(), "room");
        }
        lan.flush(from);
    }
    served.rounds += 1;
    if served.rounds.is_multiple_of(SELDOM) {
        let start = worked();
        lan.serve();
        served.time += worked() - start;
        served.frames += senders * shape.batch;
    } else {
        lan.serve();
    }
    let mut frames = 0;
    for port in 0..ports {
        let station = &mut lan.stations[port];
        station.reap();
        frames += station.take(QUEUE, |_| {});
        lan.flush(port);
    }
    frames
}

pub(crate) fn rate(shape: &Shape, ns: f64) -> String {
    format!(
        "{} · {:.2} M/s · {:.1} Gb/s",
        span(ns),
        1e3 / ns,
        shape.len as f64 * 8.0 / ns
    )
}

/// A row with three floors: copies, perhaps a bridge, datagrams.
pub(crate) fn row(name: &str, shape: &Shape, sampled: Option<Sampled>, bridge: bool, extra: &str) {
    let Some(sampled) = sampled else {
        println!("| {name} | the machine is too restless | | | | | | | |");
        return;
    };
    let floors = &sampled.floors;
    let part = |at: usize| {
        let compared = floors[at];
        (format!("{:.2}", 1.0 / compared.ratio), span(compared.floor))
    };
    let (copy, copy_ns) = part(0);
    let (datagram, datagram_ns) = part(1);
    let (bridge, bridge_ns) = if bridge {
        part(2)
    } else {
        ("–".to_owned(), "–".to_owned())
    };
    println!(
        "| {name} | **{copy}** | **{bridge}** | **{datagram}** | {} {extra}| {copy_ns} | {bridge_ns} | {datagram_ns} | {} |",
        rate(shape, sampled.ours),
        sampled.counted
    );
}

pub(crate) fn head(title: &str) {
    println!(
        "| {title} | ÷ copy limit | ÷ bridge | ÷ datagrams | ours, for each frame | copy | bridge and taps | datagrams | repetitions |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
}

pub(crate) fn print_one(plan: &Plan, places: &Places, bridge: &mut Option<Bridge>) {
    head("driver to driver, one thread");
    for ports in [2, 16] {
        for shape in [SINGLE, SMALL, FULL, LARGE] {
            let mut lan = Lan::new(Server::here(), ports, &shape);
            for port in 0..ports {
                lan.aim(port, (port + 1) % ports);
            }
            let before = lan.dropped();
            let mut served = Served::default();
            let mut copies = Copies::new(&shape);
            let mut datagrams = Datagrams::new(&shape);
            let frame = shape.bytes(0, 1);
            let mut copy = || work(plan, || copies.batch());
            let mut datagram = || work(plan, || datagrams.batch());
            let mut subject = || work(plan, || round(&mut lan, &shape, &mut served));
            let sampled = match bridge.as_mut() {
                Some(bridge) => {
                    bridge.introduce(&shape);
                    let mut across = || work(plan, || bridge.batch(&frame));
                    let floors: &mut [&mut dyn FnMut() -> f64] =
                        &mut [&mut copy, &mut datagram, &mut across];
                    sample(plan, places, floors, &mut subject)
                }
                None => sample(plan, places, &mut [&mut copy, &mut datagram], &mut subject),
            };
            assert_eq!(lan.dropped(), before, "nobody lacks buffers");
            let part = served.time.as_secs_f64() * 1e9 / served.frames.max(1) as f64;
            let name = format!("{}, {ports} ports", shape.name);
            // Beside a single frame, looking at the clock takes too long.
            let extra = match shape.batch {
                1 => String::new(),
                _ => format!("(device side and switch {}) ", span(part)),
            };
            row(&name, &shape, sampled, bridge.is_some(), &extra);
        }
    }
    println!();
}

/// Nothing but the subject, for a profiler.
pub(crate) fn spin(plan: &Plan, ports: usize) {
    for shape in [SINGLE, SMALL, FULL] {
        let mut lan = Lan::new(Server::here(), ports, &shape);
        for port in 0..ports {
            lan.aim(port, (port + 1) % ports);
        }
        let mut served = Served::default();
        let mut best = f64::MAX;
        for _ in 0..100 {
            best = best.min(work(plan, || round(&mut lan, &shape, &mut served)));
        }
        let part = served.time.as_secs_f64() * 1e9 / served.frames.max(1) as f64;
        println!(
            "{} {ports}: best {best:.1} ns, device side and switch {part:.1} ns on average",
            shape.name
        );
    }
}
