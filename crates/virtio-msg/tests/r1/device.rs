// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device adapter: drivers that do not wait, devices that are not there, and what QEMU must never be sent.

use crate::stack::{Device, bytes};
use virtio_msg::device::{ActionResult, answer_absent};
use virtio_msg::r1::{self, Busy, DeviceAdapter, Ignored, MESSAGE_SIZE, Message as R1, Outcome};
use virtio_msg::{
    ConfigData, DevNum, DeviceState, DeviceStatus, Frame, Generation, Instant, Message, QueueIndex,
    QueueSize, Token, VqueueConfig, decode,
};

fn queue(index: u32) -> VqueueConfig {
    VqueueConfig {
        index: QueueIndex(index),
        size: QueueSize(64),
        descriptor: 0x4000_0000,
        driver: 0x4000_1000,
        device: 0x4000_2000,
    }
}

fn status(bits: u32) -> R1 {
    R1::SetDeviceStatus(DeviceStatus::from_bits_retain(bits))
}

fn device() -> Device {
    Device::net(0x3_0000_0020, 64, &[1, 2, 3, 4, 5, 6, 1, 0])
}

fn says(said: &[[u8; 40]]) -> Vec<String> {
    said.iter()
        .map(|b| r1::decode(b).expect("an r1 message").message.to_string())
        .collect()
}

#[test]
fn a_burst_without_waiting_is_worked_off_in_order() {
    let mut device = device();
    let burst = [
        status(0),
        status(1),
        status(3),
        R1::SetFeatures {
            index: 0,
            features: 0x3_0000_0020,
        },
        status(11),
        R1::SetVqueue(queue(0)),
        R1::SetVqueue(queue(1)),
        status(15),
        R1::EventAvail {
            queue: QueueIndex(0),
            next_offset: 0,
            next_wrap: 0,
        },
        R1::GetDeviceStatus,
        R1::EventAvail {
            queue: QueueIndex(1),
            next_offset: 0,
            next_wrap: 0,
        },
    ];
    for message in burst {
        assert_eq!(
            device.adapter.handle_wire(&bytes(message)),
            Ok(Outcome::Taken)
        );
    }
    let said = device.works();
    assert_eq!(
        says(&said),
        [
            "SET_FEATURES response: index 0, 0x0000000300000020",
            "GET_DEVICE_STATUS response: 0x0f"
        ]
    );
    assert_eq!(device.kicks, [QueueIndex(0), QueueIndex(1)]);
    assert_eq!(device.machine.queue(QueueIndex(1)), Some(queue(1)));
    assert_eq!(device.machine.counters().ignored, 0);
}

#[test]
fn a_driver_that_sends_more_than_fits_is_told_and_loses_nothing() {
    let mut device = device();
    for _ in 0..64 {
        assert_eq!(
            device.adapter.handle_wire(&bytes(R1::GetDeviceStatus)),
            Ok(Outcome::Taken)
        );
    }
    assert_eq!(
        device.adapter.handle_wire(&bytes(R1::GetDeviceInfo)),
        Err(Busy)
    );
    assert_eq!(device.works().len(), 64);
    let said = device.takes(&bytes(R1::GetDeviceInfo));
    assert_eq!(
        says(&said),
        ["DEVICE_INFO response: version 1, device id 1, vendor 0x4d534756"]
    );
}

#[test]
fn configuration_is_read_and_written_in_small_pieces() {
    let mut device = device();
    for (message, answer) in [
        (
            R1::GetConfig { offset: 0, size: 1 },
            "GET_CONFIG response: offset 0, size 1: 0x1",
        ),
        (
            R1::GetConfig { offset: 2, size: 2 },
            "GET_CONFIG response: offset 2, size 2: 0x403",
        ),
        (
            R1::GetConfig { offset: 0, size: 4 },
            "GET_CONFIG response: offset 0, size 4: 0x4030201",
        ),
        (
            R1::GetConfig { offset: 0, size: 8 },
            "GET_CONFIG response: offset 0, size 8: 0x1060504030201",
        ),
        (
            R1::GetConfig { offset: 6, size: 4 },
            "GET_CONFIG response: offset 6, size 4: 0x1",
        ),
        (
            R1::GetConfig {
                offset: 0xff_ffff,
                size: 1,
            },
            "GET_CONFIG response: offset 16777215, size 1: 0x0",
        ),
        (R1::GetConfigGen, "GET_CONFIG_GEN response: generation 0"),
        (
            R1::SetConfig {
                offset: 1,
                size: 2,
                data: 0xbbaa,
            },
            "SET_CONFIG response: offset 1, size 2: 0xbbaa",
        ),
        (R1::GetConfigGen, "GET_CONFIG_GEN response: generation 1"),
        // Out of range: rejected, and answered all the same, since the driver waits.
        (
            R1::SetConfig {
                offset: 8,
                size: 1,
                data: 1,
            },
            "SET_CONFIG response: offset 8, size 1: 0x1",
        ),
    ] {
        assert_eq!(says(&device.takes(&bytes(message))), [answer]);
    }
    assert_eq!(device.machine.config(), [1, 0xaa, 0xbb, 4, 5, 6, 1, 0]);
    assert_eq!(device.adapter.counters().rejected_writes, 1);
    for size in [0, 9, 255] {
        for message in [
            R1::GetConfig { offset: 0, size },
            R1::SetConfig {
                offset: 0,
                size,
                data: 0,
            },
        ] {
            assert_eq!(
                device.adapter.handle_wire(&bytes(message)),
                Ok(Outcome::Ignored(Ignored::OutOfRange))
            );
        }
    }
}

