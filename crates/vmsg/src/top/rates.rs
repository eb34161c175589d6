// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happened each second between two looks.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use serde::Serialize;

use crate::control::{
    Count, Device, Port, Switch, dropped, dropped_of, is_bridged, port_state, traffic,
};

/// What a server said at one moment.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) switches: Vec<Switch>,
    pub(super) devices: Vec<Device>,
}

/// Frames and bits each second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Rate {
    pub(super) frames: f64,
    pub(super) bits: f64,
}

/// A port of a switch.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct PortRates {
    pub(super) switch: String,
    pub(super) port: String,
    /// `up`, `down`, `no driver`, `no carrier`.
    pub(super) link: String,
    /// Who drives its device.
    pub(super) driver: Option<String>,
    /// What it sends.
    #[serde(rename = "in")]
    pub(super) input: Option<Rate>,
    /// What it is sent.
    #[serde(rename = "out")]
    pub(super) output: Option<Rate>,
    /// Frames each second that it sent, or that were for it, and that were dropped.
    pub(super) drops: Option<f64>,
    /// Why most of these were.
    pub(super) reason: Option<String>,
}

/// A queue of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct QueueRates {
    /// Its number: receive queues are even, transmit queues odd.
    pub(super) queue: usize,
    pub(super) kind: QueueKind,
    #[serde(flatten)]
    pub(super) rate: Option<Rate>,
    pub(super) drops: Option<f64>,
}

/// Which way a queue is for, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum QueueKind {
    Receive,
    Transmit,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DeviceRates {
    pub(super) bus: String,
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// `up`, `down`, `no carrier`; nothing without a cable.
    pub(super) link: Option<String>,
    pub(super) driver: Option<String>,
    /// Pairs of queues.
    pub(super) pairs: usize,
    pub(super) to_guest: Option<Rate>,
    pub(super) from_guest: Option<Rate>,
    pub(super) drops: Option<f64>,
    /// Each of its queues; of network devices only.
    pub(super) queues: Vec<QueueRates>,
    /// How it does, in the server's words.
    pub(super) state: String,
    /// Of a device of a vhost-user daemon, whose data is not seen here.
    pub(super) daemon: Option<DaemonRates>,
}

/// The daemon of a device. Only what passes through the serving process can be counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DaemonRates {
    /// It is there.
    pub(super) connected: bool,
    /// How often there was one.
    pub(super) connections: u64,
    /// How often it was cut off, as it did what no daemon does.
    pub(super) faults: u64,
    /// Queues that it has.
    pub(super) queues: u64,
    /// Of these, how many it is kicked for by the driver itself, past the serving process; and kicks each second that passed
    /// through that.
    pub(super) direct_kicks: u64,
    pub(super) kicks: Option<f64>,
    /// The same of its interrupts.
    pub(super) direct_calls: u64,
    pub(super) calls: Option<f64>,
}

