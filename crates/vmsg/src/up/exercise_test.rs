// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::*;

/// Nothing takes so long unless it is of the wrong order.
const SOON: Duration = Duration::from_secs(120);

#[test]
fn nonsense_of_all_kinds_is_told_in_bounds() {
    let head = "version = 1\n";
    for text in [
        "",
        "\u{1b}[2J = 1",
        "version = 99999999999999999999999999999999999999999",
        "version = 1\n[bus.\"\u{1b}[2J\"]",
        "version = 1\n[program.p]\ncommand = [\"a\\u0000b\"]",
        "version = 1\n[program.p]\ncommand = [\"sh\", \"${ODD}\"]",
        "version = 1\n[program.p]\ncommand = [\"sh\", \"${LONG}${LONG}${LONG}\"]",
        "version = 1\n[bus.b]\npath = \"${LONG}\"\n[device.d]\ntype=\"rng\"",
        "version = 1\n[host]\nname = \"../../etc\"\nruntime = \"\\u0000\"",
        "version = 1\n[guest.x]\nmemory = \"-1\"\ncpus = 99999999999999999999\nhotplug = 65536",
        "version = 1\n[bus.b]\n[device.d]\ntype=\"rng\"\nnum = 0xffffffffffffffffffff",
        "version = 1\nbus = 3\ndevice = []\nswitch = {}\nguest.x = 1979-05-27",
    ] {
        one(text);
    }
    let deep = ["[", "{a=", "[{a=["].map(|open| format!("{head}x = {}", open.repeat(100_000)));
    deep.iter().for_each(|text| one(text));
}

/// What has many of something; no two tables of a kind may be of the same name.
fn many(count: usize, each: impl Fn(usize, &mut String)) -> String {
    let mut text = "version = 1\n".to_owned();
    for n in 0..count {
        each(n, &mut text);
    }
    text
}

#[test]
fn a_megabyte_of_mistakes_takes_no_longer_than_it_takes_to_read_it() {
    let texts = [
        many(6_000, |n, text| writeln!(text, "k{n} = {n}").expect("text")),
        many(4_000, |n, text| {
            writeln!(text, "[bus.b{n}]\nx{n} = 1").expect("text")
        }),
        many(4_000, |n, text| {
            writeln!(text, "[nonsense.b{n}]").expect("text")
        }),
        {
            let mut text = "version = 1\n[bus.b]\n[device.d]\ntype = \"net\"\n".to_owned();
            (0..6_000).for_each(|n| writeln!(text, "key{n} = {n}").expect("text"));
            text
        },
        many(1_000, |n, text| {
            let next = (n + 1) % 1_000;
            writeln!(
                text,
                "[program.p{n}]\ncommand=[\"sh\"]\nafter=[\"p{next}\"]"
            )
            .expect("text");
        }),
        many(1_000, |n, text| {
            writeln!(text, "[device.d{n}]\ntype=\"net\"\nbus=\"b\"\nswitch=\"s\"").expect("text");
        }),
        many(1_000, |n, text| {
            writeln!(text, "[port.d{n}]\nswitch=\"s\"\nvlan={}", n % 5000).expect("text");
        }),
        {
            let mut text = "version = 1\n[switch.s]\nallow = [".to_owned();
            (0..6_000).for_each(|n| write!(text, "\"a{n} > b\", ").expect("text"));
            text + "]\n"
        },
        format!(
            "version = 1\n[program.p]\ncommand = [{}]",
            "\"${NO}\",".repeat(100_000)
        ),
        format!(
            "version = 1\n[program.p]\ncommand = [\"{}\"]",
            "${ODD}".repeat(100_000)
        ),
        "\n".repeat(1 << 17),
        "= ".repeat(1 << 16),
        "\"".repeat(1 << 17),
    ];
    for text in texts {
        let began = Instant::now();
        one(&text);
        let took = began.elapsed();
        assert!(took < SOON, "{took:?} for {}", &text[..60]);
    }
}
