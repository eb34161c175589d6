// SPDX-License-Identifier: Apache-2.0 OR MIT

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
    let lines = view.lines(&rates());
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
    for line in View::default().lines(&rates()) {
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
