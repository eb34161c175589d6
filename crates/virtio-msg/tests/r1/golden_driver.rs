// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver of ours comes to DRIVER_OK with a device that says what the recorded one of QEMU said.

use crate::recorded::{Bytes, Recording, recordings};
use crate::stack::{Driver, bytes};
use std::collections::HashMap;
use virtio_msg::r1::{Message as R1, Outcome, decode};
use virtio_msg::{
    DeviceStatus, FeatureBlocks, Generation, Message, QueueIndex, U32, VqueueConfig, feature,
};

/// Answers each request with the line that the recorded device gave to it.
fn recorded_device(recording: &Recording) -> impl FnMut(&Bytes) -> Vec<Bytes> + use<> {
    let mut answers = HashMap::new();
    let mut statuses = HashMap::new();
    let mut responses = recording.responses();
    let mut status = DeviceStatus::RESET;
    for (_, line) in &recording.driver {
        match decode(line).expect("decoded before").message {
            R1::SetDeviceStatus(written) => status = written,
            R1::SetVqueue(_) | R1::EventAvail { .. } => {}
            R1::GetDeviceStatus => {
                statuses.insert(status, responses.next().expect("a response").1);
            }
            _ => {
                answers.insert(*line, responses.next().expect("a response").1);
            }
        }
    }
    let mut status = DeviceStatus::RESET;
    move |line| match decode(line).expect("an r1 message").message {
        R1::SetDeviceStatus(written) => {
            status = written;
            vec![]
        }
        R1::SetVqueue(_) | R1::EventAvail { .. } => vec![],
        R1::GetDeviceStatus => vec![statuses[&status]],
        // QEMU's proxy never asks for it.
        R1::GetConfigGen => vec![bytes(R1::ConfigGen(Generation(0)))],
        // QEMU's driver took RING_RESET as well, which our adapter does not show. The device repeats what it was sent.
        R1::SetFeatures { index, features } if !answers.contains_key(line) => {
            vec![bytes(R1::FeaturesSet { index, features })]
        }
        _ => vec![answers[line]],
    }
}

fn accepted(recording: &Recording) -> u64 {
    recording
        .driver
        .iter()
        .filter_map(
            |(_, line)| match decode(line).expect("decoded before").message {
                R1::SetFeatures { features, .. } => Some(features),
                _ => None,
            },
        )
        .next_back()
        .expect("features")
}

fn queues(recording: &Recording) -> Vec<VqueueConfig> {
    let set = |line: &Bytes| match decode(line).expect("decoded before").message {
        R1::SetVqueue(queue) => Some(queue),
        _ => None,
    };
    recording
        .driver
        .iter()
        .filter_map(|(_, l)| set(l))
        .collect()
}

#[test]
fn our_driver_comes_to_driver_ok_with_qemus_recorded_device() {
    for recording in recordings() {
        let mut driver = Driver::new(recorded_device(&recording));
        let queues = queues(&recording);
        assert_eq!(queues.len(), 3);
        let bringup = driver.bring_up(accepted(&recording), &queues);
        let info = bringup.info();
        assert_eq!((info.device_id, info.vendor_id), (1, 0x554d_4551));
        assert_eq!(
            (info.feature_bits, info.config_size, info.max_queues),
            (64, 24, 3)
        );
        let expected = accepted(&recording) & !(1 << feature::RING_RESET);
        assert_eq!(bringup.features().low_u64(), expected);
        // The lines of QEMU's driver that have no answer, in their order, one of the resets each.
        let theirs: Vec<R1> = recording
            .driver
            .iter()
            .map(|(_, l)| decode(l).expect("decoded before").message)
            .filter(|m| matches!(m, R1::SetDeviceStatus(_)))
            .skip_while(|m| *m == R1::SetDeviceStatus(DeviceStatus::RESET))
            .collect();
        let ours: Vec<R1> = driver
            .wire
            .iter()
            .copied()
            .filter(|m| matches!(m, R1::SetDeviceStatus(_)))
            .skip(1)
            .collect();
        assert_eq!(ours, theirs, "{}", recording.name);
        for queue in queues {
            assert!(driver.wire.contains(&R1::SetVqueue(queue)));
        }

        // Kicks go out as recorded, and what the device says by itself arrives.
        let sent = driver.wire.len();
        let kicks: Vec<R1> = recording
            .driver
            .iter()
            .map(|(_, l)| decode(l).expect("decoded before").message)
            .filter(|m| matches!(m, R1::EventAvail { .. }))
            .collect();
        for kick in &kicks {
            let R1::EventAvail { queue, .. } = *kick else {
                unreachable!()
            };
            driver.event(Message::EventAvail { queue, next: 0 });
        }
        assert_eq!(driver.wire[sent..], kicks);
        for (number, line) in recording.events() {
            assert_eq!(driver.adapter.handle_wire(&line), Ok(Outcome::Taken));
            driver.settle();
            let events = driver.messages();
            assert_eq!(events.len(), 1, "{} device line {number}", recording.name);
            let event = virtio_msg::decode(&events[0], 48).expect("an event");
            let expected = match decode(&line).expect("decoded before").message {
                R1::EventUsed { queue } => format!("dev 0 EVENT_USED: queue {queue}"),
                _ => "dev 0 EVENT_CONFIG: status 0x0f, generation 0, offset 0, length 0".into(),
            };
            assert_eq!(event.to_string(), expected);
        }
    }
}

#[test]
fn eight_resets_features_in_halves_and_configuration_byte_by_byte() {
    for recording in recordings() {
        let mut driver = Driver::new(recorded_device(&recording));
        for _ in 0..8 {
            assert_eq!(
                driver.line(&Message::SetDeviceStatus(DeviceStatus::RESET)),
                "SET_DEVICE_STATUS response: 0x00"
            );
        }
        assert_eq!(driver.wire.len(), 16);
        for bits in [1, 3] {
            let status = DeviceStatus::from_bits_retain(bits);
            driver.line(&Message::SetDeviceStatus(status));
        }
        let features = accepted(&recording) & !(1 << feature::RING_RESET);
        let low = u32::try_from(features & 0xffff_ffff).expect("32 bits");
        let high = u32::try_from(features >> 32).expect("32 bits");
        driver.wire.clear();
        for (first, word) in [(0, low), (1, high)] {
            let words = [U32::new(word)];
            let half = FeatureBlocks {
                first,
                count: 1,
                words: &words,
            };
            assert_eq!(
                driver.line(&Message::SetDriverFeatures(half)),
                "SET_DRIVER_FEATURES response"
            );
        }
        assert_eq!(
            driver.wire,
            [
                R1::SetFeatures {
                    index: 0,
                    features: low.into()
                },
                R1::SetFeatures { index: 0, features },
            ]
        );
        let status = DeviceStatus::from_bits_retain(11);
        assert_eq!(
            driver.line(&Message::SetDeviceStatus(status)),
            "SET_DEVICE_STATUS response: 0x0b"
        );
        let mac: Vec<String> = (0..6)
            .map(|offset| driver.line(&Message::GetConfig { offset, len: 1 }))
            .map(|line| line.rsplit(' ').next().expect("data").to_owned())
            .collect();
        assert_eq!(mac.concat(), "525400123456");
        assert_eq!(
            driver.line(&Message::GetConfig { offset: 6, len: 2 }),
            "GET_CONFIG response: generation 0, offset 6, length 2: 0100"
        );
        assert_eq!(
            driver.line(&Message::GetVqueue(QueueIndex(3))),
            "GET_VQUEUE response: queue 3, no such queue"
        );
    }
}
