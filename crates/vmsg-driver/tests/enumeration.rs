// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finding the devices of a bus, whatever its other side makes of the question.

mod common;

use common::client;
use virtio_msg::{DevNum, DeviceBitmap, DeviceInfo, Frame, Message, QueueIndex, Token};
use vmsg_driver::{DEFAULT_TIMEOUT, Error};

const RNG: DeviceInfo = DeviceInfo {
    device_id: 4,
    vendor_id: 0x1af4,
    feature_bits: 64,
    max_queues: 1,
    ..DeviceInfo::ABSENT
};

const DEVICE: DevNum = DevNum(3);

fn bitmap(numbers: &[u16], offset: u16, count: u16) -> Vec<u8> {
    let mut bits = vec![0; usize::from(count / 8)];
    for at in numbers
        .iter()
        .filter_map(|n| n.checked_sub(offset))
        .filter(|at| *at < count)
    {
        bits[usize::from(at / 8)] |= 1 << (at % 8);
    }
    bits
}

fn listed(client: &mut common::ScriptedClient) -> Vec<u16> {
    let mut devices = Vec::new();
    client
        .for_each_device(|device| devices.push(device.0))
        .unwrap();
    devices
}

#[test]
fn devices_are_listed_over_several_messages() {
    const THERE: [u16; 5] = [0, 31, 32, 300, 65535];
    let (mut client, _) = client(48, |world, request| {
        if let Message::GetDevices { offset, count } = request.message {
            // Not more than a message holds.
            let count = count.min(272);
            let next = offset.checked_add(count).unwrap_or(0);
            let bitmap = bitmap(&THERE, offset, count);
            let part = DeviceBitmap {
                offset,
                count,
                next,
                bitmap: &bitmap,
            };
            world.reply(&request.response(Message::Devices(part)));
        }
    });
    assert_eq!(listed(&mut client), THERE);
}

#[test]
fn the_first_question_is_one_that_amp_buses_understand() {
    let (mut client, _) = client(64, |world, request| {
        assert_eq!(
            request.message,
            Message::GetDevices {
                offset: 0,
                count: 32
            }
        );
        let part = DeviceBitmap {
            offset: 0,
            count: 32,
            next: 0,
            bitmap: &[1, 0, 0, 0x80],
        };
        world.reply(&request.response(Message::Devices(part)));
    });
    assert_eq!(listed(&mut client), [0, 31]);
}

#[test]
fn qemus_list_with_token_0_and_without_an_end_is_understood() {
    let (mut client, world) = client(48, |world, request| {
        if let Message::GetDevices { offset, count } = request.message {
            let bits = bitmap(&[31], offset, count);
            let count = if offset >= 32 { 0 } else { count };
            let part = DeviceBitmap {
                offset,
                count,
                next: offset.saturating_add(count.max(8)),
                bitmap: &bits[..usize::from(count / 8)],
            };
            world.reply(&Frame::bus(Token(0), Message::Devices(part)));
        }
    });
    assert_eq!(listed(&mut client), [31]);
    assert_eq!(world.borrow().sent.len(), 2);
}

#[test]
fn a_list_that_goes_in_circles_or_on_for_ever_ends_and_names_nobody_twice() {
    for step in [0, 3, 8] {
        let (mut client, world) = client(48, move |world, request| {
            if let Message::GetDevices { offset, .. } = request.message {
                let part = DeviceBitmap {
                    offset,
                    count: 32,
                    next: offset.wrapping_add(step),
                    bitmap: &[0xff; 4],
                };
                world.reply(&request.response(Message::Devices(part)));
            }
        });
        let devices = listed(&mut client);
        assert!(devices.is_sorted_by(|a, b| a < b));
        assert!(devices.len() >= 32);
        assert!(world.borrow().sent.len() <= 2048);
    }
}

#[test]
fn a_bus_without_a_list_is_scanned_all_at_once() {
    let (mut client, world) = client(48, |world, request| match request.message {
        // QEMU drops what it does not know.
        Message::GetDevices { .. } => {}
        Message::GetDeviceInfo if request.dev_num.0 % 2 == 1 => {
            let info = if matches!(request.dev_num.0, 3 | 31) {
                RNG
            } else {
                DeviceInfo::ABSENT
            };
            world.reply(&request.response(Message::DeviceInfo(info)));
        }
        _ => {}
    });
    assert_eq!(listed(&mut client), [3, 31]);
    // One time-out for the list, one for all numbers that stay silent.
    assert_eq!(
        u128::from(world.borrow().now),
        2 * DEFAULT_TIMEOUT.as_nanos()
    );
    assert!(matches!(
        client.queue(DEVICE, QueueIndex(0)),
        Err(Error::Timeout { .. })
    ));
}

#[test]
fn answers_that_come_while_a_scan_waits_for_room_count() {
    let (mut client, world) = client(48, |world, request| {
        if request.message == Message::GetDeviceInfo {
            let info = if request.dev_num == DEVICE {
                RNG
            } else {
                DeviceInfo::ABSENT
            };
            world.reply(&request.response(Message::DeviceInfo(info)));
        }
    });
    world.borrow_mut().room = Some(1);
    let mut devices = Vec::new();
    client.scan(|device| devices.push(device)).unwrap();
    assert_eq!(devices, [DEVICE]);
    assert_eq!(client.counters().answers, 32);
}

#[test]
fn a_bus_on_which_nobody_answers_is_told() {
    let (mut client, _) = client(48, |_, _| {});
    assert!(matches!(
        client.for_each_device(|_| panic!("nobody is there")),
        Err(Error::Timeout { .. })
    ));
}
