// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two processes that are connected and have nothing to say.

use crate::other::Other;
use crate::{Site, file};
use rustix::thread::CpuSet;
use std::fs;
use std::time::Duration;

/// How often a process went to sleep, and how long its threads ran.
fn used(pid: u32) -> (u64, Duration) {
    let (mut slept, mut ran) = (0, 0);
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    for task in tasks {
        let path = task.expect("a thread").path();
        let read = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
        let status = read("status");
        let switches = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        slept += switches
            .and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or(0);
        let schedstat = read("schedstat");
        let first = schedstat.split(' ').next();
        ran += first.and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    (slept, Duration::from_nanos(ran))
}

/// Measures for so many seconds.
pub(crate) fn table(site: &Site, cpus: &CpuSet, seconds: u32) {
    println!(
        "| connected and idle for {seconds} s | driver wakes | and runs | device host wakes | and runs |\n|---|---|---|---|---|"
    );
    let memory = site.path("memory");
    file(&memory, 1 << 20);
    let buses = [
        ("unix", site.unix("idle")),
        ("ivshmem amp, server", site.ivshmem("amp", 0x8_0000)),
        ("ivshmem spsc, server", site.ivshmem("spsc", 0x9_0000)),
        (
            "ivshmem amp, file without doorbells",
            format!("ivshmem,file={}", memory.display()),
        ),
    ];
    let pairs = buses.map(|(name, bus)| {
        let host = Other::start(cpus, cpus, &["host", &bus]);
        // It must be there first: a driver on unix does not wait.
        drop(crate::connect_to(&bus));
        (name, host, Other::start(cpus, cpus, &["driver", &bus]))
    });
    // Until all are connected and at rest.
    std::thread::sleep(Duration::from_secs(u64::from(seconds.min(3))));
    let look = || {
        pairs
            .each_ref()
            .map(|(_, host, driver)| [used(driver.pid()), used(host.pid())])
    };
    let before = look();
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = look();
    for ((name, _, _), (before, after)) in pairs.iter().zip(before.iter().zip(after)) {
        let mut row = format!("| {name} |");
        for (before, after) in before.iter().zip(after) {
            let wakes = after.0.saturating_sub(before.0);
            let ran = after.1.saturating_sub(before.1);
            row += &format!(
                " {:.1} /s | {:.0} µs/s |",
                f64::from(u32::try_from(wakes).unwrap_or(u32::MAX)) / f64::from(seconds),
                ran.as_secs_f64() * 1e6 / f64::from(seconds)
            );
        }
        println!("{row}");
    }
}
