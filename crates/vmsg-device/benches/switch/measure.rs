// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Floor, subject, floor; medians; which CPU; how far they are from each other.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Longer there and back than this and the two CPUs are far from each other.
const FAR_NS: f64 = 250.0;
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

/// Where the two sides run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) name: &'static str,
    pub(crate) here: usize,
    pub(crate) there: usize,
}

impl Places {
    /// Two CPUs if there are as many, and one.
    pub(crate) fn find() -> (Option<Self>, Self) {
        let cpus = sched_getaffinity(None).expect("CPUs");
        let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu));
        let here = usable.next().expect("this thread runs somewhere");
        let two = usable.next().map(|there| Self {
            name: "two CPUs",
            here,
            there,
        });
        let one = Self {
            name: "one CPU",
            here,
            there: here,
        };
        (two, one)
    }

    pub(crate) fn are_two(&self) -> bool {
        self.here != self.there
    }
}

/// From now on this thread, and those it starts, run on this CPU only.
pub(crate) fn run_on(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus).expect("a CPU that this process may use");
}

/// Runs `one` here and `other` on a thread there; returns what `one` does.
pub(crate) fn beside<R>(
    places: &Places,
    other: impl FnOnce() + Send,
    one: impl FnOnce() -> R,
) -> R {
    let ready = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            run_on(places.there);
            ready.store(true, Ordering::Release);
            other();
        });
        while !ready.load(Ordering::Acquire) {
            thread::yield_now();
        }
        one()
    })
}

/// Nanoseconds for each of `count` things that `work` does.
pub(crate) fn time(count: u32, mut work: impl FnMut(u32)) -> f64 {
    let start = Instant::now();
    for number in 1..=count {
        work(number);
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
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

#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU32);

/// A number, there and back, each way in a cache line of its own.
pub(crate) fn line_round_trip(places: &Places) -> f64 {
    const ROUNDS: u32 = 5000;
    let (there, back) = (Line::default(), Line::default());
    let other = || {
        for round in 1..=ROUNDS {
            while there.0.load(Ordering::Acquire) != round {
                spin_loop();
            }
            back.0.store(round, Ordering::Release);
        }
    };
    beside(places, other, || {
        time(ROUNDS, |round| {
            there.0.store(round, Ordering::Release);
            while back.0.load(Ordering::Acquire) != round {
                spin_loop();
            }
        })
    })
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn moved(one: f64, two: f64) -> bool {
    one.max(two) > one.min(two) * 1.3
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
        true => line_round_trip(places),
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
