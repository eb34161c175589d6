// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What it costs that a guest shares no memory: the same driver, front and device with the guest's memory in what both sides have in
//! common (`memory=segment`), with copies there (`memory=bounce`), and the same over a Unix socket (memory lent, `isolate=on`); beside
//! it the copying alone.
//!
//! Device host, proxy and VMM are threads of one process. Prints Markdown tables; only ratios within one run mean anything.
//!
//! `cargo bench -p vmsg-proxy --bench bounce`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

#[path = "../vfio_user/device.rs"]
mod device;
#[path = "../vfio_user/guest.rs"]
#[allow(dead_code, reason = "shared with others, who use the rest")]
mod guest;
#[path = "../vfio_user/measure.rs"]
#[allow(dead_code, reason = "shared with others, who use the rest")]
mod measure;
mod stage;
#[path = "../vfio_user/vhost_client.rs"]
mod vhost_client;

use guest::{Driver, Load};
use measure::{Case, Places, Plan, compare, head, run_on};
use rustix::thread::{CpuSet, sched_getaffinity};
use stage::{Kind, Stage, Way};
use std::time::Instant;

/// What is done.
struct Traffic {
    name: &'static str,
    kind: Kind,
    queue: usize,
    load: Load,
}

/// Buffers of as many requests as are under way, without anybody else.
struct Copies {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Copies {
    fn new(load: Load) -> Self {
        let bytes = (load.readable + load.writable) as usize * usize::from(load.depth);
        Self {
            from: vec![1; bytes],
            // Not 0: all of it is to be there.
            to: vec![2; bytes],
        }
    }

    /// Copies the bytes of so many requests once; gives nanoseconds for each.
    fn run(&mut self, count: u32, load: Load) -> f64 {
        let bytes = (load.readable + load.writable) as usize;
        let start = Instant::now();
        for number in 0..count as usize {
            let at = number % usize::from(load.depth) * bytes;
            self.to[at..at + bytes].copy_from_slice(&self.from[at..at + bytes]);
            std::hint::black_box(&mut self.to);
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
    }
}

fn measure(plan: Plan, places: &Places, traffic: &Traffic) {
    let Traffic {
        name,
        kind,
        queue,
        load,
    } = traffic;
    run_on(&places.there);
    let stage = Stage::new(*kind);
    run_on(&places.here);
    let mut drivers = Way::ALL.map(|way| stage.drive(way, *queue));
    let mut copies = Copies::new(*load);
    let bytes = load.readable + load.writable;
    // As long as a small one takes.
    let count = match load.depth {
        1 => plan.round_trips,
        _ => (plan.requests / (1 + bytes / 4096)).max(1),
    };
    let run = |driver: &mut Driver<'static>| {
        let start = Instant::now();
        driver.stream(count, *load);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
    };
    let mut cases: Vec<Case<'_>> = Way::ALL
        .iter()
        .zip(&mut drivers)
        .map(|(way, (_, driver))| {
            Case::stream(&format!("{name}: {}", way.name()), bytes, move || {
                run(driver)
            })
        })
        .collect();
    cases.push(Case::stream(
        &format!("{name}: its bytes copied once, and nothing else"),
        bytes,
        || copies.run(count, *load),
    ));
    compare(plan, places.name, cases);
}

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let plan = if test {
        Plan {
            round_trips: 10,
            requests: 100,
            enough: 1,
        }
    } else {
        Plan {
            round_trips: 500,
            requests: 20_000,
            enough: 15,
        }
    };
    let cpus: CpuSet = sched_getaffinity(None).expect("CPUs");
    let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu));
    let first = usable.next().expect("this thread runs somewhere");
    let mut places = vec![Places::new("one CPU", first, first)];
    if let Some(second) = usable.next() {
        places.insert(0, Places::new("two CPUs", first, second));
    }
    // The header of network frames is 12 bytes.
    let frame = u32::try_from(12 + device::FRAME).expect("short");
    let traffic = |name, kind, queue, readable, writable, depth| Traffic {
        name,
        kind,
        queue,
        load: Load {
            readable,
            writable,
            depth,
        },
    };
    let all = [
        traffic(
            "16 bytes there, 16 back, one at a time",
            Kind::Block,
            0,
            16,
            16,
            1,
        ),
        traffic(
            "16 bytes there, 16 back, 32 at a time",
            Kind::Block,
            0,
            16,
            16,
            32,
        ),
        traffic(
            "frames of 1514 bytes from the guest, 128 at a time",
            Kind::Net,
            1,
            frame,
            0,
            128,
        ),
        traffic(
            "frames of 1514 bytes to the guest, 128 at a time",
            Kind::Net,
            0,
            0,
            frame,
            128,
        ),
        traffic(
            "64 KiB to the device, 16 at a time",
            Kind::Block,
            0,
            0x1_0000,
            16,
            16,
        ),
        traffic(
            "64 KiB from the device, 16 at a time",
            Kind::Block,
            0,
            16,
            0x1_0000,
            16,
        ),
    ];
    head("the guest's memory shared or copied");
    for places in &places {
        for traffic in &all {
            measure(plan, places, traffic);
        }
    }
}
