// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client against peers that are late, silent, lying or odd.

mod common;

use std::time::Duration;

use common::{bytes, client, event};
use virtio_msg::{
    ConfigEvent, DevNum, DeviceInfo, DeviceState, DeviceStatus, FeatureBlocks, FeatureSet, Frame,
    Generation, Message, QueueIndex, QueueSize, Token, U32, VqueueInfo,
};
use vmsg_driver::{Client, Error, Event, Fault};

const RNG: DeviceInfo = DeviceInfo {
    device_id: 4,
    vendor_id: 0x1af4,
    feature_bits: 64,
    config_size: 0,
    max_queues: 1,
    admin_first: 0,
    admin_count: 0,
};

const DEVICE: DevNum = DevNum(3);

fn used(queue: u32) -> Vec<u8> {
    event(
        3,
        Message::EventUsed {
            queue: QueueIndex(queue),
        },
    )
}

#[test]
fn an_answer_is_found_among_events_and_the_events_are_kept_in_order() {
    let (mut client, _) = client(48, |world, request| {
        world.deliver(Duration::ZERO, used(1));
        world.deliver(
            Duration::ZERO,
            event(
                3,
                Message::EventConfig(ConfigEvent {
                    status: DeviceStatus::DRIVER_OK,
                    generation: Generation(7),
                    offset: 4,
                    len: 2,
                    data: &[1, 2],
                }),
            ),
        );
        world.deliver(Duration::from_millis(5), used(0));
        world.reply(&request.response(Message::DeviceInfo(RNG)));
        world.deliver(
            Duration::ZERO,
            bytes(&Frame::bus(
                Token(0),
                Message::EventDevice {
                    device: DevNum(9),
                    state: DeviceState::Ready,
                },
            )),
        );
    });
    assert_eq!(client.device_info(DEVICE).unwrap(), RNG);
    let mut events = Vec::new();
    while let Some(event) = client.next_event().unwrap() {
        events.push(event);
    }
    assert_eq!(
        events,
        [
            Event::Used {
                device: DEVICE,
                queue: QueueIndex(1)
            },
            Event::Config {
                device: DEVICE,
                status: DeviceStatus::DRIVER_OK,
                generation: Generation(7),
                offset: 4,
                len: 2
            },
            Event::Used {
                device: DEVICE,
                queue: QueueIndex(0)
            },
            Event::Device {
                device: DevNum(9),
                state: DeviceState::Ready
            },
        ]
    );
    assert_eq!(client.counters().events, 4);
}

#[test]
fn a_silent_peer_costs_the_timeout_and_no_more() {
    let (mut client, world) = client(48, |_, _| {});
    client.set_timeout(Duration::from_millis(250));
    let error = client.status(DEVICE).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Timeout {
                request: "GET_DEVICE_STATUS"
            }
        ),
        "{error}"
    );
    assert_eq!(error.fault(), Fault::Gone);
    assert_eq!(world.borrow().now, 250_000_000);
    assert_eq!(client.counters().timeouts, 1);
}

#[test]
fn a_late_answer_is_not_taken_for_that_of_the_next_request() {
    let mut calls = 0;
    let (mut client, _) = client(48, move |world, request| {
        calls += 1;
        let (delay, status) = match calls {
            1 => (Duration::from_secs(4), DeviceStatus::FAILED),
            _ => (Duration::ZERO, DeviceStatus::DRIVER),
        };
        world.deliver(
            delay,
            bytes(&request.response(Message::DeviceStatus(status))),
        );
    });
    assert!(matches!(client.status(DEVICE), Err(Error::Timeout { .. })));
    assert_eq!(client.status(DEVICE).unwrap(), DeviceStatus::DRIVER);
    assert_eq!(client.counters().dropped, 1);
}

#[test]
fn answers_with_a_wrong_token_id_device_or_type_are_dropped() {
    let (mut client, _) = client(48, |world, request| {
        let right = bytes(&request.response(Message::DeviceStatus(DeviceStatus::DRIVER)));
        let lie = |at: usize, value: u8| {
            let mut lie = bytes(&request.response(Message::DeviceStatus(DeviceStatus::FAILED)));
            lie[at] = value;
            lie
        };
        for wrong in [
            lie(4, right[4].wrapping_add(1)),
            lie(4, 0),
            lie(2, 9),
            lie(1, 0x08),
            lie(0, 3),
        ] {
            world.deliver(Duration::ZERO, wrong);
        }
        world.deliver(Duration::ZERO, right.clone());
        // Twice is once too often.
        world.deliver(Duration::ZERO, right);
    });
    assert_eq!(client.status(DEVICE).unwrap(), DeviceStatus::DRIVER);
    client.poll().unwrap();
    let counters = client.counters();
    // Bus message 7 is not known at all; the others are answers to nothing.
    assert_eq!(
        (counters.dropped, counters.malformed, counters.answers),
        (5, 1, 1)
    );
}

