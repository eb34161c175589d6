// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times and texts of a line.

use std::fmt::Write as _;
use std::io::{self, Write};

/// Times of messages.
pub(super) struct Clock {
    absolute: bool,
    first: Option<u64>,
}

impl Clock {
    /// Of the time of day, or from the first message on.
    pub(super) fn new(absolute: bool) -> Self {
        Self {
            absolute,
            first: None,
        }
    }

    /// Nanoseconds since the first message this was asked of.
    pub(super) fn since_first(&mut self, time: u64) -> i128 {
        i128::from(time) - i128::from(*self.first.get_or_insert(time))
    }

    /// Microseconds since the first message, or date and time of day.
    pub(super) fn write(&self, out: &mut impl Write, time: u64, since: i128) -> io::Result<()> {
        if self.absolute {
            write!(out, "{}", date(time))
        } else {
            write!(out, "{:>16}", microseconds(since))
        }
    }
}

/// Nanoseconds as microseconds with three decimals.
pub(super) fn microseconds(nanoseconds: i128) -> String {
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let ns = nanoseconds.unsigned_abs();
    format!("{sign}{}.{:03}", ns / 1000, ns % 1000)
}

/// Nanoseconds since 1970 as `2026-11-20T13:38:04.000123456Z`.
pub(super) fn date(time: u64) -> String {
    let (seconds, ns) = (time / 1_000_000_000, time % 1_000_000_000);
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // 64 bits of nanoseconds end in the year 2554.
    let mut year = 1970;
    loop {
        let days = if is_leap(year) { 366 } else { 365 };
        if day < days {
            break;
        }
        day -= days;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!(
        "{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}.{ns:09}Z",
        day + 1,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Text from outside, with everything escaped that a terminal would not just print.
pub(crate) fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns_text_round(c) {
            clean.extend(c.escape_unicode());
        } else {
            clean.push(c);
        }
    }
    clean
}

/// JSON with everything escaped, as JSON has it, that a terminal would not just print.
pub(crate) fn clean_json(json: &str) -> String {
    let mut clean = String::with_capacity(json.len());
    for c in json.chars() {
        // All of these are below U+10000, and stand in texts only.
        if c.is_control() || turns_text_round(c) {
            clean.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            clean.push(c);
        }
    }
    clean
}

/// Invisible characters that change the order in which a line is read, or end it.
fn turns_text_round(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{061c}' | '\u{feff}')
}

/// Bytes in hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[path = "line_test.rs"]
mod tests;
