// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a vfio-user front costs: registers, kick and interrupt, copies for isolation, windows that a vIOMMU makes and takes away.
//!
//! Device host, proxy and VMM are threads of one process. Prints Markdown tables; only ratios within one run mean anything.
//!
//! `cargo bench -p vmsg-proxy --bench vfio_user`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]

mod client;
mod device;
mod guest;
mod measure;
mod stage;
mod vhost_client;

use client::{BAR4, Client, DEVICE, REGION_MESSAGE, STATUS};
use guest::{BASE, BUFFERS, Driver, Load, Ram};
use measure::{
    Case, Places, Plan, compare, eventfd_round_trip, head, run_on, socket_round_trip, time,
};
use rustix::thread::{CpuSet, sched_getaffinity};
use stage::Stage;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// A small request: 16 bytes there, 16 back, one at a time.
const ONE: Load = Load {
    readable: 16,
    writable: 16,
    depth: 1,
};

/// Starts something whose threads run there.
fn there<T>(places: &Places, start: impl FnOnce() -> T) -> T {
    run_on(&places.there);
    let started = start();
    run_on(&places.here);
    started
}

/// A status write that is not a reset: ACKNOWLEDGE, then DRIVER. The reset before is not in the figure.
fn status_writes(client: &Client, count: u32) -> f64 {
    let mut all = Duration::ZERO;
    for _ in 0..count {
        client.write(BAR4, STATUS, 0, 1);
        let start = Instant::now();
        client.write(BAR4, STATUS, 1, 1);
        client.write(BAR4, STATUS, 3, 1);
        all += start.elapsed();
    }
    client.write(BAR4, STATUS, 0, 1);
    all.as_secs_f64() * 1e9 / f64::from(2 * count)
}

fn registers(plan: Plan, places: &Places) {
    let stage = there(places, Stage::new);
    let vfio = there(places, || stage.vfio_block(false));
    let mut bus = stage.bus_client();
    let client = &vfio.client;
    let rounds = plan.round_trips;
    let socket = || socket_round_trip(places, rounds, REGION_MESSAGE, REGION_MESSAGE + 4);
    let status = || time(rounds, || assert_eq!(client.read(BAR4, STATUS, 1), 0));
    let config = || {
        time(rounds, || {
            assert_eq!(client.read(BAR4, DEVICE + 4, 4), 0x0706_0504);
        })
    };
    let cases = vec![
        Case::new("32 bytes there, 36 back over a bare socket", socket),
        Case::new("status read, answered by the proxy", status),
        Case::new(
            "PING of the device host over the bus, without a front",
            || {
                time(rounds, || {
                    bus.ping(1).expect("answered");
                })
            },
        ),
        Case::new("configuration read, from the device", config),
        Case::new("status write, to the device", || {
            status_writes(client, rounds / 2)
        }),
        Case::new("reset, to the device", || {
            time(rounds, || client.write(BAR4, STATUS, 0, 1))
        }),
    ];
    compare(plan, places.name, cases);
}

fn requests(plan: Plan, places: &Places) {
    let stage = there(places, Stage::new);
    let (one, two, three) = (Ram::new(), Ram::new(), Ram::new());
    let vfio = there(places, || stage.vfio_block(false));
    let isolated = there(places, || stage.vfio_block(true));
    let (_vhost, mut by_vhost) = there(places, || stage.vhost_block(&two));
    let (_client, mut by_bus) = stage.bus_block();
    let mut by_vfio = vfio.client.drive(0, &one);
    let mut by_copies = isolated.client.drive(0, &three);
    let rounds = plan.round_trips;
    let measure = |driver: &mut Driver<'_>| {
        let start = Instant::now();
        driver.stream(rounds, ONE);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(rounds)
    };
    let cases = vec![
        Case::new("an eventfd there and another back", || {
            eventfd_round_trip(places, rounds)
        }),
        Case::new("a program on the bus", || measure(&mut by_bus)),
        Case::new("vhost-user", || measure(&mut by_vhost)),
        Case::new("vfio-user", || measure(&mut by_vfio)),
        Case::new("vfio-user, isolate=on", || measure(&mut by_copies)),
    ];
    compare(plan, places.name, cases);
}