#[test]
fn a_write_that_the_configuration_changes_under_is_tried_again() {
    let mut adapter: DeviceAdapter = DeviceAdapter::new();
    let mut out = [0; MESSAGE_SIZE];
    let write = R1::SetConfig {
        offset: 0,
        size: 1,
        data: 9,
    };
    adapter.handle_wire(&bytes(write)).expect("room");
    let mut answer = |adapter: &mut DeviceAdapter, request: &str, message: Message<'_>| {
        let size = adapter.poll_message(&mut out).expect("a request");
        let frame = decode(&out[..size], MESSAGE_SIZE).expect("a request");
        assert_eq!(frame.message.to_string(), request);
        let mut said = [0; MESSAGE_SIZE];
        let size = frame.response(message).encode(&mut said).expect("fits");
        assert_eq!(adapter.handle_message(&said[..size]), Ok(Outcome::Taken));
    };
    let info = virtio_msg::DeviceInfo {
        device_id: 1,
        ..Default::default()
    };
    answer(&mut adapter, "GET_DEVICE_INFO", Message::DeviceInfo(info));
    let generation = |n, len, data| ConfigData {
        generation: Generation(n),
        offset: 0,
        len,
        data,
    };
    answer(
        &mut adapter,
        "GET_CONFIG: offset 0, length 0",
        Message::Config(generation(3, 0, &[])),
    );
    for n in 3..5 {
        let request = format!("SET_CONFIG: generation {n}, offset 0, length 1: 09");
        answer(
            &mut adapter,
            &request,
            Message::ConfigSet(generation(n + 1, 0, &[])),
        );
        assert_eq!(adapter.poll_wire(&mut [0; 40]), None);
    }
    let request = "SET_CONFIG: generation 5, offset 0, length 1: 09";
    answer(
        &mut adapter,
        request,
        Message::ConfigSet(generation(6, 1, &[9])),
    );
    let mut wire = [0; 40];
    assert_eq!(adapter.poll_wire(&mut wire), Some(40));
    assert_eq!(
        wire,
        bytes(R1::ConfigSet {
            offset: 0,
            size: 1,
            data: 9
        })
    );
    assert_eq!(adapter.counters().rejected_writes, 0);
}

#[test]
fn a_number_without_device_answers_what_it_is_and_holds_up_no_other() {
    let mut device = device();
    let absent = |message| r1::Frame::new(DevNum(4), message).to_bytes();
    for message in [
        absent(R1::GetDeviceStatus),
        absent(status(0)),
        absent(R1::GetDeviceInfo),
    ] {
        device.adapter.handle_wire(&message).expect("room");
        let mut out = [0; MESSAGE_SIZE];
        let size = device.adapter.poll_message(&mut out).expect("a question");
        let frame = decode(&out[..size], MESSAGE_SIZE).expect("a message");
        assert_eq!(frame.to_string().split(' ').nth(3), Some("GET_DEVICE_INFO"));
        let mut said = [0; MESSAGE_SIZE];
        let size = answer_absent(&frame, &mut said).expect("answered");
        assert_eq!(
            device.adapter.handle_message(&said[..size]),
            Ok(Outcome::Taken)
        );
        assert_eq!(device.adapter.poll_message(&mut out), None);
    }
    assert_eq!(device.adapter.counters().absent, 2);
    let said = device.takes(&bytes(R1::GetDeviceStatus));
    assert_eq!(
        said[0],
        absent(R1::DeviceInfo {
            version: 1,
            device_id: 0,
            vendor_id: 0
        })
    );
    assert_eq!(says(&said[1..]), ["GET_DEVICE_STATUS response: 0x00"]);
}

#[test]
fn a_device_that_goes_does_not_leave_the_driver_stuck() {
    let mut device = device();
    device.takes(&bytes(R1::GetDeviceStatus));
    let mut out = [0; MESSAGE_SIZE];
    device
        .adapter
        .handle_wire(&bytes(R1::GetDeviceStatus))
        .expect("room");
    assert!(device.adapter.poll_message(&mut out).is_some());
    let gone = Message::EventDevice {
        device: DevNum(0),
        state: DeviceState::Removed,
    };
    let size = Frame::bus(Token(0), gone).encode(&mut out).expect("fits");
    assert_eq!(
        device.adapter.handle_message(&out[..size]),
        Ok(Outcome::Ignored(Ignored::NoCounterpart))
    );
    // It is asked anew whether it is there.
    device
        .adapter
        .handle_wire(&bytes(R1::GetDeviceStatus))
        .expect("room");
    let size = device.adapter.poll_message(&mut out).expect("a question");
    let frame = decode(&out[..size], MESSAGE_SIZE).expect("a message");
    assert_eq!(frame.message, Message::GetDeviceInfo);
}

