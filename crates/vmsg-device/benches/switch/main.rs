// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames from driver to driver through the switch, beside bare copies of the same bytes, a bridge of Linux between two tap
//! interfaces, and a pair of Unix datagram sockets.
//!
//! As in the other benchmarks floor, subject and floor are measured in turn, and only ratios mean anything. The bridge needs a
//! network namespace, in which this program starts itself again (root); without one its columns are empty.
//!
//! `cargo bench -p vmsg-device --bench switch`; with `-- --test` everything runs once, for no figures.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "a program")]

mod bridge;
mod fair;
mod floors;
mod frames;
mod lan;
mod live;
mod measure;
mod through;
#[path = "../two_sides/mod.rs"]
mod two_sides;

use std::process::Command;
use std::time::Duration;

use bridge::Bridge;
use measure::Plan;
use two_sides::{Places, run_on};

/// Set where there is a namespace for a bridge.
const ROLE: &str = "VMSG_BENCH_SWITCH";

fn main() {
    let test = std::env::args().any(|arg| arg == "--test");
    let plan = if test {
        Plan {
            time: Duration::from_millis(1),
            rounds: 10,
            enough: 1,
        }
    } else {
        Plan {
            time: Duration::from_millis(20),
            rounds: 1000,
            enough: 15,
        }
    };
    let alone = std::env::var_os(ROLE).is_some();
    if !alone {
        let possible = Command::new("unshare").args(["-n", "true"]).status();
        if possible.is_ok_and(|status| status.success()) {
            let status = Command::new("unshare")
                .arg("-n")
                .arg(std::env::current_exe().expect("this program"))
                .args(std::env::args_os().skip(1))
                .env(ROLE, "1")
                .status();
            let status = status.expect("started");
            assert!(status.success(), "failed in its network namespace");
            return;
        }
    }
    // For work on one of the tables.
    let only = std::env::args().skip_while(|arg| arg != "--only").nth(1);
    let wanted = |table: &str| only.as_deref().is_none_or(|only| only == table);
    let (two, one) = Places::find();
    if only.as_deref() == Some("spin") {
        through::spin(&plan, 2);
        through::spin(&plan, 16);
        return;
    }
    let mut bridge = alone.then(Bridge::new);
    run_on(one.here);
    if wanted("one") {
        through::print_one(&plan, &one, &mut bridge);
    }
    if let Some(two) = &two
        && wanted("two")
    {
        live::print_rates(&plan, two, &mut bridge);
    }
    if wanted("latency") {
        live::print_latencies(&plan, &one, two.as_ref());
    }
    if wanted("fair") {
        fair::print(&plan);
    }
}
