// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rates as lines of text.

use std::cmp::Ordering;

use super::rates::{DeviceRates, PortRates, QueueKind, QueueRates, Rate, Rates};
use crate::control::Table;

/// What is left out where there is no room, first what is missed least.
const SPARE: &[&str] = &[
    "PAIRS",
    "FAULTS",
    "LINK",
    "DRIVER",
    "BUS",
    "SWITCH",
    "TYPE",
    "MOSTLY FOR",
    "CAME",
    "FROM f/s",
    "IN f/s",
    "TO f/s",
    "OUT f/s",
    "STATE",
    "QUEUES",
    "DROPS/s",
];

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) text: String,
    /// It stands above columns.
    pub(super) is_head: bool,
}

/// By what lines are sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    /// As the server has them.
    #[default]
    Order,
    /// By name.
    Name,
    /// By frames in.
    FramesIn,
    /// By bits in.
    BitsIn,
    /// By frames out.
    FramesOut,
    /// By bits out.
    BitsOut,
    /// By drops.
    Drops,
}

const SORTS: [Sort; 7] = [
    Sort::Order,
    Sort::Name,
    Sort::FramesIn,
    Sort::BitsIn,
    Sort::FramesOut,
    Sort::BitsOut,
    Sort::Drops,
];

impl Sort {
    /// The one `steps` further to the right.
    pub(super) fn step(self, steps: isize) -> Self {
        let at = SORTS.iter().position(|sort| *sort == self).unwrap_or(0);
        let count = SORTS.len().cast_signed();
        let at = (at.cast_signed() + steps).rem_euclid(count);
        SORTS[at.cast_unsigned()]
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Name => "name",
            Self::FramesIn => "frames in",
            Self::BitsIn => "bits in",
            Self::FramesOut => "frames out",
            Self::BitsOut => "bits out",
            Self::Drops => "drops",
        }
    }
}

/// What is to be seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct View {
    pub(super) sort: Sort,
    pub(super) reversed: bool,
    /// Each queue has a line, too.
    pub(super) queues: bool,
}

/// What a row can be sorted by.
trait Row {
    fn name(&self) -> (&str, &str);
    fn rates(&self) -> (Option<Rate>, Option<Rate>, Option<f64>);
}

impl Row for PortRates {
    fn name(&self) -> (&str, &str) {
        (&self.switch, &self.port)
    }

    fn rates(&self) -> (Option<Rate>, Option<Rate>, Option<f64>) {
        (self.input, self.output, self.drops)
    }
}

impl Row for DeviceRates {
    fn name(&self) -> (&str, &str) {
        (&self.bus, &self.id)
    }

    fn rates(&self) -> (Option<Rate>, Option<Rate>, Option<f64>) {
        // Into the device is out of the guest.
        (self.from_guest, self.to_guest, self.drops)
    }
}

/// A queue and its device.
struct QueueRow<'a>(&'a DeviceRates, QueueRates);

impl Row for QueueRow<'_> {
    fn name(&self) -> (&str, &str) {
        (&self.0.bus, &self.0.id)
    }

    fn rates(&self) -> (Option<Rate>, Option<Rate>, Option<f64>) {
        let QueueRates {
            kind, rate, drops, ..
        } = self.1;
        match kind {
            QueueKind::Transmit => (rate, None, drops),
            QueueKind::Receive => (None, rate, drops),
        }
    }
}

impl View {
    fn compare(self, a: &impl Row, b: &impl Row) -> Ordering {
        let number = |row: (Option<Rate>, Option<Rate>, Option<f64>)| {
            let (input, output, drops) = row;
            let number = match self.sort {
                Sort::Order | Sort::Name => None,
                Sort::FramesIn => input.map(|rate| rate.frames),
                Sort::BitsIn => input.map(|rate| rate.bits),
                Sort::FramesOut => output.map(|rate| rate.frames),
                Sort::BitsOut => output.map(|rate| rate.bits),
                Sort::Drops => drops,
            };
            number.unwrap_or(-1.0)
        };
        match self.sort {
            Sort::Order => Ordering::Equal,
            Sort::Name => a.name().cmp(&b.name()),
            // The most comes first.
            _ => number(b.rates()).total_cmp(&number(a.rates())),
        }
    }

