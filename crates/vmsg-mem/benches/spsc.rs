// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The message queue against what the machine can do at most.
//!
//! Prints one markdown table row per metric. Only ratios within one run mean
//! anything: each repetition measures floor, subject, floor, and counts only if
//! the floor moved by less than 30 %. The median of at least 15 counts.
//!
//! `cargo bench -p vmsg-mem --bench spsc`
//!
//! Two threads spin at the same time: on a machine that does other things too,
//! run the binary under `chrt -f 1`, or it finds nothing that counts.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmsg_mem::RamSlice;
use vmsg_mem::spsc::{Consumer, Layout, Producer, SLOT_SIZE};

/// Repetitions that must count.
const ENOUGH: usize = 15;
/// Repetitions after which a restless machine is given up.
const TRIES: usize = 400;
/// Round trips, or messages, in one measurement.
const ROUNDS: u32 = 20_000;
const MESSAGES: u32 = 200_000;
/// Slots of the queues.
const CAPACITY: u32 = 256;
const BATCH: u32 = 64;
/// Above this, a cache line's round trip is between far CPUs.
const FAR_NS: f64 = 250.0;

#[repr(align(128))]
struct Line(AtomicU32);

impl Line {
    const fn new() -> Self {
        Self(AtomicU32::new(0))
    }
}

/// Shared memory with queues: aligned to a page like any mapping.
struct Memory(Box<[Page]>);

#[repr(align(4096))]
struct Page([AtomicU64; 512]);

impl Memory {
    fn new() -> Self {
        let bytes = Layout::PLAIN.bytes_for(CAPACITY).expect("fits");
        let page = || Page([const { AtomicU64::new(0) }; 512]);
        Self((0..bytes.div_ceil(4096)).map(|_| page()).collect())
    }

    fn ram(&self) -> RamSlice<'_> {
        let first = self.0[0].0.as_slice();
        let bytes = Layout::PLAIN.bytes_for(CAPACITY).expect("fits");
        // SAFETY: the pages follow each other, hold only atomics, and are borrowed as long as
        // the slice.
        unsafe { RamSlice::from_raw_parts(std::ptr::NonNull::from(first).cast(), bytes) }
    }
}

/// Nanoseconds for each of `count` things that `work` does.
fn time(count: u32, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
}

/// Runs `one` here and `other` on another thread; returns what `one` does.
fn beside<R>(other: impl FnOnce() + Send, one: impl FnOnce() -> R) -> R {
    let ready = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            ready.store(true, Ordering::Release);
            other();
        });
        while !ready.load(Ordering::Acquire) {
            spin_loop();
        }
        one()
    })
}

/// A number, there and back, each way in a cache line of its own.
fn line_round_trip() -> f64 {
    let (there, back) = (Line::new(), Line::new());
    beside(
        || {
            for round in 1..=ROUNDS {
                while there.0.load(Ordering::Acquire) != round {
                    spin_loop();
                }
                back.0.store(round, Ordering::Release);
            }
        },
        || {
            time(ROUNDS, || {
                for round in 1..=ROUNDS {
                    there.0.store(round, Ordering::Release);
                    while back.0.load(Ordering::Acquire) != round {
                        spin_loop();
                    }
                }
            })
        },
    )
}

fn queue<'m>(
    memory: &'m Memory,
    layout: Layout,
) -> (Producer<RamSlice<'m>>, Consumer<RamSlice<'m>>) {
    (
        Producer::new(memory.ram(), layout).expect("a sound layout"),
        Consumer::new(memory.ram(), layout).expect("a sound layout"),
    )
}

fn send(producer: &mut Producer<RamSlice<'_>>, message: &[u8]) {
    while producer.try_push(message).is_err() {
        let _ = producer.publish();
        spin_loop();
    }
}

fn receive(consumer: &mut Consumer<RamSlice<'_>>, message: &mut [u8; SLOT_SIZE]) {
    while !consumer.try_pop(message).expect("a sound queue") {
        spin_loop();
    }
}

/// A message of 64 bytes, there and back.
fn queue_round_trip(layout: Layout) -> f64 {
    let (there, back) = (Memory::new(), Memory::new());
    let (mut ask, mut asked) = queue(&there, layout);
    let (mut answer, mut answered) = queue(&back, layout);
    beside(
        move || {
            let mut message = [0; SLOT_SIZE];
            for _ in 0..ROUNDS {
                receive(&mut asked, &mut message);
                send(&mut answer, &message);
                let _ = answer.publish();
                let _ = asked.release();
            }
        },
        move || {
            let mut message = [0; SLOT_SIZE];
            time(ROUNDS, || {
                for round in 0..ROUNDS {
                    let [number, ..] = round.to_le_bytes();
                    send(&mut ask, &[number; SLOT_SIZE]);
                    let _ = ask.publish();
                    let _ = answered.release();
                    receive(&mut answered, &mut message);
                    assert_eq!(message[SLOT_SIZE - 1], number);
                }
            })
        },
    )
}

