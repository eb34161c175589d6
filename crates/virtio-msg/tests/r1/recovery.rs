// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver adapter when something is missing: other devices, counterparts, answers, room.

use crate::stack::bytes;
use std::collections::VecDeque;
use virtio_msg::r1::{self, Busy, DriverAdapter, Ignored, MESSAGE_SIZE, Message as R1, Outcome};
use virtio_msg::{DevNum, DeviceStatus, Frame, Message, QueueIndex, QueueSize, Token, decode};

/// Bytes of a revision-1 message.
fn message(dev: u16, token: u16, message: Message<'_>) -> Vec<u8> {
    let mut out = [0; 300];
    let size = Frame::new(DevNum(dev), Token(token), message)
        .encode(&mut out)
        .expect("fits");
    out[..size].to_vec()
}

#[test]
fn other_numbers_are_answered_as_absent_all_at_once() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    for dev in 1..32 {
        let ask = message(dev, dev, Message::GetDeviceInfo);
        assert_eq!(adapter.handle_request(&ask), Ok(Outcome::Taken));
    }
    let mut out = [0; MESSAGE_SIZE];
    assert_eq!(adapter.poll_wire(&mut [0; 40]), None);
    for dev in 1..32 {
        let size = adapter.poll_message(&mut out).expect("an answer");
        assert_eq!(
            decode(&out[..size], MESSAGE_SIZE)
                .expect("a message")
                .to_string(),
            format!("dev {dev} #{dev} GET_DEVICE_INFO response: no device")
        );
    }
    assert_eq!(adapter.poll_message(&mut out), None);
    let ask = message(1, 1, Message::GetDeviceStatus);
    assert_eq!(
        adapter.handle_request(&ask),
        Ok(Outcome::Ignored(Ignored::OtherDevice))
    );
}

#[test]
fn what_has_no_counterpart_is_refused_by_name() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    for (bytes, why) in [
        (
            message(
                0,
                1,
                Message::GetDevices {
                    offset: 0,
                    count: 32,
                },
            ),
            Ignored::NoCounterpart,
        ),
        (
            message(0, 1, Message::Pong { data: 0 }),
            Ignored::Unexpected,
        ),
        (
            message(
                0,
                0,
                Message::EventUsed {
                    queue: QueueIndex(0),
                },
            ),
            Ignored::WrongWay,
        ),
        (
            message(
                0,
                0,
                Message::EventAvail {
                    queue: QueueIndex(64),
                    next: 0,
                },
            ),
            Ignored::OutOfRange,
        ),
        (
            message(0, 1, Message::GetConfig { offset: 0, len: 29 }),
            Ignored::ResponseTooLong,
        ),
        (
            message(0, 1, Message::GetDeviceFeatures { first: 0, count: 9 }),
            Ignored::ResponseTooLong,
        ),
    ] {
        assert_eq!(adapter.handle_request(&bytes), Ok(Outcome::Ignored(why)));
    }
    assert_eq!(adapter.counters().messages_ignored, 6);
    assert!(matches!(
        adapter.handle_request(&[0; 4]),
        Ok(Outcome::Ignored(Ignored::Malformed(_)))
    ));
    for (message, why) in [
        (
            R1::EventAvail {
                queue: QueueIndex(0),
                next_offset: 0,
                next_wrap: 0,
            },
            Ignored::WrongWay,
        ),
        (R1::GetDeviceStatus, Ignored::WrongWay),
        (R1::DeviceStatus(DeviceStatus::RESET), Ignored::Unexpected),
    ] {
        assert_eq!(
            adapter.handle_wire(&bytes(message)),
            Ok(Outcome::Ignored(why))
        );
    }
    assert!(matches!(
        adapter.handle_wire(&[0; 39]),
        Ok(Outcome::Ignored(Ignored::Malformed(_)))
    ));
}

/// A device that says nothing until it is told to.
#[derive(Default)]
struct Paused {
    taken: VecDeque<R1>,
}

impl Paused {
    fn fetch(&mut self, adapter: &mut DriverAdapter) {
        let mut wire = [0; 40];
        while adapter.poll_wire(&mut wire).is_some() {
            self.taken
                .push_back(r1::decode(&wire).expect("an r1 message").message);
        }
    }

    fn answer(&mut self, adapter: &mut DriverAdapter, status: u32) -> Outcome {
        assert_eq!(self.taken.pop_front(), Some(R1::GetDeviceStatus));
        let answer = R1::DeviceStatus(DeviceStatus::from_bits_retain(status));
        let outcome = adapter.handle_wire(&bytes(answer)).expect("room");
        self.fetch(adapter);
        outcome
    }
}