    fn sorted<R: Row>(self, rows: &[R]) -> Vec<&R> {
        let mut rows: Vec<&R> = rows.iter().collect();
        rows.sort_by(|a, b| self.compare(*a, *b));
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    /// All lines. On a screen of so many `columns` that of which can be spared most is left out.
    pub(super) fn lines(self, rates: &Rates, columns: Option<usize>) -> Vec<Line> {
        let mut tables = Vec::new();
        if !rates.ports.is_empty() {
            tables.push(self.ports(&rates.ports));
        }
        tables.push(self.devices(&rates.devices));
        if rates.devices.iter().any(|device| device.daemon.is_some()) {
            tables.push(self.daemons(&rates.devices));
        }
        if self.queues {
            tables.push(self.queues(&rates.devices));
        }
        if let Some(columns) = columns {
            for table in &mut tables {
                table.fit(columns, SPARE);
            }
        }
        let mut lines = Vec::new();
        for table in tables {
            if !lines.is_empty() {
                lines.push(Line {
                    text: String::new(),
                    is_head: false,
                });
            }
            let rows = table.lines().into_iter().enumerate();
            lines.extend(rows.map(|(index, text)| Line {
                text,
                is_head: index == 0,
            }));
        }
        lines
    }

    fn ports(self, ports: &[PortRates]) -> Table {
        let mut table = Table::new(&[
            "SWITCH",
            "PORT",
            "LINK",
            "DRIVER",
            "IN f/s",
            "IN bit/s",
            "OUT f/s",
            "OUT bit/s",
            "DROPS/s",
            "MOSTLY FOR",
        ]);
        for port in self.sorted(ports) {
            table.row([
                port.switch.clone(),
                port.port.clone(),
                port.link.clone(),
                port.driver.clone().unwrap_or_else(|| "-".to_owned()),
                short(port.input.map(|rate| rate.frames)),
                short(port.input.map(|rate| rate.bits)),
                short(port.output.map(|rate| rate.frames)),
                short(port.output.map(|rate| rate.bits)),
                short(port.drops),
                port.reason.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
        table
    }

    fn devices(self, devices: &[DeviceRates]) -> Table {
        let mut table = Table::new(&[
            "BUS",
            "DEVICE",
            "TYPE",
            "LINK",
            "PAIRS",
            "DRIVER",
            "FROM f/s",
            "FROM bit/s",
            "TO f/s",
            "TO bit/s",
            "DROPS/s",
            "STATE",
        ]);
        for device in self.sorted(devices) {
            // What goes past the server is not nothing.
            let short = |number| match device.daemon {
                Some(_) => "direct".to_owned(),
                None => short(number),
            };
            table.row([
                device.bus.clone(),
                device.id.clone(),
                device.kind.clone(),
                device.link.clone().unwrap_or_else(|| "-".to_owned()),
                match device.pairs {
                    0 => "-".to_owned(),
                    pairs => pairs.to_string(),
                },
                device.driver.clone().unwrap_or_else(|| "-".to_owned()),
                short(device.from_guest.map(|rate| rate.frames)),
                short(device.from_guest.map(|rate| rate.bits)),
                short(device.to_guest.map(|rate| rate.frames)),
                short(device.to_guest.map(|rate| rate.bits)),
                short(device.drops),
                device.state.clone(),
            ]);
        }
        table
    }

    fn daemons(self, devices: &[DeviceRates]) -> Table {
        let mut table = Table::new(&[
            "BUS", "DEVICE", "DAEMON", "CAME", "FAULTS", "QUEUES", "KICKS/s", "CALLS/s",
        ]);
        for device in self.sorted(devices) {
            let Some(daemon) = device.daemon else {
                continue;
            };
            let passed = |direct: u64, rate: Option<f64>| match daemon.queues {
                0 => "-".to_owned(),
                queues if direct >= queues => "direct".to_owned(),
                _ => short(rate),
            };
            table.row([
                device.bus.clone(),
                device.id.clone(),
                if daemon.connected { "there" } else { "gone" }.to_owned(),
                daemon.connections.to_string(),
                daemon.faults.to_string(),
                daemon.queues.to_string(),
                passed(daemon.direct_kicks, daemon.kicks),
                passed(daemon.direct_calls, daemon.calls),
            ]);
        }
        table
    }

    fn queues(self, devices: &[DeviceRates]) -> Table {
        let rows = devices.iter().flat_map(|device| {
            let queues = device.queues.iter();
            queues.map(move |queue| QueueRow(device, *queue))
        });
        let rows: Vec<QueueRow<'_>> = rows.collect();
        let mut table = Table::new(&["BUS", "DEVICE", "QUEUE", "FOR", "f/s", "bit/s", "DROPS/s"]);
        for QueueRow(device, queue) in self.sorted(&rows) {
            table.row([
                device.bus.clone(),
                device.id.clone(),
                queue.queue.to_string(),
                match queue.kind {
                    QueueKind::Receive => "receive".to_owned(),
                    QueueKind::Transmit => "transmit".to_owned(),
                },
                short(queue.rate.map(|rate| rate.frames)),
                short(queue.rate.map(|rate| rate.bits)),
                short(queue.drops),
            ]);
        }
        table
    }
}

/// A number in at most six characters; `-`: not known yet.
fn short(number: Option<f64>) -> String {
    let Some(number) = number else {
        return "-".to_owned();
    };
    let mut rest = number;
    for unit in ["", "K", "M", "G", "T"] {
        if rest < 999.5 {
            return match rest {
                _ if unit.is_empty() && (rest >= 99.95 || rest == 0.0) => format!("{rest:.0}"),
                rest if rest >= 99.95 => format!("{rest:.0}{unit}"),
                rest => format!("{rest:.1}{unit}"),
            };
        }
        rest /= 1000.0;
    }
    format!("{rest:.0}P")
}

#[cfg(test)]
#[path = "view_test.rs"]
pub(super) mod tests;
