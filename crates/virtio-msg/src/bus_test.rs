// SPDX-License-Identifier: Apache-2.0 OR MIT
extern crate std;
use super::answer;
use crate::{DevNum, DeviceBitmap, Frame, Message, Token, decode};
use std::vec::Vec;

fn ask(offset: u16, count: u16, max: usize, devices: &[u16]) -> Option<(u16, u16, u16, Vec<u16>)> {
    let mut out = [0xaa; 65536];
    let frame = Frame::bus(Token(9), Message::GetDevices { offset, count });
    let highest = devices.iter().max().map(|&n| DevNum(n));
    let size = answer(
        &frame,
        highest,
        |dev| devices.contains(&dev.0),
        max,
        &mut out,
    )?;
    assert!(size <= max);
    let reply = decode(&out[..size], max).expect("own message");
    assert_eq!(reply.token, Token(9));
    let Message::Devices(
        map @ DeviceBitmap {
            offset,
            count,
            next,
            ..
        },
    ) = reply.message
    else {
        panic!("{reply}")
    };
    Some((offset, count, next, map.iter().map(|d| d.0).collect()))
}

#[test]
fn the_window_that_was_asked_for_comes_back() {
    assert_eq!(
        ask(0, 32, 48, &[0, 5, 31]),
        Some((0, 32, 0, std::vec![0, 5, 31]))
    );
    assert_eq!(ask(0, 32, 64, &[]), Some((0, 32, 0, std::vec![])));
}

#[test]
fn more_devices_are_announced() {
    assert_eq!(ask(0, 32, 48, &[1, 40]), Some((0, 32, 32, std::vec![1])));
    assert_eq!(ask(32, 32, 48, &[1, 40]), Some((32, 32, 0, std::vec![40])));
}

#[test]
fn a_window_that_does_not_fit_the_message_is_cut() {
    assert_eq!(
        ask(0, 65528, 48, &[0, 271, 272]),
        Some((0, 272, 272, std::vec![0, 271]))
    );
    assert_eq!(
        ask(65528, 64, 48, &[65535]),
        Some((65528, 8, 0, std::vec![65535]))
    );
    assert_eq!(
        ask(0, 65528, 65535, &[65535]),
        Some((0, 65528, 65528, std::vec![]))
    );
}

#[test]
fn windows_off_the_grid_are_not_answered() {
    assert_eq!(ask(1, 32, 48, &[1]), None);
    assert_eq!(ask(0, 31, 48, &[1]), None);
}

#[test]
fn ping_comes_back_with_its_number() {
    let mut out = [0; 48];
    let size = answer(
        &Frame::bus(Token(3), Message::Ping { data: 7 }),
        None,
        |_| false,
        48,
        &mut out,
    );
    let frame = decode(&out[..size.expect("answered")], 48).expect("own message");
    assert_eq!(frame, Frame::bus(Token(3), Message::Pong { data: 7 }));
    // Some Linux trees answer the response again: that must not go on for ever.
    assert_eq!(answer(&frame, None, |_| false, 48, &mut [0; 48]), None);
}
