// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Floor, subject, floor; medians; which CPU; how far they are from each other.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::two_sides::{FAR_NS, Places, line_round_trip, median, moved};

/// After this long a row is given up.
const ROW: Duration = Duration::from_secs(60);

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// For each part of a repetition.
    pub(crate) time: Duration,
    /// Round trips for each part, where those are measured.
    pub(crate) rounds: u32,
    /// Repetitions that must count.
    pub(crate) enough: usize,
}

/// The processor time that this thread has had.
pub(crate) fn worked() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(now).expect("not negative")
}

/// Nanoseconds of this thread for each frame, of which `work` says how many it has done. What others do on its CPU does not
/// count, but for what they leave of its caches.
pub(crate) fn work(plan: &Plan, mut work: impl FnMut() -> usize) -> f64 {
    let start = worked();
    let mut frames = 0;
    loop {
        for _ in 0..16 {
            frames += work();
        }
        let elapsed = worked() - start;
        if elapsed >= plan.time && frames > 0 {
            return elapsed.as_secs_f64() * 1e9 / frames as f64;
        }
    }
}

/// Nanoseconds for each frame, of which `work` says how many it has done.
pub(crate) fn pace(plan: &Plan, mut work: impl FnMut() -> usize) -> f64 {
    let start = Instant::now();
    let mut frames = 0;
    loop {
        for _ in 0..16 {
            frames += work();
        }
        let elapsed = start.elapsed();
        if elapsed >= plan.time && frames > 0 {
            return elapsed.as_secs_f64() * 1e9 / frames as f64;
        }
    }
}

/// What was measured of one thing.
#[derive(Clone, Debug)]
pub(crate) struct Sampled {
    /// For each floor, first to last.
    pub(crate) floors: Vec<Compared>,
    pub(crate) ours: f64,
    /// How many repetitions of how many counted.
    pub(crate) counted: String,
}

/// The subject beside one floor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared {
    /// Subject ÷ floor.
    pub(crate) ratio: f64,
    pub(crate) floor: f64,
}

/// Measures floors, the subject, and the floors again, until enough repetitions count: the first floor must not have moved,
/// nor, between two CPUs, the line. `None` if the machine does not rest.
pub(crate) fn sample(
    plan: &Plan,
    places: &Places,
    floors: &mut [&mut dyn FnMut() -> f64],
    subject: &mut dyn FnMut() -> f64,
) -> Option<Sampled> {
    let line = || match places.are_two() {
        true => line_round_trip(places, 5000),
        false => 1.0,
    };
    let mut samples = Vec::new();
    let mut far = 0;
    let mut tried = 0;
    let start = Instant::now();
    while samples.len() < plan.enough && start.elapsed() < ROW {
        tried += 1;
        let line_before = line();
        let before: Vec<f64> = floors.iter_mut().map(|floor| floor()).collect();
        let ours = subject();
        let mut after: Vec<f64> = floors.iter_mut().rev().map(|floor| floor()).collect();
        after.reverse();
        if plan.enough > 1 && (moved(before[0], after[0]) || moved(line_before, line())) {
            continue;
        }
        far += usize::from(line_before > FAR_NS);
        let means: Vec<f64> = before
            .iter()
            .zip(&after)
            .map(|(one, two)| f64::midpoint(*one, *two))
            .collect();
        samples.push((means, ours));
    }
    if samples.is_empty() {
        return None;
    }
    let floors = (0..floors.len())
        .map(|at| Compared {
            ratio: median(
                samples
                    .iter()
                    .map(|(means, ours)| ours / means[at])
                    .collect(),
            ),
            floor: median(samples.iter().map(|(means, _)| means[at]).collect()),
        })
        .collect();
    let counted = if places.are_two() {
        format!("{} of {tried}, {far} far", samples.len())
    } else {
        format!("{} of {tried}", samples.len())
    };
    Some(Sampled {
        floors,
        ours: median(samples.into_iter().map(|(_, ours)| ours).collect()),
        counted,
    })
}

/// Nanoseconds, or microseconds if there are many.
pub(crate) fn span(ns: f64) -> String {
    if ns >= 10_000.0 {
        format!("{:.1} µs", ns / 1e3)
    } else {
        format!("{ns:.1} ns")
    }
}
