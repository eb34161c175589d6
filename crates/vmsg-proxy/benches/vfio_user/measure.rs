// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Things measured one after the other, in one run, and given as ratios.

use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// Round trips, and requests of a stream, in one measurement.
    pub(crate) round_trips: u32,
    pub(crate) requests: u32,
    /// Repetitions that must count.
    pub(crate) enough: usize,
}

/// How long one table may take on a restless machine.
const TABLE: Duration = Duration::from_secs(60);

/// Where threads may run: the VMM here, the rest there.
#[derive(Clone)]
pub(crate) struct Places {
    pub(crate) name: &'static str,
    pub(crate) here: CpuSet,
    pub(crate) there: CpuSet,
}

impl Places {
    pub(crate) fn new(name: &'static str, here: usize, there: usize) -> Self {
        let only = |cpu| {
            let mut set = CpuSet::new();
            set.set(cpu);
            set
        };
        Self {
            name,
            here: only(here),
            there: only(there),
        }
    }

    /// Runs `one` here and `other` on a thread there; gives what `one` does.
    pub(crate) fn beside<R>(&self, other: impl FnOnce() + Send, one: impl FnOnce() -> R) -> R {
        let ready = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                run_on(&self.there);
                ready.store(true, Ordering::Release);
                other();
            });
            while !ready.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            one()
        })
    }
}

/// From now on this thread, and those it starts, run on these CPUs only.
pub(crate) fn run_on(cpus: &CpuSet) {
    sched_setaffinity(None, cpus).expect("CPUs that this process may use");
}

/// Nanoseconds for each of `count` things that `work` does.
pub(crate) fn time(count: u32, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..count {
        work();
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
}

/// Messages of so many bytes there and back over a Unix socket, both sides asleep in recv(2): the least that it takes to ask
/// another thread for something.
pub(crate) fn socket_round_trip(
    places: &Places,
    rounds: u32,
    question: usize,
    answer: usize,
) -> f64 {
    use rustix::net::{RecvFlags, SendFlags, recv, send};
    let pass = |from: &UnixStream, out: &[u8]| {
        let sent = send(from, out, SendFlags::NOSIGNAL).expect("a socket");
        assert_eq!(sent, out.len(), "all of it");
    };
    let take = |from: &UnixStream, len| {
        let mut into = [0; 256];
        let got = recv(from, &mut into[..], RecvFlags::empty()).expect("a socket");
        assert_eq!(got.0, len, "all of it");
    };
    let (near, far) = UnixStream::pair().expect("sockets");
    let other = || {
        for _ in 0..rounds {
            take(&far, question);
            pass(&far, &[0; 256][..answer]);
        }
    };
    places.beside(other, || {
        time(rounds, || {
            pass(&near, &[0; 256][..question]);
            take(&near, answer);
        })
    })
}

/// An eventfd there and another back, both sides asleep in read(2).
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
    places.beside(other, || {
        time(rounds, || {
            ring(&there);
            wait(&back);
        })
    })
}

/// One row: what it is, and a measurement of it in nanoseconds.
pub(crate) struct Case<'a> {
    pub(crate) name: String,
    /// Bytes of payload in one, where it is to be given as a rate.
    pub(crate) bytes: u32,
    pub(crate) measure: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Case<'a> {
    pub(crate) fn new(name: &str, measure: impl FnMut() -> f64 + 'a) -> Self {
        Self::stream(name, 0, measure)
    }

    pub(crate) fn stream(name: &str, bytes: u32, measure: impl FnMut() -> f64 + 'a) -> Self {
        Self {
            name: name.to_owned(),
            bytes,
            measure: Box::new(measure),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn moved(one: f64, two: f64) -> bool {
    one.max(two) > one.min(two) * 1.3
}

/// The head of a table of [`compare`].
pub(crate) fn head(what: &str) {
    println!("| {what} | time | ÷ first | samples |\n|---|---|---|---|");
}

/// Measures the cases in turn, forwards and backwards, and prints a row for each. The first is what the others are divided by; a
/// repetition counts if it did not move by more than 30 % from one end to the other.
pub(crate) fn compare(plan: Plan, place: &str, mut cases: Vec<Case<'_>>) {
    // The first of everything is slower: caches, page faults.
    for case in &mut cases {
        (case.measure)();
    }
    let (mut samples, mut tried) = (Vec::new(), 0);
    let start = Instant::now();
    while samples.len() < plan.enough && start.elapsed() < TABLE {
        tried += 1;
        let forwards: Vec<f64> = cases.iter_mut().map(|case| (case.measure)()).collect();
        let mut backwards: Vec<f64> = cases.iter_mut().rev().map(|c| (c.measure)()).collect();
        backwards.reverse();
        if plan.enough == 1 || !moved(forwards[0], backwards[0]) {
            let both = forwards.iter().zip(backwards);
            samples.push(both.map(|(f, b)| f64::midpoint(*f, b)).collect::<Vec<_>>());
        }
    }
    for (at, case) in cases.iter().enumerate() {
        let name = format!("{}, {place}", case.name);
        if samples.is_empty() {
            println!("| {name} | – | – | 0 of {tried}: the machine is too restless |");
            continue;
        }
        let ns = median(samples.iter().map(|sample| sample[at]).collect());
        let ratio = median(samples.iter().map(|s| s[at] / s[0]).collect());
        let rate = match case.bytes {
            0 => String::new(),
            bytes => format!(
                " ({:.0} k/s, {:.2} Gb/s)",
                1e6 / ns,
                f64::from(bytes) * 8.0 / ns
            ),
        };
        println!(
            "| {name} | {:.2} µs{rate} | {ratio:.2} | {} of {tried} |",
            ns / 1e3,
            samples.len()
        );
    }
}