/// 64-byte messages one way over slots and two indices, nothing checked,
/// both indices private and stored every 64 messages.
fn raw_one_way() -> f64 {
    let memory = Memory::new();
    let ram = memory.ram();
    let slot = move |index: u32| 128 + (index % CAPACITY) as usize * SLOT_SIZE;
    let word = move |offset| ram.atomic_u32(offset).expect("a word inside");
    beside(
        move || {
            let (mut tail, mut message) = (0u32, [0u8; SLOT_SIZE]);
            while tail < MESSAGES {
                let head = word(0).load(Ordering::Acquire);
                if head == tail {
                    spin_loop();
                }
                while tail != head {
                    ram.read(slot(tail), &mut message);
                    std::hint::black_box(&message);
                    tail += 1;
                    if tail % BATCH == 0 {
                        word(0x40).store(tail, Ordering::Release);
                    }
                }
            }
        },
        move || {
            let mut message = [0u8; SLOT_SIZE];
            let (mut room_to, mut head) = (CAPACITY, 0u32);
            time(MESSAGES, || {
                while head < MESSAGES {
                    while head == room_to {
                        room_to = word(0x40).load(Ordering::Acquire) + CAPACITY;
                        spin_loop();
                    }
                    message[..4].copy_from_slice(&head.to_le_bytes());
                    ram.write(slot(head), &message);
                    head += 1;
                    if head % BATCH == 0 || head == MESSAGES {
                        word(0).store(head, Ordering::Release);
                    }
                }
                while word(0x40).load(Ordering::Acquire) != MESSAGES {
                    spin_loop();
                }
            })
        },
    )
}

/// The same through ours, published every 64 messages.
fn queue_one_way(layout: Layout) -> f64 {
    let memory = Memory::new();
    let (mut producer, mut consumer) = queue(&memory, layout);
    let done = Line::new();
    let done = &done.0;
    beside(
        move || {
            let (mut count, mut message) = (0u32, [0u8; SLOT_SIZE]);
            while count < MESSAGES {
                while consumer.try_pop(&mut message).expect("a sound queue") {
                    std::hint::black_box(&message);
                    count += 1;
                    // Without arm flags, each call gives the slot back at once.
                    if layout.arm_flags || count % BATCH == 0 {
                        let _ = consumer.release();
                    }
                }
                let _ = consumer.release();
                spin_loop();
            }
            done.store(1, Ordering::Release);
        },
        move || {
            let mut message = [0u8; SLOT_SIZE];
            time(MESSAGES, || {
                for count in 1..=MESSAGES {
                    message[..4].copy_from_slice(&count.to_le_bytes());
                    send(&mut producer, &message);
                    if count % BATCH == 0 {
                        let _ = producer.publish_early();
                    }
                }
                let _ = producer.publish();
                while done.load(Ordering::Acquire) == 0 {
                    spin_loop();
                }
            })
        },
    )
}

struct Sample {
    line: f64,
    floor: f64,
    subject: f64,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures and prints one row; `ratio` makes the figure of one sample.
fn row(
    name: &str,
    target: &str,
    floor: impl Fn() -> f64,
    subject: impl Fn() -> f64,
    ratio: impl Fn(&Sample) -> f64,
) {
    let mut samples = Vec::new();
    let mut thrown_away = 0;
    let start = Instant::now();
    while samples.len() < ENOUGH && thrown_away < TRIES && start.elapsed() < Duration::from_secs(20)
    {
        let line = line_round_trip();
        let (before, subject, after) = (floor(), subject(), floor());
        let moved = |one: f64, two: f64| one.max(two) / one.min(two) > 1.3;
        if moved(before, after) || moved(line, line_round_trip()) {
            thrown_away += 1;
            continue;
        }
        let floor = (before + after) / 2.0;
        samples.push(Sample {
            line,
            floor,
            subject,
        });
    }
    if samples.is_empty() {
        println!(
            "| {name} | – | {target} | – | – | 0 of {thrown_away}: the machine is too restless |"
        );
        return;
    }
    let pick = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
    let far = samples.iter().filter(|sample| sample.line > FAR_NS).count();
    println!(
        "| {name} | {:.2} | {target} | {:.1} ns | {:.1} ns | {} of {}, {far} far |",
        pick(&ratio),
        pick(&|sample| sample.subject),
        pick(&|sample| sample.floor),
        samples.len(),
        samples.len() + thrown_away,
    );
}

fn main() {
    println!("| metric | ratio | target | ours | floor | samples |");
    println!("|---|---|---|---|---|---|");
    for (what, layout) in [
        ("plain", Layout::PLAIN),
        ("armed", Layout::armed(SLOT_SIZE)),
    ] {
        row(
            &format!("message round trip ÷ cache line ({what})"),
            "≤ 1.1",
            line_round_trip,
            || queue_round_trip(layout),
            |sample| sample.subject / sample.floor,
        );
        row(
            &format!("message rate ÷ batch-of-64 queue ({what})"),
            "≥ 0.85",
            raw_one_way,
            || queue_one_way(layout),
            |sample| sample.floor / sample.subject,
        );
    }
}
