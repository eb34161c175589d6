// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the recordings in `tests/golden/r1`, and shows that the codec knows every message in them.

use std::path::Path;
use virtio_msg::r1::{SIZE, decode};

pub(crate) type Bytes = [u8; SIZE];

pub(crate) struct Recording {
    pub(crate) name: &'static str,
    pub(crate) driver: Vec<(usize, Bytes)>,
    pub(crate) device: Vec<(usize, Bytes)>,
}

impl Recording {
    pub(crate) fn responses(&self) -> impl Iterator<Item = (usize, Bytes)> + '_ {
        self.device.iter().copied().filter(|(_, b)| b[0] == 1)
    }

    pub(crate) fn events(&self) -> impl Iterator<Item = (usize, Bytes)> + '_ {
        self.device.iter().copied().filter(|(_, b)| b[0] == 0)
    }
}

pub(crate) fn recordings() -> [Recording; 2] {
    ["net-mmio", "net-pci"].map(|name| Recording {
        name,
        driver: read(&format!("{name}.driver.txt")),
        device: read(&format!("{name}.device.txt")),
    })
}

fn read(file: &str) -> Vec<(usize, Bytes)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/r1")
        .join(file);
    let text = std::fs::read_to_string(path).expect("the recording");
    text.lines()
        .filter(|l| !l.starts_with('#') && !l.trim().is_empty())
        .map(|line| {
            let (head, payload) = line.split_once('|').expect("header and payload");
            let mut words = head.split_whitespace();
            let number = words.next().and_then(|n| n.parse().ok()).expect("a number");
            let hex = words.skip(1).collect::<String>() + payload.trim();
            let mut bytes = [0; SIZE];
            for (i, byte) in bytes.iter_mut().enumerate().take(hex.len() / 2) {
                *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hexadecimal");
            }
            assert!(hex.len() % 2 == 0 && hex.len() <= 2 * SIZE);
            (number, bytes)
        })
        .collect()
}

#[test]
fn every_recorded_message_decodes_and_encodes_to_the_same_bytes() {
    let mut count = 0;
    for recording in recordings() {
        for (number, bytes) in recording.driver.iter().chain(&recording.device) {
            let frame =
                decode(bytes).unwrap_or_else(|e| panic!("{} {number}: {e}", recording.name));
            assert_eq!(
                frame.to_bytes(),
                *bytes,
                "{} {number}: {frame}",
                recording.name
            );
            count += 1;
        }
    }
    assert_eq!(count, 69 + 48 + 81 + 55);
}

#[test]
fn trace_lines_read_like_this() {
    let lines: Vec<String> = recordings()
        .iter()
        .flat_map(|r| r.driver.iter().chain(&r.device))
        .map(|(_, bytes)| decode(bytes).expect("decoded before").to_string())
        .collect();
    for line in [
        "r1 dev 0 DEVICE_INFO",
        "r1 dev 0 DEVICE_INFO response: version 1, device id 1, vendor 0x554d4551",
        "r1 dev 0 GET_FEATURES: index 0",
        "r1 dev 0 GET_FEATURES response: index 0, 0x0000010339bf8064",
        "r1 dev 0 SET_FEATURES: index 0, 0x0000000330af8024",
        "r1 dev 0 SET_FEATURES response: index 0, 0x0000000330af8024",
        "r1 dev 0 GET_CONFIG: offset 6, size 2",
        "r1 dev 0 GET_CONFIG response: offset 6, size 2: 0x1",
        "r1 dev 0 SET_DEVICE_STATUS: 0x0b",
        "r1 dev 0 GET_DEVICE_STATUS",
        "r1 dev 0 GET_DEVICE_STATUS response: 0x0f",
        "r1 dev 0 GET_VQUEUE: queue 1",
        "r1 dev 0 GET_VQUEUE response: queue 2, at most 1024",
        "r1 dev 0 GET_VQUEUE response: queue 3, no such queue",
        "r1 dev 0 SET_VQUEUE: queue 0, size 1024, descriptor 0x5b660000, driver 0x5b664000, device 0x5b665000",
        "r1 dev 0 EVENT_AVAIL: queue 2",
        "r1 dev 0 EVENT_USED: queue 1",
        "r1 dev 0 EVENT_CONFIG: status 0x0f, offset 0, size 0",
    ] {
        assert!(
            lines.iter().any(|l| l == line),
            "no line {line:?} in {lines:#?}"
        );
    }
}

#[test]
fn short_bus_and_unknown_messages_are_refused() {
    use virtio_msg::DecodeError;
    let mut bytes = [0; SIZE];
    bytes[1] = 3;
    assert!(decode(&bytes).is_ok());
    assert_eq!(
        decode(&bytes[..39]),
        Err(DecodeError::TooShort { have: 39, need: 40 })
    );
    for (msg_type, msg_id) in [
        (2, 3),
        (0, 0),
        (0, 1),
        (0, 0x0e),
        (0, 0x22),
        (1, 0x0a),
        (1, 0x12),
    ] {
        [bytes[0], bytes[1]] = [msg_type, msg_id];
        assert_eq!(
            decode(&bytes),
            Err(DecodeError::Unknown { msg_type, msg_id })
        );
    }
}
