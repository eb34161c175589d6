// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (951_827_696, "2000-02-29T12:34:56.000000000Z"),
        (1_795_181_884, "2026-11-20T13:38:04.000000000Z"),
        (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
    ] {
        assert_eq!(date(seconds * 1_000_000_000), text);
    }
    assert_eq!(date(u64::MAX), "2554-07-21T23:34:33.709551615Z");
}

#[test]
fn times_before_the_first_message_are_negative() {
    let mut clock = Clock::new(false);
    assert_eq!(clock.since_first(5_000), 0);
    assert_eq!(microseconds(clock.since_first(3_999)), "-1.001");
    assert_eq!(microseconds(clock.since_first(1_005_007)), "1000.007");
}

#[test]
fn nothing_reaches_the_terminal_that_would_do_something_there() {
    assert_eq!(clean("a\u{1b}[2J\nb"), "a\\u{1b}[2J\\u{a}b");
    assert_eq!(clean("a\u{202e}b\u{9b}c"), "a\\u{202e}b\\u{9b}c");
    assert_eq!(clean("Gerät → 1"), "Gerät → 1");
}

#[test]
fn json_stays_json_whatever_is_in_it() {
    let text = "\u{1b}[2J\u{7f}\u{9b}\u{202e}\u{feff}\\\u{202e}\" ü";
    let json = serde_json::json!({ "text": text }).to_string();
    let shown = clean_json(&json);
    assert!(
        shown
            .chars()
            .all(|c| !c.is_control() && !turns_text_round(c)),
        "{shown}"
    );
    let back: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(back["text"], text);
}
