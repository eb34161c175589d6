// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Answers for people.

use std::collections::BTreeMap;

use super::protocol::{Count, Device, MacEntry, Part, Port, Switch};
use super::table::Table;

/// A table of the processes of `vmsg up`.
pub(super) fn parts(parts: &[Part]) -> Table {
    let mut table = Table::new(&[
        "PART", "TYPE", "STATE", "PID", "RESTARTS", "UPTIME", "LAST END",
    ]);
    for part in parts {
        let dash = || "-".to_owned();
        table.row([
            part.name.clone(),
            part.kind.clone(),
            part.state.clone(),
            part.pid.map_or_else(dash, |pid| pid.to_string()),
            part.restarts.to_string(),
            part.uptime_ms
                .map_or_else(dash, |ms| format!("{}.{} s", ms / 1000, ms % 1000 / 100)),
            part.note.clone().unwrap_or_else(dash),
        ]);
    }
    table
}

/// A table of the devices.
pub(super) fn devices(devices: &[Device]) -> Table {
    let mut table = Table::new(&[
        "BUS",
        "ID",
        "NUMBER",
        "TYPE",
        "LINK",
        "PAIRS",
        "TO GUEST",
        "FROM GUEST",
        "DROPPED",
        "DRIVEN BY",
        "STATE",
    ]);
    for device in devices {
        table.row(device_row(device));
    }
    table
}

fn device_row(device: &Device) -> [String; 11] {
    let link = match device.link {
        None => "-",
        Some(link) if !link.up => "down",
        Some(link) if !link.carrier => "no carrier",
        Some(_) => "up",
    };
    let dash = || "-".to_owned();
    let traffic = traffic(device);
    let none = || past_here(device).to_owned();
    let frames = |count: Option<Count>| count.map_or_else(none, |count| count.frames.to_string());
    let holder = match &device.holder {
        Some(holder) => match holder.pid {
            Some(pid) => format!("{} (pid {pid})", holder.name),
            None => holder.name.clone(),
        },
        None => "-".to_owned(),
    };
    [
        device.bus.clone(),
        device.id.clone(),
        device.number.to_string(),
        device.kind.clone(),
        link.to_owned(),
        // Only network devices have pairs.
        match device.pairs.len() {
            0 => dash(),
            pairs => pairs.to_string(),
        },
        frames(traffic.map(|(to, _)| to)),
        frames(traffic.map(|(_, from)| from)),
        traffic.map_or_else(none, |_| dropped(device).to_string()),
        holder,
        match device.state.as_str() {
            "" => dash(),
            state => state.to_owned(),
        },
    ]
}

/// What a disk has counted, if it is one of ours.
const DISK: &str = "reads";

/// Whether the data of a device goes between its driver and a daemon, and nothing of it through the serving process.
pub(crate) fn is_bridged(device: &Device) -> bool {
    device.counters.contains_key("daemon-connected")
}

/// What stands where a device's traffic is not known: that it has none that could be counted, or that it goes past who counts.
fn past_here(device: &Device) -> &'static str {
    if is_bridged(device) { "direct" } else { "-" }
}

/// What goes to a device's guest, and what comes from it: frames; of a disk what is read and what is written. Nothing of other
/// devices.
pub(crate) fn traffic(device: &Device) -> Option<(Count, Count)> {
    let (maps, names) = match device.pairs.as_slice() {
        [] if device.kind == "blk" && device.counters.contains_key(DISK) => (
            std::slice::from_ref(&device.counters),
            [("reads", "read_bytes"), ("writes", "write_bytes")],
        ),
        [] => return None,
        pairs => (
            pairs,
            [("rx_frames", "rx_bytes"), ("tx_frames", "tx_bytes")],
        ),
    };
    let sum = |name: &str| {
        let counts = maps.iter().filter_map(|map| map.get(name));
        counts.fold(0, |sum: u64, count| sum.saturating_add(*count))
    };
    let [to, from] = names.map(|(frames, bytes)| Count {
        frames: sum(frames),
        bytes: sum(bytes),
    });
    Some((to, from))
}

/// Frames of either direction that went nowhere, or requests of a disk that failed.
pub(crate) fn dropped(device: &Device) -> u64 {
    let maps = device.pairs.iter().chain([&device.counters]);
    dropped_of(maps.flatten())
}

/// The same of some counters of a device.
pub(crate) fn dropped_of<'a>(counters: impl Iterator<Item = (&'a String, &'a u64)>) -> u64 {
    counters
        .filter(|(name, _)| {
            matches!(
                name.as_str(),
                "rx_too_big"
                    | "rx_over_mtu"
                    | "rx_link_down"
                    | "rx_no_queue"
                    | "tx_malformed"
                    | "tx_link_down"
                    | "errors"
            )
        })
        .fold(0, |sum, (_, count)| sum.saturating_add(*count))
}

