// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ctl PATH list` for people.

use std::io::{self, Write};

use super::protocol::Device;
use crate::trace::clean;

/// Characters of a name that are shown.
const LONGEST: usize = 64;

const HEAD: [&str; 9] = [
    "BUS",
    "ID",
    "NUMBER",
    "TYPE",
    "LINK",
    "PAIRS",
    "TO GUEST",
    "FROM GUEST",
    "DROPPED",
];

/// Prints a table of the devices.
pub(super) fn print(out: &mut impl Write, devices: &[Device]) -> io::Result<()> {
    let rows: Vec<[String; 9]> = devices.iter().map(row).collect();
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    line(out, &HEAD.map(str::to_owned), widths, "DRIVEN BY")?;
    for (row, device) in rows.iter().zip(devices) {
        let holder = match &device.holder {
            Some(holder) => match holder.pid {
                Some(pid) => format!("{} (pid {pid})", shown(&holder.name)),
                None => shown(&holder.name),
            },
            None => "-".to_owned(),
        };
        line(out, row, widths, &holder)?;
    }
    Ok(())
}

/// A name as a terminal may have it: it comes from the other side of the socket.
fn shown(name: &str) -> String {
    clean(&name.chars().take(LONGEST).collect::<String>())
}

fn line(
    out: &mut impl Write,
    cells: &[String; 9],
    widths: [usize; 9],
    last: &str,
) -> io::Result<()> {
    for (cell, width) in cells.iter().zip(widths) {
        write!(out, "{cell:<width$}  ")?;
    }
    writeln!(out, "{last}")
}

fn row(device: &Device) -> [String; 9] {
    let link = match device.link {
        None => "-",
        Some(link) if !link.up => "down",
        Some(link) if !link.carrier => "no carrier",
        Some(_) => "up",
    };
    let sum = |name: &str| -> u64 {
        let pairs = device.pairs.iter();
        let counts = pairs.filter_map(|pair| pair.get(name));
        counts.fold(0, |sum, count| sum.saturating_add(*count))
    };
    let frames = |name: &str| match device.pairs.len() {
        0 => "-".to_owned(),
        _ => sum(name).to_string(),
    };
    [
        shown(&device.bus),
        shown(&device.id),
        device.number.to_string(),
        shown(&device.kind),
        link.to_owned(),
        match device.pairs.len() {
            0 => "-".to_owned(),
            pairs => pairs.to_string(),
        },
        frames("rx_frames"),
        frames("tx_frames"),
        match device.pairs.len() {
            0 => "-".to_owned(),
            _ => dropped(device).to_string(),
        },
    ]
}

/// Frames of either direction that went nowhere.
fn dropped(device: &Device) -> u64 {
    let maps = device.pairs.iter().chain([&device.counters]);
    maps.flatten()
        .filter(|(name, _)| {
            matches!(
                name.as_str(),
                "rx_too_big"
                    | "rx_over_mtu"
                    | "rx_link_down"
                    | "rx_no_queue"
                    | "tx_malformed"
                    | "tx_link_down"
            )
        })
        .fold(0, |sum, (_, count)| sum.saturating_add(*count))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

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
            pairs: vec![counters.clone(), counters],
        };
        let mut out = Vec::new();
        print(&mut out, &[device]).expect("memory");
        let text = String::from_utf8(out).expect("text");
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains(r"\u{1b}[2J\u{202e}") && text.contains("18446744073709551615"));
        assert!(text.lines().all(|line| line.len() < 1000));
    }
}
