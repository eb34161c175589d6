// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::{Bringup, BringupError, BringupStep};
use crate::device::{Action, ActionResult, DeviceMachine, Identity, Options, QueueSlot};
use crate::driver::{Received, Requester};
use crate::{
    DevNum, DeviceStatus, Duration, FeatureSet, Frame, Instant, Message, QueueIndex, QueueSize,
    VqueueConfig, decode, feature,
};
use std::string::{String, ToString};
use std::vec::Vec;

type Device = DeviceMachine<[QueueSlot; 2], [u8; 12]>;

fn device(offered: &[u32]) -> Device {
    let identity = Identity {
        device_id: 1,
        vendor_id: 0x4d47_5356,
        ..Identity::default()
    };
    let queues = [QueueSlot::new(64); 2];
    DeviceMachine::new(
        DevNum(3),
        identity,
        FeatureSet::from_bits(offered),
        queues,
        [0; 12],
        Options::new(48),
    )
}

/// One request to the device and its response back, over 48-byte messages; `judge` decides about actions.
fn exchange(
    requester: &mut Requester<1>,
    device: &mut Device,
    message: &Message<'_>,
    judge: &mut dyn FnMut(&Action) -> ActionResult,
    then: impl FnOnce(&Message<'_>),
) {
    let (mut to, mut from) = ([0; 48], [0; 48]);
    let (id, size) = requester
        .start(
            Instant(0),
            DevNum(3),
            message,
            Duration::from_secs(1),
            &mut to,
        )
        .expect("room");
    let frame = decode(&to[..size], 48).expect("own message");
    device.handle_message(Instant(0), &frame).expect("idle");
    while let Some(action) = device.poll_action() {
        device.complete(judge(&action));
    }
    let size = device.poll_transmit(&mut from).expect("answered");
    let reply: Frame<'_> = decode(&from[..size], 48).expect("own message");
    match requester.handle_frame(&reply) {
        Received::Response(answered, message) if answered == id => then(&message),
        other => panic!("{other:?}"),
    }
}

fn run(
    device: &mut Device,
    judge: &mut dyn FnMut(&Action) -> ActionResult,
) -> (Result<FeatureSet, BringupError>, Vec<String>) {
    let mut requester = Requester::new();
    let mut bringup = Bringup::new();
    let mut lines = Vec::new();
    let mut next = 0;
    loop {
        // The message borrows the sequence, so it takes the way over the bus as bytes.
        let mut bytes = [0; 48];
        let size = match bringup.step() {
            BringupStep::Send(message) => {
                lines.push(message.to_string());
                Frame::new(DevNum(3), crate::Token(0), message)
                    .encode(&mut bytes)
                    .expect("fits")
            }
            BringupStep::ChooseFeatures(offered) => {
                bringup.choose_features(
                    offered.intersection(&FeatureSet::from_bits(&[5, feature::VERSION_1])),
                );
                continue;
            }
            BringupStep::Queues(None) if next < 2 => {
                bringup.get_queue(QueueIndex(next));
                continue;
            }
            BringupStep::Queues(None) => {
                bringup.finish();
                continue;
            }
            BringupStep::Queues(Some(info)) => {
                assert_eq!(info.max_size, QueueSize(64));
                bringup.set_queue(VqueueConfig {
                    index: info.index,
                    size: QueueSize(16),
                    descriptor: 0x1000,
                    driver: 0x2000,
                    device: 0x3000,
                });
                next += 1;
                continue;
            }
            BringupStep::Ready => return (Ok(bringup.features()), lines),
            BringupStep::Failed(error) => return (Err(error), lines),
            BringupStep::Wait => panic!("nothing was sent"),
        };
        let message = decode(&bytes[..size], 48).expect("own message").message;
        exchange(&mut requester, device, &message, judge, |reply| {
            bringup.handle_response(reply)
        });
    }
}

#[test]
fn a_device_comes_up_in_the_order_of_linux() {
    let mut device = device(&[5, 15, feature::VERSION_1, feature::ACCESS_PLATFORM]);
    let (result, lines) = run(&mut device, &mut |_| ActionResult::Done);
    let features = FeatureSet::from_bits(&[5, feature::VERSION_1, feature::ACCESS_PLATFORM]);
    assert_eq!(result, Ok(features));
    assert_eq!(device.features(), features);
    assert_eq!(device.status().bits(), 0xf);
    assert_eq!(device.queue(QueueIndex(1)).map(|q| q.driver), Some(0x2000));
    assert_eq!(
        lines,
        [
            "GET_DEVICE_INFO",
            "SET_DEVICE_STATUS: 0x00",
            "SET_DEVICE_STATUS: 0x01",
            "SET_DEVICE_STATUS: 0x03",
            "GET_DEVICE_FEATURES: blocks 0+2",
            "SET_DRIVER_FEATURES: blocks 0+2: 0x00000020 0x00000003",
            "SET_DEVICE_STATUS: 0x0b",
            "GET_VQUEUE: queue 0",
            "SET_VQUEUE: queue 0, size 16, descriptor 0x1000, driver 0x2000, device 0x3000",
            "GET_VQUEUE: queue 0",
            "GET_VQUEUE: queue 1",
            "SET_VQUEUE: queue 1, size 16, descriptor 0x1000, driver 0x2000, device 0x3000",
            "GET_VQUEUE: queue 1",
            "SET_DEVICE_STATUS: 0x0f",
        ]
    );
}

#[test]
fn each_refusal_has_its_name() {
    let refuse = |which: fn(&Action) -> bool| {
        let mut judge = move |a: &Action| {
            if which(a) {
                ActionResult::Refused
            } else {
                ActionResult::Done
            }
        };
        run(&mut device(&[feature::VERSION_1]), &mut judge).0
    };
    let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    assert_eq!(
        refuse(|a| matches!(a, Action::FeaturesOk(_))),
        Err(BringupError::FeaturesRefused(driver))
    );
    assert_eq!(
        refuse(|a| matches!(a, Action::SetQueue(QueueIndex(1), _))),
        Err(BringupError::QueueRefused(QueueIndex(1)))
    );
    let stuck = driver | DeviceStatus::FEATURES_OK | DeviceStatus::NEEDS_RESET;
    assert_eq!(
        refuse(|a| matches!(a, Action::DriverOk)),
        Err(BringupError::NotReady(stuck))
    );
}

#[test]
fn absence_silence_and_nonsense_end_it() {
    let first = |answer: Option<&Message<'_>>| {
        let mut bringup = Bringup::new();
        assert_eq!(bringup.step(), BringupStep::Send(Message::GetDeviceInfo));
        assert_eq!(bringup.step(), BringupStep::Wait);
        match answer {
            Some(message) => bringup.handle_response(message),
            None => bringup.handle_timeout(),
        }
        match bringup.step() {
            BringupStep::Failed(error) => Some(error),
            _ => None,
        }
    };
    assert_eq!(
        first(Some(&Message::DeviceInfo(crate::DeviceInfo::ABSENT))),
        Some(BringupError::Absent)
    );
    assert_eq!(
        first(Some(&Message::VqueueSet)),
        Some(BringupError::BadAnswer)
    );
    assert_eq!(first(None), Some(BringupError::TimedOut));
}
