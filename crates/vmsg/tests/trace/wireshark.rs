// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every message as the dissector shows it, and broken ones.

use std::path::Path;

use tempfile::TempDir;
use vmsg_bus::trace::Layout;

use crate::older;
use crate::samples::{self, Sample};
use crate::tshark::{self, Packet, packets};
use crate::{direction, interface};

fn record(path: &Path, layout: Layout, samples: &[Sample]) -> Vec<Packet> {
    let mut trace = interface(path, layout);
    for sample in samples {
        trace.record(direction(sample.to_device), &sample.bytes, sample.fds);
    }
    drop(trace);
    let packets = packets(path);
    assert_eq!(packets.len(), samples.len());
    packets
}

/// Compares what tshark shows with the samples, and each response with the request before it.
fn compare(layout: u64, samples: &[Sample], packets: &[Packet]) {
    for (i, (sample, packet)) in samples.iter().zip(packets).enumerate() {
        let name = sample.name;
        assert!(!packet.is_malformed(), "{name}: {packet:?}");
        assert_eq!(packet.text("virtio_msg.name"), name);
        assert_eq!(packet.number("virtio_msg.layout"), layout);
        assert_eq!(
            packet.number("virtio_msg.direction"),
            u64::from(!sample.to_device)
        );
        assert_eq!(packet.number("virtio_msg.fds"), sample.fds as u64);
        for (field, value) in &sample.fields {
            assert_eq!(packet.number(field), *value, "{name}: {field}");
        }
        for (field, value) in &sample.texts {
            assert_eq!(packet.text(field), *value, "{name}: {field}");
        }
        if packet.number("virtio_msg.type.response") == 1 {
            // Frames are counted from 1.
            assert_eq!(packet.number("virtio_msg.request_in"), i as u64, "{name}");
            assert_eq!(
                packets[i - 1].number("virtio_msg.response_in"),
                i as u64 + 1
            );
            let time: f64 = packet
                .text("virtio_msg.response_time")
                .parse()
                .expect("seconds");
            assert!((0.0..10.0).contains(&time), "{time}");
        }
    }
}

#[test]
fn every_message_of_revision_1_has_its_fields() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let samples = samples::transport();
    let packets = record(&folder.path().join("t"), Layout::Revision1, &samples);
    compare(1, &samples, &packets);
    for packet in &packets {
        assert_eq!(packet.number("virtio_msg.dev"), 5);
    }
    // Bits 32 and 63 of block 1, bit 65 of block 2.
    assert_eq!(
        packets[3].all("virtio_msg.features.bit"),
        ["32", "63", "65"]
    );
    assert_eq!(packets[3].number("virtio_msg.token"), 2);
}

#[test]
fn every_bus_message_has_its_fields() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let samples = samples::bus();
    let packets = record(&folder.path().join("t"), Layout::Revision1, &samples);
    compare(1, &samples, &packets);
    assert_eq!(
        packets[1].all("virtio_msg.devices.present"),
        ["8", "10", "23"]
    );
}

#[test]
fn every_message_of_r1_has_its_fields() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let samples = older::r1();
    let packets = record(&folder.path().join("t"), Layout::R1, &samples);
    compare(2, &samples, &packets);
    assert_eq!(packets[3].all("virtio_msg.features.bit"), ["5", "32"]);
}

#[test]
fn messages_of_the_short_layout_have_their_fields() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let samples = older::short();
    for sample in &samples {
        let frame = virtio_msg::short::decode(&sample.bytes).expect("a message");
        assert_eq!(frame.message.name(), sample.name);
    }
    let packets = record(&folder.path().join("t"), Layout::Short, &samples);
    compare(3, &samples, &packets);
    for i in [1, 2] {
        assert_eq!(packets[i].all("virtio_msg.features.bit"), ["5", "32"]);
    }
    assert_eq!(packets[5].text("virtio_msg.data"), "01:02");
}

/// Connections are told apart, and so are sections of a file that was continued.
#[test]
fn requests_of_one_connection_are_not_answered_on_another() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("t");
    let samples = samples::transport();
    let (request, response) = (&samples[0].bytes, &samples[1].bytes);
    let mut one = interface(&path, Layout::Revision1);
    let mut two = interface(&path, Layout::Revision1);
    one.record(direction(true), request, 0);
    two.record(direction(true), request, 0);
    one.record(direction(false), response, 0);
    two.record(direction(false), response, 0);
    one.record(direction(true), request, 0);
    drop((one, two));
    let mut again = interface(&path, Layout::Revision1);
    again.record(direction(false), response, 0);
    drop(again);
    let packets = packets(&path);
    assert_eq!(packets[2].number("virtio_msg.request_in"), 1);
    assert_eq!(packets[3].number("virtio_msg.request_in"), 2);
    assert!(packets[5].all("virtio_msg.request_in").is_empty());
    assert_eq!(packets[5].number("frame.section_number"), 2);
}

#[test]
fn the_list_of_packets_reads_like_a_conversation() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("t");
    record(&path, Layout::Revision1, &samples::transport());
    let lines = tshark::run(
        &path,
        &["-T", "fields", "-e", "_ws.col.Source", "-e", "_ws.col.Info"],
    );
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[0], "driver\tdev 5 #1 GET_DEVICE_INFO");
    assert_eq!(
        lines[1],
        "device\tdev 5 #1 GET_DEVICE_INFO response: device id 1 (network), vendor 0x00001af4, 64 feature bits, 12 config bytes, 3 queues"
    );
    assert_eq!(
        lines[3],
        "device\tdev 5 #2 GET_DEVICE_FEATURES response: blocks 1+2, bits 32 63 65"
    );
    assert_eq!(
        lines[23],
        "driver\tdev 5 EVENT_AVAIL: queue 1, next 9, wrap 1"
    );
}

/// What is no message is marked, and nothing else happens.
#[test]
fn broken_messages_are_marked() {
    if !tshark::is_there() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("t");
    let mut trace = interface(&path, Layout::Revision1);
    let mut count = 0;
    // Each message without its last byte, with one more, with another id, and with a size that is not there.
    for sample in samples::transport() {
        let bytes = sample.bytes;
        let resized = |len: usize| {
            let mut bytes = bytes.clone();
            bytes.resize(len, 0);
            bytes[6] = u8::try_from(len).expect("short");
            bytes
        };
        let mut unknown = bytes.clone();
        unknown[1] = 0x3f;
        let mut longer = bytes.clone();
        longer[6] = 0xff;
        let mut variants = vec![resized(bytes.len() + 1), unknown, longer];
        if bytes.len() > 8 {
            variants.push(resized(bytes.len() - 1));
        }
        for variant in variants {
            assert!(virtio_msg::decode(&variant, 65536).is_err());
            trace.record(direction(sample.to_device), &variant, 0);
            count += 1;
        }
        trace.record(direction(true), &bytes[..4], 0);
        count += 1;
    }
    trace.record(direction(true), &[], 0);
    // Numbers as large as they can be.
    for (id, kind) in (0..=255).flat_map(|id| (0..4).map(move |kind| (id, kind))) {
        trace.record(
            direction(true),
            &[&[kind, id, 0, 0, 0, 0, 72, 0][..], &[0xff; 64]].concat(),
            0,
        );
    }
    drop(trace);
    let packets = packets(&path);
    assert_eq!(packets.len(), count + 1 + 1024);
    for packet in &packets[..=count] {
        assert!(packet.is_malformed(), "{packet:?}");
    }
    for packet in &packets {
        assert!(packet.all("_ws.lua.error").is_empty(), "{packet:?}");
        assert!(!packet.all("virtio_msg.head").is_empty());
    }
}
