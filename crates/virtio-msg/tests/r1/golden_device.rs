// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of ours answers the recorded proxy of QEMU, message for message and field for field.

use crate::recorded::{Bytes, recordings};
use crate::stack::Device;
use virtio_msg::r1::{Message, decode, id};
use virtio_msg::{DeviceStatus, QueueIndex, feature};

/// What the recorded device offered, without one bit and with another, neither of which the driver takes.
const OFFERED: u64 = 0x0000_0103_39bf_8064 & !(1 << 6) | 1 << 35;
const QUEUE_SIZE: u16 = 2048;
const CONFIG: [u8; 12] = [2, 0x56, 0x4d, 0x53, 0x47, 1, 1, 0, 1, 0, 0xdc, 5];

/// A field of a payload: name, offset, bytes, and what it is to be.
type Field = (&'static str, usize, usize, Rule);

enum Rule {
    /// What was recorded.
    Same,
    /// Our own value, which may differ: given the recorded payload.
    Own(fn(&[u8]) -> u64),
}

/// Every field of every response that the recorded device gave, with the differences that are allowed. What belongs to no field is 0.
fn fields(msg_id: u8) -> Vec<Field> {
    use Rule::{Own, Same};
    match msg_id {
        id::DEVICE_INFO => vec![
            ("version", 0, 4, Same),
            ("device id", 4, 4, Same),
            ("vendor", 8, 4, Own(|_| 0x4d53_4756)),
        ],
        id::GET_FEATURES => vec![("index", 0, 4, Same), ("features", 4, 8, Own(|_| OFFERED))],
        id::SET_FEATURES => vec![("index", 0, 4, Same), ("features", 4, 8, Same)],
        id::GET_CONFIG => vec![
            ("offset", 0, 3, Same),
            ("size", 3, 1, Same),
            (
                "data",
                4,
                8,
                Own(|theirs| {
                    let (offset, size) = (usize::from(theirs[0]), usize::from(theirs[3]));
                    number(&CONFIG[offset..offset + size])
                }),
            ),
        ],
        id::GET_DEVICE_STATUS => vec![("status", 0, 4, Same)],
        id::GET_VQUEUE => vec![
            ("index", 0, 4, Same),
            // There is a queue where there was one.
            (
                "largest size",
                4,
                4,
                Own(|theirs| match number(&theirs[4..8]) {
                    0 => 0,
                    _ => QUEUE_SIZE.into(),
                }),
            ),
        ],
        id::EVENT_USED => vec![("queue", 0, 4, Same)],
        id::EVENT_CONFIG => vec![
            ("status", 0, 4, Same),
            // QEMU does not say what has changed.
            ("offset", 4, 3, Own(|_| 6)),
            ("size", 7, 1, Own(|_| 2)),
            ("value", 8, 8, Own(|_| 3)),
        ],
        other => panic!("no such response was recorded: {other:#x}"),
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
}

fn compare(name: &str, ours: &Bytes, theirs: &Bytes) {
    let line = decode(ours).expect("own message");
    assert_eq!(ours[0], theirs[0], "{name}: type of {line}");
    assert_eq!(ours[1], theirs[1], "{name}: id of {line}");
    assert_eq!(ours[2..4], theirs[2..4], "{name}: device number of {line}");
    let (ours, theirs) = (&ours[4..], &theirs[4..]);
    let mut seen = [false; 36];
    for (field, at, bytes, rule) in fields(line.message.id()) {
        let expected = match rule {
            Rule::Same => number(&theirs[at..at + bytes]),
            Rule::Own(value) => value(theirs),
        };
        let said = number(&ours[at..at + bytes]);
        assert_eq!(said, expected, "{name}: {field} of {line}");
        seen[at..at + bytes].fill(true);
    }
    for (at, seen) in seen.iter().enumerate() {
        assert!(
            *seen || (ours[at], theirs[at]) == (0, 0),
            "{name}: byte {at} of {line}"
        );
    }
}

#[test]
fn our_device_answers_qemus_recorded_driver_field_by_field() {
    for recording in recordings() {
        let mut device = Device::net(OFFERED, QUEUE_SIZE, &CONFIG);
        let mut responses = recording.responses();
        let (mut compared, mut kicks, mut resets) = (0, 0, 0);
        for (number, line) in &recording.driver {
            let name = format!("{} line {number}", recording.name);
            let said = device.takes(line);
            let message = decode(line).expect("decoded before").message;
            let wants_answer = matches!(
                message,
                Message::GetDeviceInfo
                    | Message::GetFeatures { .. }
                    | Message::SetFeatures { .. }
                    | Message::GetConfig { .. }
                    | Message::GetDeviceStatus
                    | Message::GetVqueue(_)
            );
            if wants_answer {
                let (_, theirs) = responses.next().expect("a response to each request");
                assert_eq!(said.len(), 1, "{name}: {message}");
                compare(&name, &said[0], &theirs);
                compared += 1;
            } else {
                assert!(said.is_empty(), "{name}: {message} was answered");
            }
            match message {
                Message::SetVqueue(queue) => {
                    assert_eq!(device.machine.queue(queue.index), Some(queue), "{name}");
                }
                Message::SetDeviceStatus(status) => {
                    assert_eq!(device.machine.status(), status, "{name}");
                    resets += usize::from(status == DeviceStatus::RESET);
                }
                Message::EventAvail { .. } => kicks += 1,
                _ => {}
            }
        }
        assert!(responses.next().is_none(), "{}", recording.name);
        assert!(
            compared >= 31 && kicks == device.kicks.len(),
            "{}",
            recording.name
        );
        assert_eq!(resets, if recording.name == "net-pci" { 8 } else { 3 });
        assert!(device.machine.features().bit(feature::VERSION_1));
        let counters = device.machine.counters();
        assert_eq!(
            (
                counters.ignored,
                counters.bad_queue_setups,
                counters.refused_status
            ),
            (0, 0, 0)
        );

        // What the device said by itself.
        let mut events = 0;
        for (number, theirs) in recording.events() {
            let name = format!("{} device line {number}", recording.name);
            match decode(&theirs).expect("decoded before").message {
                Message::EventUsed { queue } => device.machine.notify_used(queue),
                _ => {
                    device.machine.update_config(6, &[3, 0]);
                }
            }
            let said = device.works();
            assert_eq!(said.len(), 1, "{name}");
            compare(&name, &said[0], &theirs);
            events += 1;
        }
        assert!(events >= 17, "{}", recording.name);
        assert!(device.machine.queue(QueueIndex(3)).is_none());
    }
}