/// A table of the ports of all switches.
pub(super) fn ports(switches: &[Switch]) -> Table {
    let mut table = Table::new(&[
        "SWITCH",
        "PORT",
        "LINK",
        "VLAN",
        "MACS",
        "SENT",
        "GOT",
        "ITS DROPPED",
        "OTHERS' DROPPED",
        "FOR",
        "LIMITS",
    ]);
    for switch in switches {
        for port in &switch.ports {
            table.row([
                switch.id.clone(),
                port.id.clone(),
                port_state(port).to_owned(),
                port.vlan.clone(),
                port.macs.to_string(),
                port.input.total().frames.to_string(),
                port.output.total().frames.to_string(),
                total(port.dropped_in.values()).to_string(),
                total(port.dropped_out.values()).to_string(),
                reasons(port),
                limits(port),
            ]);
        }
    }
    table
}

/// Whether frames can pass.
pub(crate) fn port_state(port: &Port) -> &'static str {
    match (port.link, port.running, port.uplink) {
        (false, ..) => "down",
        (true, true, _) => "up",
        (true, false, true) => "no carrier",
        (true, false, false) => "no driver",
    }
}

fn total<'a>(counts: impl Iterator<Item = &'a u64>) -> u64 {
    counts.fold(0, |sum: u64, count| sum.saturating_add(*count))
}

/// The reasons for which frames were dropped since the beginning, the most frequent first. Each with its number, as an old reason that
/// is over must not hide a new one.
fn reasons(port: &Port) -> String {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (reason, frames) in port.dropped_in.iter().chain(&port.dropped_out) {
        let sum = sums.entry(reason).or_default();
        *sum = sum.saturating_add(*frames);
    }
    let mut sums: Vec<(&str, u64)> = sums.into_iter().filter(|(_, sum)| *sum > 0).collect();
    sums.sort_by_key(|(_, sum)| std::cmp::Reverse(*sum));
    match sums.len() {
        0 => "-".to_owned(),
        count => {
            let first = sums.iter().take(REASONS);
            let mut texts: Vec<String> = first.map(|(name, sum)| format!("{name} {sum}")).collect();
            if count > REASONS {
                texts.push("…".to_owned());
            }
            texts.join(", ")
        }
    }
}

/// Reasons that are shown of a port.
const REASONS: usize = 4;

/// What a port may not do, as `port set` has it.
fn limits(port: &Port) -> String {
    let mut limits = Vec::new();
    limits.extend(port.rate_in.map(|rate| format!("rate-in={}", bits(rate))));
    limits.extend(port.rate_out.map(|rate| format!("rate-out={}", bits(rate))));
    limits.extend(port.storm.map(|storm| format!("storm={storm}")));
    if !port.pin.is_empty() {
        limits.push("pin".to_owned());
    }
    if port.capture.is_some() {
        limits.push("captured".to_owned());
    }
    if limits.is_empty() {
        "-".to_owned()
    } else {
        limits.join(" ")
    }
}

/// Bits a second as they are written.
fn bits(rate: u64) -> String {
    let rate_of = vmsg_net::switch::Rate::from_bits(rate);
    rate_of.map_or_else(|| rate.to_string(), |rate| rate.to_string())
}

/// A table of the switches.
pub(super) fn switches(switches: &[Switch]) -> Table {
    let mut table = Table::new(&[
        "SWITCH", "WORKER", "PORTS", "MACS", "TABLE", "AGE", "UNKNOWN", "RULES",
    ]);
    for switch in switches {
        table.row([
            switch.id.clone(),
            switch.worker.to_string(),
            switch.ports.len().to_string(),
            switch.macs.to_string(),
            switch.table.to_string(),
            format!("{} s", switch.age),
            switch.unknown.clone(),
            switch.rules.len().to_string(),
        ]);
    }
    table
}

/// A table of the rules.
pub(super) fn rules(switches: &[Switch]) -> Table {
    let mut table = Table::new(&["SWITCH", "RULE"]);
    for switch in switches {
        for rule in &switch.rules {
            table.row([switch.id.clone(), rule.clone()]);
        }
        if !switch.rules.iter().any(|rule| rule.starts_with("allow ")) {
            let text = "- (none allows anything: nobody reaches anybody)";
            table.row([switch.id.clone(), text.to_owned()]);
        }
    }
    table
}