fn isolation(plan: Plan, places: &Places) {
    let block = |readable, writable, depth| Load {
        readable,
        writable,
        depth,
    };
    // The header of network frames is 12 bytes.
    let frame = u32::try_from(12 + device::FRAME).expect("short");
    let kinds = [
        (
            "16 bytes there, 16 back, 32 at a time",
            None,
            block(16, 16, 32),
        ),
        (
            "64 KiB from the device, 16 at a time",
            None,
            block(16, 0x1_0000, 16),
        ),
        (
            "64 KiB to the device, 16 at a time",
            None,
            block(0x1_0000, 16, 16),
        ),
        (
            "frames of 1514 bytes from the guest, 128 at a time",
            Some(1),
            block(frame, 0, 128),
        ),
        (
            "frames of 1514 bytes to the guest, 128 at a time",
            Some(0),
            block(0, frame, 128),
        ),
    ];
    for (name, net, load) in kinds {
        let stage = there(places, Stage::new);
        let make = |isolate| match net {
            Some(_) => stage.vfio_net(isolate),
            None => stage.vfio_block(isolate),
        };
        let (one, two) = (Ram::new(), Ram::new());
        let lent = there(places, || make(false));
        let isolated = there(places, || make(true));
        let mut direct = lent.client.drive(net.unwrap_or(0), &one);
        let mut copied = isolated.client.drive(net.unwrap_or(0), &two);
        let bytes = load.readable + load.writable;
        // As long as a small one takes.
        let count = (plan.requests / (1 + bytes / 4096)).max(1);
        let measure = |driver: &mut Driver<'_>| {
            let start = Instant::now();
            driver.stream(count, load);
            start.elapsed().as_secs_f64() * 1e9 / f64::from(count)
        };
        let cases = vec![
            Case::stream(name, bytes, || measure(&mut direct)),
            Case::stream(&format!("{name}, isolate=on"), bytes, || {
                measure(&mut copied)
            }),
        ];
        compare(plan, places.name, cases);
    }
}

/// As a guest behind an IOMMU: the ring is open all the time, a page with the buffers from before a request until after it.
fn mapped_requests(client: &Client, driver: &mut Driver<'_>, ram: &Ram, count: u32) -> f64 {
    // Not twice the same address in a row, as guests do it.
    let mut at = 0;
    time(count, || {
        at = (at + 1) % 64;
        let address = BASE + BUFFERS + at * 0x2_0000;
        driver.buffers = address;
        client.map(address, 0x2_0000, BUFFERS, &ram.file);
        driver.stream(1, ONE);
        client.unmap(address, 0x2_0000);
    })
}

fn translation(plan: Plan, places: &Places) {
    let stage = there(places, Stage::new);
    let rams = [Ram::new(), Ram::new(), Ram::new()];
    let fronts: Vec<_> = [false, false, true]
        .map(|isolate| there(places, || stage.vfio_block(isolate)))
        .into();
    let drivers: Vec<_> = fronts
        .iter()
        .zip(&rams)
        .enumerate()
        .map(|(at, (front, ram))| {
            if at == 0 {
                front
                    .client
                    .map(BASE + BUFFERS, 0x2_0000, BUFFERS, &ram.file);
            }
            front.client.map(BASE, 0x4000, 0, &ram.file);
            RefCell::new(front.client.bring_up(0, ram))
        })
        .collect();
    let rounds = plan.round_trips / 2;
    let map_only = |at: usize| {
        let address = BASE + (16 << 20);
        let client = &fronts[at].client;
        time(rounds, || {
            client.map(address, 0x2_0000, BUFFERS, &rams[at].file);
            client.unmap(address, 0x2_0000);
        })
    };
    let mapped = |at: usize| {
        let driver = &mut drivers[at].borrow_mut();
        mapped_requests(&fronts[at].client, driver, &rams[at], rounds)
    };
    let socket = || 2.0 * socket_round_trip(places, rounds, 48, 16);
    let cases = vec![
        Case::new("a request", || {
            let start = Instant::now();
            drivers[0].borrow_mut().stream(rounds, ONE);
            start.elapsed().as_secs_f64() * 1e9 / f64::from(rounds)
        }),
        Case::new("a request between DMA_MAP and DMA_UNMAP", || mapped(1)),
        Case::new(
            "a request between DMA_MAP and DMA_UNMAP, isolate=on",
            || mapped(2),
        ),
        Case::new("DMA_MAP and DMA_UNMAP", || map_only(1)),
        Case::new("DMA_MAP and DMA_UNMAP, isolate=on", || map_only(2)),
        Case::new(
            "two messages of 48 bytes and answers over a bare socket",
            socket,
        ),
    ];
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
    type Table = fn(Plan, &Places);
    let tables: [(&str, Table); 4] = [
        ("a guest's access to a register", registers),
        (
            "one request of 16 bytes there and 16 back: kick, device, interrupt",
            requests,
        ),
        (
            "many requests, the guest's memory lent or copied",
            isolation,
        ),
        (
            "memory opened for one request, as behind a vIOMMU",
            translation,
        ),
    ];
    for (what, table) in tables {
        head(what);
        for places in &places {
            table(plan, places);
        }
        println!();
    }
}