impl DaemonRates {
    fn new(device: &Device, old: Option<(&Device, f64)>) -> Option<Self> {
        let count = |of: &Device, name: &str| of.counters.get(name).copied().unwrap_or(0);
        let rate = |name: &str| {
            let (old, seconds) = old?;
            Some(each_second(count(old, name), count(device, name), seconds))
        };
        is_bridged(device).then(|| Self {
            connected: count(device, "daemon-connected") != 0,
            connections: count(device, "daemon-connections"),
            faults: count(device, "daemon-faults"),
            queues: count(device, "daemon-queues"),
            direct_kicks: count(device, "daemon-queues-kicked-directly"),
            kicks: rate("daemon-kicks"),
            direct_calls: count(device, "daemon-queues-calling-directly"),
            calls: rate("daemon-calls"),
        })
    }
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Rates {
    /// Seconds between the looks; nothing after the first.
    pub(super) seconds: Option<f64>,
    pub(super) ports: Vec<PortRates>,
    pub(super) devices: Vec<DeviceRates>,
}

/// How much `now` is more than `before`, each second. Counters of one that was started again begin anew.
fn each_second(before: u64, now: u64, seconds: f64) -> f64 {
    let more = if now >= before { now - before } else { now };
    // Exact up to 2^53, and near enough beyond.
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let more = more as f64;
    more / seconds
}

impl Rate {
    fn between(before: Count, now: Count, seconds: f64) -> Self {
        Self {
            frames: each_second(before.frames, now.frames, seconds),
            bits: 8.0 * each_second(before.bytes, now.bytes, seconds),
        }
    }
}

impl Rates {
    pub(super) fn between(before: Option<&Sample>, now: &Sample) -> Self {
        let seconds = before.map(|before| {
            let passed = now.at.saturating_duration_since(before.at);
            passed.as_secs_f64().max(0.001)
        });
        let mut drivers: HashMap<&str, &Device> = HashMap::new();
        for device in now.devices.iter().filter(|device| device.kind == "net") {
            drivers.entry(&device.id).or_insert(device);
        }
        let old_ports: HashMap<(&str, &str), &Port> = before
            .iter()
            .flat_map(|sample| &sample.switches)
            .flat_map(|switch| {
                let ports = switch.ports.iter();
                ports.map(|port| ((switch.id.as_str(), port.id.as_str()), port))
            })
            .collect();
        let old_devices: HashMap<(&str, &str), &Device> = before
            .iter()
            .flat_map(|sample| &sample.devices)
            .map(|device| ((device.bus.as_str(), device.id.as_str()), device))
            .collect();
        let mut ports = Vec::new();
        for switch in &now.switches {
            for port in &switch.ports {
                let driver = drivers.get(port.id.as_str()).filter(|_| !port.uplink);
                let old = old_ports.get(&(switch.id.as_str(), port.id.as_str()));
                ports.push(PortRates::new(
                    switch,
                    port,
                    driver.and_then(|device| driver_of(device)),
                    old.zip(seconds).map(|(old, seconds)| (*old, seconds)),
                ));
            }
        }
        let device = |device: &Device| {
            let old = old_devices.get(&(device.bus.as_str(), device.id.as_str()));
            let old = old.zip(seconds).map(|(old, seconds)| (*old, seconds));
            DeviceRates::new(device, old)
        };
        Self {
            seconds,
            ports,
            devices: now.devices.iter().map(device).collect(),
        }
    }
}

fn driver_of(device: &Device) -> Option<String> {
    let holder = device.holder.as_ref()?;
    Some(match holder.pid {
        Some(pid) => format!("{} ({pid})", holder.name),
        None => holder.name.clone(),
    })
}

impl PortRates {
    fn new(
        switch: &Switch,
        port: &Port,
        driver: Option<String>,
        old: Option<(&Port, f64)>,
    ) -> Self {
        let mut drops = None;
        let mut reason = None;
        if let Some((old, seconds)) = old {
            let mut by_reason: BTreeMap<&str, f64> = BTreeMap::new();
            for (now, before) in [
                (&port.dropped_in, &old.dropped_in),
                (&port.dropped_out, &old.dropped_out),
            ] {
                for (name, count) in now {
                    let before = before.get(name).copied().unwrap_or(0);
                    *by_reason.entry(name).or_default() += each_second(before, *count, seconds);
                }
            }
            // The sum of nothing would be -0.
            drops = Some(by_reason.values().fold(0.0, |sum, rate| sum + rate));
            reason = by_reason
                .into_iter()
                .filter(|(_, rate)| *rate > 0.0)
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .map(|(name, _)| name.to_owned());
        }
        Self {
            switch: switch.id.clone(),
            port: port.id.clone(),
            link: port_state(port).to_owned(),
            driver: if port.uplink {
                Some("uplink".to_owned())
            } else {
                driver
            },
            input: old.map(|(old, seconds)| {
                Rate::between(old.input.total(), port.input.total(), seconds)
            }),
            output: old.map(|(old, seconds)| {
                Rate::between(old.output.total(), port.output.total(), seconds)
            }),
            drops,
            reason,
        }
    }
}

/// The rates of a device's queues.
fn queues(device: &Device, old: Option<(&Device, f64)>) -> Vec<QueueRates> {
    let mut queues = Vec::new();
    for (pair, counters) in device.pairs.iter().enumerate() {
        let old = old.and_then(|(old, seconds)| Some((old.pairs.get(pair)?, seconds)));
        for (index, kind, prefix) in [
            (2 * pair, QueueKind::Receive, "rx_"),
            (2 * pair + 1, QueueKind::Transmit, "tx_"),
        ] {
            let passed = |counters: &BTreeMap<String, u64>| {
                let count = |what: &str| counters.get(&format!("{prefix}{what}")).copied();
                Count {
                    frames: count("frames").unwrap_or(0),
                    bytes: count("bytes").unwrap_or(0),
                }
            };
            let lost = |counters: &BTreeMap<String, u64>| {
                dropped_of(counters.iter().filter(|(name, _)| name.starts_with(prefix)))
            };
            queues.push(QueueRates {
                queue: index,
                kind,
                rate: old
                    .map(|(old, seconds)| Rate::between(passed(old), passed(counters), seconds)),
                drops: old.map(|(old, seconds)| each_second(lost(old), lost(counters), seconds)),
            });
        }
    }
    queues
}

impl DeviceRates {
    fn new(device: &Device, old: Option<(&Device, f64)>) -> Self {
        let of_pairs = old.filter(|_| !device.pairs.is_empty());
        let rates = old.and_then(|(old, seconds)| {
            let (before, now) = (traffic(old)?, traffic(device)?);
            let to_guest = Rate::between(before.0, now.0, seconds);
            Some((to_guest, Rate::between(before.1, now.1, seconds)))
        });
        let link = device.link.map(|link| match (link.up, link.carrier) {
            (false, _) => "down",
            (true, false) => "no carrier",
            (true, true) => "up",
        });
        Self {
            bus: device.bus.clone(),
            id: device.id.clone(),
            kind: device.kind.clone(),
            link: link.map(str::to_owned),
            driver: driver_of(device),
            pairs: device.pairs.len(),
            to_guest: rates.map(|(to, _)| to),
            from_guest: rates.map(|(_, from)| from),
            drops: old
                .filter(|_| rates.is_some())
                .map(|(old, seconds)| each_second(dropped(old), dropped(device), seconds)),
            queues: queues(device, of_pairs),
            state: device.state.clone(),
            daemon: DaemonRates::new(device, old),
        }
    }
}

#[cfg(test)]
#[path = "rates_test.rs"]
mod tests;
