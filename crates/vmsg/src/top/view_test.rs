// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::super::rates::DaemonRates;
use super::*;

pub(in super::super) fn port(name: &str, bits: f64, drops: f64) -> PortRates {
    let rate = Rate {
        frames: bits / 1000.0,
        bits,
    };
    PortRates {
        switch: "s0".to_owned(),
        port: name.to_owned(),
        link: "up".to_owned(),
        driver: None,
        input: Some(rate),
        output: Some(Rate::default()),
        drops: Some(drops),
        reason: None,
    }
}

pub(in super::super) fn rates() -> Rates {
    Rates {
        seconds: Some(1.0),
        ports: vec![
            port("b", 5e9, 0.0),
            port("a", 10.0, 3.0),
            port("\u{1b}[2J\u{202e}c\n", 7e3, 1.0),
        ],
        devices: Vec::new(),
    }
}

fn order(view: View) -> Vec<String> {
    let lines = view.lines(&rates(), None);
    let rows = lines[1..4].iter();
    rows.map(|line| {
        line.text
            .split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    })
    .collect()
}

#[test]
fn rows_are_sorted_by_what_was_chosen() {
    let view = |sort, reversed| View {
        sort,
        reversed,
        queues: false,
    };
    let hostile = r"\u{1b}[2J\u{202e}c\u{a}";
    assert_eq!(order(view(Sort::Order, false)), ["b", "a", hostile]);
    assert_eq!(order(view(Sort::Name, false))[2], "b");
    assert_eq!(order(view(Sort::BitsIn, false)), ["b", hostile, "a"]);
    assert_eq!(order(view(Sort::BitsIn, true)), ["a", hostile, "b"]);
    assert_eq!(order(view(Sort::Drops, false)), ["a", hostile, "b"]);
    let mut sort = Sort::Order;
    for _ in 0..SORTS.len() {
        sort = sort.step(1);
    }
    assert_eq!(sort, Sort::Order);
    assert_eq!(sort.step(-1), Sort::Drops);
}

#[test]
fn no_name_gets_through_to_a_terminal() {
    for line in View::default().lines(&rates(), None) {
        assert!(!line.text.contains(char::is_control), "{:?}", line.text);
    }
}

#[test]
fn numbers_are_short() {
    for (number, text) in [
        (0.0, "0"),
        (0.5, "0.5"),
        (12.34, "12.3"),
        (99.97, "100"),
        (999.4, "999"),
        (999.9, "1.0K"),
        (1_234_567.0, "1.2M"),
        (123_456_789.0, "123M"),
        (9.87e11, "987G"),
        (9.87e17, "987P"),
    ] {
        assert_eq!(short(Some(number)), text);
    }
    assert_eq!(short(None), "-");
}

pub(in super::super) fn disk(daemon: Option<DaemonRates>) -> DeviceRates {
    DeviceRates {
        bus: "b0".to_owned(),
        id: "disk".to_owned(),
        kind: "blk".to_owned(),
        link: None,
        driver: Some("vmsg-proxy (12345)".to_owned()),
        pairs: 0,
        to_guest: daemon.is_none().then(Rate::default),
        from_guest: daemon.is_none().then(Rate::default),
        drops: daemon.is_none().then_some(0.0),
        queues: Vec::new(),
        state: "running".to_owned(),
        daemon,
    }
}

pub(in super::super) const DAEMON: DaemonRates = DaemonRates {
    connected: true,
    connections: 3,
    faults: 1,
    queues: 2,
    direct_kicks: 1,
    kicks: Some(20.0),
    direct_calls: 2,
    calls: Some(0.0),
};

fn words(view: View, rates: &Rates, columns: Option<usize>) -> Vec<String> {
    let lines = view.lines(rates, columns);
    let words = |line: &Line| line.text.split_whitespace().collect::<Vec<_>>().join(" ");
    lines.iter().map(words).collect()
}

#[test]
fn what_goes_past_the_server_is_not_shown_as_nothing() {
    let devices = vec![disk(Some(DAEMON)), disk(None)];
    let mut rates = Rates {
        devices,
        ..Rates::default()
    };
    let lines = words(View::default(), &rates, None);
    let past = "b0 disk blk - - vmsg-proxy (12345) direct direct direct direct direct running";
    assert_eq!(lines[1], past);
    assert_eq!(lines[2], past.replace("direct", "0"));
    assert_eq!(
        lines[4],
        "BUS DEVICE DAEMON CAME FAULTS QUEUES KICKS/s CALLS/s"
    );
    assert_eq!(lines[5], "b0 disk there 3 1 2 20.0 direct");
    assert_eq!(lines.len(), 6, "{lines:?}");
    // Without queues there is nothing that could go anywhere.
    let gone = DaemonRates {
        connected: false,
        queues: 0,
        ..DAEMON
    };
    rates.devices = vec![disk(Some(gone))];
    assert_eq!(
        words(View::default(), &rates, None)[4],
        "b0 disk gone 3 1 0 - -"
    );
    rates.devices = vec![disk(None)];
    assert_eq!(words(View::default(), &rates, None).len(), 2);
}

#[test]
fn a_narrow_screen_has_the_columns_that_are_wanted_most() {
    let mut rates = rates();
    rates.ports.truncate(2);
    rates.devices = vec![disk(Some(DAEMON)), disk(None)];
    let narrow = words(View::default(), &rates, Some(40));
    let heads: Vec<&String> = narrow
        .iter()
        .filter(|line| line.contains("PORT") || line.contains("DEVICE"))
        .collect();
    assert_eq!(
        heads,
        [
            "PORT IN bit/s OUT bit/s DROPS/s",
            "DEVICE FROM bit/s TO bit/s DROPS/s",
            "DEVICE DAEMON QUEUES KICKS/s CALLS/s",
        ]
    );
    let view = View {
        queues: true,
        ..View::default()
    };
    for line in view.lines(&rates, Some(40)) {
        assert!(line.text.chars().count() <= 40, "{}", line.text);
    }
    // All of it where there is room, as in a pipe.
    let wide = words(View::default(), &rates, Some(400));
    assert_eq!(wide, words(View::default(), &rates, None));
}
