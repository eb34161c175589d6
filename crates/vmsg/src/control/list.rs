// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ctl PATH list` for people.

use std::io::{self, Write};

use super::protocol::Device;

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
                Some(pid) => format!("{} (pid {pid})", holder.name),
                None => holder.name.clone(),
            },
            None => "-".to_owned(),
        };
        line(out, row, widths, &holder)?;
    }
    Ok(())
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
        pairs.filter_map(|pair| pair.get(name)).sum()
    };
    let frames = |name: &str| match device.pairs.len() {
        0 => "-".to_owned(),
        _ => sum(name).to_string(),
    };
    [
        device.bus.clone(),
        device.id.clone(),
        device.number.to_string(),
        device.kind.clone(),
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
        .map(|(_, count)| count)
        .sum()
}
