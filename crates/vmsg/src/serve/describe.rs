// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an operator is shown of a device.

use std::collections::BTreeMap;

use virtio_msg::{DeviceStatus, feature};
use vmsg_device::host::Report;

use super::late::Absent;
use crate::buses::NamedBus;
use crate::control::{Device, Holder, Link};

fn bus_name(buses: &[NamedBus], index: usize) -> String {
    let bus = buses.get(index);
    bus.map(|bus| bus.name.clone()).unwrap_or_default()
}

fn type_name(device_id: u32) -> String {
    let name = feature::device_name(device_id);
    name.map_or_else(|| format!("type {device_id}"), ToOwned::to_owned)
}

/// A device that is waited for.
pub(super) fn describe_absent(absent: Absent, buses: &[NamedBus]) -> Device {
    Device {
        bus: bus_name(buses, absent.bus),
        id: absent.id,
        number: absent.number,
        kind: type_name(absent.device_id),
        worker: absent.worker,
        status: DeviceStatus::empty().to_string(),
        features: Vec::new(),
        holder: None,
        link: None,
        counters: BTreeMap::new(),
        pairs: Vec::new(),
        details: BTreeMap::new(),
        state: absent.state,
    }
}

/// In a word or two, how a device does.
fn state_of(status: DeviceStatus, counters: &BTreeMap<String, u64>) -> &'static str {
    if counters.get("daemon-connected") == Some(&0) {
        "no daemon"
    } else if status.contains(DeviceStatus::NEEDS_RESET) {
        "needs reset"
    } else if status.contains(DeviceStatus::DRIVER_OK) {
        "running"
    } else if status.is_empty() {
        "idle"
    } else {
        "starting"
    }
}

/// A device that is on its bus.
pub(super) fn describe(report: Report, buses: &[NamedBus]) -> Device {
    let device_id = report.device_id;
    let name =
        |bit| feature::name(device_id, bit).map_or_else(|| format!("bit {bit}"), ToOwned::to_owned);
    let counters = |list: Vec<(&str, u64)>| -> BTreeMap<String, u64> {
        let list = list.into_iter();
        list.map(|(name, value)| (name.to_owned(), value)).collect()
    };
    let snapshot = report.snapshot.unwrap_or_default();
    let of_device = counters(snapshot.counters);
    Device {
        bus: bus_name(buses, report.bus),
        id: report.name,
        number: report.number.0,
        kind: type_name(device_id),
        state: state_of(report.status, &of_device).to_owned(),
        worker: report.worker,
        status: report.status.to_string(),
        features: report.features.iter().map(name).collect(),
        holder: report.holder.map(|holder| Holder {
            name: holder.name,
            pid: holder.pid,
        }),
        link: snapshot.link.map(|link| Link {
            up: link.up,
            carrier: link.carrier,
        }),
        counters: of_device,
        pairs: snapshot.pairs.into_iter().map(counters).collect(),
        details: snapshot
            .details
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
}