fn fetched(adapter: &mut DriverAdapter) -> Vec<String> {
    let mut all = Vec::new();
    let mut out = [0; MESSAGE_SIZE];
    while let Some(size) = adapter.poll_message(&mut out) {
        all.push(
            decode(&out[..size], MESSAGE_SIZE)
                .expect("a message")
                .to_string(),
        );
    }
    all
}

#[test]
fn a_request_that_is_given_up_does_not_hold_up_those_after_it() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    let mut device = Paused::default();
    for token in 1..=5 {
        let ask = message(0, token, Message::GetDeviceStatus);
        assert_eq!(adapter.handle_request(&ask), Ok(Outcome::Taken));
        device.fetch(&mut adapter);
    }
    // 4 and 5 wait, 1 and 2 were given up, 3 is in flight.
    assert_eq!(adapter.counters().abandoned, 2);
    assert_eq!(device.taken.len(), 3);
    // The device goes on, and says everything it owes: each answer goes to the request it belongs to.
    let unexpected = Outcome::Ignored(Ignored::Unexpected);
    assert_eq!(device.answer(&mut adapter, 1), unexpected);
    assert_eq!(device.answer(&mut adapter, 2), unexpected);
    assert_eq!(device.answer(&mut adapter, 3), Outcome::Taken);
    assert_eq!(
        fetched(&mut adapter),
        ["dev 0 #3 GET_DEVICE_STATUS response: 0x03"]
    );
    assert_eq!(device.answer(&mut adapter, 4), Outcome::Taken);
    assert_eq!(device.answer(&mut adapter, 5), Outcome::Taken);
    assert_eq!(
        fetched(&mut adapter),
        [
            "dev 0 #4 GET_DEVICE_STATUS response: 0x04",
            "dev 0 #5 GET_DEVICE_STATUS response: 0x05"
        ]
    );
    assert!(!adapter.is_busy());
}

#[test]
fn a_device_that_has_lost_a_request_is_understood_again() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    let mut device = Paused::default();
    let mut token = 0;
    let mut ask = |adapter: &mut DriverAdapter, device: &mut Paused| {
        token += 1;
        let ask = message(0, token, Message::GetDeviceStatus);
        assert_eq!(adapter.handle_request(&ask), Ok(Outcome::Taken));
        device.fetch(adapter);
    };
    for _ in 0..4 {
        ask(&mut adapter, &mut device);
    }
    // The first is lost for good; 2 is in flight. One answer is taken for that of the first, and never missed.
    assert_eq!(device.taken.len(), 2);
    device.taken.pop_front();
    device.answer(&mut adapter, 2);
    assert!(fetched(&mut adapter).is_empty());
    ask(&mut adapter, &mut device);
    while !device.taken.is_empty() {
        assert_eq!(device.answer(&mut adapter, 9), Outcome::Taken);
    }
    assert_eq!(fetched(&mut adapter).len(), 3);
    ask(&mut adapter, &mut device);
    device.answer(&mut adapter, 9);
    assert_eq!(
        fetched(&mut adapter),
        ["dev 0 #6 GET_DEVICE_STATUS response: 0x09"]
    );
}

#[test]
fn an_answer_about_something_else_is_not_taken_for_the_right_one() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    let mut wire = [0; 40];
    let ask = message(0, 1, Message::GetVqueue(QueueIndex(1)));
    assert_eq!(adapter.handle_request(&ask), Ok(Outcome::Taken));
    assert_eq!(adapter.poll_wire(&mut wire), Some(40));
    let answer = |index| {
        bytes(R1::Vqueue {
            index: QueueIndex(index),
            max_size: QueueSize(64),
        })
    };
    let unexpected = Ok(Outcome::Ignored(Ignored::Unexpected));
    assert_eq!(adapter.handle_wire(&answer(0)), unexpected);
    assert_eq!(
        adapter.handle_wire(&r1::Frame::new(DevNum(5), R1::GetDeviceInfo).to_bytes()),
        Ok(Outcome::Ignored(Ignored::OtherDevice))
    );
    assert_eq!(adapter.handle_wire(&answer(1)), Ok(Outcome::Taken));
    assert_eq!(adapter.handle_wire(&answer(1)), unexpected);
    assert_eq!(fetched(&mut adapter).len(), 1);
}

#[test]
fn nothing_is_lost_while_the_way_to_the_device_is_full() {
    let mut adapter: DriverAdapter = DriverAdapter::default();
    let ask = |token| message(0, token, Message::GetDeviceStatus);
    for token in 1..=3 {
        assert_eq!(adapter.handle_request(&ask(token)), Ok(Outcome::Taken));
    }
    assert_eq!(adapter.handle_request(&ask(4)), Err(Busy));
    let mut device = Paused::default();
    device.fetch(&mut adapter);
    for _ in 0..3 {
        device.answer(&mut adapter, 1);
    }
    assert_eq!(fetched(&mut adapter).len(), 3);
    assert_eq!(adapter.counters().abandoned, 0);
}