#[test]
fn only_what_was_asked_is_answered() {
    let mut device = device();
    let unexpected = Ok(Outcome::Ignored(Ignored::Unexpected));
    let mut out = [0; MESSAGE_SIZE];
    let mut response = |adapter: &mut DeviceAdapter, token, message: Message<'_>| {
        let size = Frame::new(DevNum(0), Token(token), message)
            .encode(&mut out)
            .expect("fits");
        adapter.handle_message(&out[..size])
    };
    let answer = Message::DeviceStatus(DeviceStatus::RESET);
    assert_eq!(response(&mut device.adapter, 1, answer), unexpected);
    device.takes(&bytes(R1::GetDeviceStatus));
    device
        .adapter
        .handle_wire(&bytes(R1::GetDeviceStatus))
        .expect("room");
    let mut ask = [0; MESSAGE_SIZE];
    let size = device.adapter.poll_message(&mut ask).expect("a request");
    let token = decode(&ask[..size], MESSAGE_SIZE)
        .expect("a request")
        .token
        .0;
    assert_eq!(response(&mut device.adapter, token + 1, answer), unexpected);
    assert_eq!(
        response(&mut device.adapter, token, Message::VqueueSet),
        unexpected
    );
    assert_eq!(
        response(&mut device.adapter, token, answer),
        Ok(Outcome::Taken)
    );
    assert_eq!(response(&mut device.adapter, token, answer), unexpected);
    let mut wire = [0; 40];
    assert_eq!(device.adapter.poll_wire(&mut wire), Some(40));
    assert_eq!(device.adapter.poll_wire(&mut wire), None);
    for (message, why) in [
        (R1::DeviceStatus(DeviceStatus::RESET), Ignored::WrongWay),
        (
            R1::EventUsed {
                queue: QueueIndex(0),
            },
            Ignored::WrongWay,
        ),
        (R1::IommuTranslate { va: 0, prot: 0 }, Ignored::WrongWay),
        (
            R1::IommuTranslated {
                va: 0,
                pa: 0,
                prot: 0,
            },
            Ignored::Unexpected,
        ),
    ] {
        assert_eq!(
            device.adapter.handle_wire(&bytes(message)),
            Ok(Outcome::Ignored(why))
        );
    }
    assert!(!device.adapter.iommu_enabled());
    assert_eq!(
        says(&device.takes(&bytes(R1::IommuEnable(true)))),
        [] as [&str; 0]
    );
    assert!(device.adapter.iommu_enabled());
}

#[test]
fn events_leave_room_for_a_response_and_say_nothing_twice() {
    let mut adapter: DeviceAdapter = DeviceAdapter::new();
    let mut out = [0; MESSAGE_SIZE];
    let mut used = |adapter: &mut DeviceAdapter, q| {
        let event = Message::EventUsed {
            queue: QueueIndex(q),
        };
        let size = Frame::new(DevNum(0), Token(0), event)
            .encode(&mut out)
            .expect("fits");
        adapter.handle_message(&out[..size])
    };
    for q in 0..63 {
        for _ in 0..3 {
            assert_eq!(used(&mut adapter, q), Ok(Outcome::Taken));
        }
    }
    assert_eq!(used(&mut adapter, 63), Err(Busy));
    adapter
        .handle_wire(&bytes(R1::GetDeviceInfo))
        .expect("room");
    let mut ask = [0; MESSAGE_SIZE];
    let size = adapter.poll_message(&mut ask).expect("a question");
    let frame = decode(&ask[..size], MESSAGE_SIZE).expect("a question");
    let mut said = [0; MESSAGE_SIZE];
    let size = answer_absent(&frame, &mut said).expect("answered");
    assert_eq!(adapter.handle_message(&said[..size]), Ok(Outcome::Taken));
    let mut wire = [0; 40];
    let mut count = 0;
    while adapter.poll_wire(&mut wire).is_some() {
        count += 1;
    }
    assert_eq!((count, wire[0]), (64, 1));
}

#[test]
fn a_reset_is_complete_before_anything_after_it_is_answered() {
    let mut device = device();
    device.takes(&bytes(R1::GetDeviceInfo));
    for message in [status(0), R1::GetDeviceStatus] {
        device.adapter.handle_wire(&bytes(message)).expect("room");
    }
    let mut out = [0; MESSAGE_SIZE];
    let size = device.adapter.poll_message(&mut out).expect("a request");
    let frame = decode(&out[..size], MESSAGE_SIZE).expect("a request");
    device
        .machine
        .handle_message(Instant(0), &frame)
        .expect("idle");
    assert!(device.machine.poll_action().is_some());
    assert_eq!(device.adapter.poll_message(&mut out), None);
    assert_eq!(device.adapter.poll_wire(&mut [0; 40]), None);
    device.machine.complete(ActionResult::Done);
    assert_eq!(says(&device.works()), ["GET_DEVICE_STATUS response: 0x00"]);
}