#[test]
fn malformed_messages_are_counted_and_dropped() {
    let (mut client, _) = client(48, |world, request| {
        let right = bytes(&request.response(Message::DeviceStatus(DeviceStatus::DRIVER)));
        let sized = |size: u16| {
            let mut message = right.clone();
            message[6..8].copy_from_slice(&size.to_le_bytes());
            message
        };
        for bad in [
            Vec::new(),
            vec![0xff; 48],
            sized(0),
            sized(7),
            sized(11),
            sized(13),
            sized(49),
            sized(u16::MAX),
        ] {
            world.deliver(Duration::ZERO, bad);
        }
        // A driver answers nothing but PING.
        world.reply(&Frame::new(DEVICE, Token(5), Message::GetDeviceStatus));
        world.deliver(Duration::ZERO, right);
    });
    assert_eq!(client.status(DEVICE).unwrap(), DeviceStatus::DRIVER);
    assert_eq!(
        (client.counters().malformed, client.counters().dropped),
        (8, 1)
    );
}

#[test]
fn a_flood_of_events_does_not_outlast_the_timeout() {
    let (mut client, world) = client(48, |world, _| {
        // For longer than the time-out.
        for i in 0..4000u32 {
            let message = event(
                3,
                Message::EventUsed {
                    queue: QueueIndex(i % 100),
                },
            );
            world.deliver(Duration::from_micros(100 * u64::from(i)), message);
        }
    });
    client.set_timeout(Duration::from_millis(100));
    assert!(matches!(client.status(DEVICE), Err(Error::Timeout { .. })));
    assert_eq!(world.borrow().now, 100_000_000);
    assert!(client.counters().events_lost > 0);
    let mut last = None;
    for _ in 0..vmsg_driver::MAX_EVENTS {
        // Without receiving more.
        world.borrow_mut().incoming.clear();
        last = client.next_event().unwrap();
    }
    assert_eq!(last, Some(Event::Lost));
}

#[test]
fn a_full_bus_is_waited_for_and_the_clock_runs() {
    let (mut client, world) = client(48, |world, request| {
        world.reply(&request.response(Message::DeviceStatus(DeviceStatus::DRIVER)));
    });
    world.borrow_mut().room = Some(0);
    assert_eq!(client.status(DEVICE).unwrap(), DeviceStatus::DRIVER);
    assert_eq!(world.borrow().now, 1_000_000);
    client.set_timeout(Duration::ZERO);
    assert!(matches!(
        client.notify_available(DEVICE, QueueIndex(0), 0),
        Err(Error::Timeout { .. })
    ));
}

#[test]
fn a_closed_bus_is_told_after_what_had_arrived() {
    let (mut client, world) = client(48, |world, _| {
        world.deliver(Duration::ZERO, used(2));
        world.closed = true;
    });
    let error = client.status(DEVICE).unwrap_err();
    assert_eq!(error.fault(), Fault::Gone);
    assert_eq!(
        client.next_event().unwrap(),
        Some(Event::Used {
            device: DEVICE,
            queue: QueueIndex(2)
        })
    );
    assert!(client.next_event().is_err());
    assert_eq!(world.borrow().now, 0);
}

#[test]
fn buffers_that_are_too_small_are_refused() {
    let (scripted, _) = client(48, |_, _| {});
    let refused = Client::new(scripted.into_channel(), NoClock, [0u8; 95]);
    assert!(matches!(
        refused,
        Err(Error::NoRoom {
            need: 96,
            have: 95,
            ..
        })
    ));
}

struct NoClock;

impl<C> vmsg_driver::Wait<C> for NoClock {
    fn now(&mut self) -> virtio_msg::Instant {
        virtio_msg::Instant(0)
    }
    fn wait(&mut self, _: &mut C, _: vmsg_driver::Interest, _: virtio_msg::Instant) {}
}

#[test]
fn pings_go_both_ways() {
    let (mut client, world) = client(48, |world, request| {
        if let Message::Ping { data } = request.message {
            world.reply(&Frame::bus(Token(0x1234), Message::Ping { data: 99 }));
            world.deliver(
                Duration::from_micros(7),
                bytes(&request.response(Message::Pong { data })),
            );
        }
    });
    assert_eq!(client.ping(0xdead_beef).unwrap(), Duration::from_micros(7));
    let answer = bytes(&Frame::bus(Token(0x1234), Message::Pong { data: 99 }));
    assert_eq!(world.borrow().sent.last(), Some(&answer));
}

#[test]
fn a_ping_that_brings_another_number_is_no_answer() {
    let (mut client, _) = client(48, |world, request| {
        world.reply(&request.response(Message::Pong { data: 1 }));
    });
    let error = client.ping(2).unwrap_err();
    assert_eq!(error.fault(), Fault::Peer);
}

#[test]
fn an_absent_device_is_told() {
    let (mut client, _) = client(48, |world, request| {
        world.reply(&request.response(Message::DeviceInfo(DeviceInfo::ABSENT)))
    });
    assert!(matches!(
        client.device_info(DEVICE),
        Err(Error::NoDevice(DEVICE))
    ));
}

