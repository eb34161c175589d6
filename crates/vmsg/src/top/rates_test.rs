// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::time::Duration;

use super::*;
use crate::control::{Holder, Link, Traffic};

fn count(frames: u64, bytes: u64) -> Traffic {
    Traffic {
        unicast: Count { frames, bytes },
        ..Traffic::default()
    }
}

fn port(id: &str, input: Traffic, drops: &[(&str, u64)]) -> Port {
    let drops = drops
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count));
    Port {
        id: id.to_owned(),
        link: true,
        running: true,
        input,
        dropped_out: drops.collect(),
        ..Port::default()
    }
}

fn switch(ports: Vec<Port>) -> Switch {
    Switch {
        id: "s0".to_owned(),
        worker: 0,
        unknown: "flood".to_owned(),
        age: 300,
        table: 8192,
        macs: 0,
        rules: Vec::new(),
        ports,
    }
}

fn device(id: &str, received: u64) -> Device {
    let pair = [
        ("rx_frames", received),
        ("rx_bytes", 100 * received),
        ("rx_too_big", received),
    ];
    Device {
        bus: "b0".to_owned(),
        id: id.to_owned(),
        number: 0,
        kind: "net".to_owned(),
        worker: 0,
        status: String::new(),
        features: Vec::new(),
        holder: Some(Holder {
            name: "proxy".to_owned(),
            pid: Some(7),
        }),
        link: Some(Link {
            up: true,
            carrier: true,
        }),
        counters: BTreeMap::new(),
        pairs: vec![pair.map(|(name, count)| (name.to_owned(), count)).into()],
        details: BTreeMap::new(),
        state: String::new(),
    }
}

fn sample(at: Instant, port: Port, received: u64) -> Sample {
    Sample {
        at,
        switches: vec![switch(vec![port])],
        devices: vec![device("net0", received)],
    }
}

#[test]
fn rates_are_differences_by_the_time_between() {
    let begin = Instant::now();
    let before = sample(
        begin,
        port("net0", count(100, 1000), &[("acl", 5), ("storm", 100)]),
        10,
    );
    let two_seconds = begin + Duration::from_secs(2);
    let now = sample(
        two_seconds,
        port(
            "net0",
            count(300, 5000),
            &[("acl", 25), ("storm", 104), ("pin", 2)],
        ),
        30,
    );
    let rates = Rates::between(Some(&before), &now);
    assert_eq!(rates.seconds, Some(2.0));
    let port = &rates.ports[0];
    let input = Rate {
        frames: 100.0,
        bits: 16000.0,
    };
    assert_eq!(port.input, Some(input));
    let none = Rates::between(Some(&now), &now).ports[0].drops;
    assert!(none.is_some_and(f64::is_sign_positive), "{none:?}");
    assert_eq!(port.drops, Some(13.0));
    assert_eq!(
        port.reason.as_deref(),
        Some("acl"),
        "the most since then, not of all"
    );
    assert_eq!(port.driver.as_deref(), Some("proxy (7)"));
    assert_eq!(port.link, "up");
    let device = &rates.devices[0];
    let received = Rate {
        frames: 10.0,
        bits: 8000.0,
    };
    assert_eq!(device.to_guest, Some(received));
    assert_eq!(device.drops, Some(10.0));
    assert_eq!(device.from_guest, Some(Rate::default()));
    let [receive, transmit] = device.queues.as_slice() else {
        panic!("{:?}", device.queues);
    };
    let idle = QueueRates {
        queue: 1,
        kind: QueueKind::Transmit,
        rate: Some(Rate::default()),
        drops: Some(0.0),
    };
    assert_eq!(*transmit, idle);
    let busy = QueueRates {
        queue: 0,
        kind: QueueKind::Receive,
        rate: Some(received),
        drops: Some(10.0),
    };
    assert_eq!(*receive, busy);
}

#[test]
fn one_look_and_one_after_a_restart_are_no_rates_below_zero() {
    let begin = Instant::now();
    let first = sample(begin, port("net0", count(100, 1000), &[]), 10);
    let rates = Rates::between(None, &first);
    assert_eq!((rates.seconds, rates.ports[0].input), (None, None));
    assert_eq!(rates.devices[0].to_guest, None);
    assert_eq!(rates.devices[0].queues[0].rate, None);
    // It was started again, in no time.
    let again = sample(begin, port("net0", count(7, 70), &[]), 0);
    let rates = Rates::between(Some(&first), &again);
    let input = rates.ports[0].input.expect("a rate");
    assert!(input.frames.is_finite() && input.frames >= 0.0);
    // And one that was not there before.
    let other = sample(
        begin + Duration::from_secs(1),
        port("new", count(7, 70), &[]),
        0,
    );
    assert_eq!(Rates::between(Some(&first), &other).ports[0].input, None);
}

#[test]
fn of_a_daemon_s_device_only_what_passes_here_has_a_rate() {
    let begin = Instant::now();
    let disk = |kicks: u64| {
        let counters = [
            ("daemon-connected", 1),
            ("daemon-connections", 3),
            ("daemon-queues", 2),
            ("daemon-queues-calling-directly", 2),
            ("daemon-kicks", kicks),
            ("daemon-calls", 7),
        ];
        Device {
            kind: "blk".to_owned(),
            counters: counters.map(|(name, n)| (name.to_owned(), n)).into(),
            pairs: Vec::new(),
            state: "running".to_owned(),
            ..device("disk", 0)
        }
    };
    let sample = |at, kicks| Sample {
        at,
        switches: Vec::new(),
        devices: vec![disk(kicks)],
    };
    let now = sample(begin + Duration::from_secs(2), 30);
    let rates = Rates::between(Some(&sample(begin, 10)), &now);
    let device = &rates.devices[0];
    assert_eq!((device.to_guest, device.drops), (None, None));
    assert_eq!(device.state, "running");
    let daemon = device.daemon.expect("it is a daemon's");
    assert!(daemon.connected);
    assert_eq!((daemon.connections, daemon.queues), (3, 2));
    assert_eq!((daemon.direct_kicks, daemon.kicks), (0, Some(10.0)));
    assert_eq!((daemon.direct_calls, daemon.calls), (2, Some(0.0)));
    let first = Rates::between(None, &now).devices[0].daemon;
    assert_eq!(first.expect("as before").kicks, None);
}
