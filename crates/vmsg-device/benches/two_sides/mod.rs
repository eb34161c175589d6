// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two sides on CPUs of their own: where they run, how far these are from each other, and what it takes to wake somebody there.

use std::hint::spin_loop;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Longer there and back than this and the two CPUs are far from each other.
pub(crate) const FAR_NS: f64 = 250.0;

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

#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU32);

/// A number, there and back, each way in a cache line of its own.
pub(crate) fn line_round_trip(places: &Places, rounds: u32) -> f64 {
    let (there, back) = (Line::default(), Line::default());
    let other = || {
        for round in 1..=rounds {
            while there.0.load(Ordering::Acquire) != round {
                spin_loop();
            }
            back.0.store(round, Ordering::Release);
        }
    };
    beside(places, other, || {
        time(rounds, |round| {
            there.0.store(round, Ordering::Release);
            while back.0.load(Ordering::Acquire) != round {
                spin_loop();
            }
        })
    })
}

/// An eventfd there and another back, both sides asleep in read(2): the least that it takes to wake somebody and to be woken.
pub(crate) fn eventfd_round_trip(places: &Places, rounds: u32) -> f64 {
    fn ring(fd: &OwnedFd) {
        rustix::io::write(fd, &1u64.to_ne_bytes()).expect("an eventfd");
    }
    fn wait(fd: &OwnedFd) {
        rustix::io::read(fd, &mut [0; 8]).expect("an eventfd");
    }
    let bell = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let (there, back) = (bell(), bell());
    let other = || {
        for _ in 0..rounds {
            wait(&there);
            ring(&back);
        }
    };
    beside(places, other, || {
        time(rounds, |_| {
            ring(&there);
            wait(&back);
        })
    })
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Whether two measurements of the same are too far from each other to count.
pub(crate) fn moved(one: f64, two: f64) -> bool {
    one.max(two) > one.min(two) * 1.3
}