/// A table of addresses.
pub(super) fn macs(entries: &[MacEntry]) -> Table {
    let mut table = Table::new(&["SWITCH", "VLAN", "MAC", "PORT", "AGE"]);
    for entry in entries {
        table.row([
            entry.switch.clone(),
            match entry.vlan {
                None => "all".to_owned(),
                Some(0) => "-".to_owned(),
                Some(vlan) => vlan.to_string(),
            },
            entry.mac.clone(),
            entry.port.clone(),
            if entry.fixed {
                "fixed".to_owned()
            } else {
                format!("{} s", entry.age)
            },
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_makes_no_sense_is_printed_all_the_same() {
        let counters: BTreeMap<_, _> = ["rx_frames", "rx_too_big", "rx_no_queue"]
            .map(|name| (name.to_owned(), u64::MAX))
            .into();
        let device = Device {
            bus: "b".repeat(70_000),
            id: "\u{1b}[2J\u{202e}".to_owned(),
            number: 0,
            kind: "\n\n".to_owned(),
            worker: 0,
            status: String::new(),
            features: Vec::new(),
            holder: None,
            link: None,
            counters: counters.clone(),
            pairs: vec![counters.clone(), counters.clone()],
            details: BTreeMap::new(),
            state: String::new(),
        };
        let lines = devices(&[device]).lines();
        let text = lines.join("\n");
        assert_eq!(lines.len(), 2, "{text}");
        assert!(text.contains(r"\u{1b}[2J\u{202e}") && text.contains("18446744073709551615"));
        assert!(lines.iter().all(|line| line.len() < 1000));

        let port = Port {
            id: "\u{1b}]0;x\u{7}".to_owned(),
            vlan: "v".repeat(70_000),
            rate_in: Some(u64::MAX),
            dropped_in: counters.clone(),
            dropped_out: counters,
            ..Port::default()
        };
        let switch = Switch {
            id: "\r".to_owned(),
            worker: usize::MAX,
            unknown: "\u{9b}2J".to_owned(),
            age: u64::MAX,
            table: 0,
            macs: 0,
            rules: vec!["allow \u{1b}c".to_owned()],
            ports: vec![port],
        };
        let switches_list = [switch];
        for table in [
            ports(&switches_list),
            switches(&switches_list),
            rules(&switches_list),
        ] {
            let lines = table.lines();
            assert_eq!(lines.len(), 2);
            assert!(!lines.concat().contains(char::is_control), "{lines:?}");
        }
    }

    #[test]
    fn a_disk_s_requests_stand_where_frames_do() {
        let counters = [
            ("reads", 3),
            ("read_bytes", 4096),
            ("writes", 2),
            ("errors", 1),
        ];
        let mut device = Device {
            bus: "b0".to_owned(),
            id: "d".to_owned(),
            number: 1,
            kind: "blk".to_owned(),
            worker: 0,
            status: String::new(),
            features: Vec::new(),
            holder: None,
            link: None,
            counters: counters.map(|(name, n)| (name.to_owned(), n)).into(),
            pairs: Vec::new(),
            details: BTreeMap::new(),
            state: "idle".to_owned(),
        };
        let words = |device: &Device| {
            let table = devices(std::slice::from_ref(device)).lines();
            let words: Vec<_> = table[1].split_whitespace().map(str::to_owned).collect();
            words.join(" ")
        };
        assert_eq!(words(&device), "b0 d 1 blk - - 3 2 1 - idle");
        let (to, from) = traffic(&device).expect("a disk's");
        assert_eq!((to.bytes, from.bytes), (4096, 0));
        device.kind = "rng".to_owned();
        assert_eq!(words(&device), "b0 d 1 rng - - - - - - idle");
        // What a daemon does with the driver's buffers is not seen here, so it is not said to be nothing.
        device.kind = "blk".to_owned();
        device.counters.clear();
        assert_eq!(words(&device), "b0 d 1 blk - - - - - - idle");
        device.counters.insert("daemon-connected".to_owned(), 1);
        assert_eq!(words(&device), "b0 d 1 blk - - direct direct direct - idle");
    }

    #[test]
    fn an_old_reason_does_not_hide_a_new_one() {
        let counts = |of: &[(&str, u64)]| {
            of.iter()
                .map(|(name, n)| ((*name).to_owned(), *n))
                .collect()
        };
        let port = Port {
            dropped_in: counts(&[
                ("acl", 29),
                ("vlan", 0),
                ("link-down", 1),
                ("no-receiver", 5),
            ]),
            dropped_out: counts(&[("link-down", 2)]),
            ..Port::default()
        };
        assert_eq!(reasons(&port), "acl 29, no-receiver 5, link-down 3");
        assert_eq!(reasons(&Port::default()), "-");
    }

    #[test]
    fn a_switch_without_a_rule_that_allows_says_what_that_means() {
        let mut switch = Switch {
            id: "s0".to_owned(),
            worker: 0,
            unknown: "flood".to_owned(),
            age: 300,
            table: 0,
            macs: 0,
            rules: vec!["deny a > b".to_owned()],
            ports: Vec::new(),
        };
        assert!(rules(&[switch.clone()]).lines()[2].contains("nobody reaches anybody"));
        switch.rules.push("allow a > b".to_owned());
        assert_eq!(rules(&[switch]).lines().len(), 3);
    }
}
