// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ls`.

use std::io::Write;
use std::time::Duration;

use anyhow::bail;
use serde::Serialize;
use virtio_msg::{DevNum, FeatureSet, QueueIndex, feature};
use vmsg_device::device::VENDOR_ID;

use super::{BusClient, connect, explain, silence};
use crate::buses::{self, is_r1};
use crate::cli::LsArgs;
use crate::out::Out;

/// Queues and bytes of configuration that are shown; a device may claim more.
const MAX_QUEUES: u32 = 256;
const MAX_CONFIG: u32 = 4096;

/// What `ls` says about a device; also its JSON.
#[derive(Debug, Serialize)]
struct Listed {
    number: u16,
    id: Option<String>,
    #[serde(rename = "type")]
    kind: String,
    device_id: u32,
    vendor_id: String,
    status: String,
    features: Vec<String>,
    queues: Vec<Queue>,
    config_generation: Option<u32>,
    config: Option<String>,
}

#[derive(Debug, Serialize)]
struct Queue {
    index: u32,
    max_size: u32,
    size: u32,
}

/// Lists the devices on a bus.
pub(crate) fn ls(args: LsArgs) -> anyhow::Result<()> {
    let spec = buses::parse(&args.bus)?;
    buses::for_driver(&args.bus, &spec)?;
    let mut client = connect(&spec, args.timeout.map(Duration::from_millis))?;
    let explained = |error| explain(error, &spec);
    let mut numbers = Vec::new();
    if client.channel().capabilities().enumerates {
        numbers = client.devices().map_err(explained)?;
    } else {
        client
            .scan(|number| numbers.push(number))
            .map_err(explained)?;
        if let (true, true, Some(hint)) = (numbers.is_empty(), is_r1(&spec), silence(&spec)) {
            bail!("there is no device as r1 has one; {hint}");
        }
    }
    let mut devices = Vec::new();
    for number in numbers {
        devices.push(look_at(&mut client, number)?);
    }
    let mut out = Out::lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&devices)?)?;
    } else {
        print(&mut out, &devices)?;
        if is_r1(&spec) {
            writeln!(
                out,
                "r1 has one device, number 0; it does not tell its name, current queue sizes nor how much \
                 configuration there is: shown is what its kind can have"
            )?;
        }
    }
    Ok(())
}

fn look_at(client: &mut BusClient, number: DevNum) -> anyhow::Result<Listed> {
    let info = client.device_info(number)?;
    let offered = client.device_features(number, &info)?;
    let status = client.status(number)?;
    // Who has no names does not answer at all: they are known to have some where they are claimed by them, and where the devices are ours.
    let named = client.channel().capabilities().claims || info.vendor_id == VENDOR_ID;
    let id = named.then(|| client.device_name(number).ok()).flatten();
    let mut queues = Vec::new();
    for index in 0..info.max_queues.min(MAX_QUEUES) {
        let queue = client.queue(number, QueueIndex(index))?;
        queues.push(Queue {
            index,
            max_size: queue.max_size.0,
            size: queue.size.0,
        });
    }
    let mut bytes = vec![0; usize::try_from(info.config_size.min(MAX_CONFIG))?];
    let (config_generation, config) = if bytes.is_empty() {
        (None, None)
    } else {
        let generation = client.read_config(number, 0, &mut bytes)?;
        (Some(generation.0), Some(hex(&bytes)))
    };
    Ok(Listed {
        number: number.0,
        id,
        kind: feature::device_name(info.device_id)
            .unwrap_or("unknown")
            .to_owned(),
        device_id: info.device_id,
        vendor_id: vendor(info.vendor_id),
        status: status.to_string(),
        features: names(info.device_id, &offered),
        queues,
        config_generation,
        config,
    })
}

fn names(device_id: u32, features: &FeatureSet) -> Vec<String> {
    features
        .iter()
        .map(|bit| feature::name(device_id, bit).map_or_else(|| format!("bit{bit}"), str::to_owned))
        .collect()
}

/// A vendor id in hexadecimal, and as the letters that some of them spell.
fn vendor(id: u32) -> String {
    let letters = id.to_le_bytes();
    match str::from_utf8(&letters) {
        Ok(text) if letters.iter().all(u8::is_ascii_graphic) => format!("{id:#010x} ({text})"),
        _ => format!("{id:#010x}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn print(out: &mut impl Write, devices: &[Listed]) -> std::io::Result<()> {
    if devices.is_empty() {
        return writeln!(out, "no devices");
    }
    for device in devices {
        let Listed {
            number,
            id,
            kind,
            device_id,
            vendor_id,
            status,
            ..
        } = device;
        let id = id.as_deref().unwrap_or("-");
        writeln!(
            out,
            "{number}  {id}  {kind} (device id {device_id})  vendor {vendor_id}"
        )?;
        writeln!(out, "    status    {status}")?;
        writeln!(out, "    features  {}", device.features.join(" "))?;
        let queues: Vec<String> = device
            .queues
            .iter()
            .map(|queue| match queue.size {
                0 => format!("{}:{}", queue.index, queue.max_size),
                size => format!("{}:{size}/{}", queue.index, queue.max_size),
            })
            .collect();
        writeln!(out, "    queues    {}", queues.join(" "))?;
        if let (Some(config), Some(generation)) = (&device.config, device.config_generation) {
            writeln!(out, "    config    {config} (generation {generation})")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendors_that_spell_something_are_spelled() {
        assert_eq!(vendor(VENDOR_ID), "0x67736d76 (vmsg)");
        assert_eq!(vendor(0x1af4), "0x00001af4");
    }

    #[test]
    fn unknown_features_have_numbers() {
        let names = names(1, &FeatureSet::from_bits(&[5, 32, 200]));
        assert_eq!(names, ["MAC", "VERSION_1", "bit200"]);
    }
}
