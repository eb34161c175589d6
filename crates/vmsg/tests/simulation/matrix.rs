// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The restart matrix: each side killed at each step of the set-up and under traffic, once and twice, on each kind of bus, with a device that
//! uses its queues in order and one that does not. Each case ends with all requests answered, or with a named reason and a guest that
//! works after a reset; none hangs.
//!
//! Cases are enumerated. In the short run the second killing falls on some of the moments only; from `VMSG_SIM_CASES=300` on it falls on all of
//! them, and for each 10,000 every case is played with other decisions of the device's own.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::guest::Memory;
use crate::line::Bus;
use crate::setting::{Kind, Setting};
use crate::staged::{Ending, When, Who, lengths, play};

/// Turns under traffic at which somebody is killed.
const TRAFFIC: std::ops::Range<usize> = 0..40;

/// When somebody is killed: in the set-up, under traffic, once more at once, once more in the replay.
const MOMENTS: [&str; 4] = ["set-up", "traffic", "twice at once", "again in the replay"];

/// One line of the table.
#[derive(Debug, Default)]
struct Line {
    cases: usize,
    recovered: usize,
    refused: BTreeMap<String, usize>,
}

/// What a case belongs to: bus, device, who keeps the record, who is killed, and when.
type Key = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
);

struct Table {
    lines: BTreeMap<Key, Line>,
    seeds: u64,
    thorough: bool,
    memory: Memory,
}

fn bus_name(setting: Setting) -> &'static str {
    match setting.bus {
        Bus::Unix if setting.iommu => "unix, a window for each request",
        Bus::Unix => "unix",
        Bus::Common => "without descriptors, views of common memory",
        Bus::Bare => "without descriptors",
        Bus::BareR1 => "the same, r1",
    }
}

fn who_name(who: Who) -> &'static str {
    match who {
        Who::Host => "device host",
        Who::Proxy => "proxy",
        Who::Guest => "guest",
    }
}

/// The reason without what follows from it, for any queue.
fn short(full: &str) -> String {
    let reason = full.strip_prefix("the device needs a reset: ");
    let reason = reason.unwrap_or(full);
    let end = reason.find([';', ',']).unwrap_or(reason.len());
    reason[..end]
        .replace("queue 0", "a queue")
        .replace("queue 1", "a queue")
}

impl Table {
    fn case(&mut self, setting: Setting, when: &'static str, plan: &[(When, Who)]) {
        let device = match setting.kind {
            Kind::Echo => "in order",
            Kind::Disk => "out of order",
            Kind::Net => "net",
        };
        let record = match (setting.kind, setting.bus.lends(), setting.keeps_inflight) {
            (Kind::Echo | Kind::Net, ..) | (_, false, _) => "-",
            (_, _, false) => "proxy",
            (_, _, true) => "front end",
        };
        let who = who_name(plan[0].1);
        let key = (bus_name(setting), device, record, who, when);
        for seed in 1..=self.seeds {
            let place = || format!("{setting:?}, seed {seed}: {plan:?}");
            let ending = catch_unwind(AssertUnwindSafe(|| play(seed, setting, plan, &self.memory)));
            let ending = ending.unwrap_or_else(|_| panic!("{} fails", place()));
            let line = self.lines.entry(key).or_default();
            match ending {
                Ending::NotReached => continue,
                Ending::Recovered => line.recovered += 1,
                Ending::Refused(reason) => {
                    *line.refused.entry(short(&reason)).or_default() += 1;
                }
                Ending::Hung(story) => panic!("{} hangs: {story}", place()),
            }
            line.cases += 1;
        }
    }

    fn setting(&mut self, setting: Setting) {
        let lengths = lengths(setting, &self.memory);
        let steps = (0..=lengths.to_host).map(When::ToHost);
        let answers = (0..=lengths.to_driver).map(When::ToDriver);
        let set_up: Vec<When> = steps.chain(answers).collect();
        let every = if self.thorough { 1 } else { 16 };
        let all = [Who::Host, Who::Proxy, Who::Guest];
        for who in all {
            for &at in &set_up {
                self.case(setting, MOMENTS[0], &[(at, who)]);
            }
            for at in TRAFFIC {
                self.case(setting, MOMENTS[1], &[(When::Traffic(at), who)]);
            }
            for at in TRAFFIC.step_by(every) {
                let first = (When::Traffic(at), who);
                for second in all {
                    self.case(setting, MOMENTS[2], &[first, (When::Now, second)]);
                    for &during in set_up.iter().step_by(every) {
                        let plan = [first, (during, second)];
                        self.case(setting, MOMENTS[3], &plan);
                    }
                }
            }
        }
    }

