// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::{Enumeration, EnumerationStep};
use crate::{DevNum, DeviceBitmap, DeviceInfo, Frame, Message, Token, bus, decode};
use std::vec::Vec;

/// Runs an enumeration against answers made by `answer`; `None` is a time-out. Gives the devices and the number of requests.
fn run(
    max: usize,
    mut answer: impl FnMut(&Frame<'_>, &mut [u8]) -> Option<usize>,
) -> (Vec<u16>, usize) {
    let mut e = Enumeration::new(max);
    let (mut found, mut requests) = (Vec::new(), 0);
    loop {
        match e.step() {
            EnumerationStep::Send(dev, message) => {
                requests += 1;
                assert_eq!(e.step(), EnumerationStep::Wait);
                let mut out = [0; 65536];
                match answer(&Frame::new(dev, Token(1), message), &mut out) {
                    Some(size) => {
                        let reply = decode(&out[..size], max).expect("fits the bus");
                        e.handle_response(&reply.message, |d| found.push(d.0));
                    }
                    None => e.handle_timeout(),
                }
            }
            EnumerationStep::Wait => panic!("nothing was sent"),
            EnumerationStep::Done => return (found, requests),
        }
    }
}

#[test]
fn every_device_is_found_over_any_message_size() {
    let devices = [0, 5, 31, 32, 700, 4095, 65535];
    for max in [48, 50, 64, 264, 65535] {
        let (found, _) = run(max, |frame, out| {
            bus::answer(
                frame,
                Some(DevNum(65535)),
                |d| devices.contains(&d.0),
                max,
                out,
            )
        });
        assert_eq!(found, devices, "message size {max}");
    }
}

#[test]
fn qemu_never_says_that_it_was_the_last_window() {
    // QEMU answers any window, and its next offset is always beyond it; at the end the answer is empty.
    let (found, requests) = run(48, |frame, out| {
        let Message::GetDevices { offset, .. } = frame.message else {
            panic!("{frame}")
        };
        let (count, bitmap): (u16, &[u8]) = if offset < 32 {
            (32, &[1, 0, 0, 0x80])
        } else {
            (0, &[])
        };
        let map = DeviceBitmap {
            offset,
            count,
            next: offset + count,
            bitmap,
        };
        frame.response(Message::Devices(map)).encode(out).ok()
    });
    assert_eq!((found, requests), (std::vec![0, 31], 2));
}

#[test]
fn a_hostile_next_offset_ends_the_search() {
    for next in [0, 1, 8, 31, 33, 65535] {
        let (found, requests) = run(48, |frame, out| {
            let map = DeviceBitmap {
                offset: 0,
                count: 32,
                next,
                bitmap: &[1, 0, 0, 0],
            };
            frame.response(Message::Devices(map)).encode(out).ok()
        });
        assert_eq!((found, requests), (std::vec![0], 1), "next {next}");
    }
    // An answer for a window that was not asked for.
    let (_, requests) = run(48, |frame, out| {
        let map = DeviceBitmap {
            offset: 0,
            count: 32,
            next: 32,
            bitmap: &[1, 0, 0, 0],
        };
        frame.response(Message::Devices(map)).encode(out).ok()
    });
    assert_eq!(requests, 2);
}

#[test]
fn a_bus_without_get_devices_is_scanned_to_number_31() {
    let (found, requests) = run(48, |frame, out| match frame.message {
        Message::GetDeviceInfo if frame.dev_num == DevNum(31) => {
            let info = DeviceInfo {
                device_id: 4,
                ..DeviceInfo::ABSENT
            };
            frame.response(Message::DeviceInfo(info)).encode(out).ok()
        }
        Message::GetDeviceInfo if frame.dev_num.0 % 2 == 0 => {
            crate::device::answer_absent(frame, out)
        }
        _ => None,
    });
    assert_eq!((found, requests), (std::vec![31], 33));
}
