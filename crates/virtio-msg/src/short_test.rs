// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;

use super::{SIZE, decode};
use crate::message::DecodeError;
use std::string::{String, ToString};

/// A message in its 44 bytes: type, id, device number 3, size, payload.
fn line(msg_type: u8, msg_id: u8, payload: &[u8]) -> String {
    let mut bytes = [0xee; SIZE];
    let size = u8::try_from(payload.len() + 6).expect("short");
    bytes[..6].copy_from_slice(&[msg_type, msg_id, 3, 0, size, 0]);
    bytes[6..6 + payload.len()].copy_from_slice(payload);
    match decode(&bytes) {
        Ok(frame) => frame.to_string(),
        Err(error) => error.to_string(),
    }
}

fn words<const N: usize>(words: [u32; N]) -> std::vec::Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[test]
fn trace_lines_read_like_this() {
    for (msg_type, msg_id, payload, expected) in [
        (0, 2, words([]), "short dev 3 GET_DEVICE_INFO"),
        (
            1,
            2,
            words([1, 0x554d_4551, 64, 12, 3, 0]),
            "short dev 3 GET_DEVICE_INFO response: device id 1, vendor 0x554d4551, 64 feature bits, 12 config bytes, 3 queues",
        ),
        (
            0,
            3,
            words([0, 2]),
            "short dev 3 GET_DEVICE_FEATURES: blocks 0+2",
        ),
        (
            1,
            3,
            words([0, 0, 0x20, 3]),
            "short dev 3 GET_DEVICE_FEATURES response: blocks 0+0: 0x00000020 0x00000003",
        ),
        (
            0,
            4,
            words([0, 2, 0x20, 1]),
            "short dev 3 SET_DRIVER_FEATURES: blocks 0+2: 0x00000020 0x00000001",
        ),
        (
            1,
            4,
            words([0, 2, 0x20, 1]),
            "short dev 3 SET_DRIVER_FEATURES response",
        ),
        (1, 4, words([]), "short dev 3 SET_DRIVER_FEATURES response"),
        (
            0,
            5,
            words([6, 2]),
            "short dev 3 GET_CONFIG: offset 6, length 2",
        ),
        (
            1,
            5,
            words([9, 6, 2, 1, 0]),
            "short dev 3 GET_CONFIG response: generation 9, offset 6, length 2: 0100",
        ),
        (
            0,
            6,
            words([9, 6, 4, 1]),
            "short dev 3 SET_CONFIG: generation 9, offset 6, length 4: 01000000",
        ),
        (0, 7, words([]), "short dev 3 GET_DEVICE_STATUS"),
        (
            1,
            7,
            words([15]),
            "short dev 3 GET_DEVICE_STATUS response: 0x0f",
        ),
        (
            1,
            8,
            words([11]),
            "short dev 3 SET_DEVICE_STATUS response: 0x0b",
        ),
        (
            1,
            9,
            words([1, 1024, 256, 0x1000, 0, 0x2000, 0, 0x3000, 1]),
            "short dev 3 GET_VQUEUE response: queue 1, size 256 of 1024, descriptor 0x1000, driver 0x2000, device 0x100003000",
        ),
        (
            0,
            10,
            words([1, 0, 256, 0x1000, 0, 0x2000, 0, 0x3000, 0]),
            "short dev 3 SET_VQUEUE: queue 1, size 256, descriptor 0x1000, driver 0x2000, device 0x3000",
        ),
        (1, 10, words([]), "short dev 3 SET_VQUEUE response"),
        (1, 11, words([]), "short dev 3 RESET_VQUEUE response"),
        (
            0,
            0x40,
            words([15, 2, 0, 0, 0, 0, 0, 0]),
            "short dev 3 EVENT_CONFIG: status 0x0f, generation 2, offset 0, length 0",
        ),
        (0, 0x41, words([2, 0]), "short dev 3 EVENT_AVAIL: queue 2"),
        (0, 0x42, words([2]), "short dev 3 EVENT_USED: queue 2"),
        (2, 3, words([7]), "short bus PING: data 0x00000007"),
        (
            3,
            2,
            std::vec![0, 0, 8, 0, 0, 0, 5],
            "short bus GET_DEVICES response: devices 0+8, next 0, present 0 2",
        ),
        (0, 13, words([]), "unknown message type 0x00, id 0x0d"),
        (1, 0x42, words([2]), "unknown message type 0x01, id 0x42"),
        (
            0,
            7,
            words([1]),
            "message type 0x00, id 0x07 of 10 bytes: wrong size",
        ),
        (
            0,
            10,
            words([1; 8]),
            "message type 0x00, id 0x0a of 38 bytes: wrong size",
        ),
    ] {
        assert_eq!(line(msg_type, msg_id, &payload), expected);
    }
}

#[test]
fn a_message_that_is_cut_off_is_refused_and_none_panics() {
    let bytes = [0, 0x42, 0, 0, 10, 0, 1, 0, 0, 0];
    assert!(decode(&bytes).is_ok());
    for cut in 0..bytes.len() {
        assert!(matches!(
            decode(&bytes[..cut]),
            Err(DecodeError::TooShort { .. })
        ));
    }
    for msg_type in 0..=4 {
        for msg_id in 0..=255 {
            for size in 0..=SIZE {
                let mut bytes = [0xff; SIZE];
                bytes[..2].copy_from_slice(&[msg_type, msg_id]);
                bytes[4..6].copy_from_slice(&u16::try_from(size).expect("short").to_le_bytes());
                if let Ok(frame) = decode(&bytes) {
                    assert!(!frame.to_string().is_empty());
                }
            }
        }
    }
}