    /// One line for all moments; each column has how many recovered, and of how many if not all did.
    fn print(&self) {
        println!(
            "| bus | device | record kept by | killed | {} | refused |",
            MOMENTS.join(" | ")
        );
        println!("|---|---|---|---|---:|---:|---:|---:|---|");
        type Cells<'a> = (BTreeMap<&'a str, String>, BTreeMap<&'a str, usize>);
        let mut rows: BTreeMap<_, Cells<'_>> = BTreeMap::new();
        for ((bus, device, record, who, when), line) in &self.lines {
            let (cells, refused) = rows.entry((bus, device, record, who)).or_default();
            let cell = if line.cases == line.recovered {
                line.cases.to_string()
            } else {
                format!("{} of {}", line.recovered, line.cases)
            };
            cells.insert(when, cell);
            for (reason, count) in &line.refused {
                *refused.entry(reason).or_default() += count;
            }
        }
        for ((bus, device, record, who), (cells, refused)) in &rows {
            let cells: Vec<&str> = MOMENTS
                .iter()
                .map(|when| cells.get(when).map_or("", |cell| cell))
                .collect();
            let refused: Vec<String> = refused
                .iter()
                .map(|(reason, count)| format!("{count}: {reason}"))
                .collect();
            println!(
                "| {bus} | {device} | {record} | {who} | {} | {} |",
                cells.join(" | "),
                refused.join("; ")
            );
        }
    }
}

#[test]
fn whoever_is_killed_whenever_nothing_is_lost_nothing_is_doubled_nothing_hangs() {
    let begin = Instant::now();
    let seeds = std::env::var("VMSG_SIM_CASES").ok();
    let seeds: Option<u64> = seeds.and_then(|text| text.parse().ok());
    let new = |bus| Table {
        lines: BTreeMap::new(),
        seeds: seeds.map_or(1, |cases| cases.div_ceil(10_000)),
        thorough: seeds.is_some_and(|cases| cases >= 300),
        memory: Memory::of(bus),
    };
    let mut settings = Vec::new();
    for bus in [Bus::Unix, Bus::Common, Bus::Bare, Bus::BareR1] {
        for kind in [Kind::Echo, Kind::Disk, Kind::Net] {
            for keeps_inflight in [false, true] {
                // Where there is nothing to keep it is all the same.
                if keeps_inflight && (kind != Kind::Disk || !bus.lends()) {
                    continue;
                }
                settings.push(Setting {
                    bus,
                    kind,
                    eventfds: bus.lends(),
                    keeps_inflight,
                    iommu: false,
                });
            }
        }
    }
    settings.extend([Kind::Echo, Kind::Disk].map(|kind| Setting {
        bus: Bus::Unix,
        kind,
        eventfds: true,
        keeps_inflight: true,
        iommu: true,
    }));
    let mut table = new(Bus::Unix);
    std::thread::scope(|scope| {
        let play = |setting: Setting| {
            let mut table = new(setting.bus);
            scope.spawn(move || {
                table.setting(setting);
                table.lines
            })
        };
        let threads: Vec<_> = settings.into_iter().map(play).collect();
        for thread in threads {
            let lines = thread.join().expect("the case was named");
            table.lines.extend(lines);
        }
    });
    table.print();
    let sum = |of: fn(&Line) -> usize| table.lines.values().map(of).sum::<usize>();
    let refused = sum(|line| line.refused.values().sum());
    println!(
        "{} cases, {} recovered, {refused} refused with a reason, in {:.1} s",
        sum(|line| line.cases),
        sum(|line| line.recovered),
        begin.elapsed().as_secs_f64()
    );
    for ((bus, device, record, who, when), line) in &table.lines {
        let place = format!("{bus}, {device}, {record}, {who}, {when}: {line:?}");
        assert!(line.cases > 0, "{place}");
        // Without a record that outlives whoever was killed, requests that overtake each other cannot be told apart.
        let known = *device != "out of order" || *record == "front end";
        if known {
            assert!(line.refused.is_empty(), "{place}");
        }
    }
    let alone = |who: &str| {
        let is = |key: &Key| key.2 == "proxy" && key.3 == who && key.4 != MOMENTS[3];
        let lines = table.lines.iter().filter(move |(key, _)| is(key));
        lines.map(|(_, line)| line.refused.len()).sum::<usize>()
    };
    assert!(
        alone("proxy") > 0,
        "a record that dies with the proxy is of no use then"
    );
}