#[test]
fn features_take_as_many_messages_as_the_bus_needs() {
    // 48 bytes carry 8 blocks in one message; here the device has 8, and a bus that carries 4 of them.
    let info = DeviceInfo {
        feature_bits: 256,
        ..RNG
    };
    let offered = FeatureSet::from_bits(&[0, 33, 95, 130, 200, 255]);
    let accepted = FeatureSet::from_bits(&[33, 200]);
    let (mut client, world) = client(48, move |world, request| match request.message {
        Message::GetDeviceFeatures { first, count } => {
            let words: Vec<U32> = (first..first + count)
                .map(|i| offered.block(i).into())
                .collect();
            world.reply(&request.response(Message::DeviceFeatures(FeatureBlocks {
                first,
                count,
                words: &words,
            })));
        }
        Message::SetDriverFeatures(blocks) => {
            let mut set = FeatureSet::new();
            assert!(!blocks.store(&mut set));
            assert_eq!(set, accepted);
            world.reply(&request.response(Message::DriverFeaturesSet));
        }
        _ => panic!("{request}"),
    });
    assert_eq!(client.device_features(DEVICE, &info).unwrap(), offered);
    client
        .set_driver_features(DEVICE, &info, &accepted)
        .unwrap();
    assert_eq!(world.borrow().sent.len(), 2);
}

#[test]
fn a_device_with_millions_of_feature_bits_is_asked_for_those_we_can_hold() {
    let info = DeviceInfo {
        feature_bits: u32::MAX,
        ..RNG
    };
    let (mut client, world) = client(48, |world, request| {
        if let Message::GetDeviceFeatures { first, count } = request.message {
            let words = vec![U32::new(u32::MAX); count as usize];
            world.reply(&request.response(Message::DeviceFeatures(FeatureBlocks {
                first,
                count,
                words: &words,
            })));
        }
    });
    assert_eq!(
        client
            .device_features(DEVICE, &info)
            .unwrap()
            .iter()
            .count(),
        256
    );
    assert_eq!(world.borrow().sent.len(), 1);
}

#[test]
fn other_feature_blocks_than_asked_for_are_refused() {
    let (mut client, _) = client(48, |world, request| {
        world.reply(&request.response(Message::DeviceFeatures(FeatureBlocks {
            first: 1,
            count: 2,
            words: &[U32::ZERO; 2],
        })));
    });
    assert!(matches!(
        client.device_features(DEVICE, &RNG),
        Err(Error::BadAnswer { .. })
    ));
}

#[test]
fn the_answer_about_another_queue_is_refused() {
    let (mut client, _) = client(48, |world, request| {
        let info = VqueueInfo {
            index: QueueIndex(1),
            max_size: QueueSize(8),
            ..VqueueInfo::default()
        };
        world.reply(&request.response(Message::Vqueue(info)));
    });
    assert!(matches!(
        client.queue(DEVICE, QueueIndex(0)),
        Err(Error::BadAnswer { .. })
    ));
    assert_eq!(
        client.queue(DEVICE, QueueIndex(1)).unwrap().max_size,
        QueueSize(8)
    );
}

#[test]
fn a_request_to_a_device_that_is_removed_ends_at_once() {
    let gone = |number| {
        bytes(&Frame::bus(
            Token(0),
            Message::EventDevice {
                device: DevNum(number),
                state: DeviceState::Removed,
            },
        ))
    };
    let (mut client, world) = client(48, move |world, request| match request.message {
        Message::GetDeviceInfo => world.reply(&request.response(Message::DeviceInfo(RNG))),
        // Another one first.
        _ => {
            world.deliver(Duration::ZERO, gone(9));
            world.deliver(Duration::from_millis(2), gone(3));
        }
    });
    let begun = client.now();
    let result = client.status(DEVICE);
    assert!(matches!(result, Err(Error::NoDevice(DEVICE))), "{result:?}");
    let took = client.now().saturating_since(begun);
    assert!(took < Duration::from_millis(10), "{took:?}");
    let sent = client.counters().requests;
    assert!(client.is_removed(DEVICE) && client.is_removed(DevNum(9)));
    let result = client.set_status(DEVICE, DeviceStatus::RESET);
    assert!(matches!(result, Err(Error::NoDevice(DEVICE))), "{result:?}");
    assert_eq!(client.counters().requests, sent, "nobody is asked in vain");
    // Whether it is there again can be asked.
    client.device_info(DEVICE).expect("an answer");
    let ready = Message::EventDevice {
        device: DEVICE,
        state: DeviceState::Ready,
    };
    world
        .borrow_mut()
        .deliver(Duration::ZERO, bytes(&Frame::bus(Token(0), ready)));
    let mut events = 0;
    while client.next_event().expect("a bus").is_some() {
        events += 1;
    }
    assert_eq!(events, 3, "they are told as well");
    assert!(!client.is_removed(DEVICE));
}
