// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What one guest gets beside another that floods. One thread plays all drivers and the worker, so that only the order in which
//! queues are served counts.

use std::time::{Duration, Instant};

use crate::frames::{FULL, HEADER, LARGE, QUEUE, SMALL, Shape};
use crate::lan::{Lan, Server};
use crate::measure::Plan;
use crate::two_sides::median;

/// Frames that a sender who does not flood keeps under way: as many as one turn of a queue takes.
const MODEST: usize = 32;
/// Turns of queues at most between two looks of the drivers at theirs.
const TURNS: usize = 4;

#[derive(Clone, Copy)]
struct Sender {
    to: usize,
    /// Frames that it keeps under way.
    most: usize,
    shape: Shape,
}

/// Senders at the first ports, receivers behind them.
struct Scene {
    lan: Lan,
    senders: Vec<Sender>,
}

impl Scene {
    fn new(senders: &[Sender]) -> Self {
        let last = senders.iter().map(|sender| sender.to).max().unwrap_or(0);
        let mut shapes = vec![FULL; last + 1];
        for (from, sender) in senders.iter().enumerate() {
            shapes[from] = sender.shape;
            // Room for what comes.
            shapes[sender.to] = sender.shape;
        }
        let mut lan = Lan::with(Server::here(), &shapes);
        for (from, sender) in senders.iter().enumerate() {
            lan.aim(from, sender.to);
        }
        Self {
            lan,
            senders: senders.to_vec(),
        }
    }

    /// Frames of each sender that came to somebody, of those that `sends` may send; a receiver takes at most `takes` at a time.
    fn run(&mut self, sends: impl Fn(usize) -> bool, takes: usize, time: Duration) -> Vec<u64> {
        let Self { lan, senders } = self;
        let mut counts = vec![0; senders.len()];
        let start = Instant::now();
        let mut random = 1u64;
        while start.elapsed() < time {
            for (from, sender) in senders.iter().enumerate() {
                let station = &mut lan.stations[from];
                station.reap();
                while sends(from) && station.in_flight() < sender.most && station.send() {}
                lan.flush(from);
            }
            // Nobody's queue runs dry meanwhile, and nobody is always the first after a receiver has taken something.
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            let most = TURNS.min(senders.len());
            lan.steps(1 + usize::try_from(random >> 33).expect("31 bits") % most);
            for port in senders.len()..lan.stations.len() {
                let mut first = true;
                lan.stations[port].take(takes, |piece| {
                    let mut low = [0];
                    piece.read(HEADER + 11, &mut low);
                    // Of a frame in several buffers the first says it.
                    if let Some(count) = counts.get_mut(usize::from(low[0])) {
                        *count += u64::from(first || piece.len() > HEADER);
                    }
                    first = false;
                });
                lan.flush(port);
            }
        }
        // What is under way comes before the next run.
        lan.serve();
        for port in senders.len()..lan.stations.len() {
            while lan.stations[port].take(QUEUE, |_| {}) > 0 {}
            lan.flush(port);
        }
        counts
    }
}

/// The share of the first sender that does not flood in what is fair: all senders' frames by their number.
fn share_of_frames(plan: &Plan, senders: &[Sender], takes: usize) -> f64 {
    let mut scene = Scene::new(senders);
    let all = |_| true;
    scene.run(all, takes, plan.time);
    let shares = (0..plan.enough).map(|_| {
        let counts = scene.run(all, takes, plan.time);
        let sum: u64 = counts.iter().sum();
        let fair = sum as f64 / counts.len() as f64;
        counts[1] as f64 / fair
    });
    median(shares.collect())
}

/// The same where frames differ, by the time of the worker: half of what the second sender gets when it is alone.
fn share_of_time(plan: &Plan, senders: &[Sender; 2]) -> f64 {
    let mut scene = Scene::new(senders);
    let shares = (0..plan.enough).map(|_| {
        let alone = scene.run(|from| from == 1, QUEUE, plan.time)[1];
        let beside = scene.run(|_| true, QUEUE, plan.time)[1];
        let again = scene.run(|from| from == 1, QUEUE, plan.time)[1];
        beside as f64 / (f64::midpoint(alone as f64, again as f64) / 2.0)
    });
    median(shares.collect())
}

pub(crate) fn print(plan: &Plan) {
    println!(
        "| one guest beside one that floods | its throughput ÷ fair share | target (floor to pass) |"
    );
    println!("|---|---|---|");
    let target = "≥ 0.97 (0.7)";
    let sender = |to, most, shape| Sender { to, most, shape };
    let sixteen: Vec<Sender> = (0..16)
        .map(|from| sender(16 + from, if from == 0 { QUEUE } else { MODEST }, SMALL))
        .collect();
    println!(
        "| 16 senders of 64 B to 16 receivers, one floods | {:.2} | {target} |",
        share_of_frames(plan, &sixteen, QUEUE)
    );
    let two = [sender(2, QUEUE, FULL), sender(3, MODEST, FULL)];
    println!(
        "| two senders of 1514 B to two receivers, one floods | {:.2} | {target} |",
        share_of_frames(plan, &two, QUEUE)
    );
    let one = [sender(2, QUEUE, FULL), sender(2, MODEST, FULL)];
    println!(
        "| two senders of 1514 B to one receiver that takes all | {:.2} | {target} |",
        share_of_frames(plan, &one, QUEUE)
    );
    println!(
        "| two senders of 1514 B to one receiver that takes one of four | {:.2} | {target} |",
        share_of_frames(plan, &one, 16)
    );
    for shape in [SMALL, FULL] {
        let mixed = [sender(2, QUEUE, LARGE), sender(3, QUEUE, shape)];
        println!(
            "| {} beside a flood of 64 KiB, by the worker's time | {:.2} | {target} |",
            shape.name,
            share_of_time(plan, &mixed)
        );
    }
    println!();
}
